"""What every arm's first optimiser step must have shown, and whose log-probabilities a training took for its reference.

The fresh adapter changes nothing, so that the first loss follows from what the start and the reference model give the pairs of the first
step: ln 2 (IPO: 1/(4 beta^2)) where both are one model, else the mean loss of those pairs at the margins in `start.jsonl` and
`reference.jsonl`. The base against itself would give ln 2 too: hence the second check, that a response's log-probability under the
model that wrote it is the one stored when it was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from suasion.records import Preference, Response, read_json_lines, read_rows
from suasion.rundir import Manifest
from suasion.sections.training import DpoArm
from suasion.training.losses import logprob_tolerance, loss_rounding
from suasion.training.pairs import Logprobs, first_loss, target
from suasion.training.steps import EpochOrder, training_seed
from suasion.verifying.evidence import Evidence


def first_losses(run: Evidence) -> Iterator[str]:
    """Arms whose first loss, or whose log-probabilities of what was sampled, are not what they must be."""
    for arm, manifest in run.arms():
        rows = {row.id: row for row in read_rows(run.path("preferences", f"{arm.name}.jsonl"), Preference)}
        reference = _logprobs(run, arm, "reference.jsonl")
        own = arm.reference in ("start", arm.start)
        started = reference if own else _logprobs(run, arm, "start.jsonl")
        if not reference.keys() == started.keys() <= rows.keys():
            yield f"dpo {arm.name}: its log-probs are not of the pairs in preferences/{arm.name}.jsonl"
            continue
        if own or can_be_computed(arm, rows.values()):
            yield from _first_step(run, arm, manifest, rows, started, reference)
        for whose, lineage, known in (("start", "start_lineage", started), ("reference", "reference_lineage", reference)):
            if whose == "start" or not own:
                yield from _stored(run, arm, manifest, list(rows.values()), known, whose, manifest.facts[lineage])


def can_be_computed(arm: DpoArm, rows: Iterable[Preference]) -> bool:
    """Whether the first loss of an arm with another reference follows from its rows alone.

    The length-normalised loss divides by numbers of tokens, which imported texts do not tell without the model's tokenizer.
    """
    return arm.loss != "length-normalised" or all(side.tokens is not None for row in rows for side in (row.chosen, row.rejected))


def not_told(run: Evidence) -> Iterator[str]:
    """Arms whose first loss could not be checked."""
    for arm, _ in run.arms():
        other = arm.reference not in ("start", arm.start)
        if other and not can_be_computed(arm, read_rows(run.path("preferences", f"{arm.name}.jsonl"), Preference)):
            yield f"not told of {arm.name}: its loss needs the token counts of imported texts"


def _logprobs(run: Evidence, arm: DpoArm, file: str) -> dict[str, Logprobs]:
    return {row.pop("id"): Logprobs(**row) for _, row in read_json_lines(run.path(f"dpo-{arm.name}", file))}


def _first_step(
    run: Evidence,
    arm: DpoArm,
    manifest: Manifest,
    rows: dict[str, Preference],
    started: dict[str, Logprobs],
    reference: dict[str, Logprobs],
) -> Iterator[str]:
    """The first loss is the weighted mean over the pairs of the first step, within what rounding may do to a mean."""
    order = EpochOrder(list(reference), arm.batch_size, training_seed(run.recipe.seed, f"dpo-{arm.name}"))
    batch = [rows[list(reference)[place]] for place in next(iter(order))]
    lengths = [(_tokens(row.chosen, arm), _tokens(row.rejected, arm)) for row in batch]
    losses = [
        first_loss(started[row.id], reference[row.id], length, target(row, arm), arm)
        for row, length in zip(batch, lengths, strict=True)
    ]
    allowed = loss_rounding(
        torch.tensor(lengths, dtype=torch.float64),
        manifest.dtype,
        arm.loss,
        arm.beta,
        torch.tensor(losses, dtype=torch.float64),
        arm.label_smoothing,
    ).tolist()
    total = sum(row.weight for row in batch)
    expected = sum(row.weight * loss for row, loss in zip(batch, losses, strict=True)) / total
    rounding = math.sqrt(sum((row.weight * one) ** 2 for row, one in zip(batch, allowed, strict=True))) / total
    first = next(row["loss"] for _, row in read_json_lines(run.path(f"dpo-{arm.name}", "metrics.jsonl")))
    if not abs(first - expected) <= rounding:
        yield f"dpo {arm.name}: first loss {first:.6f}, expected {expected:.6f} within {rounding:.6f}"


def _stored(
    run: Evidence,
    arm: DpoArm,
    manifest: Manifest,
    rows: Sequence[Preference],
    known: dict[str, Logprobs],
    whose: str,
    lineage: str,
) -> Iterator[str]:
    """What a model gives a response that it wrote itself is what it gave when it wrote it."""
    for row in rows:
        for side, response in enumerate((row.chosen, row.rejected)):
            if whose == "start" and row.on_policy and response.lineage != lineage:
                yield f"dpo {arm.name}: response {response.id} counts as the start model's own, another model wrote it"
            if response.lineage != lineage or row.id not in known or response.logprob is None or not response.tokens:
                continue
            allowed = logprob_tolerance(len(response.tokens), manifest.dtype, run.recipe.sample)
            if not abs(known[row.id].sums()[side] - response.logprob) <= allowed:
                yield f"dpo {arm.name}: the {whose} model's log-prob of response {response.id} is not the one stored when it was sampled"


def _tokens(response: Response, arm: DpoArm) -> int:
    """Tokens of a response. Where its ids are not known, a bound on the side that allows more: no token is empty, no word has none."""
    if response.tokens is not None:
        return len(response.tokens)
    return max(1, len(response.text.split())) if arm.loss == "length-normalised" else len(response.text.encode()) + 1
