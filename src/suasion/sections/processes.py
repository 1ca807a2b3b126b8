"""Section of the recipe: in how many processes a stage trains. It changes speed and rounding, never which rows are seen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from suasion.sections.base import Section


class ProcessesSection(Section):
    """How trainings are spread. Stands in no manifest's slice: a finished stage stays finished when it changes."""

    profile: Literal["one", "ddp", "fsdp2"] = Field(
        "one",
        description="one: trainings run in this process. ddp: through `accelerate launch`, a whole model in each process. fsdp2: the same, "
        "weights, gradients and optimiser states sharded.",
    )
    count: int = Field(1, ge=1, description="Processes on this machine; with GPUs one for each.")

    @model_validator(mode="after")
    def _several(self) -> ProcessesSection:
        if self.profile == "one" and self.count > 1:
            raise ValueError("count is above 1 but nothing is spread: set profile to ddp or fsdp2")
        if self.profile != "one" and self.count < 2:
            raise ValueError(f"profile {self.profile} needs a count of at least 2")
        return self
