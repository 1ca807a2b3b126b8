"""The `ngram` grader: TF-IDF of word n-grams, Bradley-Terry on their difference.

The second family: it shares neither features nor pre-trained weights with the `embedding` grader. Rows are of unit length, so
that a long reply has no advantage by its mere size. It does not look at the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from suasion.errors import UserError
from suasion.grading.base import BradleyTerryGrader, fit_bradley_terry
from suasion.sections.grading import NgramGrader

if TYPE_CHECKING:
    from suasion.grading.pairs import TrainingPair

TOKENS = r"(?u)\b\w+(?:['’]\w+)*\b|[?!]"  # one-letter words ("I", "a") and marks of tone count too


class NgramBradleyTerry(BradleyTerryGrader):
    """See the module's docstring."""

    kind = "ngram"

    def __init__(self, spec: NgramGrader, pairs: Sequence[TrainingPair], fingerprint: str):
        super().__init__(spec.tie_margin, fingerprint)
        self.vectorizer = TfidfVectorizer(
            ngram_range=spec.ngrams, min_df=spec.min_count, sublinear_tf=True, lowercase=True, token_pattern=TOKENS
        )
        winners, losers = [pair.winner for pair in pairs], [pair.loser for pair in pairs]
        try:
            self.vectorizer.fit(sorted({*winners, *losers}))
        except ValueError as error:  # scikit-learn's only complaint here: no n-gram is left
            raise UserError(
                f"no word n-gram stands in {spec.min_count} of the grader's training texts. Lower min_count, or train on more pairs."
            ) from error
        difference = self.vectorizer.transform(winners) - self.vectorizer.transform(losers)
        self.weights = fit_bradley_terry(difference.tocsr(), spec.ridge)

    def strengths(self, contexts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[n]: the summed weights of a reply's n-grams."""
        return np.asarray(self.vectorizer.transform(replies) @ self.weights, dtype=np.float64)

    def largest_weights(self, count: int) -> dict[str, float]:
        """The n-grams with the largest weights, in either direction."""
        order = np.argsort(-np.abs(self.weights), kind="stable")[:count]
        names = self.vectorizer.get_feature_names_out()
        return {str(names[i]): round(float(self.weights[i]), 4) for i in order}
