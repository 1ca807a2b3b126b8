"""Several servers that hold the same models, as one pool: who is asked next, and how long one that failed is left alone.

Sampling (sampling/endpoint.py) and the graders that ask a language model (grading/runner.py) go through it. Work goes to the least busy
server. One that cannot be reached, breaks off, is overloaded or does not answer in time rests, longer from fault to fault, and what it was asked goes
to another; after a rest it is tried again, so that a server that comes back is used again.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

PAUSE_SECONDS = 0.5  # before the first repetition; doubles from fault to fault
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 600.0
CONNECT_SECONDS = 10.0  # a machine that is gone does not refuse a connection, it says nothing
OVERLOADED = (429, 503)


class Fault(Exception):
    """One request came to nothing; another try may help.

    server: the whole address is suspect, not only this request. wait: seconds that it asked for.
    """

    def __init__(self, what: str, server: bool = False, wait: float = 0.0):
        super().__init__(what)
        self.server, self.wait = server, wait


@dataclass
class Address:
    """One server of the pool."""

    url: str
    active: int = 0
    faults: int = 0  # in a row
    rest_until: float = 0.0


@dataclass
class Pool:
    """Addresses that serve the same models: the least busy one that is not resting comes next. limit: requests at once, for each address."""

    addresses: list[Address]
    limit: int
    rng: np.random.Generator
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self, avoid: str = "") -> Address:
        """Wait for an address with room; not for the one that failed this request last, as long as another is awake."""
        while True:
            now = time.monotonic()
            awake = [address for address in self.addresses if address.rest_until <= now]
            others = [address for address in awake if address.url != avoid] or awake
            free = [address for address in others if address.active < self.limit]
            if free:
                address = min(free, key=lambda item: (item.active, item.faults))
                address.active += 1
                return address
            rests = [address.rest_until - now for address in self.addresses if address.rest_until > now]
            self.changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), min(rests) + 0.001 if rests else None)

    def give_back(self, address: Address, fault: Fault | None) -> None:
        """After a request; a suspect address rests, the longer the more often it failed in a row."""
        address.active -= 1
        now = time.monotonic()
        if fault is None:
            address.faults = 0
        elif fault.server and address.rest_until <= now:  # many requests fail at once: one fault
            address.faults += 1
            address.rest_until = now + max(fault.wait, self.pause(address.faults))
        elif fault.wait:
            address.rest_until = max(address.rest_until, now + fault.wait)
        self.changed.set()

    def pause(self, faults: int) -> float:
        """Seconds before the next try after so many faults, of which a random half is taken."""
        return growing(faults) * float(self.rng.uniform(0.5, 1.0))


def growing(faults: int) -> float:
    """Seconds to wait after so many faults in a row (at least one): doubling, up to a minute."""
    return float(min(PAUSE_SECONDS * 2 ** (faults - 1), LONGEST_PAUSE_SECONDS))


def retry_after(value: str | None, now: float) -> float:
    """Seconds that a Retry-After header asks for (a number or an HTTP date), at most ten minutes; 0 where it says nothing usable."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else 0.0
