"""Trainings by their invariants: first loss, reference, accumulation, resume, dropout; pitfalls 5, 6, 8, 10, 11, 13, 14."""

import json
import math
import shutil
from pathlib import Path

import pytest
import small_training
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_training import CPU, LORA, interrupt, nonzero_adapter, preference_pairs, run_dpo, stir
from transformers import TrainingArguments

from suasion.errors import UserError
from suasion.models import Compute, Lineage, load_merged, load_policy, round_for_training, save_adapter
from suasion.records import Example, Preference, Response, Turn
from suasion.sections.training import DpoArm, LoraSection, SftSection, optimiser_steps
from suasion.training.dpo import MOVED_KL, DpoTrainer, kl_to_start, print_baselines, warn, with_reference
from suasion.training.loop import MARK, MetricsFile, arguments, newest_checkpoint, train
from suasion.training.pairs import Logprobs, PairIds, baselines, pair_ids, score, target
from suasion.training.reference import cache_file, check_stored_logprobs, reference_logprobs
from suasion.training.sft import IGNORED, PackedSftTrainer, training_rows
from suasion.training.steps import EpochOrder, plan_micro_batches


def a_thousandth(tokens: int) -> float:
    """Allowed difference of a log-probability, in nats."""
    return 1e-3 * tokens


def example(number: int, reply: str | None) -> Example:
    turns = (Turn(role="user", text=f"Opinion number {number}. " + "It is so. " * number),)
    return Example(id=f"e{number}", corpus="c", conversation_id=f"c{number}", author="a", turns=turns, reply=reply, outcome=1.0)


@pytest.fixture(scope="module")
def sft_adapter(tiny, tmp_path_factory):
    """A start model that differs from the base, so that 'the reference is the base' would be noticed."""
    folder = tmp_path_factory.mktemp("sft") / "adapter"
    return nonzero_adapter(tiny, folder)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sigmoid", math.log(2)),
        ("ipo", 1 / (4 * 0.1**2)),
        ("robust", math.log(2)),
        ("length-normalised", math.log(2)),
        ("length-desensitised", math.log(2)),
    ],
)
def test_the_first_loss_is_that_of_a_zero_margin(tiny, sft_adapter, tmp_path, loss, expected):
    alpha = 0.5 if loss == "length-desensitised" else 1.0
    _, _, metrics = run_dpo(
        Lineage(tiny, (sft_adapter,)), tmp_path / loss, preference_pairs(), loss=loss, length_alpha=alpha, micro_batch_tokens=1
    )  # the reference's own layout, one pair a pass: equal to the last digits
    assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_another_reference_stops_the_training_at_its_first_loss(tiny, sft_adapter, tmp_path, monkeypatch):
    """The policy starts from sft, the reference log-probs are the base's: ln 2 is expected, and not found."""
    pairs = preference_pairs(4)
    wrong = reference_logprobs(load_merged(Lineage(tiny)), pairs, CPU, tmp_path / "base.jsonl")
    monkeypatch.setattr(small_training, "reference_logprobs", lambda *args: wrong)
    with pytest.raises(UserError, match="nothing was trained"):
        run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "x", pairs)


def test_a_named_reference_has_a_computed_first_loss(tiny, sft_adapter, tmp_path):
    arm = DpoArm(name="t", labels="ai", pool="rlaif", beta=0.5)
    pair = with_reference(preference_pairs(1)[0], Logprobs(-10.0, -20.0, -5.0, -5.0), Logprobs(-8.0, -21.0, -5.0, -6.0), arm)
    assert pair.first_loss == pytest.approx(math.log(1 + math.exp(-0.5 * 3.0)))


def test_the_reference_is_the_start_model_not_the_base(tiny, sft_adapter, tmp_path):
    pairs = preference_pairs(3)
    _, rows, _ = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "x", pairs, epochs=1)
    for lineage, equal in ((Lineage(tiny, (sft_adapter,)), True), (Lineage(tiny), False)):
        model = load_merged(lineage)
        with torch.no_grad():
            sums = torch.stack([score(model, [pair], CPU)[0][0] for pair in pairs])
        difference = (sums - torch.tensor([row.reference.sums() for row in rows])).abs().max().item()
        assert (difference < 1e-4) is equal


