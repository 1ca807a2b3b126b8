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

    def __init__(self, filled: DynamicLayer, source: torch.Tensor, room: int, dtype: torch.dtype | None):
        super().__init__()
        assert filled.keys is not None
        assert filled.values is not None
        self.rows, self.length = len(source), filled.keys.shape[2]
        self._keys, self._values = (
            _reserved(part, source, self.length + room, dtype or part.dtype) for part in (filled.keys, filled.values)
        )
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


def _reserved(part: torch.Tensor, source: torch.Tensor, room: int, dtype: torch.dtype) -> torch.Tensor:
    whole = part.new_empty((len(source), part.shape[1], room, part.shape[3]), dtype=dtype)
    whole[:, :, : part.shape[2]] = part[source]
    return whole


def reserve(cache: DynamicCache, source: torch.Tensor, room: int, dtype: torch.dtype | None) -> None:
    """Turn a prefilled cache into one for decoding, in place and layer by layer: row i continues prompt source[i].

    room: positions that will be added. Layers that are more than keys and values of all positions (sliding windows, states of linear
    attention) stay the library's.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = ReservedLayer(layer, source, room, dtype)
        else:
            layer.batch_select_indices(source)


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
