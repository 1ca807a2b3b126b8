"""One run of the bench: build or cross-validate the grader, ask it, and put its numbers beside those of the baselines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from suasion.errors import UserError
from suasion.grading.base import Grader
from suasion.grading.bench import Taken, agreement, baselines, cross_taken, length_slope, over_longer, summarise, take
from suasion.grading.build import build_grader
from suasion.grading.embedding import GRID
from suasion.grading.labelled import LabelledPair, without
from suasion.grading.pairs import TrainingPair, load_training_pairs
from suasion.progress import console
from suasion.sections import grading as sections
from suasion.sections.grading import learns_from, members_of, settings_of


def run_bench(
    spec: sections.AnyGrader,
    tested: Sequence[LabelledPair],
    training: Sequence[LabelledPair] | None,
    folds: int,
    seed: int,
    scope: str = "",
) -> tuple[dict[str, Any], Taken]:
    """(bench.json without the reliability bins, answers).

    training: pairs that replace the grader's own; those that are tested too are left out, and counted. folds: 0, or cross-validate
    by group on `tested` (a language model learns nothing here, so that it is asked once and folds is 0). Raises UserError where there is nothing to train on or to hold out.
    """

    def trained_on(pairs: Sequence[LabelledPair]) -> Grader:
        taught = teaching(pairs)
        return build_grader(spec, lambda _: taught, seed, scope, in_fold=folds > 0)

    used, shared_pairs = 0, 0
    shared_groups: set[str] = set()
    if folds and learns_from(spec) is not None:
        taken, used, training_seconds = cross_taken(trained_on, tested, folds, seed)
    else:
        began = time.perf_counter()
        if training is None:
            grader = build_grader(spec, own_training, seed, scope)
        else:
            kept = without(training, tested)
            shared_pairs = len(training) - len(kept)
            shared_groups = {pair.group for pair in kept} & {pair.group for pair in tested}
            grader = trained_on(kept)
        training_seconds = time.perf_counter() - began
        taken = take(grader, tested)
    if shared_pairs or shared_groups:
        console.print(
            f"  [yellow]note:[/] {shared_pairs} pairs of --train are tested too and were left out of training; {len(shared_groups)} groups "
            "stand on both sides, so that the accuracy may flatter."
        )
    return {
        "format": "bench/1",
        "grader": spec.kind,
        "settings": settings_of(spec),
        "seed": seed,
        "folds": used,
        "groups": len({pair.group for pair in tested}),
        "labels": {label: sum(pair.label == label for pair in tested) for label in ("a", "b", "tie")},
        "shared_pairs": shared_pairs,
        "shared_groups": len(shared_groups),
        "length_slope_labels": length_slope(tested, [pair.label for pair in tested]),
        "configurations": configurations(spec),
        "training_seconds": round(training_seconds, 3),
        **summarise(tested, taken, seed),
        "over_longer": over_longer(tested, taken.given, seed),
        "baselines": baselines(tested, seed),
        "agreement": agreement(tested, taken.given, seed),
    }, taken


def configurations(spec: sections.AnyGrader) -> int:
    """How many settings are compared inside one training, on its training pairs alone: those of every grader in it that tunes itself, else 1."""
    return max(1, sum(len(GRID) for one in members_of(spec) if isinstance(one, sections.EmbeddingGrader) and one.tune))


def teaching(pairs: Sequence[LabelledPair]) -> list[TrainingPair]:
    """What a grader can learn from labelled pairs: ties, equal and empty texts are left out."""
    return [taught for pair in pairs if (taught := pair.trains()) is not None]


def own_training(data: sections.PairData) -> Sequence[TrainingPair]:
    """The data that a grader file names. Raises UserError for a run's own pairs: outside of a run there are none."""
    if data.kind in ("grader_pairs", "judge_pairs"):
        raise UserError(
            f"this grader learns from a run's own {data.kind}.jsonl. Give it pairs with --train PAIRS, or cross-validate with --folds 5."
        )
    return load_training_pairs(data, None, None)
