"""Win rates with intervals and tests: pure functions on arrays, no text, no files.

A *score* is 1 for a win, .5 for a tie, 0 for a loss and NaN for a missing verdict; NaN never becomes a number silently. The
unit of everything is the conversation (`clusters`), because two prompts of one thread are not two independent observations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import special, stats

EXACT_BELOW = 30  # conversations; the bootstrap's coverage falls below 93% under about this number
RARE_BELOW = 5.0  # wins or losses, in conversations: near 0 and 1 the bootstrap's intervals are too short
SEPARATED = 12.0  # a logit this large means that the data do not bound it
LC_MINIMUM = 10  # scored comparisons needed to fit two coefficients


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, or the reason why there is none. n: scored prompts; clusters: their conversations."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    clusters: int = 0
    method: str = "none"
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """The same as a dictionary."""
        return asdict(self)


def clopper_pearson(wins: float, n: float, confidence: float) -> tuple[float, float]:
    """Exact binomial interval, extended to fractional counts through the beta quantiles.

    low = Beta(a/2; wins, n - wins + 1), high = Beta(1 - a/2; wins + 1, n - wins) (Clopper & Pearson 1934). With ties as half
    wins it stays valid: of all scores in [0, 1] with one mean, 0/1 scores have the largest variance, so ties only make it
    wider than needed (conservative; simulated in tests/test_statistics.py).
    """
    tail = (1 - confidence) / 2
    low = 0.0 if wins <= 0 else float(stats.beta.ppf(tail, wins, n - wins + 1))
    high = 1.0 if wins >= n else float(stats.beta.ppf(1 - tail, wins + 1, n - wins))
    return low, high


def resample_weights(clusters: int, repetitions: int, rng: np.random.Generator) -> np.ndarray:
    """How often each conversation is drawn in each bootstrap repetition, (repetitions, clusters); rows sum to `clusters`.

    One matrix serves every statistic of a run: models are then compared on the same resampled conversations.
    """
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=repetitions).astype(np.float64)


def percentile_interval(samples: np.ndarray, clusters: int, confidence: float) -> tuple[float, float]:
    """Expanded percentile interval of bootstrap samples (Hesterberg 2015, "What teachers should know about the bootstrap").

    The plain percentile interval of a mean is too short by sqrt(1 - 1/n) and by normal against t quantiles; its level is
    widened to Phi(-sqrt(n / (n - 1)) t), which repairs both.
    """
    t = stats.t.ppf((1 - confidence) / 2, clusters - 1)
    tail = float(stats.norm.cdf(np.sqrt(clusters / (clusters - 1)) * t))
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def mean_estimate(scores: np.ndarray, clusters: np.ndarray, weights: np.ndarray, confidence: float) -> Estimate:
    """Mean of scores in [0, 1] with an interval by conversation.

    scores (n,) with NaN where missing; clusters (n,) conversation index; weights (B, C) from `resample_weights`. Exact under
    30 conversations, and where wins or losses are rare; else expanded percentile bootstrap. The exact interval counts
    conversations, not prompts.
    """
    seen = ~np.isnan(scores)
    n = int(seen.sum())
    if n == 0:
        return Estimate(None, reason="no scored comparison")
    value = float(scores[seen].mean())
    sums, counts = (
        cluster_sums(np.where(seen, scores, 0.0), clusters, weights.shape[1]),
        cluster_sums(seen, clusters, weights.shape[1]),
    )
    groups = int((counts > 0).sum())
    if groups < EXACT_BELOW or min(value, 1 - value) * groups < RARE_BELOW:
        low, high = clopper_pearson(value * groups, groups, confidence)
        return Estimate(value, low, high, n, groups, "exact")
    drawn = weights @ counts
    samples = (weights @ sums)[drawn > 0] / drawn[drawn > 0]
    low, high = percentile_interval(samples, groups, confidence)
    return Estimate(value, min(low, value), max(high, value), n, groups, "bootstrap")


def real_mean_estimate(values: np.ndarray, clusters: np.ndarray, weights: np.ndarray, confidence: float) -> Estimate:
    """Mean of any real numbers, such as paired differences of lengths, with an expanded percentile interval by conversation.

    values (n,) with NaN where missing; weights (B, C) from `resample_weights`. No interval under 30 conversations, where the
    bootstrap is too short and nothing exact is known of the numbers, and none where all values are equal.
    """
    seen = ~np.isnan(values)
    n = int(seen.sum())
    if n == 0:
        return Estimate(None, reason="not measured")
    value = float(values[seen].mean())
    sums, counts = (
        cluster_sums(np.where(seen, values, 0.0), clusters, weights.shape[1]),
        cluster_sums(seen, clusters, weights.shape[1]),
    )
    groups = int((counts > 0).sum())
    if groups < EXACT_BELOW:
        return Estimate(value, n=n, clusters=groups, reason=f"no interval under {EXACT_BELOW} conversations")
    if np.ptp(values[seen]) == 0:
        return Estimate(value, n=n, clusters=groups, reason="no interval: the same on every prompt")
    drawn = weights @ counts
    samples = (weights @ sums)[drawn > 0] / drawn[drawn > 0]
    low, high = percentile_interval(samples, groups, confidence)
    return Estimate(value, min(low, value), max(high, value), n, groups, "bootstrap")


def cluster_sums(values: np.ndarray, clusters: np.ndarray, count: int) -> np.ndarray:
    """Sum of values per conversation, (count,)."""
    return np.bincount(clusters, weights=values.astype(np.float64), minlength=count)


def sign_flip_p(scores: np.ndarray, clusters: np.ndarray) -> float | None:
    """Two-sided exact p-value that neither side is better; None without a scored comparison.

    Under the null each conversation's sum of (win = +1, tie = 0, loss = -1) is as likely as its negative. The distribution of
    the total is the convolution of these two-point distributions, computed exactly. With one prompt a conversation this *is*
    the sign test with ties left out (Dixon & Mood 1946).
    """
    seen = ~np.isnan(scores)
    if not seen.any():
        return None
    sums = np.rint(cluster_sums(2 * scores[seen] - 1, clusters[seen], int(clusters.max()) + 1)).astype(int)
    steps = np.abs(sums[sums != 0])
    reach = int(steps.sum())
    if reach == 0:
        return 1.0
    ones = int((steps == 1).sum())
    density = np.zeros(2 * reach + 1)
    density[reach - ones : reach + ones + 1 : 2] = stats.binom.pmf(np.arange(ones + 1), ones, 0.5)  # the plain sign test
    for step in steps[steps > 1]:
        density = (np.roll(density, step) + np.roll(density, -step)) / 2  # never wraps: the support ends at +-reach
    distance = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(density[distance >= abs(int(sums.sum()))].sum()))


def holm(p_values: list[float | None], planned: int | None = None) -> list[float | None]:
    """Holm's step-down adjusted p-values (Holm 1979). A missing p-value stays None but counts in the family.

    planned: size of the family as planned, where more comparisons were planned than could be made yet.
    """
    size = max(planned or 0, len(p_values))
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, index) in enumerate(order):
        running = max(running, min(1.0, (size - rank) * p))
        adjusted[index] = running
    return adjusted


def length_controlled(scores: np.ndarray, differences: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Win rate at equal length, one per row of weights; NaN where it cannot be estimated.

    Logistic regression of the score on a constant (the models' difference) and x = tanh(length difference / its standard
    deviation), read off at x = 0 (Dubois et al. 2024, arXiv 2404.04475, with one pair of models and no prompt term). scores
    (n,) without NaN, differences (n,), weights (B, n). Newton's method on all rows at once; a row whose coefficients run
    away is separated data, hence NaN.
    """
    x = np.tanh(differences / differences.std())
    intercept, slope = np.zeros(len(weights)), np.zeros(len(weights))
    change = np.full(len(weights), np.inf)
    for _ in range(50):
        chance = special.expit(intercept[:, None] + slope[:, None] * x)
        error, information = weights * (scores - chance), weights * chance * (1 - chance)
        g0, g1 = error.sum(1), error @ x
        h00, h01, h11 = information.sum(1), information @ x, information @ (x * x)
        determinant = h00 * h11 - h01**2
        ok = determinant > 1e-9
        safe = np.where(ok, determinant, 1.0)
        step0 = np.where(ok, (h11 * g0 - h01 * g1) / safe, 0.0)
        step1 = np.where(ok, (h00 * g1 - h01 * g0) / safe, 0.0)
        change = np.where(ok, np.maximum(np.abs(step0), np.abs(step1)), np.inf)
        intercept, slope = np.clip(intercept + step0, -50, 50), np.clip(slope + step1, -50, 50)
        if (change[ok] < 1e-9).all():
            break
    good = (change < 1e-6) & (np.maximum(np.abs(intercept), np.abs(slope)) < SEPARATED)
    return np.where(good, special.expit(intercept), np.nan)


