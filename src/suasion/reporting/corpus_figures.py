"""Figures of what a corpus holds, drawn from `corpora/stats.py` in the report's style.

A figure per source and question: how long replies and contexts are and what the limits take away, what was dropped and why,
whether the longer reply wins, how the conversations ended, and which strategies stand beside which outcomes. A question that a
source cannot answer has no figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import ceil

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from suasion.corpora.stats import BIN, Funnel, Share, SourceStats
from suasion.evaluation.wording import interval, percent
from suasion.reporting.figures import BAND, COLOURS, GRID, INK, MUTED, STYLE, WIDE, Drawing, finished, new_axes
from suasion.sections.corpus import CorpusSection

KEPT, LOST = COLOURS[0], COLOURS[1]
DROPPED, CUT = "#c4cad0", COLOURS[4]
TAIL, HEAD = 2.2, 1.35  # lengths are shown up to between these many times the limit; what is longer is told in words
BARS = 44  # at most this many bars in a histogram of lengths
FEW_VALUES = 6  # outcomes with no more distinct values than this get a bar each
FEW_CONVERSATIONS = 5  # strategies of fewer have no share worth a dot


def draw_stats(stats: Mapping[str, SourceStats], section: CorpusSection) -> list[Drawing]:
    """All figures that the sources allow, source by source."""
    with matplotlib.rc_context(STYLE):
        drawings: list[Drawing | None] = []
        for source in stats.values():
            drawings += [
                reply_lengths(source, section.reply_tokens),
                context_lengths(source, section.context_tokens),
                dropped(source),
                longer_wins(source),
                outcomes(source),
                strategies(source),
            ]
    return [drawing for drawing in drawings if drawing is not None]


def reply_lengths(source: SourceStats, limits: tuple[int, int]) -> Drawing | None:
    """Histogram of all replies that reached the length rule, the kept ones in colour, with the limits."""
    offered, kept = source.bins.get("reply offered", {}), source.bins.get("reply", {})
    if not offered:
        return None
    low, high = limits
    figure, axes = new_axes(WIDE, 2.5)
    shown = max(min(max(offered), ceil(TAIL * high / BIN) * BIN), ceil(HEAD * high / BIN) * BIN)
    width = _bar_width(shown)
    for bins, colour in ((offered, DROPPED), (kept, KEPT)):
        _bars(axes, _merged(bins, width, shown), width, colour)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top * 1.16)
    for limit, words in ((low, f" {low}"), (high, f" {high} tokens")):
        axes.axvline(limit, color=INK, lw=0.9, ls=(0, (3, 2)))
        axes.text(limit, top * 1.09, words, ha="left", va="center", color=INK)
    longer = sum(count for edge, count in offered.items() if edge > shown)
    if longer:
        axes.text(1, 0.5, f"{longer:,} longer\nthan {shown:,}", transform=axes.transAxes, ha="right", va="center", color=MUTED)
    total, left = sum(offered.values()), sum(kept.values())
    axes.set_xlim(0, shown)
    _label(axes, f"{source.corpus}: reply length", "tokens of the model's tokenizer", "replies")
    handles = [Patch(color=KEPT, label=f"kept ({left:,})"), Patch(color=DROPPED, label=f"dropped ({total - left:,})")]
    _legend(figure, handles)
    alt = f"Of {total:,} replies {left:,} are kept; the limits are {low} and {high} tokens. {_spread(source, 'reply')}"
    return finished(figure, f"{source.corpus}-reply-lengths", f"Reply lengths of {source.corpus}", alt)


def context_lengths(source: SourceStats, budget: int) -> Drawing | None:
    """Histogram of the kept contexts, the cut ones apart, with their budget."""
    kept, shortened = source.bins.get("context", {}), source.bins.get("context cut", {})
    if not kept:
        return None
    figure, axes = new_axes(WIDE, 2.5)
    width = _bar_width(max(budget, max(kept)))
    for bins, colour in ((kept, CUT), ({edge: count - shortened.get(edge, 0) for edge, count in kept.items()}, KEPT)):
        _bars(axes, _merged(bins, width, max(kept)), width, colour)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top * 1.16)
    axes.axvline(budget, color=INK, lw=0.9, ls=(0, (3, 2)))
    cut = source.kept.get("contexts cut", 0)
    axes.text(budget, top * 1.09, f"{budget}, system prompt and template included ", ha="right", va="center", color=INK)
    axes.set_xlim(0, max(budget, max(kept)) * 1.02)
    _label(axes, f"{source.corpus}: context length", "tokens, without system prompt and template", "contexts")
    whole = sum(kept.values()) - cut
    _legend(figure, [Patch(color=KEPT, label=f"whole ({whole:,})"), Patch(color=CUT, label=f"cut ({cut:,})")])
    alt = f"{sum(kept.values()):,} contexts, {cut:,} of them cut to {budget} tokens. {_spread(source, 'context')}"
    return finished(figure, f"{source.corpus}-context-lengths", f"Context lengths of {source.corpus}", alt)


def dropped(source: SourceStats) -> Drawing | None:
    """Bars of what was kept and dropped, by reason, of each unit from which something was dropped."""
    shown = [funnel for funnel in source.funnels if funnel.dropped]
    if not shown:
        return None
    rows = sum(1.75 + len(funnel.dropped) for funnel in shown)
    figure, axes = new_axes(WIDE, 0.25 + 0.34 * rows)
    y = 0.0
    for funnel in shown:
        axes.text(0, y, f"{source.corpus}: {funnel.offered:,} {funnel.unit}", va="center", color=INK, fontweight="bold")
        y += 0.95
        for reason, count, colour in [("kept", funnel.kept, KEPT), *((d.reason, d.count, DROPPED) for d in funnel.dropped)]:
            size = count / funnel.offered
            axes.barh(y + 0.2, 1, height=0.22, color=BAND, lw=0)
            axes.barh(y + 0.2, size, height=0.22, color=colour, lw=0)
            axes.text(0, y - 0.18, reason, va="center", color=INK)
            axes.text(1, y - 0.18, f"{count:,}  ({_share(size)})", ha="right", va="center", color=INK)
            y += 1.0
        y += 0.3
    axes.set_xlim(0, 1)
    axes.set_ylim(y - 0.6, -0.5)
    axes.axis("off")
    alt = " ".join(_funnel_words(funnel) for funnel in shown)
    return finished(figure, f"{source.corpus}-dropped", f"What was dropped from {source.corpus}", alt)


def longer_wins(source: SourceStats) -> Drawing | None:
    """Histogram of winner's minus loser's tokens in the kept pairs, with the longer-wins rate."""
    bins = source.bins.get("winner minus loser", {})
    rate = source.pairs.longer
    if not bins or rate.value is None:
        return None
    figure, axes = new_axes(WIDE, 2.5)
    reach = max(BIN, *map(abs, bins))
    width = _bar_width(2 * reach)
    shorter = _merged({-edge: count for edge, count in bins.items() if edge < 0}, width, reach)
    longer = _merged({edge: count for edge, count in bins.items() if edge > 0}, width, reach)
    _bars(axes, {width - edge: count for edge, count in shorter.items()}, width, LOST)
    _bars(axes, longer, width, KEPT)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top * 1.42)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= top])
    axes.axvline(0, color=INK, lw=0.9)
    axes.set_xlim(-reach, reach)
    axes.text(reach, top * 1.26, f"the longer reply won\n{_with_interval(rate)}", ha="right", va="center", color=KEPT)
    rest = rate.of - rate.count - source.pairs.equal
    equal = f", {source.pairs.equal} equal" if source.pairs.equal else ""
    axes.text(
        -reach, top * 1.26, f"  the shorter reply won\n  {percent(rest / rate.of)}{equal}", ha="left", va="center", color=LOST
    )
    _label(axes, f"{source.corpus}: winner against loser", "tokens of the winner minus tokens of the loser", "outcome pairs")
    alt = f"The longer of two replies won in {_with_interval(rate)} of {rate.of:,} kept outcome pairs."
    return finished(figure, f"{source.corpus}-longer-wins", f"Does the longer reply win in {source.corpus}?", alt)


def outcomes(source: SourceStats) -> Drawing | None:
    """How the conversations with a kept reply ended; None where all ended alike."""
    if len(source.outcomes) < 2:
        return None
    figure, axes = new_axes(WIDE, 2.2)
    bars = _outcome_bars(source.outcomes)
    for position, (_, value, count) in enumerate(bars):
        axes.bar(position, count, width=0.86, color=KEPT if value > 0 else DROPPED, lw=0)
        axes.annotate(f"{count:,}", (position, count), xytext=(0, 3), textcoords="offset points", ha="center", color=INK)
    axes.set_xticks(range(len(bars)), [label for label, _, _ in bars])
    axes.margins(y=0.14)
    unknown = f"; unknown in {source.outcome_unknown:,}" if source.outcome_unknown else ""
    dollars = "donation in dollars" if source.corpus.startswith("p4g") else "outcome"
    _label(axes, f"{source.corpus}: how conversations ended", dollars, "conversations")
    alt = f"{_with_interval(source.persuaded)} of {source.persuaded.of:,} conversations ended above 0{unknown}."
    return finished(figure, f"{source.corpus}-outcomes", f"Outcomes of {source.corpus}", alt)


def strategies(source: SourceStats) -> Drawing | None:
    """Share of conversations that persuaded, by strategy in a kept reply, with intervals; the line is all labelled ones."""
    known = [each for each in source.strategies if each.persuaded.of >= FEW_CONVERSATIONS]
    if not known or source.labelled.value is None:
        return None
    known.sort(key=lambda each: (-(each.persuaded.value or 0), each.label))
    figure, axes = new_axes(WIDE, 0.75 + 0.27 * len(known))
    axes.axvline(source.labelled.value, color=MUTED, lw=0.9, zorder=1)
    for row, each in enumerate(known):
        rate = each.persuaded
        axes.plot([rate.low or 0, rate.high or 0], [row, row], color=KEPT, lw=2, solid_capstyle="butt", zorder=2)
        axes.plot(rate.value or 0, row, "o", ms=5.5, mfc=KEPT, mec=KEPT, zorder=3, clip_on=False)
        axes.text(1.06, row, f"{rate.of:,}", va="center", ha="left", color=MUTED, transform=axes.get_yaxis_transform())
    axes.text(1.06, -1, "n", va="center", ha="left", color=MUTED, transform=axes.get_yaxis_transform())
    axes.set_xlim(0, 1)
    axes.set_ylim(len(known) - 0.4, -1.4)
    axes.set_yticks(range(len(known)), [each.label.replace("-", " ") for each in known])
    axes.tick_params(axis="y", colors=INK)
    axes.xaxis.set_major_formatter(lambda value, _: percent(value))
    axes.text(source.labelled.value, -1, f" all: {percent(source.labelled.value)}", va="center", color=MUTED)
    axes.set_title(f"{source.corpus}: strategy and outcome", loc="left", fontsize=8.5, color=INK, fontweight="bold", pad=7)
    axes.set_xlabel("conversations with this strategy that persuaded")
    said = "; ".join(f"{each.label} {_with_interval(each.persuaded)}" for each in known)
    alt = f"Share of conversations that persuaded, by strategy: {said}. All labelled: {_with_interval(source.labelled)}."
    return finished(figure, f"{source.corpus}-strategies", f"Strategies and outcomes of {source.corpus}", alt)


def _bar_width(reach: int) -> int:
    """Bins of a multiple of BIN tokens, so that at most BARS of them cover `reach`."""
    return BIN * max(1, ceil(reach / (BIN * BARS)))


def _merged(bins: Mapping[int, int], width: int, most: int) -> dict[int, int]:
    """Positive upper edges merged into bins of `width`; what lies above `most` is left out."""
    merged: dict[int, int] = {}
    for edge, count in bins.items():
        if edge <= most:
            upper = ceil(max(edge, 1) / width) * width
            merged[upper] = merged.get(upper, 0) + count
    return merged


def _bars(axes: Axes, bins: Mapping[int, int], width: int, colour: str) -> None:
    edges = sorted(bins)
    axes.bar([edge - width for edge in edges], [bins[edge] for edge in edges], width * 0.9, align="edge", color=colour, lw=0)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=8.5, color=INK, fontweight="bold", pad=7)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color=GRID, lw=0.5)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _legend(figure: Figure, handles: list[Patch]) -> None:
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=7.5, handlelength=1, borderpad=0)


def _outcome_bars(outcomes: Mapping[float, int]) -> list[tuple[str, float, int]]:
    """(label, largest value, conversations): a bar a value where there are few, else 0 apart and quarters of the range above it."""
    if len(outcomes) <= FEW_VALUES:
        return [(f"{value:g}", value, count) for value, count in outcomes.items()]
    top = max(outcomes)
    bounds = [top * part / 4 for part in range(5)] if top > 0 else [0.0]
    bars = [("0" if min(outcomes) >= 0 else "≤ 0", 0.0, sum(count for value, count in outcomes.items() if value <= 0))]
    for low, high in pairwise(bounds):
        bars.append((f"≤ {high:g}", high, sum(count for value, count in outcomes.items() if low < value <= high)))
    return bars


def _funnel_words(funnel: Funnel) -> str:
    lost = ", ".join(f"{each.reason} {each.count:,}" for each in funnel.dropped)
    return f"Of {funnel.offered:,} {funnel.unit} {funnel.kept:,} are kept; dropped: {lost}."


def _share(value: float) -> str:
    return "<1%" if 0 < value < 0.005 else percent(value)


def _with_interval(rate: Share) -> str:
    return f"{percent(rate.value)} ({interval(rate.low, rate.high)})"


def _spread(source: SourceStats, name: str) -> str:
    known = source.tokens.get(name, {})
    return f"Kept: median {known['p50']}, 5th to 95th percentile {known['p05']} to {known['p95']}." if known else "None is kept."
