"""`suasion report RUN --against OTHER`: what changed in recipe, data, tools and numbers between runs; runs that differ in the seed are pooled.

Reads recipes, manifests and evaluate's summaries of finished runs; writes comparison.json and comparison.md where a folder is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as TerminalTable

from suasion.errors import UserError
from suasion.evaluation.pooling import FEWEST_FOR_RUNS, pool
from suasion.labeling.final import SAID
from suasion.recipe import Recipe
from suasion.records import read_json, write_json
from suasion.reporting.table import Column, Table, portable, shown, signed
from suasion.rundir import Manifest, RunDir, flat_differences
from suasion.status import load_run

NOT_THE_EXPERIMENT = ("name", "report")  # parts of a recipe that change no number
SEED = "seed"
OF_ONE_RUN = ("human-labels", SAID)  # what people said of one run's own responses: other responses have other labels


@dataclass(frozen=True)
class FinishedRun:
    """A run with an evaluation."""

    name: str
    recipe: Recipe
    manifests: dict[str, Manifest]
    summary: dict[str, Any]


def read_run(path: Path) -> FinishedRun:
    """Raises UserError where the evaluation is not finished."""
    directory, recipe = load_run(path)
    if directory.state("evaluate") != "complete":
        raise UserError(f"{path} has no evaluation yet, so there is nothing to compare. Finish it with: {directory.go_on()}")
    return FinishedRun(path.name, recipe, _manifests(directory), read_json(directory.folder("evaluate") / "summary.json"))


def compare(run: FinishedRun, others: Sequence[FinishedRun]) -> dict[str, Any]:
    """Everything that changed from each other run to this one, and the pooled numbers where only the seed differs."""
    runs = [*others, run]
    pairs: list[dict[str, Any]] = [
        {
            "runs": [other.name, run.name],
            "recipe": recipe_changes(other.recipe, run.recipe),
            "data": data_changes(other, run),
            "tools": tool_changes(other, run),
            "numbers": number_changes(other.summary, run.summary),
        }
        for other in others
    ]
    only_seed = all({row["key"] for row in pair["recipe"]} <= {SEED} for pair in pairs)
    others_files = sorted({name for other in others for name in other_inputs(other, run) if name not in OF_ONE_RUN})
    seeds = [run.summary["seed"] for run in runs]
    pooled = pooled_rows(runs) if only_seed and not others_files and len(set(seeds)) == len(seeds) else []
    says = _says(runs, pooled, only_seed, others_files)
    return {
        "format": "comparison/1",
        "runs": [run.name for run in runs],
        "seeds": seeds,
        "pairs": pairs,
        "pooled": pooled,
        "says": says,
    }


def recipe_changes(one: Recipe, other: Recipe) -> list[dict[str, Any]]:
    """Keys of the recipe that differ, dotted, without paths of this machine. Arms are told apart by their names."""
    parts = []
    for recipe in (one, other):
        data = recipe.model_dump(mode="json", exclude=set(NOT_THE_EXPERIMENT))
        data["dpo"] = {arm["name"]: arm for arm in data["dpo"]}
        parts.append(portable(data))
    return [{"key": key, "was": was, "is": now} for key, (was, now) in sorted(flat_differences(*parts).items())]


def data_changes(one: FinishedRun, other: FinishedRun) -> list[dict[str, Any]]:
    """Stages whose rows or inputs from outside the run differ."""
    rows = []
    for stage in [*one.manifests, *(name for name in other.manifests if name not in one.manifests)]:
        a, b = one.manifests.get(stage), other.manifests.get(stage)
        if a is None or b is None:
            rows.append({"stage": stage, "was": _rows(a), "is": _rows(b), "what": "only in one run"})
            continue
        outside = _outside(a, b)
        dropped = flat_differences(a.dropped, b.dropped)
        what = [f"other {name}" for name in sorted(outside)]
        what += [f"dropped as {reason}: {was or 0} → {now or 0}" for reason, (was, now) in sorted(dropped.items())]
        if what or a.rows_out != b.rows_out:
            rows.append({"stage": stage, "was": a.rows_out, "is": b.rows_out, "what": "; ".join(what)})
    seals = [run.manifests["pools"].facts.get("eval_seal") for run in (one, other) if "pools" in run.manifests]
    if len(seals) == 2 and seals[0] != seals[1]:
        rows.append(
            {"stage": "pools", "was": None, "is": None, "what": "other evaluation prompts: win rates are of other prompts"}
        )
    return rows


def other_inputs(one: FinishedRun, other: FinishedRun) -> set[str]:
    """Inputs from outside the runs (corpora, weights, labels) that differ in a stage which both have."""
    common = one.manifests.keys() & other.manifests.keys()
    return {name for stage in common for name in _outside(one.manifests[stage], other.manifests[stage])}


def tool_changes(one: FinishedRun, other: FinishedRun) -> list[dict[str, Any]]:
    """What the evaluations were made with, where it differs: the code, packages, and what computed in which precision."""
    if "evaluate" not in one.manifests or "evaluate" not in other.manifests:
        return []
    fields = {"commit", "packages", "device", "dtype", "threads"}
    was, now = (run.manifests["evaluate"].model_dump(mode="json", include=fields) for run in (one, other))
    return [{"key": key, "was": old, "is": new} for key, (old, new) in sorted(flat_differences(was, now).items())]


def number_changes(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """Each model's win rate against base in both runs, its verdicts, and its length."""
    known = [{model["name"]: model for model in summary["models"]} for summary in (one, other)]
    rows = []
    for name in dict.fromkeys([*known[0], *known[1]]):
        a, b = (models.get(name) for models in known)
        was, now = (None if m is None else m["win_vs_base"] for m in (a, b))
        before, after = (None if e is None else e["value"] for e in (was, now))
        rows.append(
            {
                "model": name,
                "was": was,
                "is": now,
                "change": None if before is None or after is None else after - before,
                "verdicts": [None if m is None else m["verdict_vs_base"] for m in (a, b)],
                "words": [None if m is None else m["text"]["words"] for m in (a, b)],
            }
        )
    return rows


