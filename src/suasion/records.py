"""The typed rows that cross stage borders, and how they are read and written.

Stages meet on disk through these rows and nothing else. Each row carries its format version, ids are hashes of content, and
an unknown or missing field fails with file and line. *reply* is a human's, *response* a model's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar, overload

from pydantic import BaseModel, ConfigDict, ValidationError

from suasion.errors import UserError

Role = Literal["user", "assistant"]
Label = Literal["a", "b", "tie", "none"]
PoolName = Literal["sft", "rlaif", "rlhf", "eval"]


class Row(BaseModel):
    """Base of all rows: immutable, and strict about its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Turn(Row):
    """One turn of a dialogue. `user` is the person to be persuaded, `assistant` the persuader or any other challenger.

    `name` tells several people of one role apart ("Challenger 2"); it is a position in the thread, never a real user name.
    """

    role: Role
    text: str
    name: str | None = None


class Prompt(Row):
    """A dialogue so far, in which the persuader speaks next."""

    format: Literal["prompt/1"] = "prompt/1"
    id: str
    corpus: str
    conversation_id: str
    author: str
    turns: tuple[Turn, ...]


class Example(Row):
    """A prompt with the reply that a human gave.

    author: CMV: the poster; P4G: the persuader. persuadee: who was to be persuaded, where that is somebody else and known; pools
    count whom they share. outcome: 1.0 persuaded, 0.0 not, P4G: the donation in dollars (capped at 2), None unknown. reply is None
    for posts that nobody answered: they can only become prompts.
    """

    format: Literal["example/1"] = "example/1"
    id: str
    corpus: str
    conversation_id: str
    author: str
    persuadee: str | None = None
    turns: tuple[Turn, ...]
    reply: str | None
    outcome: float | None
    strategies: tuple[str, ...] = ()

    def prompt(self) -> Prompt:
        """The same row without its reply. The prompt id depends on the context only."""
        return Prompt(
            id=content_id("prompt", self.corpus, self.conversation_id, turns_key(self.turns)),
            corpus=self.corpus,
            conversation_id=self.conversation_id,
            author=self.author,
            turns=self.turns,
        )


class OutcomePair(Row):
    """Two human replies to one context, of which one persuaded. `group` (the poster, or a topic) is the unit of folds."""

    format: Literal["outcome-pair/1"] = "outcome-pair/1"
    id: str
    corpus: str
    conversation_id: str
    group: str
    turns: tuple[Turn, ...]
    winner: str
    loser: str


class Response(Row):
    """What a model said to a prompt.

    tokens: the sampled ids, stop token included where finish is "stop"; None for imported texts. logprob: their summed
    log-probability at temperature 1 under the untruncated distribution. lineage: hash of the model that spoke.
    """

    format: Literal["response/1"] = "response/1"
    id: str
    prompt_id: str
    n: int
    text: str
    finish: Literal["stop", "length", "unknown"]
    flags: tuple[str, ...] = ()
    tokens: tuple[int, ...] | None
    logprob: float | None
    lineage: str
    seed: int


class Pair(Row):
    """Two responses to one prompt, to be compared. `pool` says where the prompt came from."""

    format: Literal["pair/1"] = "pair/1"
    id: str
    prompt_id: str
    pool: PoolName
    a: str
    b: str


class Verdict(Row):
    """What one source says of one pair, in the pair's own (a, b) order whatever order it was shown in.

    p_a: probability that a is better, None where the source gives none. label "none" is missing data, never a tie.
    order: how it was shown: "both" when the two orders were combined; outcome: how they relate, '' where there was one only.
    """

    format: Literal["verdict/1"] = "verdict/1"
    pair_id: str
    source: str
    order: Literal["ab", "ba", "both"]
    label: Label
    p_a: float | None
    outcome: Literal["", "consistent", "flip", "tie", "none"] = ""
    reason: str = ""
    raw: str = ""
    template_hash: str = ""

    def swapped(self) -> Verdict:
        """The verdict on the pair (b, a): label and probability move together."""
        label: dict[Label, Label] = {"a": "b", "b": "a", "tie": "tie", "none": "none"}
        order: dict[str, Any] = {"ab": "ba", "ba": "ab", "both": "both"}
        return self.model_copy(
            update={
                "label": label[self.label],
                "p_a": None if self.p_a is None else 1.0 - self.p_a,
                "order": order[self.order],
            }
        )


