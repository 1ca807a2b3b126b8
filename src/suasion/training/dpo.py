"""Direct preference optimisation: `preferences/<arm>.jsonl` -> `adapter/`, `metrics.jsonl`, `reference.jsonl`.

transformers' Trainer with our own step, because the libraries read every prompt twice: here chosen and rejected share one pass
over their prompt (prefix.py). The reference log-probabilities are computed once, before any step, by the start model itself;
they are an artefact, so that a resumed training cannot drift from them and `verify` can compare them with what sampling stored.

Checked on every run, because "what is the reference model" is where this goes wrong silently:
- the start model's lineage hash is the one that wrote the on-policy responses, and its log-probability of each equals the
  stored one (the base against itself would also give a first loss of ln 2);
- every pair's first loss has the value that the stored log-probs give (ln 2 where policy and reference are one model), since the
  fresh adapter changes nothing yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.models import Compute, Lineage, compute, load_merged, load_policy, load_tokenizer
from suasion.progress import console, progress
from suasion.records import Preference, Response, canonical_json, read_json_lines, read_rows
from suasion.rundir import CHECKPOINTS, StageContext, StageResult
from suasion.sections.training import DpoArm
from suasion.seeding import derive_seed
from suasion.training.loop import arguments, optimiser_steps, train
from suasion.training.losses import FIRST_LOSS_TOLERANCE, logprob_tolerance, preference_loss, zero_margin_loss
from suasion.training.prefix import Packed, pack, reply_logits, sum_logprobs, token_kl
from suasion.training.processes import barrier, rank, save_trained, summed, world_size

KL_PAIRS = 5
FEWEST_STEPS = 12
MOVED_KL = 1e-4  # nats a token; below this a training has not changed what the model says


@dataclass(frozen=True)
class PairIds:
    """One preference as token ids, with its reference log-probabilities (sums, in nats)."""

    id: str
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    weight: float
    reference: tuple[float, float] | None = None
    first_loss: float = 0.0  # what the loss must be while the fresh adapter changes nothing


def pair_ids(preference: Preference, renderer: Renderer) -> PairIds:
    """Token ids of a preference: sampled ids exactly as sampled; imported texts tokenised, with the stop token where they are finished."""
    sides = []
    for response in (preference.chosen, preference.rejected):
        rendered = renderer.render(
            preference.prompt.turns, reply=response.text, reply_ids=response.tokens, finished=is_whole(response)
        )
        sides.append(rendered)
    return PairIds(preference.id, sides[0].prompt_ids, sides[0].reply_ids, sides[1].reply_ids, preference.weight)


def is_whole(response: Response) -> bool:
    """Whether a text ended of itself, so that its stop token belongs to it; sampled ids hold theirs already."""
    return response.finish != "length" and "unfinished" not in response.flags


def score(model: Any, batch: list[PairIds], hardware: Compute) -> tuple[torch.Tensor, Packed, torch.Tensor]:
    """Summed log-probs [n, 2] of (chosen, rejected), with the packed row and its logits [K, V]."""
    packed = pack([(pair.prompt, (pair.chosen, pair.rejected)) for pair in batch]).to(hardware.device)
    with hardware.autocast():
        logits = reply_logits(model, packed)
    return sum_logprobs(logits, packed).view(len(batch), 2), packed, logits


@torch.no_grad()
def reference_logprobs(model: Any, pairs: list[PairIds], hardware: Compute, path: Path) -> dict[str, tuple[float, float]]:
    """Reference log-probs of every pair, written to `path` as they are made; rows already there are taken over.

    The model scores in eval mode: dropout must not touch a reference.
    """
    was_training = model.training
    model.eval()
    known = {row["id"]: (row["chosen"], row["rejected"]) for _, row in _whole_lines(path)}
    with path.open("w", encoding="utf-8") as handle, progress("reference log-probs", len(pairs), "pairs", len(known)) as advance:
        for pair in pairs:
            if pair.id not in known:
                sums, _, _ = score(model, [pair], hardware)
                known[pair.id] = (float(sums[0, 0]), float(sums[0, 1]))
                advance(1)
            handle.write(canonical_json({"id": pair.id, "chosen": known[pair.id][0], "rejected": known[pair.id][1]}) + "\n")
            handle.flush()
    model.train(was_training)
    return {pair.id: known[pair.id] for pair in pairs}


def shared_logprobs(model: Any, pairs: list[PairIds], hardware: Compute, path: Path) -> dict[str, tuple[float, float]]:
    """`reference_logprobs`, of which every process makes its share; the first one puts them together."""
    if world_size() == 1:
        return reference_logprobs(model, pairs, hardware, path)
    (path.parent / CHECKPOINTS).mkdir(exist_ok=True)
    shares = [path.parent / CHECKPOINTS / f"{path.stem}-{number}-of-{world_size()}.jsonl" for number in range(world_size())]
    reference_logprobs(model, pairs[rank() :: world_size()], hardware, shares[rank()])
    barrier()
    made = {row["id"]: row for share in shares for _, row in _whole_lines(share)}
    if rank() == 0:
        path.write_text("".join(canonical_json(made[pair.id]) + "\n" for pair in pairs), encoding="utf-8")
    barrier()
    return {pair.id: (made[pair.id]["chosen"], made[pair.id]["rejected"]) for pair in pairs}


def with_fillers(pairs: list[PairIds], count: int) -> list[PairIds]:
    """The pairs and so many more of no weight: they complete the last micro-batches of several processes."""
    shortest = min(pairs, key=lambda pair: len(pair.prompt) + len(pair.chosen) + len(pair.rejected))
    return [*pairs, *[replace(shortest, weight=0.0)] * count]


class DpoTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer whose loss is the weighted mean of the pairs' losses over the whole optimiser step."""

    def __init__(self, *args: Any, arm: DpoArm, hardware: Compute, **kwargs: Any):
        super().__init__(*args, data_collator=list, **kwargs)
        self.arm, self.hardware = arm, hardware
        self.model_accepts_loss_kwargs = True  # the loss below divides by the step's total weight itself
        self._sums: dict[str, float] = {}

    def _get_num_items_in_batch(self, batch_samples: list[list[PairIds]], device: torch.device) -> torch.Tensor:
        total = torch.tensor(sum(pair.weight for batch in batch_samples for pair in batch), device=device)
        return self.accelerator.gather(total).sum() if self.args.world_size > 1 else total

    def _prepare_inputs(self, inputs: list[PairIds]) -> list[PairIds]:
        return inputs

    def compute_loss(
        self, model: Any, inputs: list[PairIds], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        sums, _, _ = score(model, inputs, self.hardware)
        reference = torch.tensor([pair.reference for pair in inputs], device=sums.device, dtype=sums.dtype)
        weights = torch.tensor([pair.weight for pair in inputs], device=sums.device)
        rewards = self.arm.beta * (sums - reference)
        margins = (sums - reference)[:, 0] - (sums - reference)[:, 1]
        losses = preference_loss(margins, self.arm.loss, self.arm.beta, self.arm.label_smoothing)
        if self.state.global_step == 0:
            self._check_first_losses(inputs, losses)
        self._collect(inputs, sums, rewards, weights)
        loss: torch.Tensor = (losses * weights).sum() / num_items_in_batch * self.args.world_size
        return loss

    def _check_first_losses(self, pairs: list[PairIds], losses: torch.Tensor) -> None:
        """Before the first update every loss is known; another value means another reference, and nothing may be learned from it."""
        for pair, loss in zip(pairs, losses.tolist(), strict=True):
            if not abs(loss - pair.first_loss) <= FIRST_LOSS_TOLERANCE[self.hardware.dtype] * max(1.0, pair.first_loss):
                raise UserError(
                    f"dpo {self.arm.name}: the first loss of preference {pair.id} is {loss:.6f}, the start and reference models give "
                    f"{pair.first_loss:.6f}. The reference is not the one that the recipe names: nothing was trained. Run again with "
                    f"--redo dpo-{self.arm.name}; if it stays, report it as a defect."
                )

    @torch.no_grad()
    def _collect(self, pairs: list[PairIds], sums: torch.Tensor, rewards: torch.Tensor, weights: torch.Tensor) -> None:
        """Chosen and rejected apart: a growing margin can hide that both fall."""
        lengths = torch.tensor(
            [[len(pair.chosen), len(pair.rejected)] for pair in pairs], dtype=torch.float32, device=sums.device
        )
        margin = rewards[:, 0] - rewards[:, 1]
        values = {
            "chosen_logp": sums[:, 0], "rejected_logp": sums[:, 1], "chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1],
            "margin": margin, "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "chosen_tokens": lengths[:, 0], "rejected_tokens": lengths[:, 1],
        }  # fmt: skip
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float((value * weights).sum())
        self._sums["weight"] = self._sums.get("weight", 0.0) + float(weights.sum())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums:
            self._sums = summed(self._sums, self.hardware.device)
            weight = self._sums.pop("weight")
            logs = {**logs, **{f"dpo_{name}": value / weight for name, value in self._sums.items()}}
            self._sums = {}
        super().log(logs, *args, **kwargs)


def run_stage(stage: StageContext) -> StageResult:
    """Train one arm from its start model."""
    recipe, arm = stage.recipe, stage.recipe.arm(stage.arm)
    hardware = compute(recipe.model)
    renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
    preferences = sorted(read_rows(stage.input("preferences", f"{arm.name}.jsonl"), Preference), key=lambda row: row.id)
    pairs = [pair_ids(preference, renderer) for preference in preferences]
    fitting = [pair for pair in pairs if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= recipe.model.max_length]
    if not fitting:
        raise UserError(f"dpo {arm.name}: none of {len(pairs)} preferences fits model.max_length {recipe.model.max_length}.")

    start = start_lineage(stage, arm.start)
    policy = load_policy(start, arm.lora, recipe.seed, hardware.device)
    own = arm.reference in ("start", arm.start)
    reference_lineage = start if own else start_lineage(stage, arm.reference)
    reference_model = policy if own else load_merged(reference_lineage, hardware.device)
    reference = shared_logprobs(reference_model, fitting, hardware, stage.folder / "reference.jsonl")
    started = reference if own else shared_logprobs(policy, fitting, hardware, stage.folder / "start.jsonl")
    fitting = [with_reference(pair, reference[pair.id], started[pair.id], arm) for pair in fitting]
    tolerance = logprob_tolerance(hardware.dtype, recipe.sample)
    checked = check_stored_logprobs(preferences, started, start.hash, tolerance, arm.name)
    unknown = sum(side.logprob is None for row in preferences if row.on_policy for side in (row.chosen, row.rejected))
    if unknown:
        console.print(
            f"  [yellow]dpo {arm.name}: {unknown} responses came from a server that told no log-probabilities; they were not compared.[/]"
        )
    length_accuracy = longer_wins(fitting)
    if length_accuracy >= 0.75:
        console.print(
            f"  [yellow]dpo {arm.name}: in {length_accuracy:.0%} of the preferences the longer response is chosen; the model may learn length.[/]"
        )

    steps = optimiser_steps(len(fitting), arm)
    if steps < FEWEST_STEPS:
        console.print(f"  [yellow]dpo {arm.name}: {len(fitting)} preferences give {steps} optimiser steps; it may not move.[/]")
    trainer = DpoTrainer(
        model=policy, arm=arm, hardware=hardware, train_dataset=fitting,
        args=arguments(TrainingArguments, arm, stage.folder, hardware, len(fitting), recipe.seed, f"dpo-{arm.name}"),
    )  # fmt: skip
    metrics = train(trainer, stage.folder, f"dpo-{arm.name}", arm.batch_size, "pairs", with_fillers)
    save_trained(policy, stage.folder / "adapter", recipe.model)
    kl = kl_to_start(policy, fitting, hardware, recipe.seed)
    warn(arm.name, metrics)
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
            "final_loss": metrics[-1]["loss"],
            "final_margin": sum(row["margin"] for row in tail) / len(tail),
            "final_accuracy": sum(row["accuracy"] for row in tail) / len(tail),
            "kl_to_start": kl,
            "moved": kl >= MOVED_KL,
            "logprobs_checked": checked,
            "on_policy": sum(preference.on_policy for preference in preferences),
            "off_policy": sum(not preference.on_policy for preference in preferences),
            "longer_is_chosen": length_accuracy,
        },
    )


