"""How far to trust a trained grader: grouped cross-validation on the pairs it learns from, beside "longer wins".

All pairs of one group (a poster, a topic) lie in one fold, so that no grader is tested on somebody it was trained on. Accuracy
comes with a cluster bootstrap over groups: pairs of one group are not independent. Nothing is read or written here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from suasion.errors import UserError
from suasion.grading.base import LONGER_WINS, Comparison, Grader, Judgement
from suasion.grading.pairs import TrainingPair
from suasion.seeding import derive_seed, generator

BOOTSTRAP = 2000
CONFIDENCE = 0.95
FOLDS = 5


@dataclass(frozen=True)
class Measurement:
    """Accuracy on held-out groups: the share of pairs whose winner is named, a tie counting one half.

    Pairs without an answer are left out; scored counts the others. low, high: percentile interval of a cluster bootstrap by group. brier: mean of (1 - P(winner))^2, .25 for a coin that says
    .5. longer: the accuracy of "longer wins" on the same pairs.
    """

    accuracy: float
    low: float
    high: float
    brier: float
    n: int
    scored: int
    groups: int
    folds: int
    longer: float
    longer_low: float
    longer_high: float

    def as_facts(self) -> dict[str, float | int]:
        """Rounded, for a manifest."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def cross_validate(
    train: Callable[[Sequence[TrainingPair]], Grader], pairs: Sequence[TrainingPair], seed: int, folds: int = FOLDS
) -> Measurement:
    """Cross-validate by group what `train` makes of pairs. Raises UserError with fewer than two groups: nothing can be held out."""
    fold_of = fold_assignment([pair.group for pair in pairs], folds, seed)
    used = max(fold_of, default=-1) + 1
    if used < 2:
        raise UserError(
            f"the grader's {len(pairs)} training pairs come from fewer than two groups (posters or topics), so that its accuracy "
            "cannot be measured. Give it pairs of more conversations."
        )
    judged: dict[int, Judgement] = {}
    for fold in range(used):
        grader = train([pair for pair, k in zip(pairs, fold_of, strict=True) if k != fold])
        held_out = [i for i, k in enumerate(fold_of) if k == fold]
        judged.update(zip(held_out, judge_pairs(grader, [pairs[i] for i in held_out], seed), strict=True))
        del grader  # it may hold a language model: not two at once
    return score(pairs, [judged[i] for i in range(len(pairs))], used, seed)


def measure_on(grader: Grader, pairs: Sequence[TrainingPair], seed: int) -> Measurement:
    """The same numbers for a grader that has never seen these pairs (folds: 0)."""
    return score(pairs, judge_pairs(grader, pairs, seed), 0, seed)


def fold_assignment(groups: Sequence[str], folds: int, seed: int) -> list[int]:
    """A fold for each row: groups in a seeded order, each into the fold that has fewest rows so far."""
    sizes: dict[str, int] = defaultdict(int)
    for group in groups:
        sizes[group] += 1
    filled = [0] * min(folds, len(sizes))
    fold_of = {}
    for group in sorted(sizes, key=lambda name: (derive_seed(seed, "folds", name), name)):
        fold = filled.index(min(filled))
        fold_of[group] = fold
        filled[fold] += sizes[group]
    return [fold_of[group] for group in groups]


def judge_pairs(grader: Grader, pairs: Sequence[TrainingPair], seed: int) -> list[Judgement]:
    """Judgements in which `a` is the winner; each pair is shown in a seeded order, so that position cannot help."""
    shown = as_comparisons(pairs, seed)
    return [
        judged if item.a == pair.winner else judged.swapped()
        for pair, item, judged in zip(pairs, shown, grader.grade(shown), strict=True)
    ]


def as_comparisons(pairs: Sequence[TrainingPair], seed: int) -> list[Comparison]:
    """Each pair in the order in which it is shown: seeded by its content."""
    items = [Comparison(pair.context, pair.winner, pair.loser) for pair in pairs]
    return [item.swapped() if derive_seed(seed, "shown", item.context, item.a, item.b) % 2 == 1 else item for item in items]


def score(pairs: Sequence[TrainingPair], judged: Sequence[Judgement], folds: int, seed: int) -> Measurement:
    """Accuracy, Brier and intervals of judgements in which `a` is the winner. Raises UserError where none was answered."""
    asked = len(pairs)
    answered = [(pair, one) for pair, one in zip(pairs, judged, strict=True) if one.label != "none"]
    if not answered:
        raise UserError(
            f"the grader answered none of {asked} pairs that it was to be measured on: {judged[0].reason if judged else ''}"
        )
    pairs, judged = [pair for pair, _ in answered], [one for _, one in answered]
    groups = [pair.group for pair in pairs]
    right = points(judged)
    longer = points(LONGER_WINS.grade([Comparison(pair.context, pair.winner, pair.loser) for pair in pairs]))
    low, high = cluster_interval(right, groups, seed)
    longer_low, longer_high = cluster_interval(longer, groups, seed)
    probabilities = np.array([0.5 if one.p_a is None else one.p_a for one in judged])
    return Measurement(
        accuracy=float(right.mean()),
        low=low,
        high=high,
        brier=float(np.mean((1.0 - probabilities) ** 2)),
        n=asked,
        scored=len(pairs),
        groups=len(set(groups)),
        folds=folds,
        longer=float(longer.mean()),
        longer_low=longer_low,
        longer_high=longer_high,
    )


def points(judged: Sequence[Judgement]) -> np.ndarray:
    """[n]: 1 where `a`, the winner, is named, .5 for a tie, else 0."""
    return np.array([{"a": 1.0, "b": 0.0}.get(one.label, 0.5) for one in judged])


def cluster_interval(values: np.ndarray, groups: Sequence[str], seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` [n] when whole groups are drawn with replacement."""
    rows = np.column_stack([values, np.ones(len(values))])
    return cluster_bootstrap(
        lambda totals: totals[..., 0] / totals[..., 1], rows, groups, generator(seed, "bootstrap", "accuracy")
    )


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, groups: Sequence[str], random: np.random.Generator
) -> tuple[float, float]:
    """95% percentile interval of a statistic of column totals, when whole groups are drawn with replacement (Efron & Tibshirani 1993).

    rows: [n, ...] what each row adds to the totals; statistic: totals [repetitions, ...] -> [repetitions], NaN where undefined.
    """
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    count = int(member.max()) + 1
    sums = np.zeros((count, *rows.shape[1:]))
    np.add.at(sums, member, rows)
    drawn = random.multinomial(count, np.full(count, 1.0 / count), size=BOOTSTRAP).astype(np.float64)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(statistic(np.tensordot(drawn, sums, axes=1)), [tail, 100 - tail])
    return float(low), float(high)
