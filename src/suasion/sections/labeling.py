"""Sections of the recipe: where human labels come from, and how verdicts become preferences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from suasion.sections.base import Section


class SimulatedAnnotator(Section):
    """A documented stand-in for people: its labels are called simulated everywhere."""

    kind: Literal["simulated"] = Field(description="Nobody labels: a scorer with noise.")
    noise: float = Field(0.35, gt=0, description="Scale of the logistic noise, in standard deviations of the score.")
    side_bias: float = Field(0.1, description="Added to the left response's score.")
    tie_share: float = Field(0.15, ge=0, lt=1, description="Share of pairs too close to call, as in published labels.")

    def ties(self, pairs: int) -> int:
        """How many of so many pairs it calls ties, beside those of identical texts."""
        return round(self.tie_share * pairs)


class ImportedLabels(Section):
    """Human labels from a file; responses of other models are off-policy and marked so."""

    kind: Literal["file"] = Field(description="Labels that exist already.")
    path: str = Field(
        description="verdicts.jsonl on this run's pairs, or (layout: preferences) a file with prompt, chosen and rejected texts."
    )
    layout: Literal["verdicts", "preferences"] = Field(
        "verdicts", description="verdicts: our rows. preferences: TRL-like rows with the texts of another model."
    )
    source: str = Field("human", description="Name of the label source in tables.")


class LabellingPage(Section):
    """People label on the run's own page, `suasion label serve RUN`; the stage takes a snapshot of what they said."""

    kind: Literal["page"] = Field(description="People label here.")
    overlap: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the pairs that is labelled a second time: by another annotator if there is one, else again with sides swapped.",
    )
    attention: int = Field(
        0, ge=0, description="Tasks an annotator gets besides, in which one response answers another prompt: about one in 15."
    )
    gold: str | None = Field(
        None, description="JSONL of {context, a, b, label} whose answers are known; everybody gets all of them besides the tasks."
    )
    guidelines: str | None = Field(
        None, description="Markdown that annotators read first and can reopen; None takes the bundled text."
    )
    consent: str | None = Field(
        None, description="Markdown that annotators agree to before they start; None takes the bundled text."
    )
    content_warning: str = Field(
        "Some texts argue about subjects that can upset: violence, illness, religion, politics. You may skip any task and stop at any time.",
        description="Shown with the consent text; '' shows none.",
    )


class HumanLabelsSection(Section):
    """Where human labels come from."""

    source: Annotated[SimulatedAnnotator | ImportedLabels | LabellingPage, Field(discriminator="kind")] = Field(
        description="Simulated annotator, imported file, or people on the labelling page."
    )


class PreferencesSection(Section):
    """From verdicts to training pairs."""

    conflicts: Literal["drop", "first", "adjudicate"] = Field(
        "drop",
        description="Several verdicts of one source on one pair that disagree: drop the pair, let the first bind, or take what an adjudicator "
        "said on the labelling page (and drop the pair where nobody has).",
    )
