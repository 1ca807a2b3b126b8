"""The command line. Commands parse and print; the work is elsewhere.

Exit codes: 0 done or skipped, 1 failed, 2 wrong use, 3 waiting for people, 4 verify found a fault or an unfinished run, 130
interrupted. Work is resumable after every one of them.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from typer.exceptions import TyperException

from suasion import __version__
from suasion.errors import UsageError, UserError
from suasion.grading.commands import app as grade_app
from suasion.labeling.commands import app as label_app
from suasion.launch.commands import app as launch_app
from suasion.progress import console
from suasion.rundir import RunDir

app = typer.Typer(
    help="Which feedback makes a small language model a better and honest persuader: examples, AI preferences, human preferences, "
    "or AI then human? A recipe goes in, a report comes out.\n\n"
    "Start with:  suasion plan recipes/demo.yaml  then  suasion run recipes/demo.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

corpus_app = typer.Typer(help="Look at the corpora before anything is trained on them.", no_args_is_help=True)
app.add_typer(corpus_app, name="corpus")
app.add_typer(grade_app, name="grade")
app.add_typer(label_app, name="label")
app.add_typer(launch_app, name="launch")

INTERRUPTED = 130

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, for example recipes/demo.yaml.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, for example runs/demo.")]
RunOrRecipe = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|RECIPE",
        help="A run directory, for example runs/demo, or the recipe file that it was made from (its run is then in runs/).",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, e.g. sft.epochs=1, dpo.rlhf.beta=0.2 or ai_labels.grader.train.path=/data/ukp (relative paths "
        "start at the recipe's folder). Repeatable.",
    ),
]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Where run directories stand.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"suasion {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="CPU threads; 0 takes all. Results are bit-equal only at one thread count.")
    ] = 0,
) -> None:
    """Options of every command."""
    os.environ["SUASION_DEBUG"] = "1" if debug else ""
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Start here; the stages before must be finished.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    redo: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Make this stage and all after it again; the old ones move to attic/.")
    ] = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Run an experiment, or go on with it: finished stages are skipped, an interrupted one resumes.

    Stages: corpus, pools, sft, sample, ai-labels, human-labels, preferences, dpo-ARM (one an arm), evaluate, report.
    """
    from suasion.pipeline import run as run_pipeline
    from suasion.recipe import load_recipe

    loaded = load_recipe(recipe, tuple(set_ or ()))
    directory, waiting = run_pipeline(loaded, runs, from_, until, redo)
    if directory.state("report") == "complete":
        from suasion.records import read_json
        from suasion.reporting.terminal import print_summary

        print_summary(read_json(directory.folder("evaluate") / "summary.json"), console)
        console.print(f"report: {directory.folder('report') / 'index.html'}")
    if waiting:
        console.print(f"[yellow]waiting for people:[/] {waiting}")
        raise typer.Exit(waiting.exit_code)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    runs: RunsOption = Path("runs"),
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="MACHINE,...", help="Predict for these machines of the table instead; 'all' for every one."),
    ] = None,
    machines: Annotated[Path | None, typer.Option(metavar="FILE", help="A table of machines of your own (YAML).")] = None,
    this_machine: Annotated[
        str | None,
        typer.Option(
            "--this-machine",
            metavar="MACHINE",
            help="With --on: this machine is one of that kind; measure it and take its shares of the peaks.",
        ),
    ] = None,
    accuracy: Annotated[
        float | None,
        typer.Option("--judge-accuracy", min=0.5, max=1, help="How often the judge is right, as `grade bench` says; else 0.65."),
    ] = None,
    ties: Annotated[
        float | None, typer.Option("--judge-ties", min=0, max=0.99, help="Share of ties among its verdicts; else 0.1.")
    ] = None,
) -> None:
    """Say what a recipe would take before it runs: rows, optimiser steps, hours a stage, disk, and what it could detect.

    Measures this machine for about 20 seconds. With --on: hours, dollars and memory on other machines, from the model's FLOPs and bytes.
    """
    from suasion.planning import make_plan, measure, print_plan
    from suasion.recipe import load_recipe

    loaded = load_recipe(recipe, tuple(set_ or ()))
    if on is None:
        print_plan(make_plan(loaded, runs, accuracy=accuracy, ties=ties), console)
        return
    from suasion.machines import TABLE, load_machines
    from suasion.prediction import lines, measured_shares, read_sizes

    table = load_machines(machines or TABLE)
    names = list(table.machines) if on == "all" else [name.strip() for name in on.split(",")]
    for name in [*names, *([this_machine] if this_machine else [])]:
        if name not in table.machines:
            raise UsageError(f"{name} is not in the table of machines: {', '.join(table.machines)}.")
    sizes = read_sizes(loaded)
    shares = None
    if this_machine:
        shares = measured_shares(
            measure(loaded, 20.0),
            sizes.shape,
            sizes.lengths,
            loaded.sample.batch_size,
            table.machines[this_machine],
            this_machine,
        )
    console.print("\n".join(lines(loaded, sizes, names, table, shares)), markup=False, soft_wrap=True)