class Preference(Row):
    """One training pair of an arm. `on_policy` is False for responses that the arm's start model did not write.

    p: probability that the chosen response is the better one, the mean over the sources that gave one; None where none did.
    """

    format: Literal["preference/1"] = "preference/1"
    id: str
    prompt: Prompt
    chosen: Response
    rejected: Response
    sources: tuple[str, ...]
    weight: float = 1.0
    p: float | None = None
    on_policy: bool = True


_DECODER = json.JSONDecoder()
HEARD_LINES = 4096  # after so many lines a reader says how far it is
_BLANKS = re.compile(r"[ \t\n\r]*")
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of such bytes

RowType = TypeVar("RowType", bound=Row)


def content_id(kind: str, *parts: str | int | float) -> str:
    """A 16-hex-digit id from content: equal content has equal ids on every machine and in every order."""
    text = "\x1f".join([kind, *map(str, parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def turns_key(turns: Iterable[Turn]) -> str:
    """The text of a context as one string, for ids and for near-duplicate search."""
    return "\x1e".join(f"{turn.role}\x1d{turn.name or ''}\x1d{turn.text}" for turn in turns)


def example_id(corpus: str, conversation_id: str, turns: Iterable[Turn], reply: str | None) -> str:
    """The id of an example: equal conversation, context and reply are one example."""
    return content_id("example", corpus, conversation_id, turns_key(turns), reply or "")


def outcome_pair_id(corpus: str, conversation_id: str, turns: Iterable[Turn], winner: str, loser: str) -> str:
    """The id of an outcome pair: equal conversation, context and replies are one pair."""
    return content_id("outcome-pair", corpus, conversation_id, turns_key(turns), winner, loser)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def read_json_lines(path: Path, heard: Callable[[int], None] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file. heard: is told now and then, and at the end, how many more bytes were read.

    Raises UserError that names file and line where a line is not UTF-8, not JSON, or not an object.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist. Check the path, or make the file with the stage that writes it.")
    told = 0
    with path.open("rb", buffering=2**18) as handle:
        for number, raw in enumerate(handle, start=1):
            if heard and not number % HEARD_LINES:
                heard(handle.tell() - told)
                told = handle.tell()
            if not raw.strip():
                continue
            try:
                value = _line_value(raw)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error}). Repair or remove this line, then run again."
                ) from error
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, found {type(value).__name__}.")
            yield number, value
        if heard:
            heard(handle.tell() - told)


def _line_value(raw: bytes) -> Any:
    """As json.loads, which spends a third of its time on encodings and blanks that ordinary lines do not have."""
    try:
        text = raw.decode()
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return json.loads(raw)
    return value if text[end:] in ("", "\n", "\r\n") else json.loads(raw)


def read_json_members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of a file that holds one JSON object, one member at a time; never is more than a piece of it in memory.

    Raises UserError with file and line where it is missing, broken, or holds something other than an object.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as handle:  # so that a byte that is no UTF-8 has a line
        window = _Window(handle)
        try:
            if (first := window.peek()) != "{":
                raise window.fault(f"it must hold an object by id, but begins with {first or 'nothing'}")
            window.symbol("{")
            found = "," if window.peek() != "}" else window.symbol("}")
            while found == ",":
                key = window.value()
                if not isinstance(key, str):
                    raise window.fault("a name must be text in double quotes")
                window.symbol(":")
                yield key, window.value()
                found = window.symbol(",}")
            if window.peek():
                raise window.fault("something stands after the object's end")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}). Repair it, or unpack the corpus again.") from error


