"""How far to trust a grader on labelled pairs: accuracy with its interval, at equal length, calibration, position, length, speed.

`take` asks a grader, `summarise` turns its answers into numbers; neither reads or writes a file. The same numbers stand for the
baselines (longer wins, first position, coin). An answer that is missing is left out of every rate and counted; a tie counts one
half. People's ties have no right answer: they are left out of accuracy and stand in the agreement with people.

accuracy_equal_length: both texts cut to the words of the shorter one, and graded again. accuracy_length_matched: only pairs whose
lengths differ by at most a tenth. length_slope: log-odds of winning a pair for each unit of log length (logistic regression without
intercept, as for the graders themselves); people's own slope stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from suasion.errors import UserError
from suasion.grading.base import BASELINES, LONGER_WINS, Comparison, Grader, Judgement, Served, fit_bradley_terry
from suasion.grading.features import word_count
from suasion.grading.labelled import LabelledPair
from suasion.grading.measure import cluster_interval, fold_assignment
from suasion.labeling.agreement import Labelled, compare

BINS = 10
MATCHED = 0.1
SLOPE_RIDGE = 1.0  # keeps the slope of "longer wins" finite


@dataclass(frozen=True)
class Taken:
    """A grader's answers on the same pairs: as given, the other way round (told as of the given order), and cut to equal length.

    seconds: for the pairs as given, without training.
    """

    given: list[Judgement]
    swapped: list[Judgement]
    equal: list[Judgement]
    seconds: float


def take(grader: Grader, pairs: Sequence[LabelledPair]) -> Taken:
    """Ask a grader for everything that the bench needs."""
    items = [pair.item for pair in pairs]
    turned, equal = [item.swapped() for item in items], [pair.equal_length() for pair in pairs]
    if isinstance(grader, Served):
        grader.estimate(items, turned, equal)
    began = time.perf_counter()
    given = grader.grade(items)
    seconds = time.perf_counter() - began
    swapped = [one.swapped() for one in grader.grade(turned)]
    return Taken(given, swapped, grader.grade(equal), seconds)


def cross_taken(
    train: Callable[[Sequence[LabelledPair]], Grader], pairs: Sequence[LabelledPair], folds: int, seed: int
) -> tuple[Taken, int, float]:
    """(answers, folds, seconds of training): each pair is judged by a grader that has seen no pair of its group.

    Raises UserError where there are fewer than two groups.
    """
    fold_of = np.array(fold_assignment([pair.group for pair in pairs], folds, seed))
    used = int(fold_of.max()) + 1
    if used < 2:
        raise UserError("all pairs are of one group, so that nothing can be held out. Give pairs of several posters or topics.")
    found: list[tuple[int, Judgement, Judgement, Judgement]] = []
    seconds = training = 0.0
    for fold in range(used):
        began = time.perf_counter()
        grader = train([pair for pair, k in zip(pairs, fold_of, strict=True) if k != fold])
        training += time.perf_counter() - began
        held_out = np.flatnonzero(fold_of == fold).tolist()
        part = take(grader, [pairs[i] for i in held_out])
        del grader  # it may hold a language model: not two at once
        seconds += part.seconds
        found.extend(zip(held_out, part.given, part.swapped, part.equal, strict=True))
    found.sort(key=lambda row: row[0])
    return (
        Taken([row[1] for row in found], [row[2] for row in found], [row[3] for row in found], seconds),
        used,
        training,
    )


def summarise(pairs: Sequence[LabelledPair], taken: Taken, seed: int) -> dict[str, Any]:
    """Every number of one grader. Rates are null where nothing was scored; n counts pairs, scored the answers that accuracy rests on."""
    right = points(pairs, taken.given)
    equal = points(pairs, taken.equal)
    matched = np.where([is_matched(pair.item) for pair in pairs], right, np.nan)
    groups = [pair.group for pair in pairs]
    accuracy, equal_accuracy, matched_accuracy = (_mean_with_interval(values, groups, seed) for values in (right, equal, matched))
    confidence, correct, brier = calibration_rows(pairs, taken.given)
    return {
        "n": len(pairs),
        "scored": accuracy["n"],
        "accuracy": accuracy["value"],
        "low": accuracy["low"],
        "high": accuracy["high"],
        "accuracy_equal_length": equal_accuracy["value"],
        "equal_length_low": equal_accuracy["low"],
        "equal_length_high": equal_accuracy["high"],
        "accuracy_length_matched": matched_accuracy["value"],
        "length_matched_low": matched_accuracy["low"],
        "length_matched_high": matched_accuracy["high"],
        "length_matched_n": matched_accuracy["n"],
        "brier": round(float(brier.mean()), 4) if len(brier) else None,
        "ece": expected_calibration_error(confidence, correct),
        "first_rate": first_rate(taken),
        "swap_consistency": swap_consistency(taken),
        "length_slope": length_slope(pairs, [one.label for one in taken.given]),
        "ties": sum(one.label == "tie" for one in taken.given),
        "missing": sum(one.label == "none" for one in taken.given),
        "outcomes": outcomes(taken.given),
        "cost": round(sum(one.cost for one in taken.given), 6),
        "seconds": round(taken.seconds, 3),
    }


def baselines(pairs: Sequence[LabelledPair], seed: int) -> dict[str, dict[str, Any]]:
    """The same numbers for every baseline, by its name."""
    return {baseline.kind: summarise(pairs, take(baseline, pairs), seed) for baseline in BASELINES}


def over_longer(pairs: Sequence[LabelledPair], judged: Sequence[Judgement], seed: int) -> dict[str, Any]:
    """{value, low, high, n}: accuracy less that of "longer wins" on the same pairs. The interval is of the difference itself: two intervals of
    accuracies on the same pairs may overlap although every draw of groups favours one side.
    """
    longer = points(pairs, LONGER_WINS.grade([pair.item for pair in pairs]))
    return _mean_with_interval(points(pairs, judged) - longer, [pair.group for pair in pairs], seed)


def points(pairs: Sequence[LabelledPair], judged: Sequence[Judgement]) -> np.ndarray:
    """[n]: 1 where the preferred text is named, .5 for a tie, 0 where the other is; NaN where there is no answer or people tied."""
    return np.array(
        [
            np.nan
            if pair.label == "tie" or one.label == "none"
            else 0.5
            if one.label == "tie"
            else float(one.label == pair.label)
            for pair, one in zip(pairs, judged, strict=True)
        ],
        dtype=np.float64,
    )


def calibration_rows(pairs: Sequence[LabelledPair], judged: Sequence[Judgement]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(confidence, correct, Brier score) of each decided pair with a probability, each [m].

    confidence: max(p, 1 - p); correct: whether that side was preferred, .5 at p = .5; Brier: (P(preferred) - 1)^2 (Brier 1950).
    """
    rows = [
        (one.p_a if pair.label == "a" else 1.0 - one.p_a)
        for pair, one in zip(pairs, judged, strict=True)
        if pair.label != "tie" and one.p_a is not None and one.label != "none"
    ]
    preferred = np.array(rows, dtype=np.float64)
    correct = np.where(preferred == 0.5, 0.5, (preferred > 0.5).astype(np.float64))
    return np.maximum(preferred, 1.0 - preferred), correct, (1.0 - preferred) ** 2