def test_micro_batches_change_nothing(tiny, sft_adapter, tmp_path):
    """One pair a pass, several, and all of a step in one pass give one trajectory; 7 pairs leave a smaller last step in every epoch.

    Without dropout, whose masks depend on how pairs are packed.
    """
    runs = []
    still = LoraSection(r=4, dropout=0.0)
    for budget in (1, 40, 4096):
        _, _, metrics = run_dpo(
            Lineage(tiny, (sft_adapter,)), tmp_path / str(budget), preference_pairs(), micro_batch_tokens=budget, lora=still
        )
        runs.append(metrics)
    for other in runs[1:]:
        for name in ("loss", "grad_norm", "chosen_logp", "margin", "kl"):  # not accuracy: at step 1 margins are rounding
            assert [row[name] for row in other] == pytest.approx([row[name] for row in runs[0]], rel=1e-3, abs=1e-4), name


def test_a_stopped_training_resumes_as_if_it_had_not_stopped(tiny, sft_adapter, tmp_path):
    lineage = Lineage(tiny, (sft_adapter,))
    _, _, whole = run_dpo(lineage, tmp_path / "whole", preference_pairs(), epochs=5, checkpoints=3)
    with pytest.raises(KeyboardInterrupt):
        run_dpo(lineage, tmp_path / "cut", preference_pairs(), epochs=5, checkpoints=3, at_step=interrupt(7))
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
    assert abs(noisy[0, 0].item() - first["p0"].chosen) > 1e-3


def test_frozen_layers_rounded_once_train_the_same(tiny, sft_adapter):
    """Bit by bit under bf16 autocast, dropout and gradients included; in fp32, and where every weight is trained, nothing is rounded."""
    hardware = Compute("cpu", "bfloat16", 1)
    lineage, lora = Lineage(tiny, (sft_adapter,)), LoraSection(r=4, dropout=0.2)
    sums, gradients = [], []
    for prepare in (lambda policy, _: policy, round_for_training):
        policy = prepare(load_policy(lineage, lora, 0), hardware).train()
        torch.manual_seed(3)
        scored = score(policy, preference_pairs(3), hardware)[0]
        scored.pow(2).sum().backward()
        sums.append(scored.detach())
        gradients.append({name: weight.grad for name, weight in policy.named_parameters() if weight.requires_grad})
    assert torch.equal(*sums)
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    types = {weight.dtype for name, weight in policy.named_parameters() if name.endswith("base_layer.weight")}
    assert types == {torch.bfloat16}
    for whole in (
        round_for_training(load_policy(lineage, lora, 0), CPU),
        round_for_training(load_policy(lineage, None, 0), hardware),
    ):
        assert {weight.dtype for weight in whole.parameters()} == {torch.float32}


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
    lineage = Lineage(tiny, (sft_adapter,))
    assert kl_to_start(policy, rows, CPU, 0, lineage) > 1e-6
    assert kl_to_start(load_policy(lineage, LORA, 0), rows, CPU, 0, lineage) == pytest.approx(0, abs=1e-7)


def test_kl_to_the_start_is_measured_in_fp32_where_compute_is_bf16(tiny, sft_adapter, tmp_path):
    """After a training through accelerate's autocast it is what the same weights give in fp32; an adapter that does nothing stays below MOVED_KL."""
    start, bf16 = Lineage(tiny, (sft_adapter,)), Compute("cpu", "bfloat16", 1)
    policy, rows, _ = run_dpo(start, tmp_path / "k", preference_pairs(4), hardware=bf16)
    trained = dict(policy.named_parameters())
    assert any(weight.dtype == torch.bfloat16 for weight in trained.values())
    assert "forward" in vars(policy)  # accelerate's
    copy = load_policy(start, LORA, 1)
    head = copy.get_base_model().lm_head  # rounded apart from the embeddings that it is tied to
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    copy.load_state_dict({name: weight.float() for name, weight in policy.state_dict().items()})
    assert kl_to_start(policy, rows, bf16, 0, start) == pytest.approx(kl_to_start(copy, rows, CPU, 0, start), rel=1e-4)
    assert "forward" in vars(policy)
    assert not any("forward" in vars(module) for module in policy.modules() if isinstance(module, torch.nn.Linear))

    hardly = round_for_training(load_policy(start, LORA, 0), bf16)
    stir(hardly, 0, std=1e-4)
    assert 0 < kl_to_start(hardly, rows, bf16, 0, start) < MOVED_KL / 100


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
    assert check_stored_logprobs([pair], {"q": Logprobs(-4.0, -2.0, 0, 0)}, "L", a_thousandth, "arm") == 2
    second_stage = pair.model_copy(update={"on_policy": False})
    assert check_stored_logprobs([second_stage], {"q": Logprobs(-9.0, -2.0, 0, 0)}, "another model", a_thousandth, "arm") == 0
    with pytest.raises(UserError, match="sampled from model L"):
        check_stored_logprobs([pair], {"q": Logprobs(-4.0, -2.0, 0, 0)}, "another model", a_thousandth, "arm")
    with pytest.raises(UserError, match="--redo sample"):
        check_stored_logprobs([pair], {"q": Logprobs(-4.1, -2.0, 0, 0)}, "L", a_thousandth, "arm")


