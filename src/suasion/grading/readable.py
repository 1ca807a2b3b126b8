"""The `readable` grader: readable features alone, Bradley-Terry on their difference.

What style and overlap with the context tell, every weight of which a person can read; beside `embedding`, whose other half it is, it
says what the sentence embeddings add. It needs no model, so that dry runs judge with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from suasion.grading.base import BradleyTerryGrader
from suasion.grading.features import NAMES, readable
from suasion.grading.linear import fit_differences, weighed
from suasion.sections.grading import ReadableGrader

if TYPE_CHECKING:
    from suasion.grading.pairs import TrainingPair


def featurise(contexts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
    """[n, len(NAMES)] of replies in their contexts."""
    return np.stack([readable(context, reply) for context, reply in zip(contexts, replies, strict=True)])


class ReadableBradleyTerry(BradleyTerryGrader):
    """See the module's docstring."""

    kind = "readable"

    def __init__(self, spec: ReadableGrader, pairs: Sequence[TrainingPair], fingerprint: str):
        super().__init__(spec.tie_margin, fingerprint)
        contexts = [pair.context for pair in pairs]
        difference = featurise(contexts, [p.winner for p in pairs]) - featurise(contexts, [p.loser for p in pairs])
        self.fit = fit_differences(difference, weighed(NAMES, spec.interplay), spec.ridge, spec.residualise_length)

    def strengths(self, contexts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[n]: weights . factors (features - slopes * log words)."""
        return self.fit.margins(featurise(contexts, replies))

    def largest_weights(self, count: int) -> dict[str, float]:
        """The features with the largest weights, in either direction."""
        return self.fit.largest_weights(NAMES, count)
