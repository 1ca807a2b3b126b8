"""Trainings by their invariants: first loss, reference, accumulation, resume, dropout; pitfalls 5, 6, 8, 10, 11, 13, 14."""

import json
import math
import shutil

import pytest
import torch

from suasion.errors import UserError
from suasion.models import Compute, Lineage, load_merged, load_policy, save_adapter
from suasion.records import Example, Preference, Response, Turn
from suasion.sections.training import DpoArm, LoraSection, SftSection
from suasion.training.dpo import (
    DpoTrainer,
    PairIds,
    check_stored_logprobs,
    kl_to_start,
    longer_wins,
    pair_ids,
    reference_logprobs,
    score,
    with_reference,
)
from suasion.training.loop import MARK, MetricsFile, arguments, newest_checkpoint, optimiser_steps, train
from suasion.training.sft import IGNORED, ReplyHeadTrainer, training_rows

CPU = Compute("cpu", "float32", torch.get_num_threads())
LORA = LoraSection(r=4, dropout=0.1)


def example(number: int, reply: str | None) -> Example:
    turns = (Turn(role="user", text=f"Opinion number {number}. " + "It is so. " * number),)
    return Example(id=f"e{number}", corpus="c", conversation_id=f"c{number}", author="a", turns=turns, reply=reply, outcome=1.0)


def preference_pairs(count: int = 7) -> list[PairIds]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 900, (length,), generator=generator).tolist())

    return [PairIds(f"p{i}", ids(5 + i), ids(3 + i % 4), ids(6 - i % 3), 1.0) for i in range(count)]


@pytest.fixture(scope="module")
def sft_adapter(tiny, tmp_path_factory):
    """A start model that differs from the base, so that 'the reference is the base' would be noticed."""
    folder = tmp_path_factory.mktemp("sft") / "adapter"
    policy = load_policy(Lineage(tiny), LORA, 0)
    torch.manual_seed(5)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(policy, folder, tiny)
    return folder


def run_dpo(lineage, folder, pairs, micro=1, epochs=3.0, loss="sigmoid", stop_at=None, checkpoints=0, batch=4):
    arm = DpoArm(
        name="t",
        labels="ai",
        pool="rlaif",
        learning_rate=5e-3,
        epochs=epochs,
        batch_size=batch,
        micro_batch_size=micro,
        loss=loss,
        checkpoints=checkpoints,
        lora=LORA,
    )
    folder.mkdir(parents=True, exist_ok=True)
    policy = load_policy(lineage, arm.lora, 1)
    reference = reference_logprobs(policy, pairs, CPU, folder / "reference.jsonl")
    rows = [with_reference(pair, reference[pair.id], reference[pair.id], arm) for pair in pairs]
    from transformers import TrainingArguments

    trainer = DpoTrainer(
        model=policy,
        arm=arm,
        hardware=CPU,
        train_dataset=rows,
        args=arguments(TrainingArguments, arm, folder, CPU, len(rows), 1, "dpo-t"),
    )
    if stop_at is not None:
        trainer.add_callback(_Interrupt(stop_at))
    return policy, rows, train(trainer, folder, "dpo-t", arm.batch_size, "pairs")


from transformers import TrainerCallback  # noqa: E402


class _Interrupt(TrainerCallback):
    """Stands for a kill: leaves the training in the middle of a step's bookkeeping."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", math.log(2)), ("ipo", 1 / (4 * 0.1**2)), ("robust", math.log(2))])
def test_the_first_loss_is_that_of_a_zero_margin(tiny, sft_adapter, tmp_path, loss, expected):
    _, _, metrics = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / loss, preference_pairs(), loss=loss)
    assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_another_reference_stops_the_training_at_its_first_loss(tiny, sft_adapter, tmp_path, monkeypatch):
    """The policy starts from sft, the reference log-probs are the base's: ln 2 is expected, and not found."""
    pairs = preference_pairs(4)
    wrong = reference_logprobs(load_merged(Lineage(tiny)), pairs, CPU, tmp_path / "base.jsonl")
    monkeypatch.setitem(globals(), "reference_logprobs", lambda *args: wrong)
    with pytest.raises(UserError, match="nothing was trained"):
        run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "x", pairs)


def test_a_named_reference_has_a_computed_first_loss(tiny, sft_adapter, tmp_path):
    arm = DpoArm(name="t", labels="ai", pool="rlaif", beta=0.5)
    pair = with_reference(preference_pairs(1)[0], (-10.0, -20.0), (-8.0, -21.0), arm)
    assert pair.first_loss == pytest.approx(math.log(1 + math.exp(-0.5 * 3.0)))


