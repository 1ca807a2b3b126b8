"""What `suasion corpus stats` prints and writes: tables for a terminal, and stats.json with the figures for everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from suasion.corpora.stats import CONFIDENCE, PROMPTS, REPLIES, Share, SourceStats
from suasion.evaluation.wording import interval, percent
from suasion.recipe import Recipe
from suasion.records import write_json
from suasion.reporting.corpus_figures import draw_stats
from suasion.sections.corpus import LEAST_CONTEXT

MANY_TOO_LONG = 0.2  # of the replies that reach the length rule; from here on a longer limit is offered


def print_stats(stats: Mapping[str, SourceStats], recipe: Recipe, console: Console) -> None:
    """Print an overview of all sources, what each lost and why, and strategies beside outcomes."""
    low, high = recipe.corpus.reply_tokens
    console.print(
        Text(
            f"{recipe.name}: replies of {low} to {high} tokens, contexts of at most {recipe.corpus.context_tokens}, counted by the "
            f"tokenizer of {recipe.model.base}",
            style="dim",
        )
    )
    console.print(_overview(list(stats.values())))
    for source in stats.values():
        lost = any(funnel.dropped for funnel in source.funnels)
        console.print(_dropped(source) if lost else Text(f"{source.corpus}: nothing is dropped\n", style="bold"))
        if source.strategies:
            console.print(_strategies(source))
    for source in stats.values():
        if offer := longer_limit(source, recipe):
            console.print(Text(offer, style="yellow"))
    console.print(Text(f"Brackets: {100 * CONFIDENCE:.0f}% Wilson intervals, rows taken as independent.", style="dim"))
    if any(source.strategies for source in stats.values()):
        console.print(
            Text("A strategy beside an outcome is no effect of it, and of many intervals some miss by chance.", style="dim")
        )


def write_stats(stats: Mapping[str, SourceStats], recipe: Recipe, folder: Path) -> list[Path]:
    """Write stats.json and every figure as .svg and .png. Returns the figures' .png files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "stats.json", as_json(stats, recipe))
    drawings = draw_stats(stats, recipe.corpus)
    for drawing in drawings:
        drawing.write(folder)
    return [folder / f"{drawing.name}.png" for drawing in drawings]


def as_json(stats: Mapping[str, SourceStats], recipe: Recipe) -> dict[str, Any]:
    """Everything that is shown, with the settings it depends on."""
    return {
        "recipe": recipe.name,
        "tokenizer": recipe.model.base,
        "reply_tokens": list(recipe.corpus.reply_tokens),
        "context_tokens": recipe.corpus.context_tokens,
        "confidence": CONFIDENCE,
        "sources": {name: asdict(source) for name, source in stats.items()},
    }


def longer_limit(source: SourceStats, recipe: Recipe) -> str:
    """Where the length rule costs many replies: how many, and the settings with twice the limit; '' elsewhere."""
    high = recipe.corpus.reply_tokens[1]
    offered = source.bins.get("reply offered", {})
    total = sum(offered.values())
    funnel = source.funnel(REPLIES)
    lost = next((each.count for each in funnel.dropped if each.reason == "reply too long"), 0) if funnel else 0
    if not total or lost / total < MANY_TOO_LONG:
        return ""
    short = next((each.count for each in funnel.dropped if each.reason == "reply too short"), 0) if funnel else 0
    within = sum(count for edge, count in offered.items() if edge <= 2 * high) - short
    length = max(recipe.corpus.context_tokens + 2 * high, LEAST_CONTEXT + 2 * high, recipe.model.max_length)
    return (
        f"{source.corpus}: {lost:,} of {total:,} replies ({percent(lost / total)}) are longer than {high} tokens and are dropped, "
        f"never cut. Up to {2 * high} there are {within:,}: --set corpus.reply_tokens=[{recipe.corpus.reply_tokens[0]},{2 * high}] "
        f"--set sample.max_new_tokens={2 * high} --set model.max_length={length}"
    )


def _overview(sources: list[SourceStats]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="What is read and kept", title_justify="left")
    table.add_column("")
    for source in sources:
        table.add_column(source.corpus, justify="right")
    lines: dict[str, Callable[[SourceStats], str]] = {
        "conversations": lambda s: _count(s.read.get("conversations")),
        "  with an example": lambda s: _count(s.kept.get("conversations with an example")),
        "examples": lambda s: _count(s.kept.get("examples")),
        PROMPTS: lambda s: _count(s.kept.get(PROMPTS)),
        "contexts cut": lambda s: _count(s.kept.get("contexts cut")),
        "outcome pairs": lambda s: _count(s.kept.get("outcome pairs")),
        "  longer reply wins": lambda s: rate(s.pairs.longer),
        "  the same before the length rule": lambda s: rate(s.pairs.before),
        "conversations that persuaded": lambda s: f"all {s.persuaded.of:,}" if all_alike(s) else rate(s.persuaded),
        "  mean outcome": lambda s: "–" if s.outcome_mean is None or all_alike(s) else f"{s.outcome_mean:.2f}",
        "reply tokens: 5%, median, 95%": lambda s: _spread(s, "reply"),
        "  of winners": lambda s: _spread(s, "winner"),
        "  of losers": lambda s: _spread(s, "loser"),
        "context tokens": lambda s: _spread(s, "context"),
    }
    for name, cell in lines.items():
        cells = [cell(source) for source in sources]
        if any(text != "–" for text in cells):
            table.add_row(name, *cells)
    return table


def _dropped(source: SourceStats) -> Table:
    title = f"{source.corpus}: what is dropped, and why"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name, side in (("of", "left"), ("reason", "left"), ("rows", "right"), ("share", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for funnel in source.funnels:
        for place, each in enumerate(funnel.dropped):
            of = f"{funnel.offered:,} {funnel.unit}" if place == 0 else ""
            table.add_row(of, each.reason, f"{each.count:,}", _small(each.share))
    return table


def _strategies(source: SourceStats) -> Table:
    title = f"{source.corpus}: strategies in kept replies, and how their conversations ended"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("strategy")
    for name in ("sentences", "conversations", "persuaded"):
        table.add_column(name, justify="right")
    for each in source.strategies:
        table.add_row(each.label, f"{each.sentences:,}", f"{each.persuaded.of:,}", rate(each.persuaded))
    table.add_row("[dim]all with labels[/]", "", f"{source.labelled.of:,}", rate(source.labelled))
    return table


def all_alike(source: SourceStats) -> bool:
    """Whether every kept conversation persuaded: then that was the condition for keeping it, and no finding."""
    return 0 < source.persuaded.of == source.persuaded.count


def rate(known: Share) -> str:
    """'55% (51–59%)', '–' where there is nothing to count."""
    return "–" if known.value is None else f"{percent(known.value)} ({interval(known.low, known.high)})"


def _count(value: int | None) -> str:
    return f"{value:,}" if value else "–"


def _small(value: float) -> str:
    return "<1%" if 0 < value < 0.005 else percent(value)


def _spread(source: SourceStats, name: str) -> str:
    known = source.tokens.get(name)
    return " · ".join(str(known[key]) for key in ("p05", "p50", "p95")) if known else "–"
