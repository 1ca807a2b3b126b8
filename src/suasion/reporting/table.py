"""A table of the report: raw values once, and the three ways they are shown (HTML page, Markdown, CSV).

The templates ask `Table.cells` for text, the CSV files take the values themselves, so that the three cannot disagree.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from suasion.evaluation import wording

Kind = Literal[
    "text", "count", "percent", "threshold", "of", "estimate", "log", "coefficient", "difference", "number", "number2", "small", "money", "p", "spread", "long",
]  # fmt: skip
PARTS = {  # kinds whose values are dictionaries: CSV suffix -> key
    "estimate": {"": "value", "_low": "low", "_high": "high"},
    "log": {"": "value", "_low": "low", "_high": "high"},
    "coefficient": {"": "value", "_low": "low", "_high": "high"},
    "difference": {"": "value", "_low": "low", "_high": "high"},
    "spread": {"": "p50", "_p05": "p05", "_p95": "p95"},
    "of": {"": "n", "_of": "asked"},
}
DECIMALS = {"number": 1, "number2": 2, "small": 3, "money": 2}


@dataclass(frozen=True)
class Column:
    """One column: key in the rows, heading, and how its values are shown."""

    key: str
    title: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Table:
    """Rows of raw values. `name` is the CSV file's name; estimates are dictionaries with value, low, high and reason.

    absent: what stands where a row lacks the key of a column; a value that is there and is None shows as a dash.
    """

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]
    absent: str = "–"

    def cells(self, row: dict[str, Any]) -> Iterator[tuple[Column, str, str]]:
        """(column, text, interval text or '') of one row."""
        for column in self.columns:
            yield (column, *(shown(row[column.key], column.kind) if column.key in row else (self.absent, "")))

    def reasons(self) -> list[str]:
        """Why estimates of this table, or their intervals, are missing."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            for column in self.columns:
                value = row.get(column.key)
                if isinstance(value, dict) and value.get("reason"):
                    found.setdefault((column.title, value["reason"]), []).append(str(row[self.columns[0].key]))
        alike: dict[tuple[str, str], list[str]] = {}
        for (title, reason), names in found.items():
            alike.setdefault((reason, ", ".join(names)), []).append(title)
        return [f"{', '.join(titles)}: {reason} ({names})." for (reason, names), titles in alike.items()]

    def to_csv(self) -> str:
        """Raw values; an estimate takes three columns, a count of a whole two; what is absent is empty."""
        handle = io.StringIO()
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([c.key + suffix for c in self.columns for suffix in PARTS.get(c.kind, {"": ""})])
        for row in self.rows:
            cells: list[Any] = []
            for column in self.columns:
                value, parts = row.get(column.key), PARTS.get(column.kind)
                cells += [(value or {}).get(part) for part in parts.values()] if parts else [value]
            writer.writerow(["" if cell is None else cell for cell in cells])
        return handle.getvalue()


def shown(value: Any, kind: Kind) -> tuple[str, str]:
    """A value as (text, interval text)."""
    if kind in ("estimate", "log", "coefficient", "difference"):
        if value is None:
            return "–", ""
        if value["value"] is None:
            return "cannot say", ""
        if kind == "estimate":
            return wording.percent(value["value"]), wording.interval(value["low"], value["high"]) if value[
                "low"
            ] is not None else ""
        if kind == "difference":
            return signed(value["value"]), "" if value["low"] is None else f"{signed(value['low'])} to {signed(value['high'])}"
        if kind == "coefficient":
            return coefficient(value["value"]), "" if value[
                "low"
            ] is None else f"{coefficient(value['low'])} to {coefficient(value['high'])}"
        bounds = "" if value["low"] is None else f"{value['low']:.2f} to {value['high']:.2f}".replace("-", "−")
        return f"{value['value']:.2f}".replace("-", "−"), bounds
    if kind == "of":
        return f"{value['n']} of {value['asked']}", ""
    if kind == "spread" and value is not None:
        return f"{value['p50']:,}", f"{value['p05']:,}–{value['p95']:,}"
    if kind == "threshold":
        return ("none" if value is None else wording.at_least(value)), ""
    if value is None or value == "":
        return "–", ""
    if isinstance(value, bool):
        return ("yes" if value else "no"), ""
    if kind == "percent":
        return wording.percent(value), ""
    if kind == "p":
        return wording.p_value(value).removeprefix("p ").removeprefix("= "), ""
    if kind in DECIMALS:
        return f"{value:,.{DECIMALS[kind]}f}".replace("-", "−"), ""
    return (f"{value:,}" if isinstance(value, int) else str(value)), ""


def coefficient(value: float) -> str:
    """A number from -1 to 1 in two decimals: '.21', '−.03', '1.00'."""
    text = f"{value:.2f}".replace("0.", ".", 1)
    return ".00" if text == "-.00" else text.replace("-", "−")


def signed(value: float) -> str:
    """A difference with its sign and three figures at most: '+12.4', '−0.08', '0.00'."""
    text = f"{value:+.{1 if abs(value) >= 10 else 2}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def portable(value: Any) -> Any:
    """The same value without absolute paths: '/data/x/data/corpus' becomes '.../corpus'."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, str) and value.startswith("/"):
        return ".../" + value.rstrip("/").rsplit("/", 1)[-1]
    return value


def flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts as (readable name, value) rows, without absolute paths; lists of plain values are joined."""
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in flat(item, f"{prefix}, {key}" if prefix else str(key))]
    if isinstance(value, list | tuple):
        if any(isinstance(item, dict | list | tuple) for item in value):
            return [row for number, item in enumerate(value, start=1) for row in flat(item, f"{prefix}, {number}")]
        value = ", ".join(map(str, value))
    return [(prefix.replace("_", " "), portable(value))]
