"""From a grader's settings to a grader that can judge: trained ones are trained, the others are set up.

The one place that knows all kinds. `training` gives the pairs that a trained grader learns from, by its `train` section; the bench
gives one list for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from suasion.grading.base import Grader, train_grader
from suasion.grading.pairs import TrainingPair
from suasion.sections import grading as sections

Training = Callable[[sections.PairData], Sequence[TrainingPair]]


def build_grader(spec: sections.AnyGrader, training: Training, seed: int) -> Grader:
    """A grader ready to judge. Raises UserError where data, a model or a key is missing."""
    return train_grader(spec, training(spec.train), seed)
