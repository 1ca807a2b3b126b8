"""Several models on one scale: Bradley-Terry strengths, and a mean normalised rank. Pure functions on arrays.

`scores[i, j]` is (n,) over prompts: 1 where model i won against j, .5 tie, 0 loss, NaN missing; scores[j, i] = 1 - scores[i, j].
"""

from __future__ import annotations

import evalica
import numpy as np
from scipy import sparse, stats

from suasion.evaluation.statistics import EXACT_BELOW, Estimate, percentile_interval

PRIOR = 0.5  # wins added to each side of every compared pair (one virtual tie): a model that never wins stays finite


def cluster_wins(scores: np.ndarray, clusters: np.ndarray, count: int) -> np.ndarray:
    """Half-win counts per conversation, (count, K, K), from scores (K, K, n)."""
    known = np.nan_to_num(scores, nan=0.0)
    wins = np.zeros((count, *scores.shape[:2]))
    np.add.at(wins, clusters, np.moveaxis(known, 2, 0))
    return wins


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Natural-log strengths (K,), model 0 at zero, from half-win counts (K, K); NaN for models not compared with model 0's group.

    Maximum likelihood (evalica, Newman's iteration) with ties as half a win to each side and PRIOR on every compared pair.
    A difference of d means that the stronger wins with probability 1 / (1 + exp(-d)).
    """
    size = len(wins)
    compared = (wins + wins.T) > 0
    groups = sparse.csgraph.connected_components(compared, directed=False)[1]
    members = [k for k in range(size) if groups[k] == groups[0]]
    strengths = np.full(size, np.nan)
    if len(members) < 2:
        return strengths
    pairs = [(i, j) for i in members for j in members if i != j and compared[i, j]]
    result = evalica.bradley_terry(
        [i for i, _ in pairs],
        [j for _, j in pairs],
        [evalica.Winner.X] * len(pairs),
        weights=[float(wins[i, j]) + PRIOR for i, j in pairs],
        tolerance=1e-8,
        limit=10_000,
    )
    for k in members:
        strengths[k] = np.log(result.scores[k])
    return np.asarray(strengths - strengths[0])


def strength_estimates(scores: np.ndarray, clusters: np.ndarray, weights: np.ndarray, confidence: float) -> list[Estimate]:
    """Bradley-Terry strengths against model 0, with intervals by bootstrap over conversations; none under 30 of them."""
    count = weights.shape[1]
    wins = cluster_wins(scores, clusters, count)
    values = bradley_terry(wins.sum(0))
    if count < EXACT_BELOW:
        samples = None
    else:
        samples = np.array([bradley_terry(total) for total in np.tensordot(weights, wins, axes=1)])
    estimates = []
    for k, value in enumerate(values):
        n = int((~np.isnan(scores[k])).any(0).sum())
        if np.isnan(value):
            estimates.append(Estimate(None, n=n, reason="not compared with the base model"))
        elif k == 0:
            estimates.append(Estimate(0.0, n=n, clusters=count))  # the zero of the scale
        elif samples is None:
            estimates.append(Estimate(float(value), n=n, clusters=count, reason=f"no interval under {EXACT_BELOW} conversations"))
        else:
            low, high = percentile_interval(samples[~np.isnan(samples[:, k]), k], count, confidence)
            estimates.append(Estimate(float(value), min(low, value), max(high, value), n, count, "bootstrap"))
    return estimates


def rank_scores(scores: np.ndarray) -> np.ndarray:
    """Normalised rank score of each model on each prompt, (K, n), NaN where a model has no scored comparison.

    k responses are ranked by pairwise wins and get k-1 ... 0 points, divided by k-1. Equal
    win shares share their points. On every complete prompt the models' mean is one half.
    """
    size, _, prompts = scores.shape
    ranks = np.full((size, prompts), np.nan)
    if size < 2:
        return ranks
    seen = ~np.isnan(scores)
    counts = seen.sum(1)
    shares = np.where(seen, scores, 0.0).sum(1) / np.maximum(counts, 1)
    complete = (counts > 0).all(0)
    ranks[:, complete] = (stats.rankdata(shares[:, complete], axis=0) - 1) / (size - 1)
    return ranks
