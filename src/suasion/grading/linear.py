"""A Bradley-Terry fit on named features, of which what length predicts can be taken away; `readable` and `embedding` are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from suasion.grading.base import fit_bradley_terry
from suasion.grading.features import INTERPLAY, NAMES

LENGTH = NAMES.index("log_words")


def length_slopes(differences: np.ndarray, log_length: np.ndarray) -> np.ndarray:
    """[k] least-squares slopes, without intercept, of each difference [n, k] on the difference in log length [n]."""
    power = float(log_length @ log_length)
    return differences.T @ log_length / power if power > 0 else np.zeros(differences.shape[1])


def scales(differences: np.ndarray) -> np.ndarray:
    """[k] root mean squares of differences [n, k]. Nothing is centred: a centred difference would favour one position."""
    rms = np.sqrt(np.mean(differences**2, axis=0))
    return np.where(rms > 1e-12, rms, 1.0)


def weighed(names: Sequence[str], interplay: str) -> np.ndarray:
    """[len(names)] 1 for features that are used, 0 for the interplay in stop words and in all words where it is not."""
    return np.array([float(interplay == "all" or name not in INTERPLAY) for name in names])


@dataclass(frozen=True)
class Fit:
    """A linear strength: weights . factors (features - slopes * log words)."""

    slopes: np.ndarray
    factors: np.ndarray
    weights: np.ndarray

    def margins(self, features: np.ndarray) -> np.ndarray:
        """[n] strengths of features [n, k], or margins of their differences: the two are the same function."""
        return np.asarray(((features - np.outer(features[:, LENGTH], self.slopes)) * self.factors) @ self.weights)

    def largest_weights(self, names: Sequence[str], count: int) -> dict[str, float]:
        """Of the first features, which have names; without those that are not used."""
        named = {name: round(float(weight), 4) for name, weight in zip(names, self.weights, strict=False) if weight}
        return dict(sorted(named.items(), key=lambda item: (-abs(item[1]), item[0]))[:count])


def fit_differences(difference: np.ndarray, block: np.ndarray, ridge: float, residualise_length: bool) -> Fit:
    """Fit on differences winner - loser [n, k], standardised and then multiplied by `block` [k]."""
    log_length = difference[:, LENGTH].copy()
    slopes = length_slopes(difference, log_length) if residualise_length else np.zeros(difference.shape[1])
    rest = difference - np.outer(log_length, slopes)
    block = block.copy()
    if residualise_length:
        block[LENGTH] = 0.0  # its residual is rounding error, which standardising would blow up
    factors = block / scales(rest)
    return Fit(slopes, factors, fit_bradley_terry(rest * factors, ridge))
