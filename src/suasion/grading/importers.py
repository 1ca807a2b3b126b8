"""Importers that write PAIRS files: outcome pairs of ChangeMyView, UKPConvArg1, and files or runs with human labels.

Every importer gives rows in a fixed order, so that a file can be made again byte for byte. Where a source does not say which text
was shown first (ChangeMyView), the order is drawn from the row's own hash; where it does (UKPConvArg1, people), it is kept: a
preference for the first position then shows in the bench.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from suasion.corpora.cmv import outcome_pairs
from suasion.errors import UsageError, UserError
from suasion.grading.labelled import PairRow
from suasion.grading.pairs import cmv_folder, read_sampled_pairs, read_ukp, ukp_files
from suasion.labeling.imports import read_fields
from suasion.records import Verdict, canonical_json, content_id, read_json_lines, read_rows
from suasion.seeding import derive_seed

LabelLetter = Literal["a", "b", "tie"]


def cmv_rows(source: str) -> Iterator[PairRow]:
    """The clean outcome pairs of a ConvoKit folder (or 'bundled'), grouped by poster."""
    for pair in outcome_pairs(cmv_folder(source)):
        winner_first = derive_seed(0, "pairs-order", pair.id) % 2 == 0
        first, second = (pair.winner, pair.loser) if winner_first else (pair.loser, pair.winner)
        yield PairRow(context=pair.turns, a=first, b=second, label="a" if winner_first else "b", group=pair.group)


def ukp_rows(folder: Path, by: Literal["side", "topic"]) -> Iterator[PairRow]:
    """UKPConvArg1Strict in its own order. by: group = the file (32 topic-sides, the published folds) or the topic (16)."""
    for file in ukp_files(folder):
        for pair in read_ukp(file):
            first, second = (pair.winner, pair.loser) if pair.first_won else (pair.loser, pair.winner)
            group = file.stem if by == "side" else pair.group
            yield PairRow(context=pair.context, a=first, b=second, label="a" if pair.first_won else "b", group=group)


def label_rows(path: Path) -> Iterator[PairRow]:
    """A file of human preferences (rows of prompt, chosen, rejected, metadata), in the order that people saw; grouped by conversation.

    metadata.preference "1" or "2" says which response, in the order shown, was chosen; metadata.is_equal marks a tie, whose order
    nobody knows: it is drawn. Raises UserError with file and line.
    """
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        prompt, chosen, rejected, metadata = read_fields(row, where)
        label: LabelLetter
        if metadata.get("is_equal") is True:
            label = "tie"
            chosen_first = derive_seed(0, "pairs-order", content_id("tie", chosen, rejected)) % 2 == 0
        else:
            choice = str(metadata.get("preference", ""))
            if choice not in ("1", "2"):
                raise UserError(
                    f"{where}: metadata.preference must be 1 or 2 (it is {choice!r}), or metadata.is_equal true for a tie."
                )
            chosen_first = choice == "1"
            label = "a" if chosen_first else "b"
        first, second = (chosen, rejected) if chosen_first else (rejected, chosen)
        yield PairRow(context=prompt.turns, a=first, b=second, label=label, group=prompt.conversation_id)


def run_rows(run: Path) -> Iterator[PairRow]:
    """What people said of a run's own pairs (06-human-labels), one row a label, in the order shown; grouped by conversation.

    Raises UsageError for a folder that is no run, UserError where its labels are missing.
    """
    verdicts = run / "06-human-labels" / "verdicts.jsonl"
    if not (run / "recipe.yaml").is_file():
        raise UsageError(f"{run} is no run directory (recipe.yaml is missing).")
    if not verdicts.is_file():
        raise UserError(
            f"{run} has no finished human labels ({verdicts} is missing). Finish them with: suasion label serve {run}"
        )
    sampled = read_sampled_pairs(
        run / "04-sample" / "pairs.jsonl", run / "04-sample" / "responses.jsonl", [run / "02-pools" / "rlhf.jsonl"]
    )
    known = {pair.pair.id: pair for pair in sampled}
    for verdict in read_rows(verdicts, Verdict):
        pair = known.get(verdict.pair_id)
        if pair is None or verdict.label == "none":
            continue
        first, second = pair.a.text, pair.b.text
        label: LabelLetter = verdict.label
        if verdict.order == "ba":
            mirrored: dict[str, LabelLetter] = {"a": "b", "b": "a", "tie": "tie"}
            first, second, label = second, first, mirrored[verdict.label]
        yield PairRow(context=pair.prompt.turns, a=first, b=second, label=label, group=pair.prompt.conversation_id)


def read_label_source(source: Path) -> Iterator[PairRow]:
    """Human labels of a run directory or of a file."""
    return run_rows(source) if source.is_dir() else label_rows(source)


def write_pairs(path: Path, rows: Iterable[PairRow]) -> dict[str, int]:
    """Write a PAIRS file by rename and count what is in it: pairs, groups and each label. Raises UserError for a source without pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    groups: set[str] = set()
    counts = {"pairs": 0, "a": 0, "b": 0, "tie": 0}
    with temporary.open("w", encoding="utf-8") as handle:
        for row in rows:
            counts["pairs"] += 1
            counts[row.label] += 1
            groups.add(row.group)
            print(canonical_json(row.model_dump(mode="json", exclude_none=True)), file=handle)
    if not counts["pairs"]:
        temporary.unlink()
        raise UserError("there are no pairs in this source. PersuasionForGood has none: no two replies there answer one context.")
    temporary.replace(path)
    return {**counts, "groups": len(groups)}
