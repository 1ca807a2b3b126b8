"""Several training runs of one recipe, differing in the seed, as one answer: pure functions on estimates.

An interval of a single run covers prompts, not training runs. With several runs the spread between them is seen and enters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

FEWEST_FOR_RUNS = 3  # seeds from which on an interval is said to cover training runs


@dataclass(frozen=True)
class Pooled:
    """Win rate over k training runs. between: standard deviation of the runs' true rates; within: mean standard error by prompts."""

    value: float | None
    low: float | None
    high: float | None
    runs: int
    between: float | None
    within: float | None
    reason: str = ""


def pool(estimates: Sequence[dict[str, Any]], same_prompts: bool, confidence: float) -> Pooled:
    """Mean over training runs with a t interval of k - 1 degrees of freedom.

    estimates: value, low, high of each run. The variance of the k values, s^2, holds the spread between runs and, where every run
    had its own prompts, that of prompts: se^2 = s^2 / k. On the same prompts the prompts' share is common to all runs and is
    added: se^2 = s^2 / k + w^2, w the mean standard error within a run (half an interval over its normal quantile). The spread
    between runs alone is sqrt(max(0, s^2 - w^2)), the moment estimator of a random-effects model (DerSimonian & Laird 1986) with equal weights.
    """
    known = [e for e in estimates if e["value"] is not None]
    if not known:
        return Pooled(None, None, None, 0, None, None, "no run has this comparison")
    values = np.array([e["value"] for e in known])
    widths = [(e["high"] - e["low"]) / 2 / stats.norm.ppf((1 + confidence) / 2) for e in known if e["low"] is not None]
    within = float(np.mean(widths)) if widths else None
    mean = float(values.mean())
    if len(values) < 2:
        return Pooled(mean, None, None, 1, None, within, "one run: nothing is known of the spread between training runs")
    spread = float(values.var(ddof=1))
    between = math.sqrt(max(0.0, spread - within**2)) if within is not None else None
    if same_prompts and within is None:
        return Pooled(mean, None, None, len(values), between, within, "no interval: the runs have none of their own")
    error = math.sqrt(spread / len(values) + (within**2 if same_prompts and within is not None else 0.0))
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return Pooled(mean, max(0.0, mean - reach), min(1.0, mean + reach), len(values), between, within)
