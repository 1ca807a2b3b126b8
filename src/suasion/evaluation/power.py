"""How large a true win rate must be before a run of a given size can see it (exact binomial), and whether it could see equality.

`suasion plan` prints it before a run, the report after one.
"""

from __future__ import annotations

import math

from scipy import stats


def detectable_win_rate(
    n: int,
    power: float = 0.8,
    alpha: float = 0.05,
    comparisons: int = 1,
    grader_accuracy: float = 1.0,
    tie_rate: float = 0.0,
    flip_rate: float = 0.0,
) -> float | None:
    """Smallest true win rate, among prompts that are not ties, that a two-sided sign test finds with this power.

    n independent prompts, of which `tie_rate` are ties and `flip_rate` are comparisons on which the grader contradicts itself when
    the order is swapped: both tell nothing; level alpha / comparisons (the first step of Holm).
    A grader that is right with probability g shows g w + (1 - g)(1 - w) for a true w. The critical count c is the smallest
    with 2 P(X >= c | 1/2) <= level, and P(X >= c | p) = power at p = Beta quantile(power; c, m - c + 1), m the decided
    prompts. None where even a true win rate of 1 would stay unseen.
    """
    decided = math.floor(n * max(0.0, 1 - tie_rate - flip_rate) + 1e-9)
    if decided < 1 or grader_accuracy <= 0.5:
        return None
    level = alpha / comparisons
    critical = int(stats.binom.isf(level / 2, decided, 0.5)) + 1
    if critical > decided:
        return None
    observed = float(stats.beta.ppf(power, critical, decided - critical + 1))
    true = (observed - (1 - grader_accuracy)) / (2 * grader_accuracy - 1)
    return true if true <= 1 else None


def equivalence_power(n: int, margin: float, alpha: float = 0.05, tie_rate: float = 0.0) -> float:
    """Chance that two equal models are shown to be equivalent within `margin` of one half by two one-sided tests at level alpha.

    Normal approximation: 2 Phi(margin / se - z(1 - alpha)) - 1 with se^2 = (1 - tie_rate) / (4 n), the variance of scores 0, 1/2 and 1
    at a true win rate of one half (Phillips 1990, J. Pharmacokinet. Biopharm. 18, for a known variance). Where it is low, not being
    shown equivalent says nothing, and being shown so is mostly luck.
    """
    if n < 1:
        return 0.0
    error = math.sqrt((1 - tie_rate) / (4 * n))
    if error == 0:
        return 1.0
    return max(0.0, 2 * float(stats.norm.cdf(margin / error - stats.norm.ppf(1 - alpha))) - 1)
