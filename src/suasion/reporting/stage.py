"""Stage 10: the report. Reads JSON only, computes no statistic, and writes equal bytes for equal input and equal hours.

Reads evaluate's summary, responses, verdicts and models, the eval pool, the corpus counts, and the metrics of the trainings
that exist. Writes `index.html` (one self-contained file), `report.md`, `figures/`, `tables/`, `cards/` (for
the models and sets that a run could release) and a byte copy of `summary.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from suasion.evaluation.summary import ModelVerdict
from suasion.recipe import Recipe
from suasion.records import Example, Response, read_json, read_json_lines, read_rows
from suasion.reporting.cards import cards
from suasion.reporting.figures import Drawing, draw_all
from suasion.reporting.page import build_page, render
from suasion.rundir import Input, StageContext, StageResult, read_timings


def run_stage(stage: StageContext) -> StageResult:
    """Write the report of one run."""
    summary_path = stage.input("evaluate", "summary.json")
    summary = read_json(summary_path)
    lineages = read_json(stage.input("evaluate", "models.json"))["models"]
    verdicts = list(read_rows(stage.input("evaluate", "verdicts.jsonl"), ModelVerdict))
    curves = read_curves(stage.recipe, stage.inputs)
    page = build_page(
        summary,
        stage.recipe,
        list(read_rows(stage.input("pools", "eval.jsonl"), Example)),
        list(read_rows(stage.input("evaluate", "responses.jsonl"), Response)),
        verdicts,
        lineages,
        read_json(stage.input("corpus", "counts.json")),
        read_timings(stage.folder.parent),
        curves,
    )
    drawings = draw_all(summary, curves)
    write_text(stage.folder / "index.html", render("report.html.j2", page, figures={d.name: d for d in drawings}))
    write_markdown(stage.folder, page, drawings)
    (stage.folder / "cards").mkdir(exist_ok=True)
    for name, text in cards(page, stage.recipe).items():
        write_text(stage.folder / "cards" / name, text)
    (stage.folder / "summary.json").write_bytes(summary_path.read_bytes())
    return StageResult(rows_in=len(verdicts), rows_out=len(page["tables"]["comparisons"].rows), facts={"figures": len(drawings)})


def read_curves(recipe: Recipe, inputs: dict[Input, Path]) -> dict[str, list[dict[str, Any]]]:
    """Model -> rows of its training's metrics.jsonl, for the trainings among the inputs."""
    stages = {"sft": "sft"} | {arm.name: f"dpo-{arm.name}" for arm in recipe.dpo}
    paths = {model: inputs.get(Input(name, "metrics.jsonl")) for model, name in stages.items()}
    return {model: [row for _, row in read_json_lines(path)] for model, path in paths.items() if path is not None}


def write_markdown(folder: Path, page: dict[str, Any], drawings: list[Drawing], png: bool = True) -> None:
    """report.md with the figures and tables that it shows; without the PNG figures where the folder is to be committed."""
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "tables").mkdir(exist_ok=True)
    for drawing in drawings:
        drawing.write(folder / "figures", png)
    for table in page["tables"].values():
        if table.rows:
            write_text(folder / "tables" / f"{table.name}.csv", table.to_csv())
    write_text(folder / "report.md", render("report.md.j2", page, figures={d.name: d for d in drawings}))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with one newline at the end, on every system alike."""
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8", newline="\n")
