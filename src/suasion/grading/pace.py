"""Requests-per-minute and tokens-per-minute limits, as providers state them: so many in any sixty seconds."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

WINDOW_SECONDS = 60.0


class Pace:
    """Lets amounts through so that no sixty seconds hold more than `limit`. One amount larger than the limit waits for an empty window.

    clock, sleep: for tests. Waiting requests keep their order.
    """

    def __init__(
        self,
        limit: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self.limit, self._clock, self._sleep = limit, clock, sleep
        self._passed: deque[list[float]] = deque()  # [when, amount]
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> list[float]:
        """Wait until `amount` fits. Returns the entry, for `correct`."""
        if self.limit is None:
            return [0.0, amount]
        async with self._turn:
            while True:
                now = self._clock()
                while self._passed and self._passed[0][0] <= now - WINDOW_SECONDS:
                    self._passed.popleft()
                if not self._passed or sum(entry[1] for entry in self._passed) + amount <= self.limit:
                    entry = [now, amount]
                    self._passed.append(entry)
                    return entry
                await self._sleep(self._passed[0][0] + WINDOW_SECONDS - now + 0.001)

    @staticmethod
    def correct(entry: list[float], amount: float) -> None:
        """Replace an estimate by what was really used."""
        entry[1] = amount
