"""Agreement between people and a grader, and between people, on the same pairs, with bootstrap intervals by prompt.

Raw agreement flatters: it is high by chance where one label is frequent, or where people favour a position. So it stands beside
the position-balanced agreement, Cohen's kappa (1960), Krippendorff's alpha and Gwet's AC1 (2008), which is stable where kappa collapses because the
labels are lopsided. Chance is to AC1 a draw among all labels: a tie counts as one where
anybody said it, else a coin among two labels would agree a third of the way beyond chance. Pure functions; nothing is read or written here.
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
BEYOND_CHANCE = ("kappa", "gwet_ac1", "alpha")


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
    couples = np.array([coincidences((row.human, row.ai)) for row in rows]).reshape(-1, 3, 3)
    for i, row in enumerate(rows):
        cells[i, CATEGORIES.index(row.human), CATEGORIES.index(row.ai)] = 1
        if "tie" not in (row.human, row.ai):
            sides[i, 0 if row.human_first else 1, 0 if row.human == row.ai else 1] = 1
    prompts = [row.prompt_id for row in rows]
    statistics: dict[str, tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]] = {
        "agreement": (raw_agreement, cells),
        "balanced_agreement": (balanced_agreement, sides),
        "kappa": (cohen_kappa, cells),
        "gwet_ac1": (gwet_ac1, cells if cells[:, 2].any() or cells[:, :, 2].any() else cells[:, :2, :2]),
        "alpha": (krippendorff_alpha, couples),
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
        result[name] = _estimate(statistic, contributions, prompts, generator(seed, "bootstrap", "agreement"))
    return result


def told(found: dict[str, Any]) -> dict[str, Any]:
    """What `compare` found, as a summary keeps it: agree, low and high of the raw agreement on n pairs that both decided; balanced; and on
    `labelled` pairs, ties included, what is left of it beyond chance: kappa, gwet_ac1, alpha. What is undefined is None.
    """
    raw = found["agreement"] or {"value": None, "low": None, "high": None}
    return {
        "agree": raw["value"],
        "n": found["both_decisive"],
        "low": raw["low"],
        "high": raw["high"],
        "balanced": found["balanced_agreement"],
        "labelled": found["n"],
        **{name: found[name] for name in BEYOND_CHANCE},
    }


def coincidences(values: Sequence[Label]) -> np.ndarray:
    """[3, 3] coincidences of one pair's labels by different people: each ordered couple counts 1 / (m - 1) (Krippendorff 2011).

    Zero where fewer than two people labelled the pair.
    """
    table = np.zeros((3, 3))
    for i, left in enumerate(values):
        for j, right in enumerate(values):
            if i != j:
                table[CATEGORIES.index(left), CATEGORIES.index(right)] += 1 / (len(values) - 1)
    return table


def krippendorff_alpha(table: np.ndarray) -> np.ndarray:
    """1 - D_o / D_e for nominal labels, from summed coincidences [..., k, k]: any number of people, missing labels allowed.

    D_o = 1 - tr(o) / n, D_e = 1 - sum_k n_k (n_k - 1) / (n (n - 1)) (Krippendorff 2011, "Computing Krippendorff's alpha-reliability").
    """
    total = table.sum(axis=(-2, -1))
    each = table.sum(axis=-1)
    observed = 1.0 - _ratio(np.trace(table, axis1=-2, axis2=-1), total)
    expected = 1.0 - _ratio((each * (each - 1.0)).sum(axis=-1), total * (total - 1.0))
    return 1.0 - _ratio(observed, expected)


def gwet_ac1_people(totals: np.ndarray) -> np.ndarray:
    """Gwet's AC1 for several people, from sums over pairs of [agreement, share of each category, 1].

    p_o: mean over pairs of sum_k r_k (r_k - 1) / (r (r - 1)); p_e as in `gwet_ac1` (Gwet 2008, eqs. 10 and 11).
    """
    observed = _ratio(totals[..., 0], totals[..., -1])
    share = _ratio(totals[..., 1:-1], totals[..., -1:])
    expected = (share * (1 - share)).sum(axis=-1) / (share.shape[-1] - 1)
    return _ratio(observed - expected, 1.0 - expected)


def between_people(units: Sequence[tuple[str, Sequence[Label]]], seed: int) -> dict[str, Any]:
    """Agreement between different people with 95% intervals by prompt: raw (both decisive), Krippendorff's alpha, Gwet's AC1.

    units: (prompt id, labels of different people on one pair); those with fewer than two labels say nothing. A statistic that is
    undefined is null.
    """
    shared = [(prompt, values) for prompt, values in units if len(values) > 1]
    tables = np.array([coincidences(values) for _, values in shared]).reshape(-1, 3, 3)
    counts = np.array([[values.count(category) for category in CATEGORIES] for _, values in shared], dtype=float).reshape(-1, 3)
    raters = counts.sum(axis=-1)
    shares = np.column_stack(
        [
            _ratio((counts * (counts - 1)).sum(axis=-1), raters * (raters - 1)),
            _ratio(counts if counts[:, 2].any() else counts[:, :2], raters[:, None]),
            np.ones(len(shared)),
        ]
    )
    statistics: dict[str, tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]] = {
        "agreement": (raw_agreement, tables),
        "alpha": (krippendorff_alpha, tables),
        "gwet_ac1": (gwet_ac1_people, shares),
    }
    result: dict[str, Any] = {"n": len(shared), "prompts": len({prompt for prompt, _ in shared})}
    for name, (statistic, rows) in statistics.items():
        result[name] = _estimate(statistic, rows, [prompt for prompt, _ in shared], generator(seed, "bootstrap", "people", name))
    return result


def _estimate(
    statistic: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, groups: Sequence[str], random: np.random.Generator
) -> dict[str, float] | None:
    value = float(statistic(rows.sum(axis=0))) if len(rows) else float("nan")
    if not np.isfinite(value):
        return None
    low, high = cluster_bootstrap(statistic, rows, groups, random)
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0 (up to rounding: 1 - p_e may miss 0 by an ulp)."""
    above, below = np.broadcast_arrays(np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64))
    result = np.full(above.shape, np.nan)
    np.divide(above, below, out=result, where=np.abs(below) > 1e-12)
    return result
