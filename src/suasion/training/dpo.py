"""Direct preference optimisation: `preferences/<arm>.jsonl` -> `adapter/`, `metrics.jsonl`, `reference.jsonl`.

transformers' Trainer with our own step, because the libraries read every prompt twice: here chosen and rejected share one pass
over their prompt (prefix.py), and whole pairs are packed to a token budget (steps.py). The reference log-probabilities are computed
once, before any step, by the start model itself (reference.py); they are an artefact, so that a resumed training cannot drift
from them and `verify` can compare them with what sampling stored.

Checked on every run, because "what is the reference model" is where this goes wrong silently:
- the start model's lineage hash is the one that wrote the on-policy responses, and its log-probability of each equals the
  stored one (the base against itself would also give a first loss of ln 2);
- every pair's first loss has the value that the stored log-probs give (ln 2 where policy and reference are one model), since the
  fresh adapter changes nothing yet.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.models import Compute, Lineage, compute, in_fp32, load_tokenizer
from suasion.progress import console
from suasion.records import Preference, read_rows
from suasion.rundir import StageContext, StageResult
from suasion.sections.training import DpoArm, optimiser_steps
from suasion.seeding import derive_seed
from suasion.training.attention import attention_of
from suasion.training.loop import arguments, policy_of, speed_file, train
from suasion.training.losses import (
    effective_logprobs,
    logprob_rounding,
    logprob_tolerance,
    loss_rounding,
    soft_loss,
    zero_margin_loss,
)
from suasion.training.pairs import Logprobs, PairIds, baselines, first_loss, pair_ids, score, target
from suasion.training.prefix import reply_logits, token_kl
from suasion.training.processes import is_sharded, save_trained
from suasion.training.reference import cache_file, check_stored_logprobs, shared_logprobs
from suasion.training.sharding import scorer_here
from suasion.training.steps import WholeSteps

KL_PAIRS = 5
FEWEST_STEPS = 12
TELLING = 0.75  # from this accuracy of a rule that reads nothing, a warning
FELL = 10.0  # nats a response; from here log p(chosen) has fallen
MOVED_KL = 1e-4  # nats a token; below this a training has not changed what the model says


class DpoTrainer(WholeSteps, Trainer):  # type: ignore[misc]
    """transformers' Trainer whose loss is the weighted mean of the pairs' losses over the whole optimiser step."""

    def __init__(self, *args: Any, arm: DpoArm, hardware: Compute, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section = self.arm = arm
        self.hardware = hardware

    def row_id(self, row: PairIds) -> str:
        return row.id

    def row_tokens(self, row: PairIds) -> int:
        return row.tokens

    def row_weight(self, row: PairIds) -> float:
        return row.weight

    def micro_loss(self, model: Any, rows: list[PairIds]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sums, heads, _, _ = score(model, rows, self.hardware)
        device = sums.device
        reference = torch.tensor([_known(pair).sums() for pair in rows], device=device, dtype=sums.dtype)
        started = torch.tensor([(pair.start or _known(pair)).sums() for pair in rows], device=device, dtype=sums.dtype)
        reference_heads = torch.tensor([_known(pair).heads() for pair in rows], device=device, dtype=sums.dtype)
        lengths = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in rows], device=device, dtype=sums.dtype)
        weights = torch.tensor([pair.weight for pair in rows], device=device, dtype=sums.dtype)
        targets = torch.tensor([pair.target for pair in rows], device=device, dtype=sums.dtype)
        arm = self.arm
        ratios = effective_logprobs(sums - reference, heads - reference_heads, lengths, arm.loss, arm.length_alpha)
        margins = ratios[:, 0] - ratios[:, 1]
        losses = soft_loss(margins, targets, arm.loss, arm.beta, arm.label_smoothing)
        if self.state.global_step == 0:
            self._check_first_pass(rows, sums, started, lengths, losses)
        rewards = arm.beta * ratios.detach()
        margin = rewards[:, 0] - rewards[:, 1]
        # Chosen and rejected apart: a growing margin can hide that both fall. The mean of log start - log p over the tokens of responses
        # that the start model wrote estimates KL(start || policy), up to the temperature they were drawn at, and costs nothing.
        values = {
            "chosen_logp": sums[:, 0], "rejected_logp": sums[:, 1], "chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1],
            "margin": margin, "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "chosen_tokens": lengths[:, 0], "rejected_tokens": lengths[:, 1],
            "kl": (started - sums).sum(1) / lengths.sum(1),
        }  # fmt: skip
        return (losses * weights).sum(), {name: (value.detach() * weights).sum() for name, value in values.items()}

    def _check_first_pass(
        self, pairs: list[PairIds], sums: torch.Tensor, known: torch.Tensor, lengths: torch.Tensor, losses: torch.Tensor
    ) -> None:
        """Before the first update every log-probability and loss is known; others mean another model, and nothing may be learned from it."""
        arm, dtype = self.arm, self.hardware.dtype
        gaps = (sums.detach() - known).abs() - logprob_rounding(lengths, dtype)
        expected = torch.tensor([pair.first_loss for pair in pairs], device=sums.device, dtype=sums.dtype)
        allowed = loss_rounding(lengths, dtype, arm.loss, arm.beta, expected, arm.label_smoothing).tolist()
        for pair, gap, loss, tolerance in zip(pairs, gaps.amax(1).tolist(), losses.tolist(), allowed, strict=True):
            if not (gap <= 0 and abs(loss - pair.first_loss) <= tolerance):
                raise UserError(
                    f"dpo {arm.name}: the first loss of preference {pair.id} is {loss:.6f}, the start and reference models give "
                    f"{pair.first_loss:.6f}, and its log-probabilities are {max(gap, 0):.2f} nats further away than rounding explains. The "
                    f"reference is not the one that the recipe names: nothing was trained. Run again with --redo dpo-{arm.name}; if it stays, "
                    "report it as a defect."
                )


def _known(pair: PairIds) -> Logprobs:
    assert pair.reference is not None, "the reference log-probs come before the first step"
    return pair.reference


def run_stage(stage: StageContext) -> StageResult:
    """Train one arm from its start model."""
    recipe, arm = stage.recipe, stage.recipe.arm(stage.arm)
    hardware = compute(recipe.model)
    renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
    preferences = sorted(read_rows(stage.input("preferences", f"{arm.name}.jsonl"), Preference), key=lambda row: row.id)
    if not preferences:
        raise UserError(f"dpo {arm.name}: there are no preferences. See why in preferences/counts.json; nothing was trained.")
    pairs = [replace(pair_ids(row, renderer), target=target(row, arm)) for row in preferences]
    fitting = [pair for pair in pairs if pair.longest <= recipe.model.max_length]
    if not fitting:
        raise UserError(f"dpo {arm.name}: none of {len(pairs)} preferences fits model.max_length {recipe.model.max_length}.")
    baseline = baselines(fitting)
    print_baselines(arm.name, baseline, len(fitting))

    start = start_lineage(stage, arm.start)
    own = arm.reference in ("start", arm.start)
    reference_lineage = start if own else start_lineage(stage, arm.reference)
    # A policy in shards exists only once the Trainer has made them: its start then scores before, on its own.
    policy = None if is_sharded() else policy_of(start, arm.lora, recipe.seed, hardware)

    def logprobs(lineage: Lineage, file: str) -> dict[str, Logprobs]:
        model = policy if policy is not None and lineage == start else scorer_here(lineage, hardware.device)
        return shared_logprobs(model, fitting, hardware, stage.folder / file, cache_file(lineage.hash, hardware))

    reference = logprobs(reference_lineage, "reference.jsonl")
    started = reference if own else logprobs(start, "start.jsonl")
    if policy is None:
        policy = policy_of(start, arm.lora, recipe.seed, hardware)
    fitting = [with_reference(pair, reference[pair.id], started[pair.id], arm) for pair in fitting]
    allowed = partial(logprob_tolerance, dtype=hardware.dtype, sampling=recipe.sample)
    checked = check_stored_logprobs(preferences, started, start.hash, allowed, arm.name)
    unknown = sum(side.logprob is None for row in preferences if row.on_policy for side in (row.chosen, row.rejected))
    if unknown:
        console.print(
            f"  [yellow]dpo {arm.name}: {unknown} responses came from a server that told no log-probabilities; they were not compared.[/]"
        )
    steps = optimiser_steps(len(fitting), arm)
    if steps < FEWEST_STEPS:
        console.print(f"  [yellow]dpo {arm.name}: {len(fitting)} preferences give {steps} optimiser steps; it may not move.[/]")
    if arm.engine == "trl":
        from suasion.training.trl_engine import trl_trainer

        trainer = trl_trainer(policy, arm, fitting, renderer.tokenizer, stage.folder, hardware, recipe.seed)
    else:
        trainer = DpoTrainer(
            model=policy, arm=arm, hardware=hardware, train_dataset=fitting,
            args=arguments(TrainingArguments, arm, stage.folder, hardware, len(fitting), recipe.seed, f"dpo-{arm.name}"),
        )  # fmt: skip
    metrics = train(trainer, stage.folder, f"dpo-{arm.name}", speed_file(stage.folder))
    save_trained(policy, stage.folder / "adapter", recipe.model)
    kl = kl_to_start(policy, fitting, hardware, recipe.seed, start)
    warn(arm, metrics)
    tail = metrics[-max(1, len(metrics) // 4) :]
    return StageResult(
        rows_in=len(preferences),
        rows_out=len(fitting),
        dropped={"longer than max_length": len(pairs) - len(fitting)} if len(pairs) > len(fitting) else {},
        facts={
            "start": arm.start,
            "start_lineage": start.hash,
            "reference_lineage": reference_lineage.hash,
            "lineage": start.extended(stage.folder / "adapter").hash,
            "template_hash": renderer.template_hash,
            "steps": metrics[-1]["step"],
            "first_loss": metrics[0]["loss"],
            "expected_first_loss": zero_margin_loss(arm.loss, arm.beta) if own else None,
            "dtype": hardware.dtype,
            "attention": attention_of(policy),
            "final_loss": metrics[-1]["loss"],
            "final_margin": sum(row["margin"] for row in tail) / len(tail),
            "final_accuracy": sum(row["accuracy"] for row in tail) / len(tail),
            "kl_to_start": kl,
            "moved": kl >= MOVED_KL,
            "logprobs_checked": checked,
            "on_policy": sum(preference.on_policy for preference in preferences),
            "off_policy": sum(not preference.on_policy for preference in preferences),
            "label_sources": sorted({source for preference in preferences for source in preference.sources}),
            "longer_is_chosen": baseline["longer"],
            "finished_is_chosen": baseline["finished"],
            "baseline": baseline["both"],
        },
    )


def with_reference(pair: PairIds, reference: Logprobs, started: Logprobs, arm: DpoArm) -> PairIds:
    """The pair with its reference log-probs and the loss that they and the start model's give: at zero margin where both are one."""
    lengths = (len(pair.chosen), len(pair.rejected))
    return replace(pair, reference=reference, start=started, first_loss=first_loss(started, reference, lengths, pair.target, arm))


