"""What `suasion grade bench` leaves in its folder, and the table it prints.

bench.json (the numbers of the grader at the top, those of the baselines under "baselines"), predictions.jsonl (one row a pair, ids
and numbers without texts), reliability.svg and .png, and disagreements.html: the pairs on which grader and labels differ most, to
be read. That page holds the texts themselves: it belongs to whoever may read the pairs, and into no repository.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from suasion.grading.base import Judgement
from suasion.grading.bench import Taken, calibration_rows, points, reliability_bins
from suasion.grading.features import word_count
from suasion.grading.labelled import LabelledPair
from suasion.records import canonical_json, write_json

SHOWN_DISAGREEMENTS = 40
NAMES = {"longer": "longer wins", "first": "first position", "coin": "coin"}


def write_bench(folder: Path, result: dict[str, Any], pairs: Sequence[LabelledPair], taken: Taken) -> None:
    """Write everything; bench.json comes last, by rename."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [canonical_json(row) for row in predictions(pairs, taken)]
    temporary = folder / "predictions.jsonl.tmp"
    temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    temporary.replace(folder / "predictions.jsonl")
    bins = reliability_bins(*calibration_rows(pairs, taken.given)[:2])
    if bins:
        reliability(bins, result).write(folder)
    (folder / "disagreements.html").write_text(disagreements_page(pairs, taken.given, result["grader"]), encoding="utf-8")
    write_json(folder / "bench.json", {**result, "reliability": bins})


def predictions(pairs: Sequence[LabelledPair], taken: Taken) -> list[dict[str, Any]]:
    """One row a pair, in the file's order: label and answer, probability, answer at equal length, lengths in words."""
    right = points(pairs, taken.given)
    return [
        {
            "id": pair.id,
            "row": row,
            "group": pair.group,
            "label": pair.label,
            "said": given.label,
            "p_a": None if given.p_a is None else round(given.p_a, 6),
            "right": None if right[row] != right[row] else float(right[row]),
            "outcome": given.outcome,
            "orders": [one.label for one in given.orders],
            "equal_length": equal.label,
            "words": [word_count(pair.item.a), word_count(pair.item.b)],
        }
        for row, (pair, given, equal) in enumerate(zip(pairs, taken.given, taken.equal, strict=True))
    ]


def reliability(bins: Sequence[dict[str, Any]], result: dict[str, Any]) -> Any:
    """How often the grader was right, over how sure it was: on the line it is calibrated. Dots grow with the number of pairs."""
    import matplotlib

    from suasion.reporting.figures import COLOURS, GRID, INK, MUTED, SQUARE, STYLE, finished, new_axes

    most = max(row["n"] for row in bins)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(SQUARE, 3.6)
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, lw=0.9, zorder=1)
        axes.plot([row["confidence"] for row in bins], [row["accuracy"] for row in bins], color=COLOURS[0], lw=1.2, zorder=2)
        for row in bins:
            axes.scatter(row["confidence"], row["accuracy"], s=16 + 120 * row["n"] / most, color=COLOURS[0], zorder=3)
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(min(0.4, *(row["accuracy"] - 0.05 for row in bins)), 1.03)
        axes.set_xlabel("how sure the grader was")
        axes.set_ylabel("how often it was right")
        axes.grid(color=GRID, lw=0.5)
        axes.set_axisbelow(True)
        title = f"Reliability of {result['grader']}"
        axes.set_title(title, loc="left", fontsize=8.5, color=INK, fontweight="bold", pad=7)
        alt = f"Accuracy over confidence in {len(bins)} bins; expected calibration error {result['ece']}, Brier score {result['brier']}."
        return finished(figure, "reliability", title, alt)


def disagreements_page(pairs: Sequence[LabelledPair], judged: Sequence[Judgement], name: str) -> str:
    """The pairs on which grader and label differ, the surest errors first, as one page that needs no network."""
    from jinja2 import Environment, PackageLoader

    wrong = [
        (one.p_a if one.p_a is not None else 1.0 if one.label == "a" else 0.0, pair, one)
        for pair, one in zip(pairs, judged, strict=True)
        if "none" != one.label != pair.label
    ]
    wrong.sort(key=lambda row: (-abs(row[0] - 0.5), row[1].id))
    environment = Environment(loader=PackageLoader("suasion.grading", "templates"), autoescape=True)
    return environment.get_template("disagreements.html").render(
        name=name, wrong=[(pair, one) for _, pair, one in wrong[:SHOWN_DISAGREEMENTS]], count=len(wrong), asked=len(pairs)
    )


def print_bench(result: dict[str, Any], console: Console) -> None:
    """The numbers as a table, one column a grader: the baselines stand beside."""
    columns = [result, *result["baselines"].values()]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in (result["grader"], *(NAMES[key] for key in result["baselines"])):
        table.add_column(name, justify="right")
    rows: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("accuracy", lambda row: _share(row["accuracy"])),
        ("  95% interval", lambda row: _interval(row["low"], row["high"])),
        ("at equal length", lambda row: _share(row["accuracy_equal_length"])),
        ("  95% interval", lambda row: _interval(row["equal_length_low"], row["equal_length_high"])),
        ("matched in length", lambda row: _share(row["accuracy_length_matched"])),
        ("Brier", lambda row: _number(row["brier"])),
        ("ECE", lambda row: _number(row["ece"])),
        ("first position", lambda row: _share(row["first_rate"])),
        ("same when swapped", lambda row: _share(row["swap_consistency"])),
        ("length slope", lambda row: _number(row["length_slope"])),
        ("ties / missing", lambda row: f"{row['ties']} / {row['missing']}"),
        ("seconds", lambda row: f"{row['seconds']:.1f}"),
    )
    for title, cell in rows:
        table.add_row(title, *(cell(column) for column in columns))
    console.print(table)
    labels = result["labels"]
    slope = result["length_slope_labels"]
    console.print(
        f"{result['n']} pairs of {result['groups']} groups, {result['scored']} scored; labels: {labels['a']} a, {labels['b']} b, "
        f"{labels['tie']} ties"
        + (f"; the labels' own length slope {slope:.2f}" if slope is not None else "")
        + (f"; {result['length_matched_n']} pairs matched in length" if result["length_matched_n"] else "")
        + (f"; cost ${result['cost']:.4f}" if result["cost"] else "")
    )
    gain = result["over_longer"]
    if gain["value"] is not None:
        console.print(
            f"over longer wins: {100 * gain['value']:+.1f} points ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}) on the same "
            f"{gain['n']} pairs"
        )
    console.print(agreement_line(result["agreement"]))
    if result["outcomes"]:
        console.print("both orders: " + ", ".join(f"{count} {name}" for name, count in result["outcomes"].items()))


def agreement_line(found: dict[str, Any]) -> str:
    """Agreement with whoever gave the labels, ties included, each statistic with its 95% interval; '-' where it is undefined."""
    titles = {
        "agreement": "raw",
        "balanced_agreement": "position-balanced",
        "kappa": "kappa",
        "gwet_ac1": "AC1",
        "alpha": "alpha",
    }
    told = [
        f"{title} -"
        if (known := found[name]) is None
        else f"{title} {known['value']:.2f} ({known['low']:.2f} to {known['high']:.2f})"
        for name, title in titles.items()
    ]
    return f"agreement with the labels on {found['n']} pairs, {found['both_decisive']} of them decided by both: {', '.join(told)}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{100 * low:.1f} - {100 * high:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
