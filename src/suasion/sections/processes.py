"""Section of the recipe: in how many processes stages compute. It changes speed and rounding, never which rows are seen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from suasion.sections.base import Section


class ProcessesSection(Section):
    """How stages are spread. Stands in no manifest's slice: a finished stage stays finished when it changes."""

    profile: Literal["one", "ddp", "fsdp2"] = Field(
        "one",
        description="one: trainings run in this process. ddp: through `accelerate launch`, a whole model in each process. fsdp2: the same, "
        "weights, gradients and optimiser states sharded.",
    )
    count: int = Field(
        1,
        ge=1,
        description="Processes on each machine; with GPUs one for each. As many sample and judge with local models, on this machine.",
    )
    machines: int = Field(
        1, ge=1, description="Machines that train together; each of the others runs `suasion join` (docs/scale.md)."
    )
    address: str = Field("", description="Where the others reach the first machine; needed with several.")
    port: int = Field(29500, ge=1024, le=65535, description="Port there.")

    @model_validator(mode="after")
    def _several(self) -> ProcessesSection:
        if self.profile == "one" and self.count * self.machines > 1:
            raise ValueError("count or machines is above 1 but nothing is spread: set profile to ddp or fsdp2")
        if self.profile != "one" and self.count * self.machines < 2:
            raise ValueError(f"profile {self.profile} needs a count of at least 2, or several machines")
        if self.machines > 1 and not self.address:
            raise ValueError("several machines need the address at which the others reach this one")
        return self