def length_controlled_estimate(
    scores: np.ndarray, differences: np.ndarray, clusters: np.ndarray, weights: np.ndarray, confidence: float
) -> Estimate:
    """`length_controlled` with its interval by conversation, or the reason why it cannot be estimated.

    differences (n,): length of the first model's response minus the second's, in words, NaN where one is missing.
    """
    seen = ~(np.isnan(scores) | np.isnan(differences))
    n = int(seen.sum())
    groups = len(np.unique(clusters[seen]))
    if n < LC_MINIMUM:
        return Estimate(None, n=n, clusters=groups, reason=f"only {n} scored comparisons; {LC_MINIMUM} are needed")
    scores, differences, clusters = scores[seen], differences[seen], clusters[seen]
    if not differences.any():
        return Estimate(
            float(scores.mean()),
            n=n,
            clusters=groups,
            reason="all lengths are equal: this is the plain win rate, see its interval",
        )
    if differences.min() > 0 or differences.max() < 0 or differences.std() == 0:
        return Estimate(
            None, n=n, clusters=groups, reason="one model is longer on every prompt: nothing to compare at equal length"
        )
    value = float(length_controlled(scores, differences, np.ones((1, n)))[0])
    if np.isnan(value):
        return Estimate(
            None, n=n, clusters=groups, reason="length separates wins from losses: the regression has no finite answer"
        )
    if groups < EXACT_BELOW:
        return Estimate(value, n=n, clusters=groups, reason=f"no interval under {EXACT_BELOW} conversations")
    samples = length_controlled(scores, differences, weights[:, clusters])
    finite = samples[~np.isnan(samples)]
    if len(finite) < 0.95 * len(samples):
        return Estimate(value, n=n, clusters=groups, reason="no interval: the regression fails in more than 5% of the resamples")
    low, high = percentile_interval(finite, groups, confidence)
    return Estimate(value, min(low, value), max(high, value), n, groups, "bootstrap")


