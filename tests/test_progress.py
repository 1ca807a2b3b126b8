"""Bars of reading and linking a corpus: what they count adds up to their totals, and a terminal shows the last row too."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from test_pools import COMPONENT_ROWS

from suasion import linking, progress, records
from suasion.corpora import convokit, own
from suasion.corpora.convokit import Tally
from suasion.corpora.stage import bundled_path
from suasion.records import write_rows

Bars = dict[str, tuple[int, list[int]]]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    """Every bar that is shown: description -> (total, what it was told)."""
    shown: Bars = {}
    standing: list[str] = []

    @contextmanager
    def watch(description: str, total: int, unit: str = "rows", done: int = 0) -> Iterator[Callable[[int], None]]:
        assert not standing, f"{description} would stand in {standing}"
        standing.append(description)
        shown[description] = (total, told := [])
        yield told.append
        standing.pop()

    for module in (progress, convokit, own, linking):
        monkeypatch.setattr(module, "progress", watch)
    return shown


@pytest.mark.parametrize("bucket_bytes", [2**26, 20_000])  # in one part, and dealt out to several
@pytest.mark.parametrize("kind", ["cmv", "p4g"])
def test_reading_a_corpus_shows_bytes(kind: str, bucket_bytes: int, bars: Bars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "HEARD_LINES", 10)
    folder = bundled_path(kind)
    assert list(convokit.conversations(folder, Tally(), bucket_bytes))
    assert list(bars) == [f"reading {folder.name}", f"going through {folder.name}"]
    size = (folder / "utterances.jsonl").stat().st_size
    assert bars[f"reading {folder.name}"][0] == size
    for total, told in bars.values():
        assert sum(told) == total > 0
        assert len(told) > 10


@pytest.mark.parametrize("bucket_bytes", [2**26, 2_000])
def test_own_rows_show_bytes(bucket_bytes: int, bars: Bars, tmp_path: Path) -> None:
    examples, pairs = COMPONENT_ROWS
    write_rows(tmp_path / own.EXAMPLES, examples)
    write_rows(tmp_path / own.PAIRS, pairs)
    assert list(own.extract(tmp_path, Tally(), "jsonl", bucket_bytes))
    assert bars[f"reading {tmp_path.name}"][0] == sum(file.stat().st_size for file in own.files(tmp_path))
    assert len(bars) == 2
    assert all(sum(told) == total > 0 for total, told in bars.values())


def test_linking_shows_rows_conversations_and_bands(bars: Bars) -> None:
    examples, pairs = COMPONENT_ROWS
    assert linking.link(examples, pairs, 0.5)
    assert list(bars) == ["reading examples and pairs", "marks and sketches of texts", "near-duplicates"]
    assert bars["reading examples and pairs"][0] == len(examples) + len(pairs)
    assert all(sum(told) == total > 0 for total, told in bars.values())


def test_a_bar_in_a_terminal_is_told_seldom_and_shows_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=written, force_terminal=True, width=120, highlight=False))
    with progress.progress("counting", 100_000) as advance:
        for _ in range(100_000):
            advance(1)
    assert "100000/100000" in written.getvalue()
    assert list(progress.tracked([3, 1, 2], "items")) == [3, 1, 2]
    assert "3/3" in written.getvalue()
