"""What all sections of a recipe share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

FILE_KEYS = ("path", "gold", "guidelines", "consent")  # keys of sources whose values are files, relative to the recipe


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
