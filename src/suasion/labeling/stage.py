"""Stage human-labels: verdicts of people (or of their simulated stand-in) on the rlhf pairs.

Reads sample's pairs.jsonl and responses.jsonl, pools' rlhf.jsonl and held_out.json, and the labels' file where the recipe names
one. Always writes verdicts.jsonl (on the run's own pairs) and imported.jsonl (preferences on another model's texts); one of the
two may be empty. Raises WaitingForPeople while labels are missing: what does not need them goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suasion.errors import UserError, WaitingForPeople
from suasion.grading.pairs import SampledPair, read_sampled_pairs
from suasion.labeling.annotator import SOURCE, annotate
from suasion.labeling.imports import import_preferences
from suasion.recipe import ImportedLabels, Recipe
from suasion.records import Preference, Verdict, content_id, read_json, read_rows, sha256_file, turns_key, write_rows
from suasion.rundir import StageContext, StageResult


def run_stage(stage: StageContext) -> StageResult:
    """See the module's docstring."""
    settings = stage.recipe.human_labels.source
    pairs = read_sampled_pairs(
        stage.input("sample", "pairs.jsonl"), stage.input("sample", "responses.jsonl"), [stage.input("pools", "rlhf.jsonl")]
    )
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


def external_hashes(recipe: Recipe) -> dict[str, str]:
    """name -> sha256 of what this stage reads from outside the run."""
    source = recipe.human_labels.source
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