def test_sampled_ids_are_trained_as_sampled_and_texts_are_closed(renderer):
    odd = (700, 701, 702)
    ids = pair_ids(preference(response(odd, -1.0), response(None, None, text="An imported reply.")), renderer)
    assert ids.chosen == odd
    assert ids.rejected[-1] == renderer.stop_id
    assert renderer.decode(ids.rejected) == "An imported reply."


def test_words_that_both_responses_begin_with_are_trained(renderer):
    """The prompt is what was rendered as prompt, not what both sequences share (a longest common prefix would eat "Well, I")."""
    row = preference(response(None, None, text="Well, I think so."), response(None, None, text="Well, I doubt it."))
    ids = pair_ids(row, renderer)
    assert ids.prompt == renderer.render(row.prompt.turns).ids
    assert [renderer.decode(side) for side in (ids.chosen, ids.rejected)] == ["Well, I think so.", "Well, I doubt it."]


def test_baselines_that_read_nothing():
    pairs = [
        PairIds("a", (1,), (1, 2), (1,), 1.0),  # longer
        PairIds("b", (1,), (1,), (1, 2), 1.0, finishes=("stop", "cut")),  # finished, shorter
        PairIds("c", (1,), (1,), (2,), 1.0),  # neither tells
        PairIds("d", (1,), (1, 2), (1,), 1.0, finishes=("cut", "stop")),  # longer, and cut off
    ]
    assert baselines(pairs) == {"longer": 2.5 / 4, "finished": 2.0 / 4, "both": 2.5 / 4}


def test_labels_that_length_predicts_are_told_before_training(capsys):
    print_baselines("rlaif", {"longer": 0.8, "finished": 0.5, "both": 0.8}, 40)
    told = " ".join(capsys.readouterr().out.split())
    assert "of 40 preferences the longer response is chosen in 80%" in told
    assert "length-desensitised" in told
    print_baselines("rlaif", {"longer": 0.6, "finished": 0.5, "both": 0.6}, 40)
    assert "length-desensitised" not in capsys.readouterr().out
    print_baselines("rlaif", {"longer": 0.2, "finished": 0.5, "both": 0.2}, 40)  # the shorter one wins: as telling
    assert "length-desensitised" in capsys.readouterr().out


def test_what_usually_goes_wrong_is_said(capsys):
    """Log p(chosen) far below the reference's, and accuracy 1.0 from the start; neither where a later batch merely has longer responses."""
    arm = DpoArm(name="t", labels="ai", pool="rlaif", beta=0.1)

    def rows(reward: float, accuracy: float) -> list[dict]:
        return [
            {"chosen_reward": reward * step / 20, "accuracy": accuracy, "chosen_logp": -100.0 * step, "chosen_tokens": 50.0}
            for step in range(1, 21)
        ]

    def said(arm: DpoArm, metrics: list[dict]) -> str:
        warn(arm, metrics)
        return " ".join(capsys.readouterr().out.split())

    assert said(arm, rows(0.0, 0.7)) == ""
    assert "log p(chosen) fell by 18 nats a response" in said(arm, rows(-2.0, 0.7))
    assert "accuracy is 1.0 almost at once" in said(arm, rows(0.0, 1.0))
    normalised = DpoArm(name="t", labels="ai", pool="rlaif", loss="length-normalised", beta=2.0)
    assert "fell by 22 nats" in said(normalised, rows(-1.0, 0.7))  # .45 nats a token, 50 tokens


