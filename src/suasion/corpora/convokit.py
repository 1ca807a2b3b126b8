"""A streaming reader of ConvoKit's on-disk format, which the real corpora and the bundled miniature ones share.

Reads `utterances.jsonl`, `conversations.json`, `index.json` and `speakers.json` (older corpora: `users.json`, and the keys `user`
and `root`). Memory does not grow with the number of utterances: a large file is dealt out by conversation (`buckets.py`) and read in
parts. What comes out does not depend on the order of the rows.

A line that is not JSON stops the reader with file and line. Everything else that real data holds (missing parents, cycles, null
texts, deleted authors, lone surrogates, pickled metadata) is repaired or dropped, and every drop is counted by its reason.
"""

from __future__ import annotations

import itertools
import marshal
import re
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from suasion.corpora.buckets import BUCKET_BYTES, Packed, Weight, buckets_for, dealt
from suasion.errors import UserError
from suasion.progress import progress, watched
from suasion.records import read_json_lines, read_json_members

FILES = ("utterances.jsonl", "conversations.json", "index.json", "speakers.json", "users.json")
GONE = frozenset({"", "[deleted]", "[removed]", "[missing]"})

Meta = dict[str, Any]
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff]")
_CONTROL = bytes([*range(0x09), *range(0x0B, 0x20), 0x7F])  # what of _INVISIBLE is ASCII
_PICKLED = re.compile(r"<##bin\{\d+\}&&@\*\*>")


class Utterance(NamedTuple):
    """One utterance. `line` is its line in the file, the last resort for putting a conversation in order."""

    id: str
    conversation_id: str
    speaker: str
    reply_to: str | None
    raw: str
    meta: Meta
    line: int

    @property
    def text(self) -> str:
        """What was said, tidied; done when it is asked for, because most utterances of a long thread lie on no path that is used."""
        return tidy(self.raw)


@dataclass(frozen=True)
class Conversation:
    """One conversation with all of its utterances by id, in file order."""

    id: str
    meta: Meta
    utterances: dict[str, Utterance]


@dataclass
class Tally:
    """What was read and what was dropped, by reason. `binary_fields` are metadata fields that ConvoKit pickled: they are not read."""

    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    binary_fields: tuple[str, ...] = ()


def tidy(text: str) -> str:
    """The text in NFC with plain line ends, without control characters, invisible marks and lone surrogates."""
    if text.isascii():
        if text.isprintable():
            return text.strip()
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        return text.encode().translate(None, _CONTROL).decode().strip()
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n").replace("\u00a0", " ")
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).strip()


def gone(text: str) -> bool:
    """Whether a text or an author was deleted, removed or is missing."""
    return text.strip().lower() in GONE


def conversations(folder: Path, tally: Tally, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Conversation]:
    """Yield the conversations of a corpus, each whole, in an order that depends on their ids only.

    Raises UserError for a folder that is not a corpus, and with file and line for a broken line.
    """
    for file in ("utterances.jsonl", "conversations.json"):
        _require(folder, file)
    tally.binary_fields = binary_fields(folder)
    tally.read["speakers"] = _count_speakers(folder)
    count = buckets_for((folder / "utterances.jsonl").stat().st_size, bucket_bytes)
    with tempfile.TemporaryDirectory(prefix="suasion-corpus-") as temporary:
        dealt_metas = dealt(_metas(folder), Path(temporary) / "metas", count)
        weight = Weight()
        dealt_runs = dealt(weight.of(_runs(folder, tally)), Path(temporary) / "utterances", count)
        whole = _whole(map(dict, dealt_metas), map(_grouped, dealt_runs), tally)
        yield from watched(whole, f"going through {folder.name}", lambda: weight.bytes, "bytes")


def read_outline(folder: Path, tally: Tally) -> None:
    """Count all but the utterances of a corpus: what stands in the smaller files. Raises UserError for a folder that is no corpus."""
    for file in ("utterances.jsonl", "conversations.json"):
        _require(folder, file)
    tally.read["conversations"] = sum(1 for _ in _metas(folder))
    tally.binary_fields = binary_fields(folder)
    tally.read["speakers"] = _count_speakers(folder)


def read_utterances(folder: Path, tally: Tally, heard: Callable[[int], None] | None = None) -> Iterator[Utterance]:
    """Yield the utterances of a corpus in file order, one at a time. Raises UserError with file and line for a broken line.

    heard: as in `read_json_lines`.
    """
    read, dropped = tally.read, tally.dropped
    for line, row in read_json_lines(folder / "utterances.jsonl", heard):
        read["utterances"] += 1
        identity = _name(row.get("id"))
        if not identity:
            dropped["utterance without id"] += 1
            continue
        parent = _name(row.get("reply_to", row.get("reply-to")))
        if parent == identity:
            read["utterances that reply to themselves"] += 1
            parent = ""
        conversation = _name(row.get("conversation_id")) or _name(row.get("root")) or ("" if parent else identity)
        if not conversation:
            dropped["utterance without conversation"] += 1
            continue
        text, meta = row.get("text"), row.get("meta")
        if not isinstance(text, str):
            read["utterances without text"] += 1
            text = ""
        speaker = _name(row.get("speaker", row.get("user"))) or "[deleted]"
        meta = _readable(meta) if isinstance(meta, dict) else {}
        yield Utterance(identity, conversation, speaker, parent or None, text, meta, line)


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
    """Metadata fields that ConvoKit pickled beside the JSON, as "utterances.field"; pickles are never opened.

    Raises UserError with file and line for a broken index.
    """
    path = folder / "index.json"
    index = dict(read_json_members(path)) if path.is_file() else {}
    found = set()
    for section in ("utterances", "speakers", "users", "conversations", "overall"):
        fields = index.get(f"{section}-index")
        for name, kinds in fields.items() if isinstance(fields, dict) else ():
            if kinds == "bin" or (isinstance(kinds, list) and "bin" in kinds):
                found.add(f"{section}.{name}")
    return tuple(sorted(found))