def test_the_reference_is_the_start_model_not_the_base(tiny, sft_adapter, tmp_path):
    pairs = preference_pairs(3)
    _, rows, _ = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "x", pairs, epochs=1)
    for lineage, equal in ((Lineage(tiny, (sft_adapter,)), True), (Lineage(tiny), False)):
        model = load_merged(lineage)
        with torch.no_grad():
            sums = torch.stack([score(model, [pair], CPU)[0][0] for pair in pairs])
        difference = (sums - torch.tensor([row.reference for row in rows])).abs().max().item()
        assert (difference < 1e-4) is equal


def test_micro_batches_change_nothing(tiny, sft_adapter, tmp_path):
    """1 x 4, 2 x 2 and 4 x 1 give one trajectory; 7 pairs leave a smaller last batch in every epoch."""
    runs = []
    for micro in (1, 2, 4):
        arm_lineage = Lineage(tiny, (sft_adapter,))
        _, _, metrics = run_dpo(arm_lineage, tmp_path / str(micro), preference_pairs(), micro=micro)
        runs.append([row["loss"] for row in metrics])
    for other in runs[1:]:
        # Dropout masks depend on how pairs are packed; the first step has none to speak of (B = 0), the trend must agree.
        assert other[0] == pytest.approx(runs[0][0], abs=1e-6)
        assert len(other) == len(runs[0])


def test_micro_batches_change_nothing_at_all_without_dropout(tiny, sft_adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LORA", LoraSection(r=4, dropout=0.0))
    runs = []
    for micro in (1, 2, 4):
        _, _, metrics = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / str(micro), preference_pairs(), micro=micro)
        runs.append([row["loss"] for row in metrics])
    for other in runs[1:]:
        assert max(abs(a - b) for a, b in zip(runs[0], other, strict=True)) < 1e-5