def with_reference(pair: PairIds, reference: tuple[float, float], started: tuple[float, float], arm: DpoArm) -> PairIds:
    """The pair with its reference log-probs and the loss that they and the start model's give: at zero margin where both are one."""
    margin = (started[0] - reference[0]) - (started[1] - reference[1])
    loss = preference_loss(torch.tensor([margin], dtype=torch.float64), arm.loss, arm.beta, arm.label_smoothing)
    return replace(pair, reference=reference, first_loss=float(loss))


def start_lineage(stage: StageContext, model: str) -> Lineage:
    """The lineage of base, sft or an arm of this run, from the stage's declared inputs."""
    return Lineage(stage.recipe.model, tuple(stage.input(name, "adapter") for name in adapter_stages(stage.recipe, model)))


def adapter_stages(recipe: Any, model: str) -> list[str]:
    """Stages whose adapters make up a model, oldest first: rlaif-rlhf -> [sft, dpo-rlaif, dpo-rlaif-rlhf]."""
    if model == "base":
        return []
    if model == "sft":
        return ["sft"]
    return [*adapter_stages(recipe, recipe.arm(model).start), f"dpo-{model}"]


def check_stored_logprobs(
    preferences: list[Preference], reference: dict[str, tuple[float, float]], lineage: str, tolerance: float, arm: str
) -> int:
    """Compare the reference's log-prob of every response with the one stored when it was sampled. Returns how many were compared.

    Only responses that the reference itself wrote can be compared; for a second-stage arm (rlaif-rlhf) there are none. Raises UserError
    where a log-prob differs, or where a response that counts as the start model's own was written by another model.
    """
    compared = 0
    for preference in preferences:
        for side, response in enumerate((preference.chosen, preference.rejected)):
            if response.lineage != lineage:
                if preference.on_policy:
                    raise UserError(
                        f"dpo {arm}: response {response.id} was sampled from model {response.lineage}, this arm starts from {lineage}. The "
                        "start model or the base model's files changed since: run again with --redo sample."
                    )
                continue
            if response.logprob is None or not response.tokens or preference.id not in reference:
                continue
            difference = abs(response.logprob - reference[preference.id][side]) / len(response.tokens)
            if difference > tolerance:
                raise UserError(
                    f"dpo {arm}: response {response.id} had log-probability {response.logprob:.3f} when it was sampled, the reference gives "
                    f"{reference[preference.id][side]:.3f}. Prompt, template or weights differ from sampling: run again with --redo sample."
                )
            compared += 1
    return compared


