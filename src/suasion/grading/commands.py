"""`suasion grade ...`: measure a grader on labelled pairs, and make files of such pairs. Commands parse and print."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from suasion.errors import UsageError
from suasion.progress import console

app = typer.Typer(
    help="Measure graders before trusting them: accuracy on labelled pairs, calibration, biases, cost.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
pairs_app = typer.Typer(help="Write files of labelled pairs (PAIRS) from corpora and human labels.", no_args_is_help=True)
app.add_typer(pairs_app, name="pairs")

OutOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The PAIRS file to write.")]


class UkpGroup(StrEnum):
    """What a group of UKPConvArg1 is."""

    side = "side"
    topic = "topic"


@app.command()
def bench(
    grader: Annotated[
        Path, typer.Option("--grader", metavar="FILE", help="A grader file, for example graders/embedding-cmv.yaml.")
    ],
    test: Annotated[Path, typer.Option("--test", metavar="PAIRS", help="The labelled pairs to be judged.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where bench.json, predictions.jsonl and figures go.")],
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="PAIRS", help="Pairs to train on instead of the grader file's own data or weights."),
    ] = None,
    folds: Annotated[
        int,
        typer.Option(
            "--folds",
            min=0,
            help="Train and test on --test itself, by group: each fold is judged by a grader that has not seen it.",
        ),
    ] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Judge N pairs only, drawn by the hash of their content.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of folds, intervals and subsets.")] = 0,
) -> None:
    """Measure a grader on labelled pairs, beside longer wins, first position and coin.

    PAIRS is JSONL, one row a pair: `{"context": text or turns, "a": text, "b": text, "label": "a", "b" or "tie", "group": text}`.
    Make such files with `suasion grade pairs`.
    """
    from suasion.grading.bench_files import print_bench, write_bench
    from suasion.grading.bench_run import run_bench
    from suasion.grading.files import load_grader
    from suasion.grading.labelled import drawn_by_hash, read_pairs

    if folds == 1:
        raise UsageError("--folds 1 holds nothing out. Give at least 2, or 0 for none.")
    if folds and train:
        raise UsageError("--folds trains on --test itself, --train on other pairs: give one of the two.")
    spec, tested = load_grader(grader), read_pairs(test)
    if limit is not None:
        tested = drawn_by_hash(tested, limit, seed)
    result, taken = run_bench(spec, tested, read_pairs(train) if train else None, folds, seed, str(out.resolve()))
    result["name"] = grader.stem
    result["command"] = command_line(grader, test, out, train, folds, limit, seed)
    write_bench(out, result, tested, taken)
    print_bench(result, console)
    console.print(
        f"{out}: bench.json, bench.md, predictions.jsonl, reliability.svg, disagreements.html", markup=False, soft_wrap=True
    )


@pairs_app.command("cmv")
def pairs_cmv(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="A ConvoKit folder of ChangeMyView, or 'bundled'.")],
    out: OutOption,
) -> None:
    """Outcome pairs of ChangeMyView: two replies to one post, of which one changed the poster's mind. Grouped by poster."""
    from suasion.grading.importers import cmv_rows, write_pairs

    _report(out, write_pairs(out, cmv_rows(source)))


@pairs_app.command("ukp")
def pairs_ukp(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of UKPConvArg1Strict's 32 files.")],
    out: OutOption,
    by: Annotated[
        UkpGroup,
        typer.Option("--by", help="side: the 32 topic-sides of the published folds. topic: both sides of a topic together."),
    ] = UkpGroup.topic,
) -> None:
    """UKPConvArg1Strict: which of two arguments a crowd found more convincing."""
    from suasion.grading.importers import ukp_rows, write_pairs

    _report(out, write_pairs(out, ukp_rows(source, by.value)))


@pairs_app.command("labels")
def pairs_labels(
    source: Annotated[
        Path, typer.Argument(metavar="FILE|RUN", help="A file of human preferences, or a run whose human labels are finished.")
    ],
    out: OutOption,
) -> None:
    """Human labels on model-written responses, ties included, in the order that people saw. Grouped by conversation."""
    from suasion.grading.importers import read_label_source, write_pairs

    _report(out, write_pairs(out, read_label_source(source)))


def command_line(grader: Path, test: Path, out: Path, train: Path | None, folds: int, limit: int | None, seed: int) -> str:
    """The command as somebody else can type it: of absolute paths the last part, and of the options those that are not at rest."""
    given: tuple[tuple[str, Path | int | None], ...] = (
        ("--grader", grader),
        ("--train", train),
        ("--test", test),
        ("--folds", folds or None),
        ("--limit", limit),
        ("--seed", seed or None),
        ("--out", out),
    )
    shown = ((name, value.name if isinstance(value, Path) and value.is_absolute() else value) for name, value in given)
    return shlex.join(
        ["suasion", "grade", "bench", *(part for name, value in shown if value is not None for part in (name, str(value)))]
    )


def _report(out: Path, counts: dict[str, int]) -> None:
    console.print(
        f"{out}: {counts['pairs']} pairs of {counts['groups']} groups ({counts['a']} a, {counts['b']} b, {counts['tie']} ties)",
        markup=False,
        soft_wrap=True,
    )
