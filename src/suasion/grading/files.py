"""Grader files: `graders/NAME.yaml`, a mapping with a `kind`. Paths inside are relative to the file and become absolute here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from suasion.errors import UsageError
from suasion.sections import grading as sections
from suasion.sections.base import FILE_KEYS, TEMPLATE


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises UsageError where it is missing, broken or something else."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"{path} does not exist.") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} must hold a mapping of keys, found {type(data).__name__}.")
    return data


def resolve_grader(grader: Any, folder: Path) -> Any:
    """A recipe's or panel's grader with files read in and paths made absolute. `grader`: a path relative to `folder`, or a mapping."""
    if isinstance(grader, str):
        file = (folder / grader).resolve()
        return resolve_grader(read_mapping(file), file.parent)
    if isinstance(grader, dict):
        make_absolute(grader, folder)
        for key in ("train", "measure"):
            make_absolute(grader.get(key), folder)
        template = grader.get(TEMPLATE)  # a shipped one has a name and no file
        if isinstance(template, str) and (file := folder / Path(template).expanduser()).is_file():
            grader[TEMPLATE] = str(file.resolve())
        if grader.get("kind") == "reward":
            make_base_absolute(grader.get("model"), "base", folder)
        elif grader.get("provider") == "local":
            make_base_absolute(grader, "model", folder)
        if isinstance(grader.get("members"), list):
            grader["members"] = [resolve_grader(member, folder) for member in grader["members"]]
    return grader


def make_absolute(holder: Any, folder: Path) -> None:
    """Make the file names in a mapping absolute, in place; 'bundled' is no file."""
    for key in FILE_KEYS if isinstance(holder, dict) else ():
        if isinstance(holder.get(key), str) and holder[key] != "bundled":
            holder[key] = str((folder / Path(holder[key]).expanduser()).resolve())


def make_base_absolute(holder: Any, key: str, folder: Path) -> None:
    """Make a base model that is given as a path absolute, in place; other bases are names."""
    name = holder.get(key) if isinstance(holder, dict) else None
    if isinstance(name, str) and name.startswith((".", "/", "~")):
        holder[key] = str((folder / Path(name).expanduser()).resolve())


def load_grader(path: Path) -> sections.AnyGrader:
    """Read and validate one grader file. Raises UsageError with the field and its value."""
    data = resolve_grader(str(path.resolve()), Path())
    try:
        return TypeAdapter[sections.AnyGrader](sections.Grader).validate_python(data)
    except ValidationError as error:
        kinds = sections.KINDS
        lines = [f"{path} is not a valid grader file:"]
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"] if part not in kinds) or "kind"
            known = f" Kinds: {', '.join(kinds)}." if item["type"].startswith("union_tag") else ""
            lines.append(f"  {where}: {item['msg'].removeprefix('Value error, ')}{known}")
        raise UsageError("\n".join(lines)) from error
