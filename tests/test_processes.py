"""One training in several processes: the rows of every step, the losses, a process that dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from suasion.errors import UsageError, UserError
from suasion.pipeline import run
from suasion.recipe import load_recipe
from suasion.training import joining as joining_module
from suasion.training import processes
from suasion.training.processes import launch_command
from suasion.verify import verify_run
from suasion.workers import PARENT

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
# fp32: where the hardware has bf16, another packing rounds a first loss by more than the tests allow.
STILL = (
    "model.dtype=float32",
    "sft.lora.dropout=0",
    *(f"dpo.{arm}.lora.dropout=0" for arm in ("rlaif", "rlhf", "rlaif-rlhf", "rlaif-matched")),
)
UNEVEN = (
    "pools.sft=29",
    "sft.epochs=2",
    "sft.batch_size=8",
    "sft.micro_batch_tokens=700",
    "sft.checkpoints=3",
)  # the last step has 5 rows


def test_a_profile_needs_processes_and_processes_a_profile() -> None:
    with pytest.raises(UsageError, match="needs a count of at least 2"):
        load_recipe(TINY, ("processes.profile=ddp",))
    with pytest.raises(UsageError, match="nothing is spread"):
        load_recipe(TINY, ("processes.count=2",))
    with pytest.raises(UsageError, match="need the address"):
        load_recipe(TINY, ("processes={profile: ddp, machines: 2}",))


def test_profiles_become_accelerates_options() -> None:
    ddp = launch_command(load_recipe(TINY, ("processes={profile: ddp, count: 2}",)), Path("c.json"), "cpu")
    fsdp = launch_command(load_recipe(TINY, ("processes={profile: fsdp2, count: 4}",)), Path("c.json"), "cuda")
    assert ddp[1:3] == ["-m", "accelerate.commands.launch"]
    assert "--multi_gpu" in ddp
    assert ddp[ddp.index("--num_processes") + 1] == "2"
    assert fsdp[fsdp.index("--fsdp_version") + 1] == "2"
    assert "--multi_gpu" not in fsdp
    several = load_recipe(TINY, ("processes={profile: ddp, count: 8, machines: 2, address: 10.0.0.1}",))
    other = launch_command(several, Path("c.json"), "cuda", machine=1)
    for option, value in (
        ("num_processes", "16"),
        ("num_machines", "2"),
        ("machine_rank", "1"),
        ("main_process_ip", "10.0.0.1"),
        ("main_process_port", "29500"),
    ):
        assert other[other.index(f"--{option}") + 1] == value


def metrics(run_: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_ / stage / "metrics.jsonl").read_text().splitlines()]


def assert_alike(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"epoch"}:  # the fraction of an epoch counts rows without loss
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-3), f"{key} at step {a['step']}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """SFT in one process, on rows that do not fill the last step."""
    directory, _ = run(load_recipe(TINY, (*STILL, *UNEVEN)), tmp_path_factory.mktemp("alone"), last="sft")
    return directory.path


def copy_of(alone: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(alone, tmp_path / "tiny")
    return tmp_path


@pytest.mark.parametrize("profile", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(alone, tmp_path, profile) -> None:
    """That fsdp2 does shard is asserted by every worker, and by test_sharding.py."""
    runs = copy_of(alone, tmp_path)
    recipe = load_recipe(TINY, (*STILL, *UNEVEN, f"processes={{profile: {profile}, count: 2}}"))
    directory, _ = run(recipe, runs, last="sft", redo="sft")
    assert_alike(metrics(alone, "03-sft"), metrics(directory.path, "03-sft"))
    assert directory.manifest("sft").facts["processes"] == {"profile": profile, "count": 2}
    from safetensors.torch import load_file

    ours, theirs = (load_file(path / "03-sft" / "adapter" / "adapter_model.safetensors") for path in (directory.path, alone))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "count"), [("ddp", 4), ("fsdp2", 2), ("fsdp2", 4)])
def test_every_profile_trains_samples_and_trains_an_arm_as_one(alone, tmp_path, profile, count) -> None:
    """Every kind of stage that is spread; the other arms and the evaluation are more of the same, at minutes in four processes on two cores."""
    whole, _ = run(load_recipe(TINY, (*STILL, *UNEVEN)), copy_of(alone, tmp_path / "one"), last="dpo-rlaif")
    recipe = load_recipe(TINY, (*STILL, *UNEVEN, f"processes={{profile: {profile}, count: {count}}}"))
    directory, _ = run(recipe, copy_of(alone, tmp_path / "several"), last="dpo-rlaif", redo="sft")
    assert_alike(metrics(whole.path, "03-sft"), metrics(directory.path, "03-sft"))
    first = [metrics(path, "08-dpo-rlaif")[0] for path in (whole.path, directory.path)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], abs=1e-5)  # ln 2; what follows depends on what sft wrote
    assert verify_run(directory.path).faults == []
    assert directory.manifest("dpo-rlaif").facts["processes"] == {"profile": profile, "count": count}


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["ddp", "fsdp2"])
def test_recomputed_activations_train_as_one_in_every_profile(alone, tmp_path, profile) -> None:
    settings = ("sft.recompute_activations=true", f"processes={{profile: {profile}, count: 2}}")
    directory, _ = run(load_recipe(TINY, (*STILL, *UNEVEN, *settings)), copy_of(alone, tmp_path), last="sft", redo="sft")
    assert_alike(metrics(alone, "03-sft"), metrics(directory.path, "03-sft"))


@pytest.mark.slow
def test_an_arm_trains_in_shards_as_in_one_process(alone, tmp_path) -> None:
    """With another reference than its start, so that both are scored in shards before the policy is cut up."""
    recipe = (*STILL, *UNEVEN, "dpo.rlaif.reference=base")
    one, _ = run(load_recipe(TINY, recipe), copy_of(alone, tmp_path / "one"), last="dpo-rlaif")
    runs = copy_of(one.path, tmp_path / "several")
    several, _ = run(
        load_recipe(TINY, (*recipe, "processes={profile: fsdp2, count: 2}")), runs, last="dpo-rlaif", redo="dpo-rlaif"
    )
    assert_alike(metrics(one.path, "08-dpo-rlaif"), metrics(several.path, "08-dpo-rlaif"))
    facts = [each.manifest("dpo-rlaif").facts for each in (one, several)]
    assert facts[1]["kl_to_start"] == pytest.approx(facts[0]["kl_to_start"], rel=0.02, abs=1e-5)
    assert facts[1]["processes"] == {"profile": "fsdp2", "count": 2}


@pytest.mark.slow
def test_whole_weights_train_in_shards_as_in_one_process(tmp_path) -> None:
    recipe = (*STILL[:1], *UNEVEN, "sft.lora=null", "sft.epochs=1")
    one, _ = run(load_recipe(TINY, recipe), tmp_path / "one", last="sft")
    several, _ = run(load_recipe(TINY, (*recipe, "processes={profile: fsdp2, count: 2}")), tmp_path / "several", last="sft")
    assert_alike(metrics(one.path, "03-sft"), metrics(several.path, "03-sft"))
    assert one.manifest("sft").outputs.keys() == several.manifest("sft").outputs.keys()


@pytest.mark.slow
def test_shards_compute_in_bf16_as_a_whole_model_does(tmp_path) -> None:
    """Autocast over fp32 weights on both sides; packing differs among processes, and in bf16 that moves a loss by thousandths."""
    recipe = (*STILL, *UNEVEN, "model.dtype=bfloat16", "model.device=cpu", "sft.learning_rate=0.1")
    one, _ = run(load_recipe(TINY, recipe), tmp_path / "one", last="sft")
    several, _ = run(load_recipe(TINY, (*recipe, "processes={profile: fsdp2, count: 2}")), tmp_path / "several", last="sft")
    losses = [[row["loss"] for row in metrics(each.path, "03-sft")] for each in (one, several)]
    assert losses[1] == pytest.approx(losses[0], abs=0.005)
    assert losses[0][0] - losses[0][-1] > 0.03  # it learned more than that
    assert several.manifest("sft").dtype == "bfloat16"


def joining(run_: Path, machine: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "suasion", "join", str(run_), "--machine", str(machine)])


def on_two_machines(profile: str) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"processes={{profile: {profile}, count: 1, machines: 2, address: 127.0.0.1, port: {port}}}"


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["ddp", "fsdp2"])
def test_two_machines_train_as_one(alone, tmp_path, profile) -> None:
    """Two launchers on this machine, each of one process, stand for two machines; what they share is the folder and the address."""
    runs = copy_of(alone, tmp_path)
    other = joining(runs / "tiny", 1)
    directory, _ = run(load_recipe(TINY, (*STILL, *UNEVEN, on_two_machines(profile))), runs, last="sft", redo="sft")
    assert other.wait(60) == 0
    assert_alike(metrics(alone, "03-sft"), metrics(directory.path, "03-sft"))
    assert directory.manifest("sft").facts["processes"] == {"profile": profile, "count": 2}


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_training_clearly_and_it_goes_on_when_it_is_back(alone, tmp_path) -> None:
    runs = copy_of(alone, tmp_path)
    recipe = load_recipe(TINY, (*STILL, *UNEVEN, "sft.epochs=6", "sft.checkpoints=5", on_two_machines("ddp")))
    context = runs / "tiny" / "03-sft" / "checkpoints" / "context.json"
    lost = joining(runs / "tiny", 1)

    def lose_it_after_a_checkpoint() -> None:
        while not list(context.parent.glob("checkpoint-*/complete")):
            time.sleep(0.01)
        found = subprocess.run(["pgrep", "-f", str(context)], capture_output=True, text=True, check=True).stdout.split()
        theirs = [int(pid) for pid in found if f"{PARENT}={lost.pid}".encode() in Path(f"/proc/{pid}/environ").read_bytes()]
        for pid in (lost.pid, *theirs):
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=lose_it_after_a_checkpoint, daemon=True).start()
    with pytest.raises(UserError, match=r"one of 2 processes on 2 machines died[\s\S]*goes on from the last checkpoint"):
        run(recipe, runs, last="sft", redo="sft")
    lost.wait()
    back = joining(runs / "tiny", 1)
    directory, _ = run(recipe, runs, last="sft")
    assert back.wait(60) == 0
    rows = metrics(directory.path, "03-sft")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_joining_needs_a_run_that_begins(tmp_path) -> None:
    with pytest.raises(UserError, match="no run on several machines began"):
        joining_module.join(tmp_path, 1, patience=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["ddp", "fsdp2"])
def test_a_process_that_is_killed_ends_all_clearly_and_the_next_run_goes_on(alone, tmp_path, profile) -> None:
    recipe = load_recipe(
        TINY, (*STILL, *UNEVEN, "sft.epochs=6", "sft.checkpoints=5", f"processes={{profile: {profile}, count: 2}}")
    )
    undisturbed, _ = run(recipe, copy_of(alone, tmp_path / "undisturbed"), last="sft", redo="sft")
    runs = copy_of(alone, tmp_path / "killed")
    folder = runs / "tiny" / "03-sft"

    def kill_one_after_a_checkpoint() -> None:
        while not list((folder / "checkpoints").glob("checkpoint-*/complete")):
            time.sleep(0.01)
        found = subprocess.run(
            ["pgrep", "-f", str(folder / "checkpoints" / "context.json")], capture_output=True, text=True, check=True
        )
        workers = [
            int(pid) for pid in found.stdout.split() if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ]
        os.kill(workers[-1], signal.SIGKILL)

    threading.Thread(target=kill_one_after_a_checkpoint, daemon=True).start()
    with pytest.raises(UserError, match=r"one of 2 processes died[\s\S]*goes on from the last checkpoint"):
        run(recipe, runs, last="sft", redo="sft")
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    directory, _ = run(recipe, runs, last="sft")
    assert_alike(metrics(undisturbed.path, "03-sft"), metrics(directory.path, "03-sft"))


def test_a_workers_own_message_is_the_message(tmp_path, monkeypatch) -> None:
    """The message of a UserError in a worker reaches the user, and not a traceback of a launcher."""
    from suasion.rundir import StageContext

    recipe = load_recipe(TINY, ("processes={profile: ddp, count: 2}",))
    stage = StageContext(recipe, "sft", tmp_path / "03-sft", {}, tmp_path)

    def command(recipe, context, device):
        text = f"import json; json.dump({{'message': 'the corpus is empty. Fill it.'}}, open({str(context.with_name('failure.json'))!r}, 'w'))"
        return [sys.executable, "-c", text]

    monkeypatch.setattr(processes, "launch_command", command)
    with pytest.raises(UserError, match=r"^the corpus is empty\. Fill it\.$"):
        processes.train_apart(stage, "suasion.training.sft", "cpu")
    monkeypatch.setattr(
        processes, "launch_command", lambda *arguments: [sys.executable, "-c", "import os; print('gone'); os._exit(9)"]
    )
    with pytest.raises(UserError, match=r"sft: one of 2 processes died \(exit code 9\)"):
        processes.train_apart(stage, "suasion.training.sft", "cpu")
