"""Section of the recipe: what the report shows."""

from __future__ import annotations

from pydantic import Field

from suasion.sections.base import Section


class ReportSection(Section):
    """What the report shows."""

    title: str = Field("Which feedback makes a better persuader?", description="Title of the page.")
    examples: int = Field(6, ge=0, description="Prompts whose responses are shown side by side.")
    price_per_hour: float | None = Field(None, ge=0, description="What an hour of the machine costs; null: unknown.")
