"""Own rows: dialogues and replies that somebody brings along, in the project's row format (docs/own-data.md).

Reads `examples.jsonl` and, if it is there, `outcome_pairs.jsonl` of a folder, or one file of examples alone. What follows from the
rest may be left out: `format`, `id` (made from the content), `corpus` (the source's name in the recipe) and `outcome` (unknown).
Everything else is as strict as between stages, and an error names file, line and the nearest field.

Texts are taken as they are: line ends are made plain and what cannot be printed goes, but nothing is cleaned, because only their
owner knows what gives an outcome away.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from suasion.corpora.buckets import BUCKET_BYTES, Packed, Weight, buckets_for, dealt
from suasion.corpora.convokit import Tally, tidy
from suasion.errors import UserError
from suasion.progress import progress, watched
from suasion.records import Example, OutcomePair, Row, Turn, example_id, outcome_pair_id, read_json_lines

EXAMPLES, PAIRS = "examples.jsonl", "outcome_pairs.jsonl"
FORMAT_PAGE = "docs/own-data.md shows the row format"

OwnRow = Example | OutcomePair
KINDS: tuple[type[Example] | type[OutcomePair], ...] = (Example, OutcomePair)  # of the files, in their order
READ = {"example": "examples", "prompt": "prompts without reply", "pair": "outcome pairs"}

_ROW: TypeAdapter[OwnRow] = TypeAdapter(Annotated[OwnRow, Field(discriminator="format")])
_BETWEEN = "\x1f"  # corpus and conversation id; `tidy` leaves it in no text


def files(path: Path) -> list[Path]:
    """The files of own rows at a path: examples first, then outcome pairs if there are any. Raises UserError where there are none."""
    if path.is_file():
        return [path]
    if not (path / EXAMPLES).is_file():
        there = sorted(file.name for file in path.glob("*.jsonl")) if path.is_dir() else []
        found = f" (there is: {', '.join(there)})" if there else "" if path.is_dir() else ": there is no such folder or file"
        raise UserError(
            f"{path / EXAMPLES} does not exist{found}. Point corpus.sources at a folder with {EXAMPLES}, or at one file of "
            f"examples; {FORMAT_PAGE}."
        )
    pairs = path / PAIRS
    return [path / EXAMPLES, pairs] if pairs.is_file() else [path / EXAMPLES]


def rows(path: Path, corpus: str, heard: Callable[[int], None] | None = None) -> Iterator[tuple[str, OwnRow]]:
    """Yield ("file, line", row) of every row at a path, with nothing dropped. Raises UserError with file, line and field.

    heard: as in `read_json_lines`.
    """
    for file, kind in zip(files(path), KINDS, strict=False):
        for number, value in read_json_lines(file, heard):
            where = f"{file}, line {number}"
            try:
                tidied = _tidied(value)
            except RecursionError as error:
                raise UserError(f"{where}: values are nested too deeply. {FORMAT_PAGE}.") from error
            yield where, _row(kind, tidied, where, corpus)


def extract(
    path: Path, tally: Tally, corpus: str, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[list[Example], list[OutcomePair]]]:
    """Yield the examples and outcome pairs of each conversation, in an order that depends on corpora and ids only.

    Large files are dealt out by conversation (`buckets.py`): in memory are one part of them, and some 35 bytes of each row. A row that
    occurs twice is one row. Raises UserError, before anything is yielded, for rows that share an id and differ: they contradict each
    other.
    """
    size = sum(file.stat().st_size for file in files(path))
    count = buckets_for(size, bucket_bytes)
    identities, weight = _Identities(), Weight()

    def conversations(parts: Iterator[Iterator[Packed]]) -> Iterator[tuple[tuple[list[Example], list[OutcomePair]], int]]:
        for number, part in enumerate(parts):
            bucket: dict[tuple[str, ...], list[bytes]] = defaultdict(list)
            for key, packed in part:
                bucket[tuple(key.split(_BETWEEN, 1))].append(packed)
            if number == 0:  # by now every row was read, however many parts there are
                _refuse_contradictions(path, corpus, identities)
            tally.read["conversations"] += len(bucket)
            for conversation in sorted(bucket):
                theirs = bucket.pop(conversation)
                yield _sifted(map(_ROW.validate_json, theirs), tally), sum(map(len, theirs))

    with tempfile.TemporaryDirectory(prefix="suasion-corpus-") as temporary:
        packed = weight.of(_packed(path, tally, corpus, identities, size))
        whole = conversations(dealt(packed, Path(temporary) / "rows", count))
        yield from watched(whole, f"going through {path.name}", lambda: weight.bytes, "bytes")


def _packed(path: Path, tally: Tally, corpus: str, identities: _Identities, size: int) -> Iterator[Packed]:
    """Every row as JSON, by its corpus and conversation. size: bytes of the files."""
    with progress(f"reading {path.name}", size, "bytes") as heard:
        for _, row in rows(path, corpus, heard):
            tally.read["rows"] += 1
            tally.read[READ[_what(row)]] += 1
            packed = row.model_dump_json().encode()
            identities.add(row, packed)
            yield f"{row.corpus}{_BETWEEN}{row.conversation_id}", packed


def _sifted(rows: Iterable[OwnRow], tally: Tally) -> tuple[list[Example], list[OutcomePair]]:
    """What can be used of one conversation's rows; the rest is counted."""
    examples: list[Example] = []
    pairs: list[OutcomePair] = []
    seen: set[tuple[type, str]] = set()
    for row in rows:
        if (type(row), row.id) in seen:
            tally.dropped[f"{_what(row)} that occurs twice"] += 1
        elif not row.turns or not all(turn.text for turn in row.turns):
            tally.dropped[f"{_what(row)} without a turn, or with an empty one"] += 1
        elif isinstance(row, Example):
            examples.append(row)
        elif row.winner == row.loser:
            tally.dropped["pair of equal replies"] += 1
        else:
            pairs.append(row)
        seen.add((type(row), row.id))
    return examples, pairs


