"""Large corpora conversation by conversation, in flat memory: rows are dealt out to temporary files by the conversation they belong to,
and one file at a time is held. How many there are depends on the size of the corpus, and which row goes where on its key alone.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

BUCKET_BYTES = 64 * 2**20  # of the corpus's file; parsed, a bucket takes about twice as much
MOST_BUCKETS = 200  # files open at once; macOS allows 256

Packed = tuple[str, bytes]  # a conversation's key, and something of it as bytes

_LENGTHS = struct.Struct("<QQ")


class Weight:
    """Bytes of the rows that were dealt out so far: of all rows, once the first part of them can be read."""

    def __init__(self) -> None:
        self.bytes = 0

    def of(self, rows: Iterator[Packed]) -> Iterator[Packed]:
        """The same rows, weighed."""
        for identity, packed in rows:
            self.bytes += len(packed)
            yield identity, packed


def buckets_for(size: int, bucket_bytes: int = BUCKET_BYTES) -> int:
    """How many parts a corpus of so many bytes is read in."""
    return min(1 + size // bucket_bytes, MOST_BUCKETS)


def dealt(rows: Iterator[Packed], stem: Path, count: int) -> Iterator[Iterator[Packed]]:
    """Yield the rows in `count` parts that never divide a conversation; more than one part goes through files `stem`.0 and on."""
    if count == 1:
        yield rows
        return
    paths = [stem.with_suffix(f".{number}") for number in range(count)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for identity, packed in rows:
            key = identity.encode()
            files[zlib.crc32(key) % count].write(_LENGTHS.pack(len(key), len(packed)) + key + packed)
    for path in paths:
        yield _read_part(path)


def _read_part(path: Path) -> Iterator[Packed]:
    with path.open("rb") as file:
        while head := file.read(_LENGTHS.size):
            key, packed = _LENGTHS.unpack(head)
            yield file.read(key).decode(), file.read(packed)
