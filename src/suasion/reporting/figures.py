"""The report's figures: summary and training curves in, matplotlib figures out, as equal bytes every time.

Each figure is drawn once and leaves three ways: .svg and .png files with light colours, and SVG for the page in which the
colours are CSS variables, so that one drawing serves light and dark, and text takes the page's font. Widths are chosen so
that labels stay readable on a phone.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from suasion.evaluation.wording import interval, percent

INK, MUTED, GRID, BAND, PAPER = "#1f2328", "#66707a", "#d5d9dd", "#eceef0", "#ffffff"
COLOURS = ("#2b5c8a", "#b2522d", "#4b7d4a", "#7e569a", "#9a7418", "#2f7f86")
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BAND: "band", PAPER: "paper"} | {
    colour: f"c{number}" for number, colour in enumerate(COLOURS)
}
STYLE: dict[Any, Any] = {  # rcParams; matplotlib types their names as literals
    "svg.hashsalt": "suasion",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}
WIDE, SQUARE, NARROW = 4.2, 4.8, 3.5  # inches
TEXT_PANELS = (
    ("words", "Words a response", "{:.0f}"),
    ("cut_off", "Cut off at the limit", "{:.0%}"),
    ("repetition", "Repeated 4-word runs", "{:.0%}"),
    ("mattr", "Distinct words in every 50", "{:.0%}"),
    ("reading_grade", "Reading grade (Coleman–Liau)", "{:.1f}"),
    ("hedging", "Hedges per 100 words", "{:.1f}"),
    ("second_person", "“You” per 100 words", "{:.1f}"),
    ("claims", "Sentences with a checkable claim", "{:.0%}"),
    ("questions", "Questions a response", "{:.1f}"),
    ("context_overlap", "Copied from the context", "{:.0%}"),
    ("human_similarity", "Likeness to the human reply", "{:.2f}"),
)
CURVE_PANELS = (
    ("margin", "Margin (implicit reward)"),
    ("accuracy", "Accuracy on training pairs"),
    ("kl", "KL to the start"),
)


@dataclass(frozen=True)
class Drawing:
    """A finished figure: file name without ending, title, description for people who do not see it, and its SVG and PNG."""

    name: str
    title: str
    alt: str
    svg: bytes
    png: bytes

    def write(self, folder: Path, png: bool = True) -> None:
        """Write the .svg and, if asked, the .png."""
        (folder / f"{self.name}.svg").write_bytes(self.svg)
        if png:
            (folder / f"{self.name}.png").write_bytes(self.png)

    def inline(self) -> str:
        """SVG for the page: no prolog, ids made unique, colours as CSS variables, title and description for screen readers."""
        text = self.svg.decode()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'href="#', f'href="#{self.name}-', text)
        text = re.sub(r"url\(#", f"url(#{self.name}-", text)
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var(--fig-{variable})")
        box = re.search(r'viewBox="[^"]+"', text)
        assert box is not None  # matplotlib always writes one
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" '
            f'aria-labelledby="{self.name}-title {self.name}-desc"><title id="{self.name}-title">{escape(self.title)}</title>'
            f'<desc id="{self.name}-desc">{escape(self.alt)}</desc>'
        )
        return opening + text[text.index(">") + 1 :].strip()


def draw_all(summary: dict[str, Any], curves: dict[str, list[dict[str, Any]]]) -> list[Drawing]:
    """All figures that the data allow, in the order of the report. curves: stage model -> rows of its metrics.jsonl."""
    with matplotlib.rc_context(STYLE):
        drawings = [one for one in (forest(summary), people_forest(summary), matrix(summary)) if one is not None]
        drawings += [panel for key, title, form in TEXT_PANELS if (panel := text_panel(summary, key, title, form))]
        drawings += honesty_panels(summary)
        return drawings + training_panels(summary, curves)


def forest(summary: dict[str, Any]) -> Drawing:
    """Win rate of each trained model against base, with intervals; open diamonds are length-controlled rates."""
    detectable = next(row["win_rate"] for row in summary["power"]["detectable"] if row["name"] == "ties")
    edge = min(detectable, 1.0) - 0.5 if detectable is not None else 0.5
    title = "Win rate of each model against the untrained base model"
    return _forest(summary, _grader_rows(summary), "forest", title, "win rate against the untrained base model", edge)


def people_forest(summary: dict[str, Any]) -> Drawing | None:
    """The same where people judged: their own rates, and as diamonds the grader's corrected by theirs. None where nobody did."""
    rows = _people_rows(summary)
    if not rows:
        return None
    title = "Win rate of each model against the untrained base model in people’s eyes"
    return _forest(summary, rows, "forest-people", title, "win rate in people’s eyes, blind")


