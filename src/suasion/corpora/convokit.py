"""A streaming reader of ConvoKit's on-disk format, which the real corpora and the bundled miniature ones share.

Reads `utterances.jsonl`, `conversations.json`, `index.json` and `speakers.json` (older corpora: `users.json`, and the keys `user`
and `root`). Memory does not grow with the number of utterances: a large file is first dealt out to temporary files by
conversation, and one of those at a time is held. What comes out does not depend on the order of the rows.

A line that is not JSON stops the reader with file and line. Everything else that real data holds (missing parents, cycles, null
texts, deleted authors, lone surrogates, pickled metadata) is repaired or dropped, and every drop is counted by its reason.
"""

from __future__ import annotations

import itertools
import marshal
import re
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suasion.errors import UserError
from suasion.records import read_json, read_json_lines

FILES = ("utterances.jsonl", "conversations.json", "index.json", "speakers.json", "users.json")
GONE = frozenset({"", "[deleted]", "[removed]", "[missing]"})
BUCKET_BYTES = 64 * 2**20  # of the utterance file; parsed, a bucket takes about four times as much

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff]")
_PICKLED = re.compile(r"<##bin\{\d+\}&&@\*\*>")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One utterance. `line` is its line in the file, the last resort for putting a conversation in order."""

    id: str
    conversation_id: str
    speaker: str
    reply_to: str | None
    text: str
    meta: Mapping[str, Any]
    line: int


@dataclass(frozen=True)
class Conversation:
    """One conversation with all of its utterances by id, in file order."""

    id: str
    meta: Mapping[str, Any]
    utterances: dict[str, Utterance]


@dataclass
class Tally:
    """What was read and what was dropped, by reason. `binary_fields` are metadata fields that ConvoKit pickled: they are not read."""

    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    binary_fields: tuple[str, ...] = ()


def tidy(text: str) -> str:
    """The text in NFC with plain line ends, without control characters, invisible marks and lone surrogates."""
    text = text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n").replace("\u00a0", " ")
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).strip()


def gone(text: str) -> bool:
    """Whether a text or an author was deleted, removed or is missing."""
    return text.strip().lower() in GONE


def conversations(folder: Path, tally: Tally, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Conversation]:
    """Yield the conversations of a corpus, each whole, in an order that depends on their ids only.

    Raises UserError for a folder that is not a corpus, and with file and line for a broken line.
    """
    metas = _conversation_metas(folder)
    tally.binary_fields = binary_fields(folder)
    tally.read["speakers"] = _count_speakers(folder)
    path = folder / "utterances.jsonl"
    buckets = 1 + path.stat().st_size // bucket_bytes
    seen_metas = 0
    for utterances in _buckets(read_utterances(folder, tally), buckets):
        grouped: dict[str, dict[str, Utterance]] = {}
        for utterance in utterances:
            members = grouped.setdefault(utterance.conversation_id, {})
            if utterance.id in members:
                tally.dropped["utterance id used twice"] += 1
            else:
                members[utterance.id] = utterance
        for identity in sorted(grouped):
            tally.read["conversations"] += 1
            tally.read["conversations without metadata"] += identity not in metas
            seen_metas += identity in metas
            yield Conversation(identity, metas.get(identity, {}), grouped[identity])
    tally.dropped["conversation without utterances"] += len(metas) - seen_metas


def read_utterances(folder: Path, tally: Tally) -> Iterator[Utterance]:
    """Yield the utterances of a corpus in file order, one at a time. Raises UserError with file and line for a broken line."""
    for line, row in read_json_lines(folder / "utterances.jsonl"):
        tally.read["utterances"] += 1
        identity = _name(row.get("id"))
        if not identity:
            tally.dropped["utterance without id"] += 1
            continue
        parent = _name(row.get("reply_to", row.get("reply-to")))
        if parent == identity:
            tally.read["utterances that reply to themselves"] += 1
            parent = ""
        conversation = _name(row.get("conversation_id")) or _name(row.get("root")) or ("" if parent else identity)
        if not conversation:
            tally.dropped["utterance without conversation"] += 1
            continue
        text = row.get("text")
        if not isinstance(text, str):
            tally.read["utterances without text"] += 1
            text = ""
        meta = row.get("meta")
        yield Utterance(
            id=identity,
            conversation_id=conversation,
            speaker=_name(row.get("speaker", row.get("user"))) or "[deleted]",
            reply_to=parent or None,
            text=tidy(text),
            meta=_readable(meta) if isinstance(meta, dict) else {},
            line=line,
        )


def ancestors(utterances: Mapping[str, Utterance], identity: str) -> tuple[list[Utterance], str]:
    """The path from the conversation's first utterance to the parent of `identity`, and what is wrong with it, '' if nothing.

    Faults: "missing parent" (the path then starts below the gap) and "cycle of replies".
    """
    path: list[Utterance] = []
    seen = {identity}
    parent = utterances[identity].reply_to
    while parent is not None:
        if parent in seen:
            return path[::-1], "cycle of replies"
        if parent not in utterances:
            return path[::-1], "missing parent"
        seen.add(parent)
        path.append(utterances[parent])
        parent = utterances[parent].reply_to
    return path[::-1], ""


def in_order(utterances: Mapping[str, Utterance]) -> list[Utterance]:
    """A dialogue's turns along its one chain of replies; in file order where the replies do not form a single chain."""
    by_line = sorted(utterances.values(), key=lambda utterance: utterance.line)
    following = {utterance.reply_to: utterance for utterance in by_line if utterance.reply_to in utterances}
    first = [utterance for utterance in by_line if utterance.reply_to not in utterances]
    if len(first) != 1 or len(following) != len(by_line) - 1:
        return by_line
    chain = [first[0]]
    while chain[-1].id in following:
        chain.append(following[chain[-1].id])
    return chain if len(chain) == len(by_line) else by_line


