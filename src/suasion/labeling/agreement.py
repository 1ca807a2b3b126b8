"""Agreement between people and a grader on the same pairs, with bootstrap intervals by prompt.

Raw agreement flatters: it is high by chance where one label is frequent, or where people favour a position. So it stands beside
the position-balanced agreement, Cohen's kappa (1960) and Gwet's AC1 (2008), which is stable where kappa collapses because the
labels are lopsided. Pure functions; nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from suasion.grading.measure import cluster_bootstrap
from suasion.records import Label
from suasion.seeding import generator

CATEGORIES: tuple[Label, ...] = ("a", "b", "tie")


@dataclass(frozen=True)
class Labelled:
    """One pair with both labels, in the pair's own order. human_first: did the person choose the response shown first."""

    prompt_id: str
    human: Label
    ai: Label
    human_first: bool


def raw_agreement(table: np.ndarray) -> np.ndarray:
    """Share of equal labels where both are decisive. table: [..., 3, 3] counts, human by grader; NaN where there is none."""
    decisive = table[..., :2, :2]
    return _ratio(np.trace(decisive, axis1=-2, axis2=-1), decisive.sum(axis=(-2, -1)))


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """(p_o - p_e) / (1 - p_e), p_e = sum_k p_k+ p_+k, over all categories of table [..., k, k]."""
    total = table.sum(axis=(-2, -1))
    observed = _ratio(np.trace(table, axis1=-2, axis2=-1), total)
    expected = _ratio((table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1), total**2)
    return _ratio(observed - expected, 1.0 - expected)


def gwet_ac1(table: np.ndarray) -> np.ndarray:
    """(p_o - p_e) / (1 - p_e), p_e = sum_k q_k (1 - q_k) / (K - 1), q_k the mean share of category k (Gwet 2008, eq. 6)."""
    total = table.sum(axis=(-2, -1))
    observed = _ratio(np.trace(table, axis1=-2, axis2=-1), total)
    share = _ratio((table.sum(axis=-1) + table.sum(axis=-2)) / 2, total[..., None])
    expected = (share * (1 - share)).sum(axis=-1) / (table.shape[-1] - 1)
    return _ratio(observed - expected, 1.0 - expected)


def balanced_agreement(sides: np.ndarray) -> np.ndarray:
    """Mean of the agreement where people chose the first and where they chose the second position.

    sides: [..., 2, 2] counts of decisive pairs, position chosen by (agreed, disagreed). A person who always takes the first
    position has no balanced agreement with anybody; a grader that ignores position cannot gain from people who favour one.
    """
    return np.asarray(_ratio(sides[..., 0], sides.sum(axis=-1)).mean(axis=-1))


def compare(rows: Sequence[Labelled], seed: int) -> dict[str, Any]:
    """All statistics with 95% intervals, for agreement.json. A statistic that is undefined is null.

    rows: pairs with a label (a, b or tie) from both sides; missing labels are not rows.
    """
    cells = np.zeros((len(rows), 3, 3))
    sides = np.zeros((len(rows), 2, 2))  # position the person chose, agreed or not
    for i, row in enumerate(rows):
        cells[i, CATEGORIES.index(row.human), CATEGORIES.index(row.ai)] = 1
        if "tie" not in (row.human, row.ai):
            sides[i, 0 if row.human_first else 1, 0 if row.human == row.ai else 1] = 1
    prompts = [row.prompt_id for row in rows]
    statistics: dict[str, tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]] = {
        "agreement": (raw_agreement, cells),
        "balanced_agreement": (balanced_agreement, sides),
        "kappa": (cohen_kappa, cells),
        "gwet_ac1": (gwet_ac1, cells),
    }
    result: dict[str, Any] = {
        "n": len(rows),
        "prompts": len(set(prompts)),
        "both_decisive": int(cells[:, :2, :2].sum()),
        "table": {
            human: {ai: int(cells[:, i, j].sum()) for j, ai in enumerate(CATEGORIES)} for i, human in enumerate(CATEGORIES)
        },
    }
    for name, (statistic, contributions) in statistics.items():
        value = float(statistic(contributions.sum(axis=0))) if rows else float("nan")
        if not np.isfinite(value):
            result[name] = None
            continue
        low, high = cluster_bootstrap(statistic, contributions, prompts, generator(seed, "bootstrap", "agreement"))
        result[name] = {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}
    return result


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0 (up to rounding: 1 - p_e may miss 0 by an ulp)."""
    above, below = np.broadcast_arrays(np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64))
    result = np.full(above.shape, np.nan)
    np.divide(above, below, out=result, where=np.abs(below) > 1e-12)
    return result
