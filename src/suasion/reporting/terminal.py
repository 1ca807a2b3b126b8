"""The table at the end of a run: models with intervals, and what they do not prove."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from suasion.evaluation import wording

SIMULATED = " (simulated)"


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print the models of a summary and the sentence that fits its size."""
    n = summary["n"]
    table = Table(
        title=f"{summary['run']}: {n['prompts']} prompts, {n['scored']} of {n['asked']} comparisons scored",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for heading in ("vs base", "vs sft", "vs human", "rank score"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for model in summary["models"]:
        cells = [_cell(model[key]) for key in ("win_vs_base", "win_vs_sft", "win_vs_human", "rank_score")]
        table.add_row(Text(model["label"].replace(SIMULATED, "*")), *cells, model["verdict_vs_base"] or "–")
    console.print(table)
    starred = "* trained on simulated labels. " if any(SIMULATED in model["label"] for model in summary["models"]) else ""
    level = f"{100 * summary['confidence']:.0f}%"
    console.print(
        Text(
            f"{starred}Win rates with {level} intervals over prompts; verdict: sign test against base, Holm-corrected.",
            style="dim",
        )
    )
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
