"""Gumbel noise that belongs to (row's seed, position, token), whatever other tokens or rows are looked at.

Computed where the tokens are: a nearly flat distribution over 150 thousand tokens needs as many numbers a row and token, which a GPU
makes at once and a processor in most of a second a step.
"""

from __future__ import annotations

import numpy as np
import torch


def gumbel(seeds: np.ndarray, position: int | np.ndarray, tokens: torch.Tensor) -> torch.Tensor:
    """seeds: [B] uint64; position: one for all rows, or [B]; tokens: [B, K] token ids. Returns [B, K] float64 on the tokens' device.

    The uniform numbers below are a counter hash (SplitMix64's finaliser, Steele et al. 2014, doi 10.1145/2714064.2660195), applied twice so that
    neighbouring counters are unrelated. It is arithmetic modulo 2^64, which torch has for signed numbers only: the bits are the same.
    """
    counter = np.broadcast_to(position, seeds.shape).astype(np.int64)
    row = torch.from_numpy(np.stack([seeds.astype(np.uint64).view(np.int64), counter])).to(tokens.device)
    bits = _mix(_mix(row[0] + (row[1] + 1) * _GOLDEN)[:, None] + (tokens + 1) * _GOLDEN)
    uniform = _shifted(bits, 11).double().add_(0.5).mul_(2.0**-53)
    uniform.clamp_(max=1 - 2.0**-53)  # in (0, 1): the largest would round to 1
    return uniform.log_().neg_().log_().neg_()


def _signed(bits: int) -> int:
    """The signed number of these 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shifted to the right, zeros coming in from the left."""
    return (x >> by).bitwise_and_(2 ** (64 - by) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = _shifted(x, 30).bitwise_xor_(x).mul_(_FIRST)
    x = _shifted(x, 27).bitwise_xor_(x).mul_(_SECOND)
    return _shifted(x, 31).bitwise_xor_(x)