class _Identities:
    """Of each row, by its number, 64-bit hashes of its id and of its content: which rows may contradict each other."""

    def __init__(self) -> None:
        self._ids, self._contents = array("Q"), array("Q")

    def add(self, row: OwnRow, packed: bytes) -> None:
        """The next row, and the same as JSON."""
        self._ids.append(_hash64(f"{type(row).__name__}{_BETWEEN}{row.id}".encode()))
        self._contents.append(_hash64(packed))

    def suspects(self) -> list[tuple[int, int]]:
        """(earlier, later) numbers of rows with one id and different contents, by the later; two of them may look alike by chance."""
        ids = np.frombuffer(self._ids, dtype=np.uint64)
        ascending = np.sort(ids)
        again = np.unique(ascending[1:][ascending[1:] == ascending[:-1]])
        standing: dict[int, list[int]] = defaultdict(list)
        for number in np.flatnonzero(np.isin(ids, again)).tolist():
            standing[self._ids[number]].append(number)
        neighbours = (pair for numbers in standing.values() for pair in pairwise(numbers))
        return sorted(
            (pair for pair in neighbours if self._contents[pair[0]] != self._contents[pair[1]]), key=lambda pair: pair[1]
        )


def _refuse_contradictions(path: Path, corpus: str, identities: _Identities) -> None:
    for suspects in identities.suspects():
        (first_where, first), (where, row) = [found for number, found in enumerate(rows(path, corpus)) if number in suspects]
        if type(first) is type(row) and first.id == row.id and first != row:
            differing = ", ".join(name for name in type(row).model_fields if getattr(row, name) != getattr(first, name))
            raise UserError(
                f"{where}: has the id of {first_where} ({row.id}) but another {differing}. Keep one of the two rows, or give each an id "
                "of its own (one that is left out is made from conversation, context and replies)."
            )


def _what(row: OwnRow) -> str:
    return "pair" if isinstance(row, OutcomePair) else "prompt" if row.reply is None else "example"


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _row(kind: type[Example] | type[OutcomePair], value: dict[str, Any], where: str, corpus: str) -> OwnRow:
    """The typed row, with what was left out filled in."""
    known = {"id": "(from content)", "corpus": corpus} | ({"outcome": None} if kind is Example else {})
    try:
        row = kind.model_validate(known | value)
    except ValidationError as error:
        raise UserError(f"{where}: {_faults(kind, value, error)}. {FORMAT_PAGE}.") from error
    for name in ("id", "corpus", "conversation_id", "author" if isinstance(row, Example) else "group"):
        if not getattr(row, name):
            raise UserError(f"{where}: {name} is empty. {FORMAT_PAGE}.")
    if isinstance(row, Example) and row.outcome is not None and not math.isfinite(row.outcome):
        raise UserError(f"{where}: outcome: {row.outcome} is no number. Write null where it is unknown.")
    if "id" in value:
        return row
    if isinstance(row, Example):
        return row.model_copy(update={"id": example_id(row.corpus, row.conversation_id, row.turns, row.reply)})
    identity = outcome_pair_id(row.corpus, row.conversation_id, row.turns, row.winner, row.loser)
    return row.model_copy(update={"id": identity})


def _tidied(value: Any) -> Any:
    """The same JSON value with every text in NFC, without surrounding blanks, control characters and lone surrogates."""
    if isinstance(value, str):
        return tidy(value)
    if isinstance(value, list):
        return [_tidied(item) for item in value]
    return {key: _tidied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _faults(kind: type[Row], value: dict[str, Any], error: ValidationError) -> str:
    """What is wrong with a row, in words: unknown fields with the nearest known one first, then the rest."""
    if kind is Example and {"winner", "loser"} & value.keys():
        return f"this is an outcome pair: it belongs into {PAIRS}, beside {EXAMPLES}"
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    return "; ".join(_fault(kind, fault) for fault in faults)


def _fault(kind: type[Row], fault: ErrorDetails) -> str:
    *path, name = fault["loc"] or ("row",)  # a fault of the whole row has no place
    place = ".".join(map(str, (*path, name)))
    if fault["type"] == "extra_forbidden":
        known = sorted((Turn if path[:1] == ["turns"] else kind).model_fields)
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        return f"unknown field {place}" + (f", did you mean '{near[0]}'?" if near else "") + f" (known: {', '.join(known)})"
    if fault["type"] == "missing":
        return f"field {place} is missing"
    given = fault["input"]
    shown = f" (it is {given!r})" if isinstance(given, str | int | float | bool | None) and len(repr(given)) < 60 else ""
    return f"{place}: {fault['msg']}{shown}"
