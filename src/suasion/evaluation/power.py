"""How large a true win rate must be before a run of a given size can see it. Exact binomial, no approximation.

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
) -> float | None:
    """Smallest true win rate, among prompts that are not ties, that a two-sided sign test finds with this power.

    n independent prompts, of which `tie_rate` are ties and tell nothing; level alpha / comparisons (the first step of Holm).
    A grader that is right with probability g shows g w + (1 - g)(1 - w) for a true w. The critical count c is the smallest
    with 2 P(X >= c | 1/2) <= level, and P(X >= c | p) = power at p = Beta quantile(power; c, m - c + 1), m the decided
    prompts. None where even a true win rate of 1 would stay unseen.
    """
    decided = math.floor(n * (1 - tie_rate) + 1e-9)
    if decided < 1 or grader_accuracy <= 0.5:
        return None
    level = alpha / comparisons
    critical = int(stats.binom.isf(level / 2, decided, 0.5)) + 1
    if critical > decided:
        return None
    observed = float(stats.beta.ppf(power, critical, decided - critical + 1))
    true = (observed - (1 - grader_accuracy)) / (2 * grader_accuracy - 1)
    return true if true <= 1 else None
