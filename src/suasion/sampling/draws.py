"""What every sampling engine takes and gives: draws in, drawn responses out, batch by batch.

An engine says how draws are grouped (`batches`: one group is journalled as one line) and works through the groups that are still
missing (`run`), handing over each as soon as it is whole. What is drawn again, flagged or kept is not its business: `respond.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from suasion.seeding import derive_seed

Deliver = Callable[[str, "list[Drawn]"], None]
Ended = Callable[[int], None]  # told how many more responses have ended, whether or not their group is whole


def nobody(_: int) -> None:
    """For who does not watch."""


@dataclass(frozen=True)
class Draw:
    """One response to make: which prompt (by id and token ids), which number, which attempt; where several models share a batch, whose."""

    prompt_id: str
    prompt: tuple[int, ...]
    n: int
    attempt: int = 0
    model: str = ""

    @property
    def read(self) -> tuple[str, str]:
        """What is read before it is written: draws that are equal in this share one pass over their prompt."""
        return self.model, self.prompt_id


@dataclass(frozen=True)
class Drawn:
    """What came out. logprob: sum over tokens, in nats, at temperature 1, untruncated.

    tokens and logprob are None where a server does not tell them; text stands in for tokens only then.
    """

    draw: Draw
    tokens: tuple[int, ...] | None
    finish: Literal["stop", "length"]
    logprob: float | None
    seed: int
    text: str = ""


class Sampler(Protocol):
    """One engine, bound to one model and its settings. peers: which servers speak for it, as a hash; "" where it speaks itself."""

    peers: str

    def batches(self, draws: Sequence[Draw]) -> list[list[Draw]]:
        """Groups that are made and journalled as one; the same for the same draws, whatever was made before."""

    def check(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Whether the engine speaks as the local model does, before it is used; what was found, for the stage's facts."""

    def run(self, work: Sequence[tuple[str, list[Draw]]], deliver: Deliver, ended: Ended = nobody) -> None:
        """Make every (key, group) and hand it to `deliver`, in any order, each once. Raises UserError where some cannot be made."""

    def speak(self, draw: Draw, hear: Callable[[str], None]) -> Drawn:
        """Make one response for somebody who waits for it: `hear` gets its text whenever there is more of it."""


def draw_seed(seed: int, draw: Draw) -> int:
    """The seed that owns a response's random numbers; the same for every model, so that models differ by weights only."""
    return derive_seed(seed, "sample", draw.prompt_id, draw.n, draw.attempt)