@torch.no_grad()
def kl_to_start(policy: Any, pairs: list[PairIds], hardware: Compute, seed: int) -> float:
    """Mean KL(policy || start) a token, exact over the vocabulary, on the responses of a few pairs chosen by id hash."""
    policy.eval()
    chosen = sorted(pairs, key=lambda pair: derive_seed(seed, "kl", pair.id))[:KL_PAIRS]
    values = []
    for pair in chosen:
        _, packed, logits = score(policy, [pair], hardware)
        with policy.disable_adapter(), hardware.autocast():
            start_logits = reply_logits(policy, packed)
        values.append(token_kl(logits, start_logits))
    return float(torch.cat(values).mean())


def longer_wins(pairs: list[PairIds]) -> float:
    """How well length alone predicts the labels: share of pairs whose chosen side has more tokens, ties half."""
    return sum((len(p.chosen) > len(p.rejected)) + 0.5 * (len(p.chosen) == len(p.rejected)) for p in pairs) / len(pairs)


def warn(arm: str, metrics: list[dict[str, Any]]) -> None:
    """Advice on what usually goes wrong, from the metrics of a finished training."""
    first, last = metrics[0], metrics[-1]
    if last["chosen_logp"] < first["chosen_logp"] - 10:
        console.print(
            f"  [yellow]dpo {arm}: log p(chosen) fell by {first['chosen_logp'] - last['chosen_logp']:.0f} nats. Lower learning_rate or raise beta.[/]"
        )
    early = metrics[1 : max(2, len(metrics) // 5)]
    if (
        len(metrics) >= 10
        and early
        and all(row["accuracy"] == 1.0 for row in early)
        and math.isclose(metrics[-1]["accuracy"], 1.0)
    ):
        console.print(
            f"  [yellow]dpo {arm}: accuracy is 1.0 almost at once. Look for a trivial difference: length, finish reason, format.[/]"
        )


def _whole_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a file that a kill may have torn in its last line."""
    if not path.is_file():
        return []
    text = path.read_text()
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    return list(read_json_lines(path))