@app.command()
def join(
    run_: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory, on a file system that all machines share.")],
    machine: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of this machine, from 1; `suasion run` is on machine 0.")
    ],
) -> None:
    """Take part in a run's trainings on several machines (processes.machines), until the run on the first machine ends."""
    from suasion.training.joining import join as take_part

    console.print(f"took part in {take_part(run_, machine)} training(s); the run has ended")


@app.command()
def status(source: RunOrRecipe) -> None:
    """Show which stages of a run are finished, how long they took, and what is next."""
    from suasion.status import find_run, print_status

    print_status(find_run(source), console)


@app.command()
def verify(source: RunOrRecipe) -> None:
    """Check a run: every artefact's hash, row counts, disjoint pools, the evaluation seal, lineages and first losses.

    What is finished is checked, whatever is not. Exit code 4 when something is wrong, each fault named, and when stages are missing.
    """
    from suasion.status import find_run
    from suasion.verify import verify_run

    run_ = find_run(source)
    found = verify_run(run_)
    for line in found.checks:
        console.print(f"[green]ok[/]    {escape(line)}", soft_wrap=True)
    for fault in found.faults:
        console.print(f"[red]fault[/] {escape(fault)}", soft_wrap=True)
    for line in found.unfinished:
        console.print(f"[yellow]open[/]  {escape(line)}", soft_wrap=True)
    go_on = RunDir(run_, {}).go_on()
    if found.faults:
        console.print(f"{len(found.faults)} fault(s) in {run_}. Make the stage again with: {go_on} --redo STAGE", soft_wrap=True)
    elif found.unfinished:
        console.print(f"{run_} is sound as far as it goes, and not finished. Go on with: {go_on}", soft_wrap=True)
    if found.faults or found.unfinished:
        raise typer.Exit(4)
    console.print(f"{run_} is sound.")


@app.command()
def report(
    source: RunOrRecipe,
    publish: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write the form that may be published: no contexts, no human replies, and no response that shares a 12-word run with the corpus.",
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN", help="Say what changed from RUN to this one. Repeatable: runs that differ in the seed are pooled."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --against: write comparison.json and comparison.md there.")
    ] = None,
) -> None:
    """Print the result of a run, make its report if the evaluation is finished, compare it with others, or write its publishable form."""
    from suasion.pipeline import run as run_pipeline
    from suasion.records import read_json
    from suasion.reporting.terminal import print_summary
    from suasion.status import find_run, load_run

    run_ = find_run(source)
    if out and not against:
        raise UsageError("--out says where a comparison goes: give it with --against RUN.")
    directory, recipe = load_run(run_)
    if directory.state("evaluate") != "complete":
        raise UserError(f"{run_} has no evaluation yet. Finish it with: {directory.go_on()}")
    if directory.state("report") != "complete":
        run_pipeline(recipe, run_.resolve().parent, "report", "report")
    if against:
        from suasion.reporting.comparison import compare, print_comparison, read_run, write_comparison

        found = compare(read_run(run_), [read_run(other) for other in against])
        print_comparison(found, console)
        if out:
            write_comparison(found, out)
            console.print(f"comparison: {out / 'comparison.md'}")
        return
    if publish:
        from suasion.reporting.publish import corpus_texts
        from suasion.reporting.publish import publish as write_publishable

        withheld = write_publishable(run_, publish, corpus_texts(recipe, directory))
        console.print(
            f"published form: {publish} ({withheld} responses withheld because they share a 12-word run with the corpus)"
        )
    print_summary(read_json(directory.folder("evaluate") / "summary.json"), console)
    console.print(f"report: {directory.folder('report') / 'index.html'}")


@app.command()
def chat(
    run_: RunArgument,
    models: Annotated[
        str | None, typer.Option("--models", metavar="NAMES", help="Which, for example base,sft; all finished ones if not said.")
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Letters in a random order instead of names, until you ask who is who.")
    ] = False,
    page: Annotated[bool, typer.Option("--page", help="As a page in the browser, on this machine alone.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes any free one.")] = 0,
) -> None:
    """Talk to the models of a run: the same message to all of them, replies side by side as they are written. Nothing is stored."""
    from suasion.talking.talk import Talk

    talk = Talk(run_, [name.strip() for name in models.split(",")] if models else (), blind)
    if page:
        from suasion.talking.app import serve

        serve(talk, port, console)
    else:
        from suasion.talking.terminal import chat as chat_here

        chat_here(talk, console, input)