def print_baselines(arm: str, baseline: dict[str, float], pairs: int) -> None:
    """Say before training what could be learned without reading: a grader that follows length teaches length."""
    console.print(
        f"  dpo {arm}: of {pairs} preferences the longer response is chosen in {baseline['longer']:.0%}, the one that ended of itself in "
        f"{baseline['finished']:.0%}, by both rules {baseline['both']:.0%} (50%: they tell nothing)"
    )
    if max(baseline.values()) >= TELLING or min(baseline.values()) <= 1 - TELLING:
        console.print(
            f"  [yellow]dpo {arm}: length or ending alone predicts the labels this well; the model may learn that. Try loss: length-desensitised "
            "or length-normalised, or a grader with residualise_length.[/]"
        )


def start_lineage(stage: StageContext, model: str) -> Lineage:
    """The lineage of base, sft or an arm of this run, from the stage's declared inputs."""
    return Lineage(stage.recipe.model, tuple(stage.input(name, "adapter") for name in stage.recipe.adapter_stages(model)))


@torch.no_grad()
def kl_to_start(policy: Any, pairs: Sequence[PairIds], hardware: Compute, seed: int, start: Lineage) -> float:
    """Mean KL(policy || start) a token, exact over the vocabulary, on the responses of a few pairs chosen by id hash.

    In fp32 whatever the training computed in: in bf16 the rounding of two equal models is ten times what an arm has to move (`MOVED_KL`).
    """
    policy.eval()
    chosen = sorted(pairs, key=lambda pair: derive_seed(seed, "kl", pair.id))[:KL_PAIRS]
    adapted = hasattr(policy, "disable_adapter")
    start_model = policy if adapted else scorer_here(start, hardware.device)
    exact = replace(hardware, dtype="float32")
    values = []
    with in_fp32(policy):
        for pair in chosen:
            _, _, packed, logits = score(policy, [pair], exact)
            with policy.disable_adapter() if adapted else contextlib.nullcontext():
                start_logits = reply_logits(start_model, packed)
            values.append(token_kl(logits, start_logits))
    return float(torch.cat(values).mean())


def warn(arm: DpoArm, metrics: list[dict[str, Any]]) -> None:
    """Advice on what usually goes wrong, from the metrics of a finished training.

    The fall of log p(chosen) is against the reference on the same pairs: from step to step other pairs, of other lengths, are looked at.
    """
    tail = metrics[-max(1, len(metrics) // 4) :]
    lengths = [row.get("chosen_tokens", 1.0) if arm.loss == "length-normalised" else 1.0 for row in tail]  # that ratio is a mean
    fell = -sum(row["chosen_reward"] / arm.beta * length for row, length in zip(tail, lengths, strict=True)) / len(tail)
    if fell > FELL:
        console.print(
            f"  [yellow]dpo {arm.name}: log p(chosen) fell by {fell:.0f} nats a response. Lower learning_rate or raise beta.[/]"
        )
    early = metrics[1 : max(2, len(metrics) // 5)]
    if (
        len(metrics) >= 10
        and early
        and all(row["accuracy"] == 1.0 for row in early)
        and math.isclose(metrics[-1]["accuracy"], 1.0)
    ):
        console.print(
            f"  [yellow]dpo {arm.name}: accuracy is 1.0 almost at once. Look for a trivial difference: length, finish reason, format.[/]"
        )
