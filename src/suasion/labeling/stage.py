"""Stage human-labels: verdicts of people (or of their simulated stand-in) on the rlhf pairs.

Reads sample's pairs.jsonl and responses.jsonl, pools' rlhf.jsonl and held_out.json, and the labels' file where the recipe names
one or, where people label on the run's own page, its labels.db (and then writes labels.jsonl, a snapshot). Always writes verdicts.jsonl (on the run's own pairs) and imported.jsonl (preferences on another model's texts); one of the
two may be empty. Raises WaitingForPeople while labels are missing: what does not need them goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suasion.errors import UserError, WaitingForPeople
from suasion.grading.pairs import SampledPair, read_sampled_pairs
from suasion.labeling.annotator import SOURCE, annotate
from suasion.labeling.events import ADJUDICATOR, State, Task, fold, labels_digest, open_tasks, plan_tasks, snapshot, verdict_rows
from suasion.labeling.imports import import_preferences
from suasion.labeling.store import FILE, Store
from suasion.recipe import Recipe
from suasion.records import (
    Pair,
    Preference,
    Prompt,
    Verdict,
    content_id,
    read_json,
    read_rows,
    sha256_file,
    turns_key,
    write_rows,
)
from suasion.rundir import StageContext, StageResult
from suasion.sections.labeling import ImportedLabels, LabellingPage


def run_stage(stage: StageContext) -> StageResult:
    """See the module's docstring."""
    settings = stage.recipe.human_labels.source
    pairs = read_sampled_pairs(
        stage.input("sample", "pairs.jsonl"), stage.input("sample", "responses.jsonl"), [stage.input("pools", "rlhf.jsonl")]
    )
    if isinstance(settings, LabellingPage):
        return _snapshot(stage, pairs, settings)
    if settings.kind == "simulated":
        verdicts = annotate(pairs, settings, stage.recipe.seed)
        facts = {"source": SOURCE, "simulated": True, "layout": "verdicts", **_facts(verdicts)}
        return _write(stage, StageResult(rows_in=len(pairs), facts=facts), verdicts, [])
    path = Path(settings.path)
    if not path.is_file():
        raise WaitingForPeople(
            f"human labels are missing: there is no file at {path}, and {len(pairs)} rlhf pairs want one. Put the labels there (or set "
            "human_labels.source.path) and run again; arms that need no human labels go on without them."
        )
    if settings.layout == "verdicts":
        verdicts, unknown = _read_verdicts(settings, pairs)
        facts = {"source": settings.source, "simulated": False, "layout": "verdicts", **_facts(verdicts)}
        dropped = {"verdict on a pair outside the rlhf pool": unknown} if unknown else {}
        return _write(stage, StageResult(len(pairs), 0, dropped, facts), verdicts, [])
    imported = import_preferences(path, settings.source, _held_out(stage.input("pools", "held_out.json")))
    if not imported.preferences:
        raise UserError(
            f"{path} holds no usable preference: {imported.labelled} rows, left out: {imported.dropped}. Check the file."
        )
    fitting = fit_contexts(imported.preferences, stage.recipe)
    facts = {
        "source": settings.source,
        "simulated": False,
        "layout": "preferences",
        "note": "imported labels on another model's texts: off-policy, and not on this run's pairs",
        "n": imported.labelled,
        "ties": imported.ties,
        "none": 0,
        "tie_share": round(imported.ties / imported.labelled, 4),
        "first_rate": first_rate(imported.first, imported.decisive),
        "unfinished_share": round(imported.unfinished / (2 * len(imported.preferences)), 4),
    }
    dropped = dict(imported.dropped)
    if len(fitting) < len(imported.preferences):
        dropped["context does not fit"] = len(imported.preferences) - len(fitting)
    return _write(stage, StageResult(imported.labelled, 0, dropped, facts), [], fitting)


def _snapshot(stage: StageContext, pairs: Sequence[SampledPair], settings: LabellingPage) -> StageResult:
    """What people said on the page so far, once nothing is missing."""
    run = stage.folder.parent
    tasks = plan_tasks([item.pair.id for item in pairs], settings.overlap, stage.recipe.seed)
    state, annotators = _events(run / FILE) if (run / FILE).is_file() else (fold([]), frozenset[str]())
    missing = len(open_tasks(state, tasks, annotators))
    if missing:
        raise WaitingForPeople(
            f"{missing} of {len(tasks)} human labels are missing. Open the labelling page with: suasion label serve {run} and run again when "
            "they are there; arms that need no human labels go on without them."
        )
    labels = snapshot(state, tasks, annotators)
    verdicts = verdict_rows(labels, state.adjudicated)
    write_rows(stage.folder / "labels.jsonl", labels)
    said = [verdict for verdict in verdicts if verdict.source != ADJUDICATOR]
    facts = {
        "source": "human",
        "simulated": False,
        "layout": "verdicts",
        "last_event": state.last,
        "annotators": len({label.annotator for label in labels}),
        "both_bad": sum(label.both_bad for label in labels),
        "adjudicated": len(verdicts) - len(said),
        "excluded": sorted(state.excluded),
        "imported_off_policy": len(state.imported),
        "erased": [{"event": event.n, "events": event.body["events"]} for event in state.erasures],
        **_facts(said),
    }
    return _write(stage, StageResult(rows_in=len(pairs), facts=facts), verdicts, [])