class _Window:
    """A piece of a JSON text: it grows until the next value fits, and forgets what was read."""

    PIECE = 2**20  # characters

    def __init__(self, handle: TextIO):
        self.handle, self.text, self.place, self.lines = handle, "", 0, 0

    def fault(self, what: str, place: int | None = None) -> ValueError:
        """An error at a place of the window, with its line in the file."""
        return ValueError(f"{what}: line {1 + self.lines + self.text.count(chr(10), 0, self.place if place is None else place)}")

    def peek(self) -> str:
        """The next character that is no blank; '' at the end of the file."""
        while True:
            blanks = _BLANKS.match(self.text, self.place)
            self.place = blanks.end() if blanks else self.place
            if self.place < len(self.text) or not self._grow():
                return self.text[self.place : self.place + 1]

    def symbol(self, wanted: str) -> str:
        """Read over one of the characters in `wanted` and return it. Raises ValueError for any other."""
        found = self.peek()
        if not found or found not in wanted:
            raise self.fault(f"expected {' or '.join(wanted)}, found {found or 'the end of the file'}")
        self.place += 1
        return found

    def value(self) -> Any:
        """Read the next value. Raises ValueError where there is none."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
            except RecursionError as error:
                raise self.fault("values are nested too deeply") from error
            except ValueError as error:
                if not self._grow():
                    place = error.pos if isinstance(error, json.JSONDecodeError) else self.place
                    raise self.fault(getattr(error, "msg", str(error)), place) from error
            else:
                if end < len(self.text) or not self._grow():  # at the window's end a number may go on
                    self.place = end
                    return value

    def _grow(self) -> bool:
        """Read as much again as is left, so that a long value is not tried too often. False at the end of the file."""
        piece = self.handle.read(max(self.PIECE, len(self.text) - self.place))
        if piece:
            self.lines += self.text.count("\n", 0, self.place)
            self.text, self.place = self.text[self.place :] + piece, 0
            if not piece.isascii() and (broken := _NO_UTF8.search(self.text)):
                raise self.fault("it is not UTF-8", broken.start())
        return bool(piece)


def read_rows(path: Path, kind: type[RowType]) -> Iterator[RowType]:
    """Yield the typed rows of a file. Raises UserError with file, line and field."""
    for number, value in read_json_lines(path):
        yield _typed(value, kind, f"{path}, line {number}")


def _typed(value: Any, kind: type[RowType], where: str) -> RowType:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "row"
        raise UserError(
            f"{where}: not a valid {kind.__name__} row: {place}: {first['msg']}. "
            "The file was changed, or made by another version: run the stage that writes it again."
        ) from error


class RowFile(Sequence[RowType]):
    """The typed rows of a file as a sequence that is read when it is asked for: eight bytes a row are in memory, where it begins.

    Use it in a `with`. Raises UserError with file, line and field, for a broken row when it is read.
    """

    def __init__(self, path: Path, kind: type[RowType]):
        if not path.is_file():
            raise UserError(f"{path} does not exist. Check the path, or make the file with the stage that writes it.")
        self.path, self.kind = path, kind
        self._begins = array("Q")
        self._handle = path.open("rb")
        place = 0
        for raw in self._handle:
            if raw.strip():
                self._begins.append(place)
            place += len(raw)

    def __enter__(self) -> RowFile[RowType]:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[RowType]:
        return read_rows(self.path, self.kind)

    @overload
    def __getitem__(self, number: int) -> RowType: ...

    @overload
    def __getitem__(self, number: slice) -> list[RowType]: ...

    def __getitem__(self, number: int | slice) -> RowType | list[RowType]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        self._handle.seek(self._begins[number])
        return _typed(_line_value(self._handle.readline()), self.kind, f"{self.path}, row {number + 1}")


@contextmanager
def row_writer(path: Path) -> Iterator[Callable[[Row], None]]:
    """A function that adds rows to a file of JSONL. The file appears by rename when the block ends, and not if it ends in an error."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        yield lambda row: print(canonical_json(row.model_dump(mode="json")), file=handle)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSONL by rename, so that a reader never sees half a file. Returns how many."""
    count = 0
    with row_writer(path) as write:
        for row in rows:
            write(row)
            count += 1
    return count


def json_text(value: Any) -> str:
    """Indented JSON with sorted keys: what `write_json` writes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with sorted keys, by rename. NaN is refused: a number is a number or absent."""
    temporary = path.with_name(path.name + ".tmp")
    text = json_text(value)
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read one JSON document. Raises UserError where it is missing or broken."""
    try:
        return json.loads(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{path} is not valid JSON (it is not UTF-8: line {line}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
