"""What `suasion grade bench` leaves in its folder, and the table it prints.

bench.json (the numbers of the grader at the top, those of the baselines under "baselines"), bench.md (the same as tables that a document can
take), predictions.jsonl (one row a pair, ids and numbers without texts), reliability.svg and .png, and disagreements.html: the pairs on
which grader and labels differ most, to be read. That page holds the texts themselves: it belongs to whoever may read the pairs, and into no repository.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from suasion.grading.bench import Taken, calibration_rows, points, reliability_bins
from suasion.grading.disagreements import disagreements_page
from suasion.grading.features import word_count
from suasion.grading.labelled import LabelledPair
from suasion.records import canonical_json, write_json

AGREEMENT = {
    "agreement": "raw",
    "balanced_agreement": "position-balanced",
    "kappa": "kappa",
    "gwet_ac1": "AC1",
    "alpha": "alpha",
}
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
    (folder / "bench.md").write_text(bench_page(result, bool(bins)), encoding="utf-8")
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


def print_bench(result: dict[str, Any], console: Console) -> None:
    """The numbers as a table, one column a grader: the baselines stand beside."""
    header, rows = measures(result)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in header:
        table.add_column(name, justify="right")
    for title, cells in rows:
        table.add_row(title, *cells)
    console.print(table)
    for line in (*facts(result), agreement_line(result["agreement"])):
        console.print(line, markup=False, soft_wrap=True)


def bench_page(result: dict[str, Any], pictured: bool) -> str:
    """The numbers as Markdown. pictured: whether there is a reliability picture to show."""
    header, rows = measures(result)
    lines = [f"# {result['grader']}: {result['n']} labelled pairs", ""]
    lines += ["```sh", result["command"], "```", ""] if "command" in result else []
    lines += [f"| | {' | '.join(header)} |", "|---|" + "---:|" * len(header)]
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows]
    lines += [
        "",
        *(f"- {line}" for line in facts(result)),
        "",
        "| agreement with the labels | value | 95% interval |",
        "|---|---:|---:|",
    ]
    for name, title in AGREEMENT.items():
        known = result["agreement"][name]
        cells = ("-", "-") if known is None else (f"{known['value']:.2f}", f"{known['low']:.2f} to {known['high']:.2f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", *(["![How often the grader was right, over how sure it was](reliability.svg)", ""] if pictured else [])]
    lines += ["Where grader and labels differ: disagreements.html. How to read these numbers: docs/grading.md.", ""]
    return "\n".join(lines)


def measures(result: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(names of grader and baselines, rows of a title and a cell for each): every measure of the bench."""
    columns = [result, *result["baselines"].values()]
    titles: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("accuracy", lambda row: _share(row["accuracy"])),
        ("95% interval", lambda row: _interval(row["low"], row["high"])),
        ("at equal length", lambda row: _share(row["accuracy_equal_length"])),
        ("95% interval", lambda row: _interval(row["equal_length_low"], row["equal_length_high"])),
        ("matched in length", lambda row: _share(row["accuracy_length_matched"])),
        ("95% interval", lambda row: _interval(row["length_matched_low"], row["length_matched_high"])),
        ("Brier", lambda row: _number(row["brier"])),
        ("ECE", lambda row: _number(row["ece"])),
        ("first position", lambda row: _share(row["first_rate"])),
        ("same when swapped", lambda row: _share(row["swap_consistency"])),
        ("length slope", lambda row: _number(row["length_slope"])),
        ("ties / missing", lambda row: f"{row['ties']} / {row['missing']}"),
        ("cost, US dollars", lambda row: f"{row['cost']:.4f}" if row["cost"] else "0"),
        ("seconds", lambda row: f"{row['seconds']:.1f}"),
        ("pairs a second", lambda row: rate(row["n"] / row["seconds"]) if row["seconds"] >= 0.1 else "-"),
    )
    header = [result["grader"], *(NAMES[key] for key in result["baselines"])]
    return header, [(title, [cell(column) for column in columns]) for title, cell in titles]


def rate(value: float) -> str:
    """Two digits for a slow grader, whole pairs for a fast one."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def facts(result: dict[str, Any]) -> list[str]:
    """What stands beside the measures, a sentence each."""
    labels, slope, gain = result["labels"], result["length_slope_labels"], result["over_longer"]
    found = [
        f"{result['n']} pairs of {result['groups']} groups, {result['scored']} scored; labels: {labels['a']} a, {labels['b']} b, "
        f"{labels['tie']} ties"
        + (f"; the labels' own length slope {slope:.2f}" if slope is not None else "")
        + (f"; {result['length_matched_n']} pairs matched in length" if result["length_matched_n"] else "")
    ]
    held_out = f"{result['folds']} folds by group" if result["folds"] else "nothing held out of these pairs"
    inside = result["configurations"]
    tried = f"chosen from {inside} configurations inside each training" if inside > 1 else "one configuration"
    found.append(
        f"{held_out}; {tried}; {result['training_seconds']:.1f} s of training. Settings that were looked at on these pairs before are not "
        "counted: say how many beside the numbers."
    )
    if gain["value"] is not None:
        found.append(
            f"over longer wins: {100 * gain['value']:+.1f} points ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}) on the same "
            f"{gain['n']} pairs"
        )
    if result["outcomes"]:
        found.append("both orders: " + ", ".join(f"{count} {name}" for name, count in result["outcomes"].items()))
    return found


def agreement_line(found: dict[str, Any]) -> str:
    """Agreement with whoever gave the labels, ties included, each statistic with its 95% interval; '-' where it is undefined."""
    told = [
        f"{title} -"
        if (known := found[name]) is None
        else f"{title} {known['value']:.2f} ({known['low']:.2f} to {known['high']:.2f})"
        for name, title in AGREEMENT.items()
    ]
    return f"agreement with the labels on {found['n']} pairs, {found['both_decisive']} of them decided by both: {', '.join(told)}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{100 * low:.1f} - {100 * high:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
