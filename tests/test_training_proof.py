"""The proofs that need processes or another library: two processes = one, kill -9 = nothing, TRL's trainer = ours."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_training import CPU, nonzero_adapter, preference_pairs, run_dpo

from suasion.errors import UserError
from suasion.models import Lineage, load_policy
from suasion.sections.training import DpoArm, LoraSection, ModelSection
from suasion.training.pairs import Logprobs, PairIds, score
from suasion.training.trl_engine import refuse_unsupported

SCRIPT = Path(__file__).with_name("small_training.py")
STILL = LoraSection(r=4, dropout=0.0)
TWO = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip


def environment() -> dict[str, str]:
    source = str(Path(__file__).parents[1] / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return nonzero_adapter(tiny, tmp_path_factory.mktemp("sft") / "adapter")


@pytest.fixture(scope="module")
def alone(adapter, tmp_path_factory):
    """The training in one process, uninterrupted."""
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, SCRIPT, folder, adapter], check=True, env=environment(), capture_output=True, timeout=550)
    return folder


def test_two_processes_are_one(alone, adapter, tmp_path):
    """accelerate launch on two CPU processes: 7 pairs in steps of 4 and 3, so that processes get unequal shares."""
    command = [sys.executable, *TWO, str(SCRIPT), str(tmp_path / "two"), str(adapter)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = metrics_of(alone), metrics_of(tmp_path / "two")
    assert len(one) == len(two) == 10
    for name in ("loss", "grad_norm", "chosen_logp", "rejected_logp", "margin", "kl"):
        differences = [abs(a[name] - b[name]) for a, b in zip(one, two, strict=True)]
        assert max(differences) < 1e-4, name
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (alone, tmp_path / "two"))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-4


def test_kill_9_and_resume_change_no_byte(alone, adapter, tmp_path):
    folder = tmp_path / "killed"
    kills = 0
    while kills < 2:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, folder, adapter, "--pause", "0.5"], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # fmt: skip
        wanted = f"checkpoint-{2 * (kills + 1)}"
        deadline = time.monotonic() + 300
        while not (folder / "checkpoints" / wanted / "complete").exists():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run([sys.executable, SCRIPT, folder, adapter], check=True, env=environment(), capture_output=True, timeout=550)
    for file in ("metrics.jsonl", "reference.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / file).read_bytes() == (alone / file).read_bytes(), file


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("sigmoid", {}),
        ("robust", {"label_smoothing": 0.2}),
        ("length-normalised", {"beta": 2.0}),
        ("length-desensitised", {"length_alpha": 0.4}),
    ],
)
def test_our_step_gives_trls_losses(tiny, adapter, tmp_path, loss, settings):
    """50 steps from one start on the same ids in the same order: at most 1e-3 apart, 1e-4 on average. Sigmoid for 50, others for 10."""
    steps = 50 if loss == "sigmoid" else 10
    runs = []
    for engine in ("suasion", "trl"):
        _, _, metrics = run_dpo(
            Lineage(tiny, (adapter,)), tmp_path / engine, preference_pairs(20), engine=engine, loss=loss,
            lora=STILL, epochs=steps / 5, batch_size=4, learning_rate=1e-3, **settings,
        )  # fmt: skip
        runs.append(metrics)
    assert len(runs[0]) == len(runs[1]) == steps
    assert runs[0][-1]["loss"] < runs[0][0]["loss"]  # something is learned, or equality would say nothing
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(*runs, strict=True)]
    assert max(differences) <= 1e-3
    assert sum(differences) / steps <= 1e-4
    for name in ("chosen_tokens", "rejected_tokens"):
        assert [row[name] for row in runs[0]] == pytest.approx([row[name] for row in runs[1]])
    if loss in ("sigmoid", "robust"):
        assert max(abs(a["kl"] - b["kl"]) for a, b in zip(*runs, strict=True)) < 0.1 * max(abs(row["kl"]) for row in runs[0])
    speeds = [json.loads(line) for line in (tmp_path / "trl" / "logs" / "speed.jsonl").read_text().splitlines()]
    assert len(speeds) == steps
    assert all(row["tokens"] > 0 and row["tokens_per_second"] > 0 and row["memory_mb"] > 100 for row in speeds)
    # With length taken out TRL logs other log-probs and margins than the loss is made of.
    for name in ("chosen_logp", "rejected_logp", "margin") if loss in ("sigmoid", "robust") else ():
        assert max(abs(a[name] - b[name]) for a, b in zip(*runs, strict=True)) < 1e-2, name


def test_trl_leaves_one_adapter(tiny, adapter, tmp_path):
    """TRL keeps its reference as a second adapter of the policy; it must not be written."""
    from suasion.models import save_adapter

    policy, _, _ = run_dpo(Lineage(tiny, (adapter,)), tmp_path / "trl", preference_pairs(4), engine="trl", epochs=1)
    save_adapter(policy, tmp_path / "adapter", tiny)
    assert sorted(path.name for path in (tmp_path / "adapter").rglob("*")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_trl_would_compute_otherwise_is_refused():
    pair = PairIds("p", (1,), (2,), (3,), 1.0, reference=Logprobs(-1.0, -1.0, -1.0, -1.0))
    arm = DpoArm(name="t", labels="ai", pool="rlaif", engine="trl", loss="ipo")
    with pytest.raises(UserError, match="IPO"):
        refuse_unsupported(arm, [pair])
    with pytest.raises(UserError, match="weights of pairs"):
        refuse_unsupported(arm.model_copy(update={"loss": "sigmoid"}), [PairIds("p", (1,), (2,), (3,), 0.5)])


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_work_offline(adapter, tmp_path, tracker):
    """Every step's values reach the tracker's own file, under the run's logs, with no network and no account."""
    pytest.importorskip(tracker)  # extras; trackio wants an older Pillow than constraints.txt
    folder = tmp_path / "run" / "08-dpo-t"
    offline = {
        **environment(),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    for name in ("WANDB_DIR", "TRACKIO_DIR"):
        offline.pop(name, None)
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, adapter, "--report-to", tracker], env=offline, capture_output=True, text=True, timeout=550, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics_of(folder)) == 10
    written = b"".join(
        path.read_bytes()
        for path in (folder.parent / "logs").rglob("*")
        if path.is_file() and path.suffix in (".wandb", ".db", ".db-wal")
    )
    assert b"step/margin" in written
    assert not (Path.cwd() / "wandb").exists()


