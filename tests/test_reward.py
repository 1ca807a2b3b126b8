"""The reward model: what it learns, its first loss, its files, its refusals; and that packing and resuming change nothing."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training_proof import TWO

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.models import load_base, load_tokenizer
from suasion.records import OutcomePair, Turn
from suasion.sections.training import LoraSection, ModelSection, RewardSection
from suasion.training.loop import newest_checkpoint
from suasion.training.prefix import pack
from suasion.training.reward import RewardModel, RewardNet, bradley_terry_loss, ranked_ids, train_reward

SETTINGS = RewardSection(learning_rate=5e-3, epochs=8, batch_size=4, checkpoints=0, lora=LoraSection(r=4, alpha=8, dropout=0.0))
SIGNS = ["surely", "honestly", "because", "perhaps"]
FILLER = ["the", "cat", "and", "a", "dog", "went", "over", "there", "to", "see", "if", "it", "is", "so", "or", "not", "at", "all"]


def outcome_pairs(count: int, seed: int = 0) -> list[OutcomePair]:
    """Winners hold a word that losers do not; length says nothing."""
    draw = random.Random(seed)

    def reply(sign: str) -> str:
        words = [draw.choice(FILLER) for _ in range(draw.randint(3, 9))]
        words.insert(draw.randrange(len(words)), sign)
        return " ".join(words) + "."

    return [
        OutcomePair(
            id=f"o{i}", corpus="c", conversation_id=f"c{i}", group=f"g{i}",
            turns=(Turn(role="user", text=" ".join(draw.choice(FILLER) for _ in range(8))),),
            winner=reply("because"), loser=reply("maybe"),
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> ModelSection:
    """In fp32 also where the processor has bf16: two ways to one number are compared."""
    return ModelSection(base="random:tiny", max_length=512, dtype="float32")


@pytest.fixture(scope="module")
def renderer(tiny) -> Renderer:
    return Renderer(load_tokenizer(tiny), tiny.system_prompt)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    return folder, train_reward(outcome_pairs(24), tiny, SETTINGS, folder, seed=1)


def test_it_learns_what_tells_winners_from_losers_and_tells_it_on_new_pairs(tiny, trained):
    folder, facts = trained
    assert facts["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert facts["final_accuracy"] > 0.9
    model = RewardModel.load(folder, tiny)
    new = outcome_pairs(20, seed=9)
    right = sum(winner > loser for winner, loser in (model.score(p.turns, (p.winner, p.loser)) for p in new))
    assert right >= 17


def test_a_reward_is_the_head_on_the_stop_token_of_a_plain_sequence(tiny, renderer, trained):
    """Against the textbook computation: one sequence, the adapter live, the last token's hidden state."""
    from peft import PeftModel

    folder, _ = trained
    pair = outcome_pairs(1, seed=5)[0]
    backbone = PeftModel.from_pretrained(load_base(tiny).base_model, str(folder / "adapter")).eval()
    head = load_file(folder / "head.safetensors")["weight"][0]
    expected = []
    for reply in (pair.winner, pair.loser):
        ids = renderer.render(pair.turns, reply).ids
        assert ids[-1] == renderer.stop_id
        with torch.no_grad():
            expected.append(float(backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ head))
    assert RewardModel.load(folder, tiny).score(pair.turns, (pair.winner, pair.loser)) == pytest.approx(expected, abs=1e-4)


def test_replies_do_not_see_each_other(tiny, trained):
    model = RewardModel.load(trained[0], tiny)
    turns = (Turn(role="user", text="Cats are better."),)
    together = model.score(turns, ["Why?", "Because they are.", "No."])
    assert together == pytest.approx([model.score(turns, [reply])[0] for reply in ("Why?", "Because they are.", "No.")], abs=1e-5)
    assert model.score(turns, []) == []


def test_micro_batches_change_nothing(tiny, tmp_path):
    rows = []
    for budget in (1, 4096):
        settings = SETTINGS.model_copy(update={"micro_batch_tokens": budget, "epochs": 1})
        train_reward(outcome_pairs(7), tiny, settings, tmp_path / str(budget), seed=0)
        rows.append([json.loads(line) for line in (tmp_path / str(budget) / "metrics.jsonl").read_text().splitlines()])
    assert len(rows[0]) == 2
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_stopped_training_resumes_to_the_same_bytes(tiny, tmp_path, monkeypatch):
    settings = SETTINGS.model_copy(update={"checkpoints": 3, "epochs": 3, "lora": LoraSection(r=4, dropout=0.1)})
    train_reward(outcome_pairs(12), tiny, settings, tmp_path / "whole", seed=2)
    from suasion.training import reward

    real, calls = reward.bradley_terry_loss, []

    def dies(margins):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(margins)

    monkeypatch.setattr(reward, "bradley_terry_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train_reward(outcome_pairs(12), tiny, settings, tmp_path / "cut", seed=2)
    monkeypatch.setattr(reward, "bradley_terry_loss", real)
    checkpoint = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-6"
    assert not (checkpoint / "model.safetensors").exists()  # the frozen base is not copied into every checkpoint
    train_reward(outcome_pairs(12), tiny, settings, tmp_path / "cut", seed=2)
    for file in ("adapter/adapter_model.safetensors", "head.safetensors", "reward.json", "metrics.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


PROGRAM = """
import sys
from pathlib import Path
from test_reward import SETTINGS, outcome_pairs
from suasion.sections.training import ModelSection
from suasion.training.reward import train_reward

model = ModelSection(base="random:tiny", max_length=512, dtype="float32")
train_reward(outcome_pairs(7), model, SETTINGS.model_copy(update={"epochs": 2}), Path(sys.argv[1]), seed=0)
"""


def test_two_processes_train_the_model_that_one_does(tmp_path, monkeypatch):
    """7 pairs in steps of 4 and 3: unequal shares."""
    (tmp_path / "program.py").write_text(PROGRAM)
    tests = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1] / "src"), tests]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, launcher in (("one", ()), ("two", TWO)):
        command = [sys.executable, *launcher, str(tmp_path / "program.py"), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")
    )
    assert len(one) == 4
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-4
    assert max(value.abs().max().item() for name, value in ours.items() if "lora_B" in name) > 1e-3  # something was learned


