"""The table at the end of a run: models with intervals, and what they do not prove."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from suasion.evaluation import wording


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the models of a summary and the sentence that fits its size."""
    n = summary["n"]
    table = Table(
        title=f"{summary['run']}: {n['prompts']} prompts, {n['scored']} of {n['asked']} comparisons scored",
        title_justify="left",
        caption=f"{100 * summary['confidence']:.0f}% intervals over prompts; verdict: sign test against base, Holm-corrected",
        caption_justify="left",
    )
    table.add_column("model", overflow="fold")
    for heading in ("against base", "against sft", "against human", "rank score"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for model in summary["models"]:
        cells = [_cell(model[key]) for key in ("win_vs_base", "win_vs_sft", "win_vs_human", "rank_score")]
        table.add_row(Text(model["label"]), *cells, model["verdict_vs_base"] or "–")
    console.print(table)
    if wording.proves_nothing(summary):
        console.print(Text(wording.size_warning(summary), style="bold yellow"))
    for sentence in summary["headline"]:
        if not (wording.proves_nothing(summary) and sentence == wording.size_warning(summary)):
            console.print(Text(sentence))
    for caveat in summary["caveats"]:
        if caveat.startswith("Missing: "):
            console.print(Text(caveat, style="yellow"))


def _cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    if estimate["value"] is None:
        return "cannot say"
    bounds = f" ({wording.interval(estimate['low'], estimate['high'])})" if estimate["low"] is not None else ""
    return wording.percent(estimate["value"]) + bounds