def _require(folder: Path, file: str) -> None:
    if not folder.is_dir():
        raise UserError(
            f"no corpus at {folder}: the folder does not exist. Get it with `suasion fetch cmv` or `p4g` and name the "
            "folder: --set corpus.sources.0.path=FOLDER (or bundled)."
        )
    if not (folder / file).is_file():
        raise UserError(
            f"{folder} is not a corpus in ConvoKit's on-disk format: {file} is missing (there should be utterances.jsonl and "
            "conversations.json). Unpack the corpus again, or point corpus.sources at the folder that holds these files."
        )


def _metas(folder: Path) -> Iterator[Packed]:
    """Conversation id and packed metadata, one at a time."""
    for identity, entry in read_json_members(folder / "conversations.json"):
        meta = entry.get("meta", entry) if isinstance(entry, dict) else {}  # the oldest format has the metadata itself here
        where = f"{folder / 'conversations.json'}, conversation {identity}"
        yield tidy(identity), _packed(_readable(meta) if isinstance(meta, dict) else {}, where)


def _count_speakers(folder: Path) -> int:
    files = [folder / file for file in ("speakers.json", "users.json") if (folder / file).is_file()]
    return sum(1 for _ in read_json_members(files[0])) if files else 0


def _runs(folder: Path, tally: Tally) -> Iterator[Packed]:
    """Utterances that stand together in the file and belong together, packed together."""
    path = folder / "utterances.jsonl"
    with progress(f"reading {folder.name}", path.stat().st_size, "bytes") as heard:
        for identity, run in itertools.groupby(read_utterances(folder, tally, heard), attrgetter("conversation_id")):
            utterances = list(map(tuple, run))
            yield identity, _packed(utterances, f"{path}, line {utterances[0][-1]} and on")


def _packed(value: Any, where: str) -> bytes:
    try:
        return marshal.dumps(value)
    except ValueError as error:  # from Python 3.12 on JSON may be nested more deeply than marshal can write
        raise UserError(f"{where}: {error}. Take the nested metadata out, then run again.") from error


def _whole(
    metas_of_buckets: Iterator[dict[str, bytes]], buckets: Iterator[dict[str, list[bytes]]], tally: Tally
) -> Iterator[tuple[Conversation, int]]:
    """Every conversation, and its bytes in the bucket."""
    for metas, bucket in zip(metas_of_buckets, buckets, strict=True):
        tally.read["conversations"] += len(bucket)
        tally.read["conversations without metadata"] += len(bucket.keys() - metas.keys())
        tally.dropped["conversation without utterances"] += len(metas.keys() - bucket.keys())
        for identity in sorted(bucket):
            meta = marshal.loads(metas[identity]) if identity in metas else {}
            runs = bucket.pop(identity)
            yield Conversation(identity, meta, _unpacked(runs, tally)), sum(map(len, runs))


def _grouped(runs: Iterator[Packed]) -> dict[str, list[bytes]]:
    """Packed runs by conversation.

    They are unpacked when their conversation's turn comes: as objects a bucket's utterances take twice the memory, and the garbage
    collector takes half as long again to go through them.
    """
    bucket: dict[str, list[bytes]] = defaultdict(list)
    for identity, packed in runs:
        bucket[identity].append(packed)
    return bucket


def _unpacked(runs: list[bytes], tally: Tally) -> dict[str, Utterance]:
    """The utterances of one conversation by id, in file order; of two with one id the first."""
    utterances: dict[str, Utterance] = {}
    for fields in itertools.chain.from_iterable(map(marshal.loads, runs)):
        utterance = Utterance(*fields)
        if utterances.setdefault(utterance.id, utterance) is not utterance:
            tally.dropped["utterance id used twice"] += 1
    return utterances


def _readable(meta: Meta) -> Meta:
    """The metadata without pickled values."""
    pickled = [key for key, value in meta.items() if isinstance(value, str) and _PICKLED.search(value)]
    return {key: value for key, value in meta.items() if key not in pickled} if pickled else meta


def _name(value: Any) -> str:
    """An id or a name as text; '' for anything that is neither text nor a whole number."""
    if isinstance(value, str):
        return tidy(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""
