"""Sections of the recipe: graders, what they learn from, and the comparison that one of them judges."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from suasion.sections.base import Section


class PairData(Section):
    """Outcome pairs that a grader is trained on."""

    kind: Literal["grader_pairs", "judge_pairs", "cmv", "ukp"] = Field(
        description="The run's own pairs (of the SFT pool's, or of no pool's conversations), or a corpus at `path`."
    )
    path: str | None = Field(None, description="cmv: ConvoKit folder or 'bundled'; ukp: folder of UKPConvArg1Strict's csv files.")

    @model_validator(mode="after")
    def _path_where_needed(self) -> PairData:
        if (self.kind in ("cmv", "ukp")) != (self.path is not None):
            raise ValueError(f"kind {self.kind} {'needs a path' if self.path is None else 'takes no path'}")
        return self


class EmbeddingGrader(Section):
    """Sentence embeddings and readable features; Bradley-Terry logistic regression on their difference."""

    kind: Literal["embedding"]
    train: PairData = Field(description="What it learns from.")
    ridge: float = Field(
        300.0,
        gt=0,
        description="Strength of the L2 penalty, on standardised features; about 100 for a few hundred training pairs.",
    )
    embedding_weight: float = Field(0.3, ge=0, description="Scale of the embedding block against the readable features.")
    residualise_length: bool = Field(
        True, description="Remove from every feature what log length predicts of it, so that length itself cannot win."
    )
    tie_margin: float = Field(0.0, ge=0, lt=0.5, description="Probabilities within this distance of .5 are ties.")


class NgramGrader(Section):
    """TF-IDF of word n-grams; Bradley-Terry logistic regression on their difference."""

    kind: Literal["ngram"]
    train: PairData = Field(description="What it learns from.")
    ridge: float = Field(1.0, gt=0, description="Strength of the L2 penalty.")
    ngrams: tuple[int, int] = Field((1, 2), description="Shortest and longest n-gram, in words.")
    min_count: int = Field(2, ge=1, description="N-grams in fewer texts than this are ignored.")
    tie_margin: float = Field(0.0, ge=0, lt=0.5, description="Probabilities within this distance of .5 are ties.")


AnyGrader = EmbeddingGrader | NgramGrader
Grader = Annotated[AnyGrader, Field(discriminator="kind")]
KINDS = ("embedding", "ngram")


class AiLabelsSection(Section):
    """The labelling grader."""

    grader: Grader = Field(description="A grader, or the path of a grader file relative to the recipe.")


class EvaluateSection(Section):
    """The comparison on the sealed prompts."""

    grader: Grader = Field(
        description="The evaluation grader: another family and other training rows than the labelling grader's."
    )
    allow_same_grader: bool = Field(False, description="Let the labelling grader judge; the report says so.")
    bootstrap: int = Field(2000, ge=100, description="Bootstrap repetitions, by conversation.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Level of the intervals.")
    equivalence_margin: float = Field(
        0.1, gt=0, lt=0.5, description="Win rates within this distance of .5 count as equivalent (TOST)."
    )