@dataclass(frozen=True)
class _Row:
    """One line of a forest plot. rate: an estimate; diamond: a second value of the same thing, None without one."""

    label: str
    model: str
    simulated: bool
    rate: dict[str, Any]
    diamond: float | None


def _grader_rows(summary: dict[str, Any]) -> list[_Row]:
    equal = equal_length(summary)
    return [
        _Row(
            m["label"], m["name"], m["simulated"], m["win_vs_base"] or {"value": None}, equal.get(m["name"])
        )
        for m in summary["models"]
        if m["name"] != "base"
    ]  # fmt: skip


def equal_length(summary: dict[str, Any]) -> dict[str, float]:
    """Model -> its win rate against base at equal length, where that has an interval: without one it is no more than a fitted curve's end."""
    known = {m["name"]: m["length_controlled_vs_base"] for m in summary["models"]}
    return {name: rate["value"] for name, rate in known.items() if rate is not None and rate["low"] is not None}


def _people_rows(summary: dict[str, Any]) -> list[_Row]:
    known = summary.get("people") or {}
    models = {m["name"]: m for m in summary["models"]}
    corrected = {(row["first"], row["second"]): row["corrected"]["value"] for row in known.get("comparisons") or []}
    return [
        _Row(models[name]["label"], name, models[name]["simulated"], told, corrected.get((name, "base")))
        for told in known.get("tested") or []
        if told["second"] == "base" and (name := told["first"]) in models
    ]


def _forest(summary: dict[str, Any], rows: list[_Row], name: str, title: str, axis: str, band: float | None = None) -> Drawing:
    """Rates around one half, with their intervals in words and lines. band: half the width of what would usually go unseen."""
    everybody = [*_grader_rows(summary), *_people_rows(summary)]  # one scale, so that the two plots can be compared
    values = [v for row in everybody for v in (row.rate.get("low"), row.rate.get("high"), row.diamond) if v is not None]
    reach = min(0.5, max([0.25, *(abs(v - 0.5) + 0.04 for v in values)]))
    left, right = 0.5 - reach, 0.5 + reach
    figure, axes = new_axes(WIDE, 0.6 + 0.48 * max(2, len(rows)))
    if band is not None:
        axes.axvspan(max(left, 0.5 - band), min(right, 0.5 + band), color=BAND, lw=0, zorder=0)
    axes.axvline(0.5, color=MUTED, lw=0.9, zorder=1)
    for place, row in enumerate(rows):
        colour, rate = _colour(summary, row.model), row.rate
        axes.text(left, place - 0.3, row.label, ha="left", va="center", color=INK)
        if rate["value"] is None:
            axes.text(right, place - 0.3, "cannot say", ha="right", va="center", color=MUTED)
            continue
        said = f"{percent(rate['value'])}  ({interval(rate['low'], rate['high'])})"
        axes.text(right, place - 0.3, said, ha="right", va="center", color=INK)
        axes.plot([rate["low"], rate["high"]], [place + 0.12] * 2, color=colour, lw=2.2, solid_capstyle="butt", zorder=2)
        face = PAPER if row.simulated else colour
        axes.plot(rate["value"], place + 0.12, "o", ms=7, mfc=face, mec=colour, mew=1.6, zorder=3, clip_on=False)
        if row.diamond is not None:
            axes.plot(row.diamond, place + 0.33, "D", ms=3.8, mfc=PAPER, mec=MUTED, mew=1.0, zorder=4, clip_on=False)
    axes.set_xlim(left, right)
    axes.set_ylim(max(1, len(rows)) - 0.45, -0.65)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: percent(value))
    axes.set_xlabel(axis)
    if not rows:
        axes.text(0.5, 0, "no trained model yet", ha="center", color=MUTED)
    said_of = [
        f"{row.label} {percent(row.rate['value'])}, interval {interval(row.rate['low'], row.rate['high'])}"
        if row.rate["value"] is not None
        else f"{row.label} cannot say"
        for row in rows
    ]
    start = "Win rates against base" if name == "forest" else "Win rates against base in people’s eyes"
    alt = f"{start}: {'; '.join(said_of)}." if said_of else "No trained model was compared with base."
    return finished(figure, name, title, alt)


