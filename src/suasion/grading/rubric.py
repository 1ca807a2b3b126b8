"""The written rubric of an LLM grader: a versioned template file, and the questions made from it.

Judged texts enter as values, never as template. Each question carries a code in its marker lines that is drawn from the row itself, so
that a text cannot know it; a text that holds it anyway gets another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import yaml
from jinja2 import StrictUndefined
from jinja2.exceptions import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from suasion.errors import UsageError
from suasion.grading.base import Comparison
from suasion.records import sha256_file
from suasion.sections.grading import AnyGrader, LlmGrader, members_of
from suasion.seeding import derive_seed

PARTS = ("system", "pair", "ranking", "repair", "local")
_JINJA = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False, autoescape=False)  # prompts are no HTML


@dataclass(frozen=True)
class Rubric:
    """A template file's parts, and the hash of the file: what a verdict was made with."""

    parts: dict[str, str]
    hash: str

    @cached_property
    def system(self) -> str:
        """The rubric itself."""
        return self.parts["system"].strip()

    def pair(self, item: Comparison, seed: int, part: str = "pair") -> str:
        """The question about two replies, the first one shown first."""
        fence = draw_fence(seed, (item.context, item.a, item.b))
        return self._render(part, fence=fence, context=item.context, first=item.a, second=item.b)

    def ranking(self, context: str, texts: Sequence[str], seed: int) -> str:
        """The question about several replies, in the order given."""
        return self._render("ranking", fence=draw_fence(seed, (context, *texts)), context=context, texts=list(texts))

    def repair(self, fault: str) -> str:
        """What a model is told whose answer could not be read."""
        return self._render("repair", fault=fault)

    def _render(self, part: str, **values: object) -> str:
        try:
            return str(_JINJA.from_string(self.parts[part]).render(**values)).strip()
        except TemplateError as error:
            raise UsageError(f"part '{part}' of the grader's template cannot be used: {error}") from error


def draw_fence(seed: int, texts: Sequence[str]) -> str:
    """16 hex digits that stand in none of the texts: the same for the same texts in the same order."""
    attempt = 0
    while True:
        fence = f"{derive_seed(seed, 'fence', attempt, *texts):016x}"
        if not any(fence in text for text in texts):
            return fence
        attempt += 1


def template_hashes(grader: AnyGrader) -> dict[str, str]:
    """name -> sha256 of the template files of one's own that a grader, or a panel's member, asks by."""
    paths = [Path(one.template) for one in members_of(grader) if isinstance(one, LlmGrader)]
    return {f"template/{path.name}": sha256_file(path) for path in paths if path.is_file()}


def load_rubric(name: str) -> Rubric:
    """A shipped template by its name (`persuasion-1`), or a template file by its path. Raises UsageError for one that lacks a part."""
    shipped = files("suasion.grading") / "templates" / f"{name}.yaml"
    if shipped.is_file():
        text = shipped.read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise UsageError(
            f"no grader template '{name}': give a shipped one (persuasion-1) or the path of a file with {', '.join(PARTS)}."
        )
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"the grader template '{name}' is not valid YAML: {error}") from error
    missing = [part for part in PARTS if not isinstance(data, dict) or not isinstance(data.get(part), str)]
    if missing:
        raise UsageError(
            f"the grader template '{name}' lacks {', '.join(missing)}. A template has {', '.join(PARTS)}, each a text."
        )
    return Rubric({part: data[part] for part in PARTS}, hashlib.sha256(text.encode()).hexdigest()[:16])