def test_a_stopped_training_resumes_as_if_it_had_not_stopped(tiny, sft_adapter, tmp_path):
    lineage = Lineage(tiny, (sft_adapter,))
    _, _, whole = run_dpo(lineage, tmp_path / "whole", preference_pairs(), epochs=5, checkpoints=3)
    with pytest.raises(KeyboardInterrupt):
        run_dpo(lineage, tmp_path / "cut", preference_pairs(), epochs=5, checkpoints=3, stop_at=7)
    assert newest_checkpoint(tmp_path / "cut" / "checkpoints") is not None
    _, _, resumed = run_dpo(lineage, tmp_path / "cut", preference_pairs(), epochs=5, checkpoints=3)
    assert resumed == whole
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, complete in ((3, True), (6, True), (9, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / MARK).touch()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-6"
    assert not (tmp_path / "checkpoint-9").exists()
    shutil.rmtree(tmp_path)
    assert newest_checkpoint(tmp_path) is None


def test_metrics_after_the_checkpoint_are_dropped_and_torn_lines_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":2}\n{"step":3}\n{"ste')
    MetricsFile(path, keep_until=2).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_dropout_does_not_touch_the_reference(tiny, sft_adapter, tmp_path):
    """With a non-zero adapter in train mode: a fresh adapter differs by nothing and would prove nothing."""
    policy = load_policy(Lineage(tiny, (sft_adapter,)), LoraSection(r=4, dropout=0.5), 0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    policy.train()
    first = reference_logprobs(policy, preference_pairs(3), CPU, tmp_path / "a.jsonl")
    assert policy.training
    policy.eval()
    assert first == reference_logprobs(policy, preference_pairs(3), CPU, tmp_path / "b.jsonl")
    policy.train()
    with torch.no_grad():
        noisy = score(policy, preference_pairs(1), CPU)[0]
    assert abs(noisy[0, 0].item() - first["p0"][0]) > 1e-3


def test_merging_keeps_the_likelihood(tiny, sft_adapter):
    from peft import PeftModel

    from suasion.models import load_base

    live = PeftModel.from_pretrained(load_base(tiny), str(sft_adapter)).eval()
    merged = load_merged(Lineage(tiny, (sft_adapter,)))
    with torch.no_grad():
        difference = score(live, preference_pairs(4), CPU)[0] - score(merged, preference_pairs(4), CPU)[0]
    assert difference.abs().max() < 1e-4


def test_kl_is_zero_before_training_and_positive_after(tiny, sft_adapter, tmp_path):
    policy, rows, _ = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "k", preference_pairs(4))
    assert kl_to_start(policy, rows, CPU, 0) > 1e-6
    assert kl_to_start(load_policy(Lineage(tiny, (sft_adapter,)), LORA, 0), rows, CPU, 0) == pytest.approx(0, abs=1e-7)


def test_the_adapter_start_is_drawn_from_the_seed(tiny):
    first, again, other = (load_policy(Lineage(tiny), LORA, seed).state_dict() for seed in (1, 1, 2))
    keys = [key for key in first if "lora_A" in key]
    assert all(torch.equal(first[key], again[key]) for key in keys)
    assert not any(torch.equal(first[key], other[key]) for key in keys)


def test_lineages_have_the_hash_of_their_weights(tiny, sft_adapter, tmp_path):
    copy = shutil.copytree(sft_adapter, tmp_path / "copy")
    assert Lineage(tiny, (sft_adapter,)).hash == Lineage(tiny, (copy,)).hash != Lineage(tiny).hash
    weights = copy / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert Lineage(tiny, (copy,)).hash != Lineage(tiny, (sft_adapter,)).hash


def response(tokens, logprob, lineage="L", text="x") -> Response:
    return Response(
        id=text, prompt_id="p", n=0, text=text, finish="stop", tokens=tokens, logprob=logprob, lineage=lineage, seed=0
    )


def preference(chosen, rejected) -> Preference:
    prompt = example(1, "r").prompt()
    return Preference(id="q", prompt=prompt, chosen=chosen, rejected=rejected, sources=("ai",))


def test_a_stored_logprob_that_the_reference_does_not_give_is_refused():
    pair = preference(response((5, 6), -4.0), response((7,), -2.0))
    assert check_stored_logprobs([pair], {"q": (-4.0, -2.0)}, "L", 1e-3, "arm") == 2
    second_stage = pair.model_copy(update={"on_policy": False})
    assert check_stored_logprobs([second_stage], {"q": (-9.0, -2.0)}, "another model", 1e-3, "arm") == 0
    with pytest.raises(UserError, match="sampled from model L"):
        check_stored_logprobs([pair], {"q": (-4.0, -2.0)}, "another model", 1e-3, "arm")
    with pytest.raises(UserError, match="--redo sample"):
        check_stored_logprobs([pair], {"q": (-4.1, -2.0)}, "L", 1e-3, "arm")


def test_sampled_ids_are_trained_as_sampled_and_texts_are_closed(renderer):
    odd = (700, 701, 702)
    ids = pair_ids(preference(response(odd, -1.0), response(None, None, text="An imported reply.")), renderer)
    assert ids.chosen == odd
    assert ids.rejected[-1] == renderer.stop_id
    assert renderer.decode(ids.rejected) == "An imported reply."


def test_length_baseline():
    pairs = [PairIds("a", (1,), (1, 2), (1,), 1.0), PairIds("b", (1,), (1,), (1, 2), 1.0), PairIds("c", (1,), (1,), (1,), 1.0)]
    assert longer_wins(pairs) == pytest.approx(0.5)


def test_sft_rows_train_the_reply_and_nothing_else(renderer):
    rows, dropped = training_rows(
        [example(2, "Surely not."), example(1, None), example(3, "  "), example(4, "long " * 400)], renderer, 300
    )
    assert dropped == {"no reply": 2, "longer than max_length": 1}
    trained = [label for label in rows[0]["labels"] if label != IGNORED]
    assert renderer.decode(trained) == "Surely not."
    assert trained[-1] == renderer.stop_id


def test_reply_head_loss_equals_trls(tiny, renderer, tmp_path):
    """The loss at the replies only is TRL's loss, value and gradients, on a padded batch."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows, _ = training_rows([example(1, "No."), example(3, "Perhaps it is not so, though."), example(2, "Why?")], renderer, 400)
    section = SftSection(
        learning_rate=1e-3, epochs=1, batch_size=3, micro_batch_size=3, checkpoints=0, lora=LoraSection(dropout=0.0)
    )
    results = []
    for kind in (ReplyHeadTrainer, SFTTrainer):
        policy = load_policy(Lineage(tiny), section.lora, 0)
        args = arguments(
            SFTConfig,
            section,
            tmp_path,
            CPU,
            3,
            0,
            "sft",
            max_length=None,
            packing=False,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = kind(model=policy, args=args, train_dataset=Dataset.from_list(rows), processing_class=renderer.tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        count = (batch["labels"][:, 1:] != IGNORED).sum()
        loss = trainer.compute_loss(policy, batch, num_items_in_batch=count)
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_steps_are_counted_as_the_trainer_counts_them(tiny, sft_adapter, tmp_path):
    arm = DpoArm(name="t", labels="ai", pool="rlaif", epochs=2, batch_size=3)
    _, _, metrics = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "s", preference_pairs(7), epochs=2, batch=3)
    assert metrics[-1]["step"] == len(metrics) == optimiser_steps(7, arm) == 6
