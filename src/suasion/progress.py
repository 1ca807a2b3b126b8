"""Progress with rate and time left: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

console = Console(highlight=False)
LOG_EVERY_SECONDS = 20.0
QUIET_SECONDS = 3.0  # what is done sooner needs no line in a log
SHOWN_SECONDS = 0.1  # a bar is not told more often: telling it takes 10 us, which is more than some rows take

Item = TypeVar("Item")


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)} {self.unit}/s" if speed else "", style="dim")


@contextmanager
def progress(description: str, total: int | None, unit: str = "rows", done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`. `done` rows were made by an earlier, interrupted attempt and do not count for the rate.

    total: None where nobody knows. The unit "bytes" is shown as MB.
    """
    if console.is_terminal:
        counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), _Rate(unit))
        columns = (
            TextColumn("  {task.description:<28}"),
            BarColumn(28),
            *counts,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=False) as bar:
            task = bar.add_task(description, total=total, completed=done)
            untold, told = 0, time.monotonic()

            def tell(count: int) -> None:
                nonlocal untold, told
                untold += count
                if (now := time.monotonic()) - told >= SHOWN_SECONDS:
                    bar.update(task, advance=untold)
                    untold, told = 0, now

            try:
                yield tell
            finally:
                bar.update(task, advance=untold)
        return
    state = {"done": done, "last": time.monotonic()}
    start = time.monotonic()

    def advance(count: int) -> None:
        state["done"] += count
        now = time.monotonic()
        finished = total is not None and state["done"] >= total
        if now - state["last"] >= LOG_EVERY_SECONDS or (finished and now - start >= QUIET_SECONDS):
            state["last"] = now
            rate = (state["done"] - done) / max(now - start, 1e-9)
            left = (total - state["done"]) / rate if rate and total is not None else float("inf")
            if unit == "bytes":
                made = megabytes(state["done"]) + (f" of {megabytes(total)}" if total is not None else "")
                console.print(f"  {description}: {made}, {megabytes(rate)}/s, {duration(left)} left")
            else:
                console.print(
                    f"  {description}: {state['done']:.0f}/{total} {unit}, {_rate(rate)} {unit}/s, {duration(left)} left"
                )

    yield advance


def watched(items: Iterable[tuple[Item, int]], description: str, total: Callable[[], int], unit: str) -> Iterator[Item]:
    """The items, under a bar. Each comes with its share of the total, which is asked for once the first one is there."""
    rest = iter(items)
    for first in rest:
        with progress(description, total(), unit) as advance:
            for item, share in chain((first,), rest):
                yield item
                advance(share)


def tracked(items: Collection[Item], description: str, unit: str = "rows") -> Iterator[Item]:
    """The items, under a bar that moves when the next one is asked for."""
    return watched(((item, 1) for item in items), description, lambda: len(items), unit)


def duration(seconds: float) -> str:
    """'42 s', '7 min 03 s', '2 h 10 min'."""
    if seconds == float("inf"):
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def megabytes(count: float) -> str:
    """'0.4 MB', '73 MB': decimal, as download pages count."""
    return f"{count / 1e6:.0f} MB" if count >= 10e6 else f"{count / 1e6:.1f} MB"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
