"""`suasion label ...`: the page and everything around it. Commands parse and print; the work is elsewhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from suasion.errors import UsageError, UserError
from suasion.labeling.work import Purpose
from suasion.progress import console

app = typer.Typer(
    help="People label: which of two responses is more persuasive? Serve the page, invite, watch, import and export.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/demo.")]


class PurposeName(StrEnum):
    """What people are asked for."""

    labels = "labels"
    evaluation = "evaluation"


PurposeOption = Annotated[
    PurposeName, typer.Option("--purpose", help="labels: pairs for training. evaluation: compare the finished models, blind.")
]


@app.command()
def serve(
    run_: RunArgument,
    host: Annotated[str, typer.Option(help="Address to listen on. The default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 8765,
    url: Annotated[
        str | None, typer.Option(help="How annotators reach this server, for example https://labels.example.org.")
    ] = None,
    purpose: PurposeOption = PurposeName.labels,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --purpose evaluation: compare on so many prompts, drawn at random before anybody labels; by default on all.",
        ),
    ] = None,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Label here in the terminal instead: for one person over ssh.")
    ] = False,
) -> None:
    """Open the labelling page of a run, and go on with what is there. Labels are saved as they are given; Ctrl-C stops it."""
    if terminal:
        from suasion.labeling.server import open_desk
        from suasion.labeling.terminal import label

        desk = open_desk(run_, _purpose(purpose), prompts)
        try:
            label(desk, console, input)
        finally:
            desk.store.close()
        return
    from suasion.labeling.server import serve as serve_page

    serve_page(run_, _purpose(purpose), host, port, url, console, prompts)


@app.command()
def status(run_: RunArgument, purpose: PurposeOption = PurposeName.labels) -> None:
    """Print progress, agreement and annotators. Exit code 3 while labels are missing."""
    from rich.table import Table

    from suasion.labeling import insight

    desk = _desk(run_, purpose)
    try:
        state, missing, planned = desk.refresh(), desk.missing(), len(desk.work.planned)
        everything = insight.overall(state, desk.work)
        annotators = desk.store.annotators()
        people = insight.people(state, desk.work, [one.id for one in annotators])
        models = insight.model_scores(state, desk.work) if not missing else []
    finally:
        desk.store.close()
    console.print(f"{planned - missing} of {planned} labels are there, {missing} are missing; the last event is {state.last}.")
    between = everything["people"]
    for name, words in (("agreement", "agreement between people"), ("alpha", "Krippendorff's alpha"), ("gwet_ac1", "Gwet's AC1")):
        console.print(f"{words}: {_interval(between[name])} (n = {between['n']})")
    console.print(f"self-consistency, sides swapped: {_interval(everything['self_consistency'])}")
    console.print(f"left side chosen: {_interval(everything['left'])}; ties: {_share(everything['tie_share'])}")
    if state.imported:
        console.print(f"imported off-policy labels, never mixed with these: {len(state.imported)}")
    table = Table(box=None, pad_edge=False)
    for column in ("annotator", "labels", "skips", "ties", "left", "median s", "remarks"):
        table.add_column(column)
    for one in people:
        remarks = f"excluded: {one.excluded}" if one.excluded else ", ".join(one.warnings)
        seconds = "-" if one.seconds is None else f"{one.seconds:.0f}"
        table.add_row(one.id, str(one.labels), str(one.skips), _share(one.tie_share), _interval(one.left), seconds, remarks)
    if people:
        console.print(table)
    for row in models:
        console.print(
            f"{row['model']} against {row['reference']}: {_interval(row)} ({row['wins']} wins, {row['ties']} ties, {row['losses']} losses)"
        )
    if missing:
        raise typer.Exit(3)


@app.command()
def invite(
    run_: RunArgument,
    name: Annotated[str, typer.Argument(help="Name or note, for you alone; it never leaves labels.db.")] = "",
    url: Annotated[str, typer.Option(help="How annotators reach the server.")] = "http://127.0.0.1:8765",
    purpose: PurposeOption = PurposeName.labels,
) -> None:
    """Invite an annotator: prints a link that is theirs alone. It is shown once; only its hash is stored."""
    desk = _desk(run_, purpose)
    try:
        who = desk.store.add_annotator(name)
        token = desk.store.new_token(who, "invitation")
    finally:
        desk.store.close()
    console.print(f"{who}: {url.rstrip('/')}/i/{token}", soft_wrap=True, markup=False)


@app.command()
def erase(
    run_: RunArgument,
    annotator: Annotated[str, typer.Argument(help="For example annotator-2.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    purpose: PurposeOption = PurposeName.labels,
) -> None:
    """Erase everything an annotator gave, physically. A tombstone with the number of events stays."""
    desk = _desk(run_, purpose)
    try:
        if annotator not in {one.id for one in desk.store.annotators()}:
            raise UserError(f"there is no {annotator} in {desk.store.path}. See: suasion label status {run_}")
        if not yes and not typer.confirm(f"Erase everything of {annotator} for good?"):
            raise typer.Exit(1)
        gone = desk.store.erase(annotator)
    finally:
        desk.store.close()
    again = "with --redo human-labels" if purpose is PurposeName.labels else "again"
    console.print(
        f"{gone} events of {annotator} are erased. Stages made from them still hold copies: run the recipe {again}, "
        f"then delete the older folders in {run_ / 'attic'}."
    )


class Layout(StrEnum):
    """Formats of an exchange; `verdicts` are our own rows and can only be exported."""

    trl_preference = "trl-preference"
    trl_kto = "trl-kto"
    argilla = "argilla"
    label_studio = "label-studio"
    potato = "potato"
    csv = "csv"
    parquet = "parquet"
    verdicts = "verdicts"


LayoutOption = Annotated[Layout, typer.Option("--format", help="File format; docs/labeling.md says what each one holds.")]


@app.command()
def export(
    run_: RunArgument,
    layout: LayoutOption,
    out: Annotated[Path | None, typer.Option(help="File to write; by default RUN-labels-FORMAT in this folder.")] = None,
    purpose: PurposeOption = PurposeName.labels,
) -> None:
    """Write the labels to a file in the format of another tool, with the texts they are about; nothing is lost."""
    from suasion.labeling import exchange, transfer
    from suasion.records import write_rows

    suffix = ".jsonl" if layout is Layout.verdicts else exchange.FORMATS[layout.value].suffix
    path = out or Path(f"{run_.resolve().name}-labels-{layout.value}{suffix}")
    desk = _desk(run_, purpose)
    try:
        if layout is Layout.verdicts:
            count, files = write_rows(path, transfer.verdicts(desk, run_)), [path]
            console.print(f"{count} verdicts", end="")
        else:
            answers = transfer.collect(desk)
            files = exchange.write(answers, path, layout.value)
            console.print(
                f"{len(answers)} answers ({sum(one.label.label == 'tie' for one in answers)} ties, {sum(one.label.label == 'none' for one in answers)} "
                f"skips, {sum(one.label.off_policy for one in answers)} off-policy)",
                end="",
            )
    finally:
        desk.store.close()
    console.print(" in " + " and ".join(map(str, files)), soft_wrap=True, markup=False)


@app.command("import")
def import_(
    run_: RunArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of that format.")],
    layout: LayoutOption,
    purpose: PurposeOption = PurposeName.labels,
) -> None:
    """Take labels from a file: on this run's pairs they count like any other, on other texts they are kept apart as off-policy."""
    from suasion.labeling import exchange, transfer

    if layout is Layout.verdicts:
        raise UsageError(
            "verdict rows carry no texts; a recipe reads them with human_labels.source {kind: file, layout: verdicts}."
        )
    answers = exchange.read(file, layout.value)
    desk = _desk(run_, purpose)
    try:
        taken = transfer.take_in(desk, answers)
    finally:
        desk.store.close()
    console.print(
        f"{len(answers)} answers read: {taken.own} labels on this run's pairs, {taken.off_policy} off-policy ({taken.ties} ties)."
    )
    if taken.off_policy:
        console.print(
            "Off-policy labels are about texts that this run's model did not write. They are counted apart and never mixed with others."
        )
    if taken.known:
        console.print(f"{taken.known} were there already.")
    if taken.erased:
        console.print(f"{taken.erased} were left out: their annotator was erased.")


def _desk(run: Path, purpose: PurposeName) -> Any:
    from suasion.labeling.server import open_desk

    return open_desk(run, _purpose(purpose))


def _purpose(purpose: PurposeName) -> Purpose:
    return purpose.value


def _interval(one: dict[str, Any] | None) -> str:
    return "not yet defined" if one is None else f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