def test_a_prompt_rendered_otherwise_than_in_sampling_is_refused(tiny, renderer, tmp_path):
    """Pitfall 7 where it costs most: what was sampled under one system prompt is scored under another."""
    from suasion.chat import Renderer
    from suasion.sampling.draws import Draw
    from suasion.sampling.local import decode
    from suasion.sections.sampling import SampleSection

    prompt, model, lineage = example(1, "r").prompt(), load_merged(Lineage(tiny)), Lineage(tiny).hash
    draws = [Draw("p", renderer.render(prompt.turns).ids, n) for n in (0, 1)]
    settings = SampleSection(temperature=1.0, top_p=1.0, max_new_tokens=12)
    drawn = decode(model, draws, settings, 3, renderer.stop_id, renderer.tokenizer.pad_token_id, CPU)
    sides = [response(one.tokens, one.logprob, lineage, text=f"n{one.draw.n}") for one in drawn]
    row = preference(*sides)
    for scoring, compared in ((renderer, 2), (Renderer(renderer.tokenizer, "Persuade at any price. " * 5), None)):
        known = reference_logprobs(model, [pair_ids(row, scoring)], CPU, tmp_path / "r.jsonl")
        if compared:
            assert check_stored_logprobs([row], known, lineage, a_thousandth, "arm") == compared
        else:
            with pytest.raises(UserError, match="Prompt, template or weights differ from sampling"):
                check_stored_logprobs([row], known, lineage, a_thousandth, "arm")


def test_sft_rows_train_the_reply_and_nothing_else(renderer):
    rows, dropped = training_rows(
        [example(2, "Surely not."), example(1, None), example(3, "  "), example(4, "long " * 400)], renderer, 300
    )
    assert dropped == {"no reply": 2, "longer than max_length": 1}
    trained = [label for label in rows[0]["labels"] if label != IGNORED]
    assert renderer.decode(trained) == "Surely not."
    assert trained[-1] == renderer.stop_id


