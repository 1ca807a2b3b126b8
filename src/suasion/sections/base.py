"""What all sections of a recipe share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

FILE_KEYS = ("path", "gold", "guidelines", "consent")  # keys of sources whose values are files, relative to the recipe
TEMPLATE = "template"  # key of a file too, where its value is not the name of a shipped one


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    #: Fields that change how the work is done and not what comes out: they stand in no manifest, so that they may change during a run.
    TRANSPORT: ClassVar[tuple[str, ...]] = ()


def require_addresses(urls: Sequence[str], field: str) -> None:
    """Raises ValueError where one of these is no address of a server, holds a key, or stands there twice."""
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{field}: {url!r} is no address; write it like http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(f"{field}: an address holds no key; name the environment variable that does in key_env")
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ValueError(f"{field}: an address stands there twice")
