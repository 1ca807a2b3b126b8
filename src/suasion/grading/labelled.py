"""Labelled pairs: the PAIRS files that graders are trained and measured on outside of a run.

JSONL, one pair a row: `{context (text or turns), a, b, label: a|b|tie, group}`. Unknown keys are ignored, so that a file may carry
ids or notes of its own. `group` (the poster, the topic) is the unit of folds and intervals: rows of one group are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from suasion.chat import as_text
from suasion.errors import UsageError, UserError
from suasion.grading.base import Comparison
from suasion.grading.features import first_words, word_count
from suasion.grading.pairs import TrainingPair
from suasion.records import Turn, content_id, read_json_lines
from suasion.seeding import derive_seed


class PairRow(BaseModel):
    """One row of a PAIRS file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    context: str | tuple[Turn, ...]
    a: str
    b: str
    label: Literal["a", "b", "tie"]
    group: Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]


@dataclass(frozen=True)
class LabelledPair:
    """A comparison, what people or an outcome said of it, and the group that it belongs to."""

    item: Comparison
    label: Literal["a", "b", "tie"]
    group: str

    @property
    def id(self) -> str:
        """Depends on context and texts, in the order given, and on nothing else."""
        return content_id("labelled-pair", self.item.context, self.item.a, self.item.b)

    def trains(self) -> TrainingPair | None:
        """The pair as graders learn from it; None for a tie, equal texts and empty ones, which teach nothing."""
        a, b = self.item.a.strip(), self.item.b.strip()
        if self.label == "tie" or not a or not b or a == b:
            return None
        won, lost = (self.item.a, self.item.b) if self.label == "a" else (self.item.b, self.item.a)
        return TrainingPair(self.item.context, won, lost, self.group)

    def equal_length(self) -> Comparison:
        """Both texts cut to the words of the shorter one."""
        count = min(word_count(self.item.a), word_count(self.item.b))
        return Comparison(self.item.context, first_words(self.item.a, count), first_words(self.item.b, count))


def read_pairs(path: Path) -> list[LabelledPair]:
    """The rows of a PAIRS file. Raises UserError with file, line and field, and for a file without rows."""
    rows = []
    for number, value in read_json_lines(path):
        try:
            row = PairRow.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"][:1])) or "row"
            raise UserError(
                f"{path}, line {number}: not a labelled pair: {where}: {first['msg']}. A row is "
                '{"context": text or turns, "a": text, "b": text, "label": "a", "b" or "tie", "group": text}.'
            ) from error
        rows.append(to_labelled(row))
    if not rows:
        raise UserError(f"{path} holds no pairs. Make such a file with: suasion grade pairs --help")
    return rows


def to_labelled(row: PairRow) -> LabelledPair:
    """A row as the bench reads it: turns become plain text, as graders see a run's contexts."""
    context = row.context if isinstance(row.context, str) else as_text(row.context)
    return LabelledPair(Comparison(context, row.a, row.b), row.label, row.group)


def without(training: Iterable[LabelledPair], tested: Iterable[LabelledPair]) -> list[LabelledPair]:
    """Training pairs that are not tested, whichever way round the two texts stand."""
    known = {_unordered(pair) for pair in tested}
    return [pair for pair in training if _unordered(pair) not in known]


def drawn_by_hash(pairs: Sequence[LabelledPair], limit: int, seed: int) -> list[LabelledPair]:
    """At most `limit` pairs, drawn by the hash of their content and kept in the order of the file: the same for every grader.

    Raises UsageError for a limit below 1.
    """
    if limit < 1:
        raise UsageError(f"--limit {limit}: give at least 1 pair.")
    chosen = sorted(range(len(pairs)), key=lambda i: (derive_seed(seed, "subset", pairs[i].id), i))[:limit]
    return [pairs[i] for i in sorted(chosen)]


def _unordered(pair: LabelledPair) -> tuple[str, ...]:
    return (pair.item.context, *sorted((pair.item.a.strip(), pair.item.b.strip())))