def prediction_powered(
    graded: np.ndarray, judged: np.ndarray, clusters: np.ndarray, weights: np.ndarray, confidence: float
) -> Estimate:
    """Win rate in people's eyes from a grader's scores of all prompts and people's scores of a random subset of them.

    mean(lambda f) over all + mean(y - lambda f) over the subset, with the lambda that makes the variance least (prediction-powered
    inference, Angelopoulos et al. 2023, arXiv 2301.09633; the tuned form, arXiv 2311.01453). Unbiased for any grader, because the subset was
    drawn at random; a grader that agrees with people shortens the interval, one that does not gets lambda near 0. graded, judged
    (n,) with NaN where missing. Expanded percentile bootstrap over conversations, lambda fixed; no value where fewer than 30
    conversations were judged by people.
    """
    seen = ~np.isnan(graded)
    both = seen & ~np.isnan(judged)
    n = int(both.sum())
    groups = len(np.unique(clusters[both]))
    if groups < EXACT_BELOW:
        return Estimate(None, n=n, clusters=groups, reason=f"people judged {groups} conversations; {EXACT_BELOW} are needed")
    spread = float(graded[both].var(ddof=1))
    share = n / int(seen.sum())
    together = float(np.cov(graded[both], judged[both])[0, 1])
    tuning = 0.0 if spread == 0 else float(np.clip(together / spread / (1 + share), 0.0, 1.0))
    count = weights.shape[1]

    def means(row: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float]:
        """Bootstrap means of the masked row, and its plain mean."""
        sums = cluster_sums(np.where(mask, row, 0.0), clusters, count)
        counts = cluster_sums(mask, clusters, count)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ sums) / (weights @ counts), float(row[mask].mean())

    everywhere, whole = means(tuning * graded, seen)
    corrections, correction = means(judged - tuning * graded, both)
    samples = everywhere + corrections
    low, high = percentile_interval(samples[np.isfinite(samples)], groups, confidence)
    value = float(np.clip(whole + correction, 0.0, 1.0))
    return Estimate(value, max(0.0, min(low, value)), min(1.0, max(high, value)), n, groups, "prediction-powered")


def is_equivalent(interval: Estimate, margin: float) -> bool:
    """Two one-sided tests (Schuirmann 1987): the 1 - 2 alpha interval lies within `margin` of one half."""
    return interval.low is not None and interval.high is not None and 0.5 - margin < interval.low and interval.high < 0.5 + margin
