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


def gumbel(seeds: np.ndarray, position: int | np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Gumbel noise that belongs to (row's seed, position, token), whatever other tokens or rows are looked at.

    seeds: [B] uint64; position: one for all rows, or [B]; tokens: [B, K] token ids; returns [B, K] float64. The uniform numbers below are a counter hash
    (SplitMix64's finaliser, Steele et al. 2014, doi 10.1145/2714064.2660195), applied twice so that neighbouring counters are unrelated.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        row = _mix(seeds.astype(np.uint64)[:, None] + (np.reshape(position, (-1, 1)).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        bits = _mix(row + (tokens.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    uniform: np.ndarray = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), never 0 or 1
    noise: np.ndarray = -np.log(-np.log(uniform))
    return noise


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