def binary_fields(folder: Path) -> tuple[str, ...]:
    """Metadata fields that ConvoKit pickled beside the JSON, as "utterances.field"; pickles are never opened."""
    path = folder / "index.json"
    index = read_json(path) if path.is_file() else {}
    found = set()
    for section in ("utterances", "speakers", "users", "conversations", "overall"):
        fields = index.get(f"{section}-index") if isinstance(index, dict) else None
        for name, kinds in fields.items() if isinstance(fields, dict) else ():
            if kinds == "bin" or (isinstance(kinds, list) and "bin" in kinds):
                found.add(f"{section}.{name}")
    return tuple(sorted(found))


def _conversation_metas(folder: Path) -> dict[str, dict[str, Any]]:
    if not folder.is_dir():
        raise UserError(
            f"no corpus at {folder}: the folder does not exist. Check corpus.sources in the recipe, or use path: bundled."
        )
    for file in ("utterances.jsonl", "conversations.json"):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} is not a corpus in ConvoKit's on-disk format: {file} is missing (there should be utterances.jsonl and "
                "conversations.json). Unpack the corpus again, or point corpus.sources at the folder that holds these files."
            )
    value = read_json(folder / "conversations.json")
    if not isinstance(value, dict):
        raise UserError(f"{folder / 'conversations.json'} must hold an object by conversation id, found {type(value).__name__}.")
    metas = {}
    for identity, entry in value.items():
        meta = entry.get("meta", entry) if isinstance(entry, dict) else {}  # the oldest format has the metadata itself here
        metas[tidy(identity)] = _readable(meta) if isinstance(meta, dict) else {}
    return metas


def _count_speakers(folder: Path) -> int:
    for file in ("speakers.json", "users.json"):
        if (folder / file).is_file():
            value = read_json(folder / file)
            return len(value) if isinstance(value, dict | list) else 0
    return 0


def _buckets(utterances: Iterator[Utterance], count: int) -> Iterator[Iterator[Utterance]]:
    """The utterances in `count` parts that never divide a conversation; more than one part goes through temporary files."""
    if count == 1:
        yield utterances
        return
    with tempfile.TemporaryDirectory(prefix="suasion-corpus-") as folder:
        paths = [Path(folder) / f"{number}" for number in range(count)]
        files = [path.open("wb") for path in paths]
        try:
            for u in utterances:
                file = files[zlib.crc32(u.conversation_id.encode()) % count]
                marshal.dump((u.id, u.conversation_id, u.speaker, u.reply_to, u.text, dict(u.meta), u.line), file)
        finally:
            for file in files:
                file.close()
        for path in paths:
            yield _read_bucket(path)


def _read_bucket(path: Path) -> Iterator[Utterance]:
    with path.open("rb") as file:
        for _ in itertools.count():
            try:
                yield Utterance(*marshal.load(file))  # written above, by this very process
            except EOFError:
                return


def _readable(meta: dict[str, Any]) -> dict[str, Any]:
    """The metadata without pickled values."""
    return {key: value for key, value in meta.items() if not (isinstance(value, str) and _PICKLED.search(value))}


def _name(value: Any) -> str:
    """An id or a name as text; '' for anything that is neither text nor a whole number."""
    return tidy(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else ""
