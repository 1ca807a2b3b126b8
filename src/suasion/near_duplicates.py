"""Near-duplicate texts by MinHash, in memory that is small beside the texts.

A text becomes a sketch of 128 numbers, of which the share that two sketches have in common estimates the Jaccard similarity of the
texts' word 5-grams (Broder 1997). datasketch makes the sketches and chooses the bands; its index of them would take ten times the
memory of the sketches. Here they lie in a temporary file, and one band at a time is looked at: candidates are sketches that agree in
a whole band, and the estimate then decides.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations

import numpy as np

from suasion.progress import tracked

SHINGLE = 5  # words
LEAST_SHINGLES = 20  # shorter texts ("Hello, how are you?") are alike by chance
PERMUTATIONS = 128  # standard error of an estimated similarity of .5: .044
CHUNK = 2**13  # sketches read at once: 4 MB

_BYTES = 4 * PERMUTATIONS  # datasketch's hash values are below 2^32
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Sketches:
    """Sketches of texts, each of which belongs to an owner (a number). Use it in a `with`, which removes the temporary file."""

    def __init__(self, threshold: float):
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        # Bands are tuned to a lower threshold, since they miss half of what lies just above theirs.
        bands = MinHashLSH(threshold=min(0.8 * threshold, 0.9), num_perm=PERMUTATIONS)
        self._bands = [slice(start, start + bands.r) for start in range(0, bands.b * bands.r, bands.r)]
        self._blank = MinHash(num_perm=PERMUTATIONS, hashfunc=_hash32)
        self._owners = array("I")
        self._file = tempfile.TemporaryFile(prefix="suasion-sketches-")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Sketches:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, owner: int, text: str) -> None:
        """Sketch a text; one that is too short to compare is left out."""
        grams = shingles(text)
        if len(grams) >= LEAST_SHINGLES:
            sketch = self._blank.copy()
            sketch.update_batch(sorted(grams))
            self._owners.append(owner)
            self._file.write(sketch.hashvalues.astype("<u4").tobytes())

    def pairs(self, together: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
        """Yield pairs of owners that have texts with an estimated similarity of at least the threshold.

        together: whether two owners need not be compared any more, because what was yielded before ties them together anyhow.
        """
        read = lru_cache(maxsize=2**12)(self._sketch)
        repeated: set[int] = set()  # sketches that equal an earlier one: only the earlier one is compared with others
        for one, other in self._agreeing(slice(0, PERMUTATIONS)):
            if np.array_equal(read(one), read(other)):
                repeated.add(other)
                if self._owners[one] != self._owners[other]:
                    yield self._owners[one], self._owners[other]
        tried: set[tuple[int, int]] = set()
        for band in tracked(self._bands, "near-duplicates", "bands"):
            for one, other in self._candidates(band, repeated):
                owners = self._owners[one], self._owners[other]
                if owners[0] == owners[1] or (one, other) in tried or together(*owners):
                    continue
                tried.add((one, other))
                if np.mean(read(one) == read(other)) >= self.threshold:
                    yield owners

    def _candidates(self, columns: slice, left_out: set[int]) -> Iterator[tuple[int, int]]:
        """Pairs of different sketches that agree in these columns."""
        group: list[int] = []
        for one, other in self._agreeing(columns):
            if not group or group[-1] != one:
                yield from combinations([number for number in group if number not in left_out], 2)
                group = [one]
            group.append(other)
        yield from combinations([number for number in group if number not in left_out], 2)

    def _agreeing(self, columns: slice) -> Iterator[tuple[int, int]]:
        """Neighbours among the sketches that agree in these columns: of three that do the first and second, the second and third.

        Columns are compared by a 64-bit hash, so that one pair in 10^19 may not really agree.
        """
        marks = np.zeros(len(self._owners), dtype=np.uint64)
        self._file.seek(0)
        for start in range(0, len(marks), CHUNK):
            chunk = np.frombuffer(self._file.read(CHUNK * _BYTES), dtype="<u4").reshape(-1, PERMUTATIONS)
            part = marks[start : start + len(chunk)]
            for column in chunk[:, columns].T:
                part *= _MIX
                part ^= column
                part ^= part >> np.uint64(29)
        order = np.argsort(marks, kind="stable")
        for place in np.flatnonzero(marks[order][1:] == marks[order][:-1]):
            yield int(order[place]), int(order[place + 1])

    def _sketch(self, number: int) -> np.ndarray:
        self._file.seek(number * _BYTES)
        return np.frombuffer(self._file.read(_BYTES), dtype="<u4")


def shingles(text: str) -> set[bytes]:
    """Word 5-grams of a text, in lower case and without punctuation."""
    said = words(text)
    return {" ".join(said[i : i + SHINGLE]).encode() for i in range(len(said) - SHINGLE + 1)}


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")