def reliability_bins(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float | int]]:
    """Ten bins of equal width over [.5, 1]: how sure the grader was, how often it was right, and how many pairs; empty bins are left out."""
    index = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": round(float(confidence[index == k].mean()), 4),
            "accuracy": round(float(correct[index == k].mean()), 4),
            "n": int((index == k).sum()),
        }
        for k in range(BINS)
        if (index == k).any()
    ]


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float | None:
    """sum over bins of n_k / n |accuracy_k - confidence_k| (Naeini et al. 2015; Guo et al. 2017, eq. 3); None without probabilities."""
    if not len(confidence):
        return None
    bins = reliability_bins(confidence, correct)
    return round(sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / len(confidence), 4)


def first_rate(taken: Taken) -> float | None:
    """How often the text shown first was named, over both orders and decisive answers: .5 for a grader that ignores position.

    A grader that combines two orders is asked for its answers to each order.
    """
    shown: list[bool] = []
    for given, swapped in zip(taken.given, taken.swapped, strict=True):
        single = given.orders if given.orders else (given, swapped)
        for one, first in zip(single, ("a", "b"), strict=False):
            if one.label in ("a", "b"):
                shown.append(one.label == first)
    return round(sum(shown) / len(shown), 4) if shown else None


def swap_consistency(taken: Taken) -> float | None:
    """Share of pairs with two answers on which both orders name the same text, or both call a tie."""
    both = [
        (given.orders if given.orders else (given, swapped)) for given, swapped in zip(taken.given, taken.swapped, strict=True)
    ]
    answered = [
        (one.label, other.label)
        for one, other in (pair for pair in both if len(pair) == 2)
        if "none" not in (one.label, other.label)
    ]
    return round(sum(one == other for one, other in answered) / len(answered), 4) if answered else None


def length_slope(pairs: Sequence[LabelledPair], labels: Sequence[str]) -> float | None:
    """Log-odds of winning for each unit of log words, from labels a or b; None where none is decisive or no lengths differ."""
    rows = []
    for pair, label in zip(pairs, labels, strict=True):
        if label in ("a", "b"):
            difference = np.log1p(word_count(pair.item.a)) - np.log1p(word_count(pair.item.b))
            rows.append(difference if label == "a" else -difference)
    differences = np.array(rows)[:, None] if rows else np.zeros((0, 1))
    if len(rows) < 2 or not differences.any():
        return None
    return round(float(fit_bradley_terry(differences, SLOPE_RIDGE)[0]), 4)


def outcomes(judged: Sequence[Judgement]) -> dict[str, int]:
    """How the two orders relate, counted; empty for graders that cannot tell positions apart."""
    found = [one.outcome for one in judged if one.outcome]
    return {name: found.count(name) for name in ("consistent", "flip", "tie", "none")} if found else {}


def is_matched(item: Comparison) -> bool:
    """Whether the two lengths in words differ by at most a tenth of the longer one."""
    left, right = word_count(item.a), word_count(item.b)
    return abs(left - right) <= MATCHED * max(left, right, 1)


def agreement(pairs: Sequence[LabelledPair], judged: Sequence[Judgement], seed: int) -> dict[str, Any]:
    """Agreement with the labels, ties included, with intervals by group (`suasion.labeling.agreement`)."""
    rows = [
        Labelled(pair.group, pair.label, one.label, pair.label == "a")
        for pair, one in zip(pairs, judged, strict=True)
        if one.label != "none"
    ]
    return compare(rows, seed)


def _mean_with_interval(values: np.ndarray, groups: Sequence[str], seed: int) -> dict[str, Any]:
    seen = ~np.isnan(values)
    if not seen.any():
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = cluster_interval(values[seen], [group for group, kept in zip(groups, seen, strict=True) if kept], seed)
    return {"value": round(float(values[seen].mean()), 4), "low": round(low, 4), "high": round(high, 4), "n": int(seen.sum())}
