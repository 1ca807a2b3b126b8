"""Sections of the recipe: what is read, and how it is divided into pools."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from suasion.sections.base import Section

LEAST_CONTEXT = 256  # tokens of a sequence that the longest reply must leave to its context


class CorpusSource(Section):
    """One corpus to read."""

    kind: Literal["cmv", "p4g", "jsonl"] = Field(
        description="Which extractor reads it: ChangeMyView, PersuasionForGood, or own rows."
    )
    path: str = Field(
        "bundled", description="A folder in ConvoKit's on-disk format, or 'bundled'. jsonl: a folder or file of own rows."
    )
    donating_only: bool = Field(False, description="p4g: keep only dialogues in which the persuadee donated.")
    max_per_conversation: int = Field(4, ge=1, description="At most this many examples of one conversation.")


class CorpusSection(Section):
    """What is read, and how long its texts may be."""

    sources: tuple[CorpusSource, ...] = Field(min_length=1, description="Corpora, read in this order.")
    reply_tokens: tuple[int, int] = Field(
        (20, 256),
        description="Shortest and longest human reply, in tokens of the model's tokenizer. A reply is never cut: others are dropped and counted.",
    )
    context_tokens: int = Field(
        512, ge=32, description="Budget of a context. Longer ones lose their oldest turns first, at turn borders, and are marked."
    )


class PoolsSection(Section):
    """How many conversations each pool gets. Pools are disjoint by conversation, author and near-duplicate text."""

    sft: int | Literal["rest"] = Field("rest", description="Examples for supervised fine-tuning; 'rest' takes all that remain.")
    rlaif: int = Field(2150, ge=1, description="Prompts whose pairs the AI grader labels.")
    rlhf: int = Field(200, ge=1, description="Prompts whose pairs people label.")
    eval: int = Field(
        115,
        ge=1,
        description="Sealed prompts of the final comparison; each has a human reply, one that persuaded as long as there are such.",
    )
    judge_conversations: int = Field(
        0, ge=0, description="Conversations with outcome pairs kept out of every pool, to train the evaluation grader."
    )
    rlaif_per_conversation: int = Field(2, ge=1, description="At most this many rlaif prompts of one conversation.")
    near_duplicate: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Estimated Jaccard similarity of word 5-grams from which two conversations may not be in different pools.",
    )
