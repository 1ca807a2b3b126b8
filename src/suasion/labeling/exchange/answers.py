"""An `Answer`: one person's answer with its texts, and what the readers and writers of all formats share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from suasion.errors import UserError
from suasion.labeling.events import HumanLabel
from suasion.labeling.imports import parse_context
from suasion.records import Row, Turn, canonical_json, content_id, turns_key

OUR_ID = re.compile(r"[a-z][a-z0-9-]{0,60}")


class Answer(Row):
    """A label with its texts in the pair's own order. `prompt_id` is the unit of intervals."""

    label: HumanLabel
    prompt_id: str
    turns: tuple[Turn, ...]
    a: str
    b: str

    @property
    def left(self) -> str:
        """What stood on the left."""
        return self.a if self.label.order == "ab" else self.b

    @property
    def right(self) -> str:
        """What stood on the right."""
        return self.b if self.label.order == "ab" else self.a

    @property
    def side(self) -> str:
        """What was answered, by position: left, right, tie, both bad or none."""
        if self.label.label in ("a", "b"):
            return "left" if (self.label.label == "a") == (self.label.order == "ab") else "right"
        return "both bad" if self.label.both_bad else self.label.label


FIELDS = (*HumanLabel.model_fields, "prompt_id")  # what stands beside a format's own fields


@dataclass
class Parts:
    """What a row says in its format's own fields, before it becomes an Answer. rest: FIELDS, as far as the row has them."""

    turns: tuple[Turn, ...]
    left: str
    right: str
    side: str
    annotator: str
    rest: dict[str, Any] = field(default_factory=dict)

    def answer(self, where: str) -> Answer:
        """The answer. Fields of its own overrule `rest`; ids that are missing are made from the texts."""
        rest = {name: value for name, value in self.rest.items() if name in FIELDS}
        order = rest.get("order", "ab")
        a, b = (self.left, self.right) if order == "ab" else (self.right, self.left)
        first, second = ("a", "b") if order == "ab" else ("b", "a")
        said = {"left": first, "right": second, "tie": "tie", "both bad": "tie", "none": "none"}.get(self.side)
        key = turns_key(self.turns)
        pair = rest.setdefault("pair_id", content_id("imported pair", key, a, b))
        rest.setdefault("task", content_id("task", pair, "first"))
        rest |= {"annotator": _annotator(self.annotator), "label": said, "both_bad": self.side == "both bad"}
        prompt_id = rest.pop("prompt_id", None) or content_id("imported prompt", key)
        try:
            return Answer(
                label=HumanLabel.model_validate({"kind": "first", "order": "ab", "off_policy": True, "origin": "import"} | rest),
                prompt_id=prompt_id, turns=self.turns, a=a, b=b,
            )  # fmt: skip
        except ValidationError as error:
            first_error = error.errors()[0]
            raise UserError(
                f"{where}: {'.'.join(map(str, first_error['loc']))}: {first_error['msg']} (it is {first_error['input']!r}). Repair this row."
            ) from error


def _annotator(name: str) -> str:
    """Our own ids stay. A name or an address of somebody becomes a number: it is no business of labels.db."""
    return name if OUR_ID.fullmatch(name) else "imported-" + content_id("annotator", name)


def rest_of(answer: Answer) -> dict[str, Any]:
    """FIELDS of an answer, without what is null: Argilla's metadata has no null, and absent says the same."""
    fields = answer.label.model_dump(mode="json") | {"prompt_id": answer.prompt_id}
    return {name: value for name, value in fields.items() if value is not None}


def messages(turns: Iterable[Turn]) -> list[dict[str, str]]:
    """A thread as chat messages; `name` where several people share a role."""
    return [{"role": turn.role, "content": turn.text} | ({"name": turn.name} if turn.name is not None else {}) for turn in turns]


def turns_of(value: Any, where: str) -> tuple[Turn, ...]:
    """A conversation, a plain text, or a templated thread of the kind that `suasion.labeling.imports` reads."""
    if isinstance(value, str):
        return parse_context(value) or (Turn(role="user", text=value),)
    try:
        return tuple(Turn(role=one["role"], text=one["content"], name=one.get("name")) for one in value)
    except (TypeError, KeyError, AttributeError, ValidationError) as error:
        raise UserError(f"{where}: the prompt must be a text, or messages with role (user or assistant) and content.") from error


def completion(value: Any, where: str) -> str:
    """The text of one response, given as text or as a single message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise UserError(f"{where}: a response must be a text, or one message with content.")
    return value


def temporary(path: Path) -> Path:
    """Where a file is written before it is renamed."""
    return path.with_name(path.name + ".tmp")


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSONL under the temporary name."""
    with temporary(path).open("w", encoding="utf-8") as handle:
        handle.writelines(canonical_json(row) + "\n" for row in rows)
    return path


def part(row: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A part of a row that is an object, empty where the row lacks it."""
    value = row.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {name} must be an object.")
    return value