@app.command()
def show(
    recipe: RecipeArgument,
    row: Annotated[
        str, typer.Option(metavar="ID", help="Id of an example, outcome pair, response or preference, or its beginning.")
    ],
    set_: SetOption = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Print a row as the model sees it: prompt, trained tokens and stop token in colour."""
    from suasion.recipe import load_recipe
    from suasion.show import show as show_row

    show_row(load_recipe(recipe, tuple(set_ or ())), runs, row, console)


@app.command()
def export(
    run_: RunArgument,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="base, sft or an arm.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where it goes; must not exist yet.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model instead of one adapter on the original base.")
    ] = False,
) -> None:
    """Write a model of a run so that plain peft (or, merged, plain transformers) loads it: one exact adapter, or merged safetensors."""
    from suasion.export import export as export_model
    from suasion.status import load_run

    directory, recipe = load_run(run_)
    for file in export_model(directory, recipe, model, to, merged):
        console.print(f"{file} ({file.stat().st_size / 1e6:.1f} MB)", markup=False, soft_wrap=True)


@corpus_app.command("stats")
def corpus_stats(
    source: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe file, or a run directory whose corpus stage is finished.")
    ],
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write stats.json and the figures (.svg and .png) there.")
    ] = None,
) -> None:
    """Show what the corpora hold: lengths, outcomes, strategies, how often the longer reply wins, and what is dropped and why.

    A recipe's corpora are read as a run would read them, and nothing is kept; of a run the counts that it wrote are shown.
    """
    from suasion.corpora.stage import survey
    from suasion.corpora.stats import read_stats, source_stats
    from suasion.recipe import load_recipe
    from suasion.reporting.corpus_tables import print_stats, write_stats
    from suasion.status import load_run

    if source.is_dir():
        directory, recipe = load_run(source)
        if set_:
            raise UsageError("--set changes a recipe, and a run is what it is. Give the recipe instead of the run.")
        if directory.state("corpus") != "complete":
            raise UserError(f"{source} has no finished corpus stage yet. Finish it with: {directory.go_on('--until', 'corpus')}")
        stats = read_stats(directory.folder("corpus") / "counts.json")
    else:
        recipe = load_recipe(source, tuple(set_ or ()))
        stats = {label: source_stats(label, report.as_json()) for label, report in survey(recipe).items()}
    print_stats(stats, recipe, console)
    if out:
        figures = write_stats(stats, recipe, out)
        console.print(f"{out}: stats.json and {len(figures)} figures (.svg, .png)")


@app.command()
def fetch(
    corpus: Annotated[
        Literal["cmv", "p4g", "ukp"], typer.Argument(metavar="CORPUS", help="cmv, p4g or ukp.", show_default=False)
    ],
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where it goes; data/ and the corpus's name if not said.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Instead of the published one: an https address, a .zip or .tar.gz file, or a folder."
        ),
    ] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", metavar="HEX", help="What the archive must have.")] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="Fetch although the folder is there, and compare; a folder that differs moves to .old."),
    ] = False,
) -> None:
    """Get a real corpus, checked, into data/.

    **cmv** - ChangeMyView (Winning Arguments): about 73 MB, 350 MB unpacked. Reddit users' text without a licence: for research only,
    never to be passed on.

    **p4g** - PersuasionForGood: about 2 MB, 10 MB unpacked. Apache-2.0.

    **ukp** - UKPConvArg1Strict, for graders: comes with its whole repository, tens of MB, of which 6 MB are kept. CC-BY 4.0.

    Interrupted, the same command goes on where it stopped. The SHA-256 of what came first is recorded beside the folder, in
    *.fetch.json, and enforced ever after.
    """
    from suasion.corpora.fetch import announce
    from suasion.corpora.fetch import fetch as fetch_corpus

    console.print("\n".join(announce(corpus, source)), markup=False, soft_wrap=True)
    got = fetch_corpus(corpus, to, source, sha256, again)
    console.print("\n".join(got.lines()), markup=False, soft_wrap=True)


def main() -> None:
    """Entry point: turns errors into messages and exit codes."""
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False)  # typer returns the code of an Exit; it turns Ctrl-C into 130
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except UserError as error:
        if os.environ.get("SUASION_DEBUG"):
            raise
        _print_error(str(error))
        return error.exit_code
    except TyperException as error:  # wrong use: typer words it
        error.show()  # type: ignore[attr-defined]
        return 2
    except PermissionError as error:
        if os.environ.get("SUASION_DEBUG"):
            raise
        _print_error(
            f"{error.filename or error}: permission denied. Give yourself access to it, or name another folder (--runs, or $SUASION_CACHE for caches)."
        )
        return 1
    except Exception as error:  # a full disk only; tokenizers reports one as a bare Exception, torch and safetensors as their own
        if not _is_full_disk(error) or os.environ.get("SUASION_DEBUG"):
            raise
        where = getattr(error, "filename", None) or "while writing"
        _print_error(f"no space left on the device ({where}). Free some, then run the same command again: it resumes.")
        return 1
    if code == INTERRUPTED:
        console.print("\ninterrupted; what is finished stays. Run the same command again to go on.")
    return code if isinstance(code, int) else 0


def _is_full_disk(error: Exception) -> bool:
    """Whether writing failed for want of space. torch, safetensors, tokenizers and SQLite report it in words of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    words = ("No space left", "PytorchStreamWriter failed", "inline_container", "database or disk is full")
    return any(said in str(error) for said in words)


def _print_error(message: str) -> None:
    errors = Console(stderr=True, highlight=False)
    errors.print("[red]error:[/] ", end="")
    errors.print(message, markup=False, soft_wrap=True)
