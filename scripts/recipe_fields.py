"""Write docs/recipes.md: every field of a recipe with its type, default and meaning, read from the sections themselves.

    python scripts/recipe_fields.py

A test holds the page to the sections, so that what a reader finds there is what `suasion run` accepts.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from suasion.recipe import Recipe, models_in

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
HEAD = """# Recipes, field by field

Made by `python scripts/recipe_fields.py` from `src/suasion/sections/`; do not edit. A recipe is YAML with one section a stage. A key that is not
here is refused with the nearest one that is. `--set section.field=value` changes one value, `--set dpo.ARM.field=value` one arm's.
Examples: [recipes/](../recipes), grader files: [graders/](../graders).
"""


def page() -> str:
    """The whole page."""
    parts, queue, seen = [HEAD], [("recipe", Recipe)], {Recipe}
    while queue:
        name, section = queue.pop(0)
        summary = " ".join((section.__doc__ or "").split())
        rows = [_row(key, field) for key, field in section.model_fields.items()]
        parts.append(
            "\n".join([f"## {name}", "", summary, "", "| field | type | default | meaning |", "|---|---|---|---|", *rows, ""])
        )
        for key, field in section.model_fields.items():
            for inner in models_in(field.annotation):
                if inner not in seen:
                    seen.add(inner)
                    queue.append((_name(name, key, inner), inner))
    return "\n".join(parts)


def _name(outer: str, key: str, section: type[BaseModel]) -> str:
    path = key if outer == "recipe" else f"{outer.split(' ')[0]}.{key}"
    kind = section.model_fields.get("kind")
    kinds = typing.get_args(kind.annotation) if kind else ()
    return f"{path} (kind: {kinds[0]})" if len(kinds) == 1 else path


def _row(key: str, field: FieldInfo) -> str:
    default = (
        "required" if field.is_required() else "see below" if isinstance(field.default, BaseModel) else _value(field.default)
    )
    return f"| `{key}` | {_type(field.annotation)} | {default} | {_escaped(field.description or '')} |"


def _value(value: object) -> str:
    assert value is not PydanticUndefined
    text = json.dumps(value, ensure_ascii=False)
    return f"`{_escaped(text)}`" if len(text) <= 60 else _escaped(text)


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (tuple, list):
        inner = [_type(argument) for argument in arguments if argument is not Ellipsis]
        return "list of " + inner[0] if len(arguments) > 1 and arguments[1] is Ellipsis else "[" + ", ".join(inner) + "]"
    if origin is dict:
        return "mapping"
    if arguments:
        return " or ".join(dict.fromkeys(_type(argument) for argument in arguments))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[annotation.__name__]  # type: ignore[attr-defined]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