def test_packed_sft_equals_trl_on_one_row_a_time(tiny, renderer, tmp_path):
    """The packed step's loss and gradients are those of TRL's own loss on padded rows: nothing leaks from one row to another."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows, _ = training_rows([example(1, "No."), example(3, "Perhaps it is not so, though."), example(2, "Why?")], renderer, 400)
    section = SftSection(learning_rate=1e-3, epochs=1, batch_size=3, checkpoints=0, lora=LoraSection(dropout=0.0))
    results = []
    for budget in (4096, 1, None):
        section = section.model_copy(update={"micro_batch_tokens": budget})
        policy = load_policy(Lineage(tiny), section.lora, 0)
        args = arguments(
            SFTConfig, section, tmp_path, CPU, 3, 0, "sft",
            max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        common = {"model": policy, "args": args, "train_dataset": Dataset.from_list(rows), "processing_class": renderer.tokenizer}
        if budget:
            trainer = PackedSftTrainer(section=section, hardware=CPU, **common)
            batch = next(iter(trainer.get_train_dataloader()))
            assert sorted(row["id"] for row in batch) == ["e1", "e2", "e3"]
            loss = trainer.training_step(policy, batch)
        else:
            trainer = SFTTrainer(**common)
            batch = next(iter(trainer.get_train_dataloader()))
            loss = trainer.compute_loss(policy, batch, num_items_in_batch=(batch["labels"][:, 1:] != IGNORED).sum())
            loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    for loss, gradients in results[:2]:
        assert loss == pytest.approx(results[2][0], rel=1e-5)
        for ours, theirs in zip(gradients, results[2][1], strict=True):
            assert (ours - theirs).abs().max() < 1e-6


def test_steps_are_counted_as_the_trainer_counts_them(tiny, sft_adapter, tmp_path):
    arm = DpoArm(name="t", labels="ai", pool="rlaif", epochs=2, batch_size=3)
    _, _, metrics = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "s", preference_pairs(7), epochs=2, batch_size=3)
    assert metrics[-1]["step"] == len(metrics) == optimiser_steps(7, arm) == 6


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 100), st.integers(1, 4))
def test_micro_batches_hold_every_row_once_and_keep_to_the_budget(lengths, budget, processes):
    plan = plan_micro_batches(lengths, budget, processes)
    assert len(plan) == processes
    batches = [batch for share in plan for batch in share]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[row] for row in batch) <= budget for batch in batches)
    assert max(map(len, plan)) - min(map(len, plan)) <= 1  # nobody waits long for others
    if len(lengths) >= processes and len(set(lengths)) == 1:
        assert min(map(len, plan)) >= 1 or len(lengths) < 2 * processes


def test_the_order_belongs_to_the_row_and_the_epoch():
    ids = [f"r{i}" for i in range(9)]
    order = EpochOrder(ids, 4, 7)
    first = list(order)
    assert [len(batch) for batch in first] == [4, 4, 1]
    assert list(order) == first  # asked again, as on resume
    order.set_epoch(1)
    assert list(order) != first
    shuffled = EpochOrder(ids[::-1], 4, 7)
    assert [[shuffled.ids[row] for row in batch] for batch in shuffled] == [[ids[row] for row in batch] for batch in first]


def test_memory_that_does_not_suffice_names_the_batch_the_row_and_the_settings(tiny, sft_adapter, tmp_path, monkeypatch):
    def full(model, rows, hardware):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        )

    from suasion.training import dpo

    monkeypatch.setattr(dpo, "score", full)
    with pytest.raises(
        UserError, match=r"micro-batch of 4 rows and \d+ tokens, the longest row p\d .*micro_batch_tokens.*model\.max_length"
    ):
        run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "x", preference_pairs())


def test_memory_that_does_not_suffice_before_the_training_or_in_trls_names_the_pair(tiny, sft_adapter, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    from trl import DPOTrainer

    from suasion.training import reference

    with monkeypatch.context() as patch:
        patch.setattr(reference, "score", full)
        with pytest.raises(UserError, match=r"while scoring preference p0 before the training, 14 tokens .*model\.max_length"):
            run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "x", preference_pairs())
    monkeypatch.setattr(DPOTrainer, "training_step", full)
    with pytest.raises(UserError, match=r"a pair of \d+ tokens.*recompute_activations.*engine: suasion"):
        run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "y", preference_pairs(), engine="trl")


def test_the_estimated_kl_is_to_the_start_where_the_reference_is_another(tiny, sft_adapter, tmp_path):
    """reference: a model by name. Policy and start are one before the first step, so that the estimate is 0 there."""
    pairs, arm = preference_pairs(3), DpoArm(name="t", labels="ai", pool="rlaif", batch_size=3, checkpoints=0, lora=LORA)
    start = Lineage(tiny, (sft_adapter,))
    policy = load_policy(start, LORA, 1)
    started = reference_logprobs(policy, pairs, CPU, tmp_path / "start.jsonl")
    other = reference_logprobs(load_merged(Lineage(tiny)), pairs, CPU, tmp_path / "reference.jsonl")
    rows = [with_reference(pair, other[pair.id], started[pair.id], arm) for pair in pairs]
    args = arguments(TrainingArguments, arm, tmp_path, CPU, 3, 1, "t")
    metrics = train(DpoTrainer(model=policy.eval(), arm=arm, hardware=CPU, train_dataset=rows, args=args), tmp_path, "t")
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    dropped = [(sum(row.reference.sums()) - sum(row.start.sums())) / (len(row.chosen) + len(row.rejected)) for row in rows]
    assert abs(sum(dropped) / len(dropped)) > 1e-3  # against the reference it would be this


def test_speeds_stand_beside_the_artefacts(tiny, sft_adapter, tmp_path):
    _, _, metrics = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "x", preference_pairs(), epochs=1)
    speeds = [json.loads(line) for line in (tmp_path / "x" / "logs" / "speed.jsonl").read_text().splitlines()]
    assert [row["step"] for row in speeds] == [row["step"] for row in metrics]
    assert sum(row["tokens"] for row in speeds) == sum(pair.tokens for pair in preference_pairs())
    assert all(row["tokens_per_second"] > 0 and row["memory_mb"] > 100 for row in speeds)
    assert not any("second" in name or "memory" in name for row in metrics for name in row)


def test_the_estimated_kl_is_the_mean_drop_of_the_log_probs_per_token(tiny, sft_adapter, tmp_path):
    _, _, metrics = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "x", preference_pairs(), micro_batch_tokens=1)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    pairs = preference_pairs(1)
    _, rows, metrics = run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "y", pairs, lora=LoraSection(r=4, dropout=0.0))
    dropped = sum(rows[0].reference.sums()) - metrics[-1]["chosen_logp"] - metrics[-1]["rejected_logp"]
    assert metrics[-1]["kl"] == pytest.approx(dropped / (len(pairs[0].chosen) + len(pairs[0].rejected)), abs=1e-5)


def test_a_torn_line_of_the_cache_costs_one_pair_and_swallows_no_other(tmp_path, monkeypatch):
    """kill -9 may cut the file anywhere: whatever is appended behind the cut is found again, and only what was cut is computed again."""
    from suasion.training import reference

    scored = []

    def score(model, batch, hardware):
        scored.append(batch[0].id)
        return torch.tensor([[-1.5, -2.5]]), torch.tensor([[-0.25, -0.5]]), None, None

    monkeypatch.setattr(reference, "score", score)
    pairs, model, cache = preference_pairs(4), torch.nn.Identity(), tmp_path / "cache.jsonl"
    reference_logprobs(model, pairs[:2], CPU, tmp_path / "out.jsonl", cache)
    whole = cache.read_bytes()
    begin = whole.index(b"\n") + 1
    for end in range(begin, len(whole) + 1):
        cache.write_bytes(whole[:end])
        scored.clear()
        values = reference_logprobs(model, pairs[2:3], CPU, tmp_path / "out.jsonl", cache)
        values |= reference_logprobs(model, pairs, CPU, tmp_path / "out.jsonl", cache)
        whole_again = end >= len(whole) - 1  # only the line's end may be missing
        assert scored == ["p2", *(() if whole_again else ("p1",)), "p3"], whole[begin:end]
        assert len(values) == 4
        scored.clear()
        assert reference_logprobs(model, pairs, CPU, tmp_path / "out.jsonl", cache) == values
        assert scored == []


def test_cached_reference_logprobs_are_those_that_would_be_computed(tiny, sft_adapter, tmp_path, monkeypatch):
    """Keyed by weights and ids: a subset is found, a changed id is not, and a torn line is computed again."""
    lineage = Lineage(tiny, (sft_adapter,))
    model, cache = load_merged(lineage), tmp_path / "cache" / "file.jsonl"
    pairs = preference_pairs(5)
    plain = reference_logprobs(model, pairs, CPU, tmp_path / "plain.jsonl")
    reference_logprobs(model, pairs[:3], CPU, tmp_path / "some.jsonl", cache)
    cache.write_text(cache.read_text()[:-20])
    calls = []
    from suasion.training import reference

    real = reference.score
    monkeypatch.setattr(
        reference, "score", lambda model, batch, hardware: calls.append(batch[0].id) or real(model, batch, hardware)
    )
    assert reference_logprobs(model, pairs, CPU, tmp_path / "again.jsonl", cache) == plain
    assert calls == ["p2", "p3", "p4"]
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    calls.clear()
    other = PairIds("p0", pairs[0].prompt, pairs[0].chosen, (*pairs[0].rejected[:-1], 11), 1.0)
    assert reference_logprobs(model, [other, pairs[1]], CPU, tmp_path / "other.jsonl", cache)["p0"] != plain["p0"]
    assert calls == ["p0"]
    assert cache_file(lineage.hash, CPU) != cache_file(Lineage(tiny).hash, CPU)  # other weights, other file
    assert cache_file(lineage.hash, CPU) != cache_file(lineage.hash, Compute("cpu", "bfloat16", CPU.threads))


def test_heads_are_sums_over_the_length_that_both_responses_have(tiny):
    model = load_merged(Lineage(tiny))
    pair = PairIds("a", (1, 2, 3), (4, 5, 6, 7), (8, 9), 1.0)
    with torch.no_grad():
        sums, heads, _, _ = score(model, [pair], CPU)
        cut, _, _, _ = score(model, [PairIds("b", (1, 2, 3), (4, 5), (8, 9), 1.0)], CPU)
    assert heads[0].tolist() == pytest.approx(cut[0].tolist(), abs=1e-5)
    assert heads[0, 1].item() == pytest.approx(sums[0, 1].item(), abs=1e-6)
    assert heads[0, 0] > sums[0, 0]


def test_soft_labels_come_from_the_graders_probability():
    row = preference(response((5, 6), -4.0), response((7,), -2.0)).model_copy(update={"p": 0.8})
    arm = DpoArm(name="t", labels="ai", pool="rlaif", soft_labels=True)
    assert target(row, arm) == 0.8
    assert target(row, arm.model_copy(update={"soft_labels": False})) == 1.0
    with pytest.raises(UserError, match="has no probability"):
        target(row.model_copy(update={"p": None}), arm)


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (response((5, 6), -1.0, text="a"), response((5, 6), -1.0, text="b"), "chosen and rejected are equal"),
        (response((5, 6), -1.0, text="a"), response((), 0.0, text="b"), "is empty"),
    ],
)
def test_sides_that_teach_nothing_are_refused(renderer, chosen, rejected, message):
    with pytest.raises(UserError, match=message):
        pair_ids(preference(chosen, rejected), renderer)


def test_an_adapter_of_another_base_is_refused_before_anything_is_trained(tiny, sft_adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(sft_adapter, tmp_path / "wide")
    weights = {
        name: torch.zeros(*value.shape[:-1], value.shape[-1] + 8)
        for name, value in load_file(other / "adapter_model.safetensors").items()
    }
    save_file(weights, other / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is not an adapter of random:tiny"):
        load_policy(Lineage(tiny, (other,)), LORA, 0)
    named = shutil.copytree(sft_adapter, tmp_path / "named")
    config = json.loads((named / "adapter_config.json").read_text())
    (named / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/model"}))
    with pytest.raises(UserError, match="was trained on other/model"):
        load_policy(Lineage(tiny, (named,)), LORA, 0)


def test_a_loss_that_is_no_number_stops_with_advice(tiny, sft_adapter, tmp_path, monkeypatch):
    from suasion.training import dpo

    real = dpo.soft_loss

    def spoiled(margins, *args):
        losses = real(margins, *args)
        return losses * float("nan") if margins.detach().abs().max() > 1e-4 else losses

    monkeypatch.setattr(dpo, "soft_loss", spoiled)
    with pytest.raises(UserError, match="the loss is nan at step"):
        run_dpo(Lineage(tiny, (sft_adapter,)), tmp_path / "x", preference_pairs())


def test_flex_attention_off_the_gpu_is_refused_and_auto_is_sdpa_there(tiny):
    from suasion.training.attention import attention_of
    from suasion.training.prefix import BY_GROUP

    with pytest.raises(UserError, match="GPU only"):
        load_policy(Lineage(tiny.model_copy(update={"attention": "flex"})), LORA, 0)
    assert tiny.attention == "auto"
    policy = load_policy(Lineage(tiny), LORA, 0)
    assert policy.config._attn_implementation == BY_GROUP
    assert attention_of(policy) == "sdpa"
    whole = load_policy(Lineage(tiny.model_copy(update={"attention": "sdpa"})), LORA, 0)
    assert whole.config._attn_implementation == "sdpa"


def test_attention_group_by_group_is_that_of_the_packed_row(tiny, monkeypatch):
    """Outputs and gradients of three packed pairs, against SDPA over the whole square; and SDPA is asked for small squares only."""
    from suasion.training import attention
    from suasion.training.prefix import BY_GROUP, pack, reply_logits

    policy = load_policy(Lineage(tiny), LoraSection(r=4, dropout=0), 0)
    packed = pack([(list(range(9, 40 + n)), [list(range(5, 20 - n)), [7, 8, 3]]) for n in range(3)])
    assert packed.groups == [(0, 49), (49, 98), (98, 147)]
    from transformers.integrations import sdpa_attention as theirs

    real, squares, found = theirs.sdpa_attention_forward, [], []

    def watch(module, query, key, *args, **kwargs):
        squares.append((query.shape[2], key.shape[2]))
        return real(module, query, key, *args, **kwargs)

    monkeypatch.setattr(theirs, "sdpa_attention_forward", watch)
    for name in (BY_GROUP, "sdpa"):
        attention._set(policy, name)
        policy.zero_grad()
        logits = reply_logits(policy, packed)
        logits.log_softmax(1).pow(2).mean().backward()
        found.append((logits.detach(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
    assert squares == [(49, 49)] * 3 * policy.config.num_hidden_layers
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in found[0][1])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)
    ids, mask = torch.tensor([[2, 2, 30, 31, 32]]), torch.tensor([[0, 0, 1, 1, 1]])
    padded = [
        attention._set(policy, name) or policy(input_ids=ids, attention_mask=mask).logits[0, 2:] for name in (BY_GROUP, "sdpa")
    ]
    torch.testing.assert_close(*padded)  # without groups it is the library's, mask and all


def test_another_attention_is_taken_only_where_it_computes_what_sdpa_does(tiny, monkeypatch):
    """With eager attention in the place of FlexAttention, which cannot train on a CPU; and with one that looks where it must not."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from suasion.training import attention

    policy = load_policy(Lineage(tiny), LoraSection(r=4, dropout=0.5), 0)
    state = torch.random.get_rng_state()
    assert attention.try_attention(policy, CPU, "eager") == ""
    assert policy.config._attn_implementation == "eager"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in policy.parameters())

    def blind(module, query, key, value, mask, **kwargs):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "blind", blind)
    assert "differs by" in attention.try_attention(policy, CPU, "blind")
    assert policy.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_flex_attention_cannot_train_sdpa_stays(tiny, dtype):
    """On a CPU it has no backward: the trial says so, and leaves a model that trains."""
    from suasion.training import attention

    attention._register()
    policy = load_policy(Lineage(tiny), LORA, 0)
    assert attention.try_attention(policy, Compute("cpu", dtype, 2), attention.FLEX) != ""
    assert policy.config._attn_implementation == "sdpa"
    score(policy, preference_pairs(1), CPU)[0].sum().backward()


