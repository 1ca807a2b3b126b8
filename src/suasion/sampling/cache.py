"""The key-value cache while decoding: room for the whole response is taken once, and rows that finish make room without a copy of the rest.

The library's cache grows by concatenation: every token copies every key and value that came before, and dropping one row copies all
others. Here a token costs one write, and a finished row is overwritten by the last one. (With 32 responses of the bundled model and 500
positions each that is 700 MB a token not moved.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class ReservedLayer(DynamicLayer):  # type: ignore[misc]  # the library is not followed by the type checker
    """Keys and values of one layer, [rows, heads, room, width], of which the first `rows` rows and `length` positions are in use.

    dtype: what attention computes in. Under bf16 autocast the model hands over fp32 keys, which attention would round at every token
    anew; they are rounded once, when they are stored, to the same numbers.
    """

    def __init__(self, filled: Sequence[DynamicLayer], source: torch.Tensor, length: int, room: int, dtype: torch.dtype | None):
        super().__init__()
        self.rows, self.length = len(source), length
        self._keys = _reserved([_there(layer.keys) for layer in filled], source, length, room, dtype)
        self._values = _reserved([_there(layer.values) for layer in filled], source, length, room, dtype)
        self.dtype, self.device, self.is_initialized = self._keys.dtype, self._keys.device, True
        self._show()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of new positions; returns views of all that is in use."""
        end = self.length + key_states.shape[2]
        self._keys[: self.rows, :, self.length : end] = key_states
        self._values[: self.rows, :, self.length : end] = value_states
        self.length = end
        return self._show()

    def move(self, sources: torch.Tensor, targets: torch.Tensor, rows: int) -> None:
        """Put the rows `sources` in the places `targets`, and use only the first `rows` rows from here on."""
        if len(sources):
            self._keys[targets, :, : self.length] = self._keys[sources, :, : self.length]
            self._values[targets, :, : self.length] = self._values[sources, :, : self.length]
        self.rows = rows
        self._show()

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = self._keys[: self.rows, :, : self.length]
        self.values = self._values[: self.rows, :, : self.length]
        return self.keys, self.values


def _there(part: torch.Tensor | None) -> torch.Tensor:
    assert part is not None
    return part


def _reserved(
    parts: Sequence[torch.Tensor], source: torch.Tensor, length: int, room: int, dtype: torch.dtype | None
) -> torch.Tensor:
    """[rows, heads, length + room, width]: row i holds prompt source[i] up to `length`, counted through all parts, and zeros before its part
    begins: nobody looks there, but what masked attention multiplies by 0 must be a number."""
    _, heads, _, width = parts[0].shape
    whole = parts[0].new_zeros((len(source), heads, length + room, width), dtype=dtype or parts[0].dtype)
    first = 0
    for part in parts:
        rows = ((source >= first) & (source < first + len(part))).nonzero()[:, 0]
        whole[rows, :, length - part.shape[2] : length] = part[source[rows] - first].to(whole.dtype)
        first += len(part)
    return whole


def can_be_put_together(cache: DynamicCache) -> bool:
    """Whether every layer keeps keys and values of all positions, so that caches of several passes fit into one."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def reserve(
    caches: Sequence[DynamicCache], source: torch.Tensor, length: int, room: int, dtype: torch.dtype | None
) -> DynamicCache:
    """Turn prefilled caches into one for decoding, layer by layer: row i continues prompt source[i], counted through all caches.

    length: of the longest prompt, padding on the left included; room: positions that will be added. A single cache may have layers that are
    more than keys and values of all positions (sliding windows, states of linear attention): they stay the library's.
    """
    cache = caches[0]
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = ReservedLayer([one.layers[number] for one in caches], source, length, room, dtype)
            for other in caches[1:]:
                other.layers[number] = DynamicLayer()  # its memory is free
        else:
            assert len(caches) == 1
            layer.batch_select_indices(source)
    return cache


def keep_rows(cache: DynamicCache, order: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """After rows finished: row i is from now on what row order[i] was. sources, targets: the same as moves of single rows."""
    for layer in cache.layers:
        if isinstance(layer, ReservedLayer):
            layer.move(sources, targets, len(order))
        else:
            layer.batch_select_indices(order)


def closing_moves(rows: int, keep: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """How to close the gaps with few moves: the last rows that stay go to the places of those that leave.

    keep: rows that stay, ascending. Returns (order, sources, targets): the row that stands at each place afterwards, and the moves.
    """
    left = len(keep)
    staying = set(keep)
    targets = [place for place in range(left) if place not in staying]
    sources = [row for row in keep if row >= left]
    order = list(range(left))
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    assert left <= rows
    return order, sources, targets
