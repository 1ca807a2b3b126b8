"""The form of a report that may be committed: no contexts, no human replies, no response that repeats the corpus.

`publish` reads a finished run and writes report.md, summary.json, figures and tables. A response that shares a run of 12
words with any corpus text is withheld and counted, because small models copy; contexts and human replies never leave.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from suasion.corpora import own
from suasion.corpora.cmv import clean
from suasion.corpora.convokit import Tally, read_utterances
from suasion.corpora.stage import bundled_path, source_folder
from suasion.errors import UserError
from suasion.evaluation.metrics import ngrams, words
from suasion.evaluation.summary import ModelVerdict
from suasion.grading.pairs import load_training_pairs
from suasion.recipe import Recipe, load_recipe
from suasion.records import Example, OutcomePair, Response, read_json, read_json_lines, read_rows
from suasion.reporting.figures import draw_all
from suasion.reporting.page import build_page, render
from suasion.reporting.stage import read_curves, write_markdown
from suasion.rundir import Input, RunDir, read_timings
from suasion.sections.grading import read_pairs_of

RUN_WORDS = 12


def publish(run_path: Path, out_dir: Path, corpus_texts: Iterable[str]) -> int:
    """Write the committable form of a run's report to out_dir; returns how many of the shown responses were withheld.

    corpus_texts: every text of the corpora, read once and not kept. Raises UserError where a stage is missing, the report is
    stale, or its own words (a title, a name) repeat the corpus.
    """
    evaluate, report, pools, corpus = (_folder(run_path, name) for name in ("evaluate", "report", "pools", "corpus"))
    summary_bytes = (report / "summary.json").read_bytes()
    if summary_bytes != (evaluate / "summary.json").read_bytes():
        raise UserError(
            f"{report}/summary.json is not the summary of {evaluate.name}: the report is stale. Run again with --redo report."
        )
    recipe = load_recipe(run_path / "recipe.yaml")
    metrics = {
        Input(name, "metrics.jsonl"): path
        for name in ("sft", *(f"dpo-{arm.name}" for arm in recipe.dpo))
        for path in run_path.glob(f"[0-9][0-9]-{name}/metrics.jsonl")
    }
    curves = read_curves(recipe, metrics)
    page = build_page(
        read_json(report / "summary.json"),
        recipe,
        list(read_rows(pools / "eval.jsonl", Example)),
        list(read_rows(evaluate / "responses.jsonl", Response)),
        list(read_rows(evaluate / "verdicts.jsonl", ModelVerdict)),
        read_json(evaluate / "models.json")["models"],
        read_json(corpus / "counts.json"),
        read_timings(run_path),
        curves,
    )
    own = {
        "report.md": render("report.md.j2", {**page, "examples": []}, figures={}),
        "summary.json": summary_bytes.decode(),
        **{f"{name}.csv": table.to_csv() for name, table in page["tables"].items()},
    }
    responses = [response["text"] for example in page["examples"] for response in example["responses"]]
    wanted = {run for text in (*own.values(), *responses) for run in word_runs(text)}
    found = {run for text in corpus_texts for run in word_runs(text) if run in wanted}
    leaking = sorted(name for name, text in own.items() if shares_run(text, found))
    if leaking:
        raise UserError(
            f"{', '.join(leaking)} would repeat {RUN_WORDS} words of the corpus. Take that text out of the recipe's title and names."
        )
    drawings = draw_all(page["summary"], curves)
    examples, withheld = _without_corpus(page["examples"], found)
    for name in ("figures", "tables"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_markdown(out_dir, {**page, "examples": examples, "withheld": withheld}, drawings, png=False)
    (out_dir / "summary.json").write_bytes(summary_bytes)
    return withheld


def corpus_texts(recipe: Recipe, directory: RunDir) -> Iterator[str]:
    """Every text of other people that a run has read, one at a time: what `publish` compares with.

    These are the rows that the corpus stage kept (cut and cleaned as models saw them), everything in the corpora themselves, also
    what the stage dropped, what the graders learned from outside the run, and imported human preferences. Raises UserError where a
    corpus is no longer there.
    """
    kept = directory.folder("corpus")
    yield from _texts(chain(read_rows(kept / "examples.jsonl", Example), read_rows(kept / "outcome_pairs.jsonl", OutcomePair)))
    labels = recipe.human_labels.source
    if labels.kind == "file" and labels.layout == "preferences":
        for _, row in read_json_lines(Path(labels.path)):
            for text in (row[name] for name in ("prompt", "chosen", "rejected")):
                yield from (text, clean(text))
    folders = {}
    for source in recipe.corpus.sources:
        if source.kind == "jsonl":
            yield from _texts(row for _, row in own.rows(source_folder(source), source.kind))
        else:
            folders[source_folder(source).resolve()] = source.kind
    for data in (*read_pairs_of(recipe.ai_labels.grader), *read_pairs_of(recipe.evaluate.grader)):
        if data.kind == "cmv":
            folders[(bundled_path("cmv") if data.path == "bundled" else Path(data.path or "")).resolve()] = "cmv"
        elif data.kind == "ukp":
            for pair in load_training_pairs(data, None, None):
                yield from (pair.winner, pair.loser)
    for folder, kind in folders.items():
        for text in _convokit_texts(folder):
            yield text
            if kind == "cmv":  # a link or an escaped sign interrupts a run of words that models saw whole
                yield clean(text)


def shares_run(text: str, runs: set[str], n: int = RUN_WORDS) -> bool:
    """Whether a text holds one of these n-word runs (as `word_runs` writes them), whatever its case, punctuation and line breaks."""
    return any(run in runs for run in word_runs(text, n))


def word_runs(text: str, n: int = RUN_WORDS) -> Iterator[str]:
    """All runs of n neighbouring words of a text, in lower case with single spaces; none for shorter texts."""
    return (" ".join(run) for run in ngrams(words(text), n))


def _texts(rows: Iterable[Example | OutcomePair]) -> Iterator[str]:
    """Every text of some rows."""
    for row in rows:
        yield from (turn.text for turn in row.turns)
        yield from [row.reply or ""] if isinstance(row, Example) else [row.winner, row.loser]


def _convokit_texts(folder: Path) -> Iterator[str]:
    """Every utterance of a ConvoKit corpus, and the texts in the conversations' metadata (a post's title and body)."""
    for utterance in read_utterances(folder, Tally()):
        yield utterance.text
    for entry in read_json(folder / "conversations.json").values():
        meta = entry.get("meta", entry) if isinstance(entry, dict) else {}
        yield from (value for value in meta.values() if isinstance(value, str))


def _without_corpus(examples: list[dict[str, Any]], found: set[str]) -> tuple[list[dict[str, Any]], int]:
    """The examples without contexts, replies and copying responses, and how many responses that removed."""
    kept, withheld = [], 0
    for example in examples:
        clean = [response for response in example["responses"] if not shares_run(response["text"], found)]
        withheld += len(example["responses"]) - len(clean)
        if clean:
            kept.append({**example, "turns": [], "reply": None, "responses": clean})
    return kept, withheld


def _folder(run_path: Path, stage: str) -> Path:
    found = sorted(run_path.glob(f"[0-9][0-9]-{stage}"))
    if not found or not (found[0] / "manifest.json").is_file():
        raise UserError(f"{run_path} has no finished stage {stage}. Run the recipe to its end first.")
    return found[0]