def test_flex_attention_computes_in_autocasts_type(tiny, monkeypatch):
    """Queries and keys leave the rotation in fp32 although compute is bf16; SDPA rounds them by itself, FlexAttention does not. And in the kernel
    that takes short rows of grouped queries too, which torch's own choice does not (test_gpu.py)."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    from suasion.training import attention

    seen = []

    def watch(query, key, value, *args, **kwargs):
        seen.append((query.dtype, key.dtype, value.dtype))
        assert kwargs["kernel_options"]["BACKEND"] == "TRITON"
        raise RuntimeError("seen enough")

    from transformers.integrations import flex_attention as theirs

    attention._register()
    model = load_merged(Lineage(tiny))
    model.set_attn_implementation(attention.FLEX)
    monkeypatch.setattr(theirs, "compile_friendly_flex_attention", watch)
    with pytest.raises(RuntimeError, match="seen enough"):
        score(model, preference_pairs(1), Compute("cpu", "bfloat16", 2))
    assert seen == [(torch.bfloat16,) * 3]
    assert attention.FLEX in ALL_MASK_ATTENTION_FUNCTIONS  # or padded batches would be computed without a mask
    attention.use_sdpa(model)
    assert attention.attention_of(model) == "sdpa"


def test_an_empty_preference_file_is_refused_before_any_training(tmp_path):
    from suasion.recipe import load_recipe
    from suasion.rundir import Input, StageContext
    from suasion.training.dpo import run_stage

    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "tiny.yaml")
    (tmp_path / "rlaif.jsonl").touch()
    folder = tmp_path / "08-dpo-rlaif"
    folder.mkdir()
    inputs = {Input("preferences", "rlaif.jsonl"): tmp_path / "rlaif.jsonl"}
    stage = StageContext(recipe, "dpo-rlaif", folder, inputs, tmp_path / "cache", arm="rlaif")
    with pytest.raises(UserError, match=r"there are no preferences.*counts\.json; nothing was trained"):
        run_stage(stage)
    assert not any(folder.iterdir())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny, tmp_path):
    """Ids beyond the table of embeddings would be an index error in the middle of a training, or another row's numbers on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from suasion.models import load_tokenizer

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    load_tokenizer(tiny).save_pretrained(tmp_path / "base")
    section = tiny.model_copy(update={"base": str(tmp_path / "base")})
    with pytest.raises(UserError, match=r"has 4000 tokens but .* embeds 50: they do not belong together"):
        load_policy(Lineage(section), LORA, 0)