def matrix(summary: dict[str, Any]) -> Drawing:
    """Heat map of win rates, row against column, with the number of scored prompts where some are missing."""
    table = summary["matrix"]
    labels = {m["name"]: m["label"] for m in summary["models"]} | {"human": "human reply"}
    names, size = table["names"], len(table["names"])
    figure, axes = new_axes(SQUARE, 1.2 + 0.46 * size)
    for i in range(size):
        for j in range(size):
            rate = table["rate"][i][j]
            if i == j:
                continue
            axes.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, color=BAND if rate is None else _diverging(rate), lw=0))
            missing = table["scored"][i][j] < table["asked"][i][j] and rate is not None
            dark = rate is not None and abs(rate - 0.5) > 0.28
            tone = MUTED if rate is None else "#fffffe" if dark else "#111418"
            axes.text(j, i + (0.03 if not missing else -0.1), percent(rate), ha="center", va="center", color=tone)
            if missing:
                axes.text(j, i + 0.24, f"n {table['scored'][i][j]}", ha="center", va="center", color=tone, fontsize=6.5)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_yticks(range(size), [labels[name] for name in names])
    axes.set_xticks(range(size), [labels[name] for name in names], rotation=40, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.tick_params(colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    alt = "Share of prompts on which the row's model is preferred to the column's. The same numbers stand in tables/matrix.csv."
    return finished(figure, "matrix", "Win rate of row against column", alt)


def text_panel(summary: dict[str, Any], key: str, title: str, form: str) -> Drawing | None:
    """One text measure for all models and the human reply, as dots on a common line; None where nothing was measured."""
    speakers = [*summary["models"], summary["human"]]
    values = [speaker["text"].get(key) for speaker in speakers]
    known = [value for value in values if value is not None]
    if not known:
        return None
    figure, axes = new_axes(NARROW, 0.55 + 0.25 * len(speakers))
    human = values[-1]
    if human is not None:
        axes.axvline(human, color=GRID, lw=1.0, zorder=0)
    drawn = [row for row, value in enumerate(values) if value is not None]
    colours = [_colour(summary, speakers[row]["name"]) for row in drawn]
    faces = [PAPER if speakers[row].get("simulated") else colour for row, colour in zip(drawn, colours, strict=True)]
    axes.hlines(drawn, 0, known, color=GRID, lw=0.9, zorder=1)
    axes.scatter(known, drawn, s=5.5**2, c=faces, edgecolors=colours, linewidths=1.4, zorder=3, clip_on=False)
    for row, value in enumerate(values):
        words, x, away, colour = (form.format(value), value, 7, INK) if value is not None else ("not measured", 0, 6, MUTED)
        axes.annotate(words, (x, row), xytext=(away, 0), textcoords="offset points", va="center", color=colour)
    reach = max(known) - min(0, *known) or 1
    axes.set_xlim(min(0, *known), max(known) + 0.22 * reach)
    axes.set_ylim(len(speakers) - 0.4, -0.6)
    axes.set_yticks(range(len(speakers)), [speaker["label"] for speaker in speakers])
    axes.tick_params(axis="y", colors=INK, pad=7)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(title, loc="left", fontsize=8.5, color=INK, fontweight="bold", pad=7)
    said = "; ".join(f"{s['label']} {form.format(v)}" for s, v in zip(speakers, values, strict=True) if v is not None)
    return finished(figure, f"text-{key.replace('_', '-')}", title, f"{title}: {said}.")


def honesty_panels(summary: dict[str, Any]) -> list[Drawing]:
    """What the audit's trusted rules find, one panel a kind; counts of other rules are never drawn."""
    known = summary.get("honesty") or {}
    drawings = []
    for kind in known.get("kinds", []):
        shares = {name: (entry["rates"].get(kind["kind"]) or {}).get("value") for name, entry in known["speakers"].items()}
        speakers = [
            {**speaker, "text": {kind["kind"]: shares.get(speaker["name"])}} for speaker in [*summary["models"], summary["human"]]
        ]
        shown = {**summary, "models": speakers[:-1], "human": speakers[-1]}
        panel = text_panel(shown, kind["kind"], kind["title"], "{:.0%}")
        if panel:
            drawings.append(Drawing(panel.name.replace("text-", "honesty-"), panel.title, panel.alt, panel.svg, panel.png))
    return drawings


def training_panels(summary: dict[str, Any], curves: dict[str, list[dict[str, Any]]]) -> list[Drawing]:
    """SFT's loss; margin, accuracy, KL and log-probabilities of all arms."""
    labels = {m["name"]: m["label"] for m in summary["models"]}
    arms = {name: rows for name, rows in curves.items() if name != "sft"}
    drawings = []
    if _line(curves.get("sft", []), "loss"):
        figure, axes = new_axes(NARROW, 2.7)
        _plot(axes, _line(curves["sft"], "loss"), _colour(summary, "sft"))
        drawings.append(
            _curve(figure, axes, "curve-sft-loss", "SFT loss", [Line2D([], [], color=_colour(summary, "sft"), label="sft")])
        )
    for key, title in CURVE_PANELS:
        lines = {name: line for name, rows in arms.items() if (line := _line(rows, key))}
        if not lines:
            continue
        figure, axes = new_axes(NARROW, 2.7)
        for name, line in lines.items():
            _plot(axes, line, _colour(summary, name))
        handles = [Line2D([], [], color=_colour(summary, name), label=labels.get(name, name)) for name in lines]
        if key == "accuracy":
            axes.axhline(0.5, color=GRID, lw=0.9, zorder=0)
        drawings.append(_curve(figure, axes, f"curve-{key}", title, handles))
    figure, axes = new_axes(NARROW, 2.7)
    handles = []
    for name, rows in arms.items():
        for key, style in (("chosen_logp", "-"), ("rejected_logp", "--")):
            line = _line(rows, key)
            if line:
                _plot(axes, [(step, value - line[0][1]) for step, value in line], _colour(summary, name), style)
                if style == "-":
                    handles.append(Line2D([], [], color=_colour(summary, name), label=labels.get(name, name)))
    if handles:
        axes.axhline(0, color=GRID, lw=0.9, zorder=0)
        title = "Log-probability since the first step: chosen (solid), rejected (dashed)"
        drawings.append(_curve(figure, axes, "curve-logp", title, handles))
    return drawings


def _curve(figure: Figure, axes: Axes, name: str, title: str, handles: list[Any]) -> Drawing:
    shown = title if len(title) < 40 else title.replace(": ", ":\n", 1)
    axes.set_title(shown, loc="left", fontsize=8.5, color=INK, fontweight="bold", pad=7)
    axes.set_xlabel("optimiser step")
    axes.grid(axis="y", color=GRID, lw=0.5)
    axes.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=7.5, handlelength=1.3, borderpad=0)
    series = ", ".join(str(handle.get_label()) for handle in handles)
    return finished(figure, name, title, f"{title} by optimiser step, for {series}.")


def _line(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _plot(axes: Axes, line: list[tuple[float, float]], colour: str, style: str = "-") -> None:
    axes.plot([x for x, _ in line], [y for _, y in line], style, color=colour, lw=1.4, marker="o" if len(line) < 2 else "", ms=3)


def _colour(summary: dict[str, Any], name: str) -> str:
    """Grey for base, ink for the human reply and sft, one colour an arm in the recipe's order."""
    if name in ("base", "sft", "human"):
        return {"base": MUTED, "sft": COLOURS[5], "human": INK}[name]
    arms = [m["name"] for m in summary["models"] if m["name"] not in ("base", "sft")]
    colours: dict[str, str] = dict(zip(arms, cycle(COLOURS[:5]), strict=False))
    return colours.get(name, MUTED)


def _diverging(rate: float) -> str:
    """Rust at 0, paper-like grey at .5, blue at 1."""
    low, middle, high = (178, 82, 45), (238, 238, 235), (43, 92, 138)
    end, share = (high, 2 * rate - 1) if rate >= 0.5 else (low, 1 - 2 * rate)
    share = min(1.0, share * 1.25)  # most rates lie near .5: spread them
    return "#" + "".join(f"{round(m + (e - m) * share):02x}" for m, e in zip(middle, end, strict=True))


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of this size in inches, with its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def finished(figure: Figure, name: str, title: str, alt: str) -> Drawing:
    """The figure as a Drawing: equal figures have equal bytes."""
    svg, png = io.BytesIO(), io.BytesIO()
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
    figure.set_layout_engine("none")  # laid out once, not again for each format; savefig would draw each twice to make sure
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    figure.set_dpi(200)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return Drawing(name, title, alt, svg.getvalue(), png.getvalue())