def pooled_rows(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """The primary comparisons of all runs together, with the spread between training runs."""
    seals = {run.manifests["pools"].facts.get("eval_seal") for run in runs if "pools" in run.manifests}
    same_prompts = len(seals) == 1
    confidence = runs[0].summary["confidence"]
    rows = []
    for comparison in runs[0].summary["comparisons"]:
        key = (comparison["first"], comparison["second"])
        if comparison["family"] == "primary":
            found = [c for run in runs for c in run.summary["comparisons"] if (c["first"], c["second"]) == key]
            rows.append({"first": key[0], "second": key[1], **asdict(pool(found, same_prompts, confidence)), "values": [c["value"] for c in found]})  # fmt: skip
    return rows


def _settings(name: str, title: str, note: str, changes: list[dict[str, Any]]) -> Table:
    """What was set otherwise: key, was, is."""
    return Table(
        name,
        title,
        note,
        (Column("key", "Key"), Column("was", "Was", "long"), Column("is", "Is", "long")),
        [{**row, "was": _plain(row["was"]), "is": _plain(row["is"])} for row in changes],
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """The comparison as tables, for terminal and Markdown."""
    made = []
    for number, pair in enumerate(found["pairs"], start=1):
        names = " → ".join(pair["runs"])
        made += [
            _settings(f"recipe_{number}", f"Recipe, {names}", "", pair["recipe"]),
            Table(
                f"data_{number}",
                f"Data, {names}",
                "",
                (Column("stage", "Stage"), Column("was", "Rows", "count"), Column("is", "Rows now", "count"), Column("what", "What changed", "long")),
                pair["data"],
            ),
            _settings(
                f"tools_{number}",
                f"Made with, {names}",
                "Another code, package, device or precision can change numbers too.",
                pair["tools"],
            ),
            Table(
                f"numbers_{number}",
                f"Win rate against base, {names}",
                "The change carries the noise of both runs; intervals of one run cover prompts, not training runs.",
                (
                    Column("model", "Model"),
                    Column("was", "Was", "estimate"),
                    Column("is", "Is", "estimate"),
                    Column("change", "Change"),
                    Column("verdicts", "Verdict"),
                ),
                [
                    {
                        **row,
                        "change": "–" if row["change"] is None else f"{signed(100 * row['change'])} points",
                        "verdicts": " → ".join(word or "–" for word in row["verdicts"]),
                    }
                    for row in pair["numbers"]
                ],
            ),
        ]  # fmt: skip
    if found["pooled"]:
        made.append(
            Table(
                "pooled",
                f"All {len(found['runs'])} training runs together",
                _pooled_note(found),
                (
                    Column("first", "Model"),
                    Column("second", "Against"),
                    Column("rate", "Win rate", "estimate"),
                    Column("runs", "Runs", "count"),
                    Column("between", "Between runs", "small"),
                    Column("within", "Error by prompts", "small"),
                ),
                [{**row, "rate": {key: row[key] for key in ("value", "low", "high", "reason")}} for row in found["pooled"]],
            )
        )
    return made


def _pooled_note(found: dict[str, Any]) -> str:
    runs = len(found["runs"])
    if runs < FEWEST_FOR_RUNS:
        covers = f"from {runs} runs it covers prompts and, at best, these runs: {FEWEST_FOR_RUNS} are the least for training runs in general"
    else:
        covers = f"it covers prompts and training runs, whose spread is estimated from {runs} of them"
    return (
        f"Interval: t over training runs; {covers}. It is not corrected for the number of comparisons. Between: standard deviation of the runs' "
        "own rates beyond what prompts explain; on the same prompts, part of the noise is common to all runs, and it is a lower bound."
    )


def print_comparison(found: dict[str, Any], console: Console) -> None:
    """Tables on the terminal."""
    for table in tables(found):
        shown_table = TerminalTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in table.columns:
            shown_table.add_column(column.title)
        for row in table.rows:
            shown_table.add_row(*(f"{text} ({bounds})" if bounds else text for _, text, bounds in table.cells(row)))
        console.print(shown_table if table.rows else f"{table.title}: no difference")
    for sentence in found["says"]:
        console.print(sentence, markup=False)


def write_comparison(found: dict[str, Any], folder: Path) -> None:
    """comparison.json and comparison.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", found)
    lines = [f"# {' against '.join(found['runs'])}", "", *(f"- {sentence}" for sentence in found["says"]), ""]
    for table in tables(found):
        lines += [f"## {table.title}", ""]
        if table.rows:
            lines.append("| " + " | ".join(column.title for column in table.columns) + " |")
            lines.append("|" + " --- |" * len(table.columns))
            for row in table.rows:
                cells = (f"{text} ({bounds})" if bounds else text for _, text, bounds in table.cells(row))
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        else:
            lines.append("No difference.")
        lines += ["", *([table.note, ""] if table.note and table.rows else [])]
    (folder / "comparison.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _says(runs: Sequence[FinishedRun], pooled: list[dict[str, Any]], only_seed: bool, others_files: list[str]) -> list[str]:
    if pooled and len(runs) >= FEWEST_FOR_RUNS:
        return [f"Only the seed differs: intervals of the pooled table cover prompts and {len(runs)} training runs."]
    if pooled:
        return [
            f"Only the seed differs, but {len(runs)} runs are too few to speak of training runs in general; {FEWEST_FOR_RUNS} are the least."
        ]
    if only_seed and others_files:
        return [
            f"The recipes differ in the seed alone, but the runs read other files ({', '.join(others_files)}): they are not pooled."
        ]
    if only_seed:
        return ["Two of these runs have the same recipe and the same seed: they are the same experiment, so nothing was pooled."]
    return ["The recipes differ in more than the seed: the runs are compared and not pooled."]


def _manifests(directory: RunDir) -> dict[str, Manifest]:
    return {name: directory.manifest(name) for name in directory.folders if directory.state(name) == "complete"}


def _outside(one: Manifest, other: Manifest) -> set[str]:
    """Names of inputs from outside that differ between two manifests of one stage."""
    was, now = one.external_inputs(), other.external_inputs()
    return {name for name in was.keys() | now.keys() if was.get(name) != now.get(name)}


def _rows(manifest: Manifest | None) -> int | None:
    return None if manifest is None else manifest.rows_out


def _plain(value: Any) -> str:
    return "not set" if value is None else shown(value, "text")[0] if not isinstance(value, dict | list) else str(value)