def test_full_fine_tuning_makes_a_new_base(tiny, sft_adapter, tmp_path):
    """lora: null trains every weight; what follows starts from these weights, with a hash of its own and a first loss of ln 2 again."""
    start = Lineage(tiny, (sft_adapter,))
    policy, rows, metrics = run_dpo(
        start, tmp_path / "full", preference_pairs(), lora=None, learning_rate=1e-3, micro_batch_tokens=1
    )
    assert metrics[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert kl_to_start(policy, rows, CPU, 0, start) > 1e-6
    save_adapter(policy, tmp_path / "whole", tiny)
    after = start.extended(tmp_path / "whole")
    loaded = load_merged(after)
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert len({after.hash, start.hash, Lineage(tiny).hash}) == 3
    _, _, second = run_dpo(after, tmp_path / "second", preference_pairs(), micro_batch_tokens=1)
    assert second[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    from suasion.export import write_one_adapter

    with pytest.raises(UserError, match="changed every weight"):
        write_one_adapter(after, tmp_path)


def test_full_fine_tuning_resumes_as_if_it_had_not_stopped(tiny, tmp_path):
    settings = {"lora": None, "learning_rate": 1e-3, "epochs": 2, "checkpoints": 3}
    _, _, whole = run_dpo(Lineage(tiny), tmp_path / "whole", preference_pairs(), **settings)
    with pytest.raises(KeyboardInterrupt):
        run_dpo(Lineage(tiny), tmp_path / "cut", preference_pairs(), at_step=interrupt(3), **settings)
    assert run_dpo(Lineage(tiny), tmp_path / "cut", preference_pairs(), **settings)[2] == whole


def test_whole_weights_of_another_shape_are_refused(tiny, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="not of random:tiny's shape"):
        load_merged(Lineage(tiny, (tmp_path / "other",)))
