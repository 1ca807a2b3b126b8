"""The statistics as a procedure, by simulation: coverage of intervals, type-I error of the whole family, power as planned.

The slow test repeats each experiment 2,000 times at 115 and 50 prompts; its fast twin 200 times. Bounds are the issue's (93-97%, not
significantly above 5%) where the number of repetitions can show them, and binomial limits around them in the twin.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from suasion.evaluation.power import detectable_win_rate, equivalence_power
from suasion.evaluation.statistics import (
    holm,
    is_equivalent,
    mean_estimate,
    prediction_powered,
    real_mean_estimate,
    resample_weights,
    sign_flip_p,
)
from suasion.seeding import generator

FAMILY = 6  # five trained models against base, and rlaif-matched against rlhf


def draw(rng: np.random.Generator, n: int, win: float, ties: float) -> np.ndarray:
    """Scores with expectation `win`, of which a share are ties."""
    decided = (win - ties / 2) / (1 - ties)
    return np.where(rng.random(n) < ties, 0.5, (rng.random(n) < decided).astype(float))


def correlated(rng: np.random.Generator, n: int) -> np.ndarray:
    """(FAMILY, n) null scores that share the prompt: all models of a prompt meet the same base response, as in a run."""
    shared = rng.random(n) < 0.5
    own = rng.random((FAMILY, n)) < 0.5
    return np.where(rng.random((FAMILY, n)) < 0.4, shared, own).astype(float)


def significantly_above(hits: int, repetitions: int, rate: float) -> bool:
    return stats.binomtest(hits, repetitions, rate, alternative="greater").pvalue < 0.01


def simulate(n: int, repetitions: int) -> dict[str, float]:
    """How often each promise is kept at n prompts."""
    rng = generator(0, "simulation", n, repetitions)
    weights, clusters = resample_weights(n, 1000, rng), np.arange(n)
    kept: dict[str, list[bool]] = {}

    def note(name: str, value: bool) -> None:
        kept.setdefault(name, []).append(bool(value))

    rates = {"one": detectable_win_rate(n), "family": detectable_win_rate(n, comparisons=FAMILY)}
    margin = 0.1
    for _ in range(repetitions):
        for win, ties in ((0.5, 0.1), (0.62, 0.2), (0.75, 0.0)):
            got = mean_estimate(draw(rng, n, win, ties), clusters, weights, 0.95)
            note(f"cover {win}", got.low <= win <= got.high)
        lengths = rng.exponential(1.0, n) - rng.exponential(1.5, n)
        real = real_mean_estimate(lengths, clusters, weights, 0.95)
        note("cover real", real.low <= -0.5 <= real.high)
        grader = draw(rng, n, 0.65, 0.0)
        people = np.where(rng.random(n) < 0.7, grader, 1 - grader)  # true rate in people's eyes: .65 x .7 + .35 x .3
        people[rng.random(n) < 0.35] = np.nan
        corrected = prediction_powered(grader, people, clusters, weights, 0.95)
        if corrected.value is not None:
            note("cover corrected", corrected.low <= 0.56 <= corrected.high)
        null = [sign_flip_p(scores, clusters) for scores in correlated(rng, n)]
        note("type I of the family", min(p for p in holm(null) if p is not None) <= 0.05)
        for name, rate in rates.items():
            level = 0.05 if name == "one" else 0.05 / FAMILY
            note(f"power {name}", sign_flip_p((rng.random(n) < rate).astype(float), clusters) <= level)
        even = draw(rng, n, 0.5, 0.3)
        note("equivalence", is_equivalent(mean_estimate(even, clusters, weights, 0.9), margin))
        edge = draw(rng, n, 0.5 + margin, 0.3)
        note("false equivalence", is_equivalent(mean_estimate(edge, clusters, weights, 0.9), margin))
    return {name: float(np.mean(values)) for name, values in kept.items()}


def check(n: int, repetitions: int) -> None:
    found = simulate(n, repetitions)
    slack = 2.6 * np.sqrt(0.05 * 0.95 / repetitions) if repetitions < 1000 else 0.0  # a 99% limit where there are few
    for name in (key for key in found if key.startswith("cover")):
        assert 0.93 - slack <= found[name] <= 0.97 + slack, (name, found)
    for name in ("type I of the family", "false equivalence"):
        assert not significantly_above(round(found[name] * repetitions), repetitions, 0.05), (name, found)
    error = 3 * np.sqrt(0.8 * 0.2 / repetitions)
    for name in ("power one", "power family"):
        assert abs(found[name] - 0.8) <= error, (name, found)
    planned = equivalence_power(n, 0.1, tie_rate=0.3)
    assert abs(found["equivalence"] - planned) <= 0.06 + 3 * np.sqrt(planned * (1 - planned) / repetitions), (planned, found)


def test_promises_are_kept_in_few_repetitions():
    check(50, 200)


@pytest.mark.slow
@pytest.mark.parametrize("n", [115, 50])
def test_promises_are_kept(n):
    check(n, 2000)


def test_equivalence_below_its_power_says_nothing():
    """115 prompts without ties show two equal models equivalent within 10 points in 39 of 100 runs; 30% ties make it 54."""
    assert equivalence_power(115, 0.1) == pytest.approx(0.383, abs=0.01)
    assert equivalence_power(50, 0.1) == 0.0
    assert equivalence_power(0, 0.1) == 0.0
    assert equivalence_power(100, 0.1, tie_rate=1.0) == 1.0
    assert equivalence_power(300, 0.1) > 0.8


def test_flips_cost_power_like_ties():
    assert detectable_win_rate(115, flip_rate=0.3) == detectable_win_rate(115, tie_rate=0.3)
    assert detectable_win_rate(115, flip_rate=0.3) > detectable_win_rate(115)
    assert detectable_win_rate(115, tie_rate=0.6, flip_rate=0.4) is None


def test_prediction_powered_by_hand_and_where_it_is_omitted():
    rng = generator(0, "ppi")
    n = 60
    clusters, weights = np.arange(n), resample_weights(n, 400, rng)
    grader = draw(rng, n, 0.6, 0.0)
    people = np.where(np.arange(n) % 2 == 0, grader, np.nan)
    exact = prediction_powered(grader, people, clusters, weights, 0.95)
    both = ~np.isnan(people)
    cov = np.cov(grader[both], people[both])[0, 1]
    tuning = cov / grader[both].var(ddof=1) / (1 + both.sum() / n)
    by_hand = tuning * grader.mean() + (people[both] - tuning * grader[both]).mean()
    assert exact.value == pytest.approx(by_hand)
    alone = mean_estimate(people, clusters, weights, 0.95)
    assert exact.high - exact.low < alone.high - alone.low  # a grader that is always right shortens the interval
    few = prediction_powered(grader, np.where(np.arange(n) < 10, people, np.nan), clusters, weights, 0.95)
    assert few.value is None
    assert "30 are needed" in few.reason
    constant = prediction_powered(
        np.ones(n), np.where(np.arange(n) < 40, draw(rng, n, 0.5, 0.0), np.nan), clusters, weights, 0.95
    )
    assert constant.low is not None  # a grader without any information gets no weight
