"""`suasion status RUN|RECIPE`: what is finished, what is next. Reads recipe.yaml, manifests and timings; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from suasion.errors import UsageError, UserError
from suasion.pipeline import stages
from suasion.progress import duration
from suasion.recipe import Recipe, load_recipe, validate_recipe
from suasion.rundir import RunDir

RUNS = Path("runs")  # where `suasion run` puts a run unless told otherwise


def find_run(given: Path) -> Path:
    """The run directory that is meant: the one given, or that of a recipe file. Raises UsageError where there is none."""
    if (given / "recipe.yaml").is_file():
        return given
    if not given.is_file():
        raise UsageError(
            f"{given} is not a run directory (it has no recipe.yaml) and no recipe file. Runs stand in {RUNS}/, for example {RUNS}/demo; recipes "
            "in recipes/, for example recipes/demo.yaml."
        )
    name = load_recipe(given).name
    for path in (given.parent, RUNS / name):
        if path.resolve().name == name and (path / "recipe.yaml").is_file():
            return path
    raise UsageError(
        f"{given} has no run at {RUNS / name}. Start one with: suasion run {given}. Or give the run directory, where it stands elsewhere."
    )


def load_run(path: Path) -> tuple[RunDir, Recipe]:
    """A run directory with its resolved recipe. Raises UsageError where there is none."""
    file = path / "recipe.yaml"
    if not file.is_file():
        raise UsageError(f"{path} is not a run directory (it has no recipe.yaml). Runs stand in runs/, for example runs/demo.")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} was changed and is no longer valid YAML: {error}. Run the recipe again to write it anew."
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{file} was changed and is no longer a recipe. Run the recipe again to write it anew.")
    recipe = validate_recipe(data, str(file))
    return RunDir(path, {stage.name: stage.folder for stage in stages(recipe)}), recipe


def print_status(path: Path, console: Console) -> None:
    """One line a stage, and what to do next."""
    directory, recipe = load_run(path)
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "rows", "dropped", "time"):
        table.add_column(column, justify="right" if column in ("rows", "time") else "left")
    timings = directory.timings()
    following = ""
    waiting = ""
    for stage in stages(recipe):
        state = directory.state(stage.name)
        attempts = timings.get(stage.name, [])
        seconds = duration(attempts[-1]["seconds"]) if attempts and state == "complete" else ""
        if state == "complete":
            manifest = directory.manifest(stage.name)
            dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest.dropped.items()))
            waiting = waiting or str(manifest.facts.get("waiting", ""))
            table.add_row(stage.name, "[green]complete[/]", str(manifest.rows_out), dropped, seconds)
        else:
            following = following or stage.name
            table.add_row(stage.name, "[yellow]unfinished[/]" if state == "unfinished" else "[dim]not yet[/]", "", "", "")
    console.print(table)
    if waiting:
        console.print(f"[yellow]waiting for people:[/] {waiting}")
    elif following:
        console.print(f"next: {following}. Go on with: {directory.go_on()}", soft_wrap=True)
    else:
        console.print(f"finished; report: {directory.folder('report') / 'index.html'}")
