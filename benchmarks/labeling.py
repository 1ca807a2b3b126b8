"""How the labelling page bears many people at once: sessions over HTTP that label at one label a second each.

    python benchmarks/labeling.py                              # 50 sessions for 60 seconds: about a minute and a half
    python benchmarks/labeling.py --sessions 5 --seconds 3     # a quick look

The claim it measures: with 50 people at one label a second each, no label is lost or stored twice, and 95% of requests are answered
within 200 ms on two cores. Every session is a thread of this process with a connection of its own, the server `suasion label serve` a
process of its own, its store on the disk of the temporary folder with synchronous=FULL as always. A label is two requests: the answer,
and the page that follows it. The clients take a core's share themselves; what they need counts against the server. Times begin once
everybody has joined. Prints a table as Markdown; exit code 1 where a label is lost or doubled or the 95th percentile is above 200 ms.
"""

from __future__ import annotations

import argparse
import html
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY / "tests")]

import httpx  # noqa: E402
from label_run import Server, make_run, sampled_pairs  # noqa: E402

from suasion.labeling.store import Store  # noqa: E402

LIMIT = 200.0  # milliseconds
_FIELD = re.compile(r'name="(csrf|once|task)" value="([^"]*)"')


def main() -> int:
    """Measure and print. Returns 1 where the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given, stored, took = load(Path(folder), options.sessions, options.seconds)
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    lost, doubled = len(set(given) - set(stored)), len(stored) - len(set(stored))
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, load before the end {os.getloadavg()[0]:.1f}\n")
    print("| sessions | seconds | labels acknowledged | stored | lost | doubled | p50 ms | p95 ms | p99 ms | worst ms |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    row = (
        options.sessions,
        options.seconds,
        len(given),
        len(stored),
        lost,
        doubled,
        *(round(cuts[n - 1]) for n in (50, 95, 99)),
        round(max(took)),
    )
    print("| " + " | ".join(map(str, row)) + " |")
    return int(bool(lost or doubled) or cuts[94] > LIMIT)


def load(folder: Path, sessions: int, seconds: int) -> tuple[list[str], list[str], list[float]]:
    """(tasks acknowledged, tasks stored, milliseconds of each request) of `sessions` people at one label a second each.

    Raises AssertionError where a request fails.
    """
    run = make_run(folder, sampled_pairs(sessions * seconds + sessions), overlap=0)
    server = Server(run)
    store = Store(run / "labels.db")
    links = [f"{server.url}/i/{store.new_token(store.add_annotator(''), 'invitation')}" for _ in range(sessions)]
    store.close()
    took: list[float] = []
    given: list[str] = []
    failures: list[str] = []
    barrier = threading.Barrier(sessions, took.clear)

    def timed(call: Callable[..., httpx.Response], *arguments: Any, **fields: Any) -> httpx.Response:
        began = time.perf_counter()
        reply = call(*arguments, **fields)
        took.append(1000 * (time.perf_counter() - began))
        if reply.status_code not in (200, 303):
            failures.append(f"{reply.status_code} {reply.text[:80]}")
        return reply

    def work(number: int) -> None:
        with httpx.Client(base_url=server.url, follow_redirects=True, timeout=60) as who:
            page = timed(who.post, links[number], data={"agree": "yes"}).text
            barrier.wait(120)  # a session that could not join breaks it for all, instead of keeping them waiting
            start = time.monotonic() + number / sessions
            for n in range(seconds):
                time.sleep(max(0.0, start + n - time.monotonic()))
                fields = {name: html.unescape(value) for name, value in _FIELD.findall(page)}
                timed(
                    who.post,
                    "/answer",
                    data={**fields, "choice": "left", "clarity": "2", "seconds": "3.5"},
                    follow_redirects=False,
                )
                given.append(fields["task"])
                page = timed(who.get, "/task").text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(sessions)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.stop()
    assert failures == [], failures[:3]
    store = Store(run / "labels.db")
    stored = [event.body["task"] for event in store.events() if event.kind == "label"]
    store.close()
    return given, stored, took


if __name__ == "__main__":
    sys.exit(main())
