"""What all sections of a recipe share."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

FILE_KEYS = ("path", "gold", "guidelines", "consent")  # keys of sources whose values are files, relative to the recipe
TEMPLATE = "template"  # key of a file too, where its value is not the name of a shipped one


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    #: Fields that change how the work is done and not what comes out: they stand in no manifest, so that they may change during a run.
    TRANSPORT: ClassVar[tuple[str, ...]] = ()
