"""Random numbers as a function of (purpose, row, seed), never of position, thread or reload.

A resumed, sharded or reordered run therefore draws the same numbers. Every random choice of the project goes through
`derive_seed`, `uniforms` or `generator`; none uses a global generator.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, purpose: str, *keys: str | int) -> int:
    """A 64-bit seed for one purpose and one row.

    Keys are joined with a separator that cannot occur in ids, so ("ab", "c") and ("a", "bc") differ.
    """
    text = "\x1f".join([str(seed), purpose, *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def generator(seed: int, purpose: str, *keys: str | int) -> np.random.Generator:
    """A counter-based generator (Philox) owned by one purpose and row."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, purpose, *keys)))


def uniforms(count: int, seed: int, purpose: str, *keys: str | int) -> np.ndarray:
    """`count` float64 numbers in [0, 1): entry t belongs to position t of the row, whatever is drawn elsewhere."""
    return generator(seed, purpose, *keys).random(count)