def test_on_a_machine_with_several_gpus_one_process_takes_the_first(tiny, tmp_path, monkeypatch):
    """A grader is built in one process, whatever it is that trains it; the Trainer would split its rows among all GPUs."""
    from suasion.training import reward

    real = reward.arguments

    def eight(*args, **kwargs):
        made = real(*args, **kwargs)
        made._n_gpu = 8
        return made

    monkeypatch.setattr(reward, "arguments", eight)
    settings = SETTINGS.model_copy(update={"epochs": 1})
    assert train_reward(outcome_pairs(5), tiny, settings, tmp_path / "reward", seed=0)["steps"] == 2


def test_the_loss_by_hand():
    margins = torch.tensor([0.0, 1.0, -2.0])
    assert bradley_terry_loss(margins).tolist() == pytest.approx([math.log(1 + math.exp(-m)) for m in (0.0, 1.0, -2.0)])


def test_a_fresh_head_gives_zero(tiny):
    net = RewardNet(load_base(tiny).base_model)
    assert net(pack([([1, 2], [[3], [4, 5]])])).tolist() == [0.0, 0.0]


def test_rows_that_teach_nothing_are_dropped_and_counted(renderer):
    good = outcome_pairs(1)[0]
    rows, dropped = ranked_ids(
        [
            good,
            good,
            good.model_copy(update={"winner": " "}),
            good.model_copy(update={"loser": good.winner + " "}),
            good.model_copy(update={"loser": "word " * 600}),
        ],
        renderer,
        512,
    )
    assert len(rows) == 1
    assert dropped == {"no reply": 1, "equal replies": 1, "longer than max_length": 1, "double": 1}


def test_nothing_to_learn_from_is_refused_before_any_training(tiny, tmp_path):
    pair = outcome_pairs(1)[0]
    with pytest.raises(UserError, match=r"no outcome pair .*1 equal replies"):
        train_reward([pair.model_copy(update={"loser": pair.winner})], tiny, SETTINGS, tmp_path / "x", 0)
    assert not (tmp_path / "x").exists()


def test_targets_that_name_no_module_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="c_attn"):
        train_reward(outcome_pairs(4), tiny, RewardSection(lora=LoraSection(targets=("c_attn",))), tmp_path, 0)


def test_another_base_another_template_and_changed_files_are_refused(tiny, trained, tmp_path):
    import shutil

    folder = shutil.copytree(trained[0], tmp_path / "copy")
    with pytest.raises(UserError, match="template_hash"):
        RewardModel.load(folder, tiny.model_copy(update={"system_prompt": "Be brief."}))
    other = tmp_path / "base"
    model = load_base(tiny)
    model.get_input_embeddings().weight.data[0] += 1
    model.save_pretrained(other)
    load_tokenizer(tiny).save_pretrained(other)
    with pytest.raises(UserError, match="base_hash"):
        RewardModel.load(folder, ModelSection(base=str(other), max_length=512))
    head = bytearray((folder / "head.safetensors").read_bytes())
    head[-1] ^= 1
    (folder / "head.safetensors").write_bytes(head)
    with pytest.raises(UserError, match="head_sha256"):
        RewardModel.load(folder, tiny)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        RewardModel.load(folder, tiny)


def test_where_memory_does_not_suffice_only_what_helps_is_advised(tiny, tmp_path, monkeypatch):
    """The training lies in the cache under a name without micro_batch_tokens: a smaller number loses nothing. For a single row it is no help."""

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RewardNet, "forward", full)
    with pytest.raises(UserError) as several:
        train_reward(outcome_pairs(8), tiny, SETTINGS, tmp_path / "several", seed=1)
    assert "the grader's training.micro_batch_tokens (now 512) and run again: it goes on from the last checkpoint" in str(
        several.value
    )
    assert "the grader's model.max_length" in str(several.value)
    assert "--redo" not in str(several.value)
    single = SETTINGS.model_copy(update={"micro_batch_tokens": 1, "recompute_activations": True})
    with pytest.raises(UserError) as alone:
        train_reward(outcome_pairs(8), tiny, single, tmp_path / "alone", seed=1)
    assert "in a micro-batch of 1 rows" in str(alone.value)
    assert "micro_batch_tokens" not in str(alone.value)
    assert "recompute_activations" not in str(alone.value)


def test_replies_that_cannot_be_scored_are_refused(tiny, trained):
    model = RewardModel.load(trained[0], tiny)
    turns = (Turn(role="user", text="Cats."),)
    with pytest.raises(UserError, match="without text"):
        model.score(turns, ["fine", " "])
    model.longest = 30
    with pytest.raises(UserError, match="reads 30"):
        model.score(turns, ["word " * 50])