def _events(path: Path) -> tuple[State, frozenset[str]]:
    """The state of a store, and the annotators who may still label."""
    store = Store(path)
    try:
        return fold(store.events()), store.reachable()
    finally:
        store.close()


def _planned(run: Path, settings: LabellingPage, seed: int) -> list[Task]:
    """The plan over the pairs of a run on disk; empty before they are sampled."""
    sample, pools = run / "04-sample", run / "02-pools"
    if not (sample / "pairs.jsonl").is_file():
        return []
    known = {prompt.id for prompt in read_rows(pools / "rlhf.jsonl", Prompt)}
    return plan_tasks(
        [pair.id for pair in read_rows(sample / "pairs.jsonl", Pair) if pair.prompt_id in known], settings.overlap, seed
    )


def fit_contexts(preferences: Sequence[Preference], recipe: Recipe) -> list[Preference]:
    """Imported contexts cut to the run's budget as the corpus stage cuts its own; those that cannot be cut so far are left out."""
    from suasion.corpora.stage import context_budget, fit_context
    from suasion.models import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    budget = context_budget(recipe, count_tokens)
    fitting = []
    for preference in preferences:
        turns = fit_context(preference.prompt.turns, budget, True, count_tokens)
        if turns is not None:
            key = content_id("prompt", preference.prompt.corpus, preference.prompt.conversation_id, turns_key(turns))
            prompt = preference.prompt.model_copy(update={"id": key, "turns": turns})
            sides = {side: getattr(preference, side).model_copy(update={"prompt_id": key}) for side in ("chosen", "rejected")}
            identity = content_id("preference", key, preference.chosen.id, preference.rejected.id)
            fitting.append(preference.model_copy(update={"id": identity, "prompt": prompt, **sides}))
    return fitting


def external_hashes(recipe: Recipe, run: Path) -> dict[str, str]:
    """name -> hash of what this stage reads from outside the stages: the labels' file, or what labels.db says once it is complete.

    While labels are missing there is nothing to hash: the stage waits. Afterwards each further label changes the hash, so that the
    stage is stale and says so.
    """
    source = recipe.human_labels.source
    if isinstance(source, LabellingPage):
        if not (run / FILE).is_file():
            return {}
        state, annotators = _events(run / FILE)
        tasks = _planned(run, source, recipe.seed)
        if open_tasks(state, tasks, annotators):
            return {}
        return {"human-labels": labels_digest(snapshot(state, tasks, annotators), state.adjudicated)}
    if source.kind == "simulated" or not Path(source.path).is_file():
        return {}
    return {"human-labels": sha256_file(Path(source.path))}


def first_rate(first: int, decisive: int) -> dict[str, Any] | None:
    """How often the position shown first was chosen, with the exact (Clopper-Pearson) 95% interval and the p-value against one half."""
    from scipy.stats import binomtest

    if decisive == 0:
        return None
    test = binomtest(first, decisive)
    interval = test.proportion_ci(0.95, method="exact")
    return {
        "value": round(first / decisive, 4),
        "low": round(float(interval.low), 4),
        "high": round(float(interval.high), 4),
        "p_value": round(float(test.pvalue), 4),
        "n": decisive,
    }


def chose_first(verdict: Verdict) -> bool:
    """Whether a decisive verdict took the response that was shown first; one given for both orders counts the pair's own order."""
    return verdict.label == ("b" if verdict.order == "ba" else "a")


def _facts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    decisive = [verdict for verdict in verdicts if verdict.label in ("a", "b")]
    ties = sum(verdict.label == "tie" for verdict in verdicts)
    return {
        "n": len(verdicts),
        "ties": ties,
        "none": len(verdicts) - len(decisive) - ties,
        "tie_share": round(ties / len(verdicts), 4) if verdicts else None,
        "first_rate": first_rate(sum(map(chose_first, decisive)), len(decisive)),
    }


def _read_verdicts(settings: ImportedLabels, pairs: Sequence[SampledPair]) -> tuple[list[Verdict], int]:
    """Verdicts on the run's rlhf pairs, in the file's order, and how many were on other pairs."""
    path = Path(settings.path)
    known = {item.pair.id for item in pairs}
    given = list(read_rows(path, Verdict))
    verdicts = [verdict for verdict in given if verdict.pair_id in known]
    if given and not verdicts:
        raise UserError(
            f"none of the {len(given)} verdicts in {path} is on a pair of this run's rlhf pool: they belong to another run."
        )
    missing = len(known - {verdict.pair_id for verdict in verdicts})
    if missing:
        raise WaitingForPeople(
            f"human labels are missing on {missing} of {len(known)} rlhf pairs in {path}. Add them (label 'none' for a pair that "
            "nobody could judge) and run again; arms that need no human labels go on without them."
        )
    return verdicts, len(given) - len(verdicts)


def _held_out(path: Path) -> frozenset[str]:
    hashes = read_json(path).get("conversation_hashes")
    if not isinstance(hashes, list):
        raise UserError(f"{path} does not list conversation_hashes. Run again with --redo pools.")
    return frozenset(hashes)


def _write(stage: StageContext, result: StageResult, verdicts: list[Verdict], imported: list[Preference]) -> StageResult:
    result.rows_out = write_rows(stage.folder / "verdicts.jsonl", verdicts) + write_rows(
        stage.folder / "imported.jsonl", imported
    )
    return result