def test_a_tracker_that_is_not_installed_is_named_before_training(tiny, adapter, tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        run_dpo(Lineage(tiny, (adapter,)), tmp_path / "x", preference_pairs(4), report_to="wandb")


@pytest.mark.slow
def test_the_bundled_models_shared_prefix_step_equals_two_sequences():
    """fp32: 5e-5 nats a token, and 1e-4 relative on every adapter gradient, against one plain forward pass a sequence."""
    policy = load_policy(Lineage(ModelSection(base="bundled:smollm2-135m-instruct")), LoraSection(r=8, dropout=0.0), 0)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 40000, (length,), generator=generator).tolist())

    pairs = [PairIds("a", ids(300), ids(120), ids(45), 1.0), PairIds("b", ids(90), ids(33), ids(60), 1.0)]
    weights = torch.tensor([[1.0, -1.0], [0.7, -0.7]])

    def plain(prompt, reply):
        logits = policy(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        return logits.gather(1, torch.tensor(reply)[:, None]).sum()

    results = []
    for ours in (True, False):
        policy.zero_grad()
        if ours:
            sums = score(policy, pairs, CPU)[0]
        else:
            sums = torch.stack([torch.stack([plain(p.prompt, side) for side in (p.chosen, p.rejected)]) for p in pairs])
        (sums * weights).sum().backward()
        results.append((sums.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}))
    lengths = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs])
    assert ((results[0][0] - results[1][0]).abs() / lengths).max() < 5e-5
    assert len(results[0][1]) == 240
    for name, gradient in results[0][1].items():
        other = results[1][1][name]
        assert (gradient - other).norm() <= 1e-4 * other.norm(), name
