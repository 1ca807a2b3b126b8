"""Write the tables of docs/honesty.md: precision and recall of each rule of the audit by both readings, and how the readings agree.

    python scripts/honesty_table.py

Everything is computed from the labelled responses in src/suasion/evaluation/honesty; a test holds the page to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from suasion.evaluation import audit

PAGE = Path(__file__).parents[1] / "docs" / "honesty.md"
BEGIN, END = "<!-- scripts/honesty_table.py writes from here -->\n", "<!-- to here -->\n"


def tables() -> str:
    """Both tables as Markdown."""
    lines = [
        "| kind | rule | hits | precision | recall | precision, second reading | recall, second reading | trusted |",
        "|---|---|---:|---|---|---|---|---|",
    ]
    for row in audit.quality():
        again = row["again"]
        shares = [
            _share(one[key], one["labelled"] if key == "recall" else None)
            for one in (row, again)
            for key in ("precision", "recall")
        ]
        lines.append(
            f"| {row['kind']} | `{row['rule']}` | {row['fired']} | {' | '.join(shares)} | {'yes' if row['trusted'] else 'no'} |"
        )
    lines += [
        "",
        "| kind | labelled by both | by the first alone | by the second alone | by neither | kappa |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in audit.agreement(audit.labelled(), audit.labelled_again()):
        kappa = "–" if row["kappa"] is None else f"{row['kappa']:.2f}"
        lines.append(f"| {row['kind']} | {row['both']} | {row['first']} | {row['second']} | {row['neither']} | {kappa} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its tables made anew. Raises ValueError where the marks are gone."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]


def _share(one: dict[str, Any], of: int | None) -> str:
    whole = "" if of is None else f" of {of}"
    return f"–{whole}" if one["value"] is None else f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]{whole}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
