"""The content of a report, independent of its form: tables, method paragraphs, examples and how to reproduce them.

`build_page` reads the JSON of the stages and returns one dictionary that both templates render, so that the HTML page, the
Markdown paper and the CSV files cannot disagree.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2
import yaml

from suasion.evaluation import wording
from suasion.evaluation.summary import HUMAN, ModelVerdict, controls, primary_pairs
from suasion.recipe import Recipe
from suasion.records import Example, Response
from suasion.reporting import results
from suasion.reporting.examples import SETS, shown_examples
from suasion.reporting.figures import equal_length
from suasion.reporting.findings import (
    honesty_tables,
    hours_table,
    likelihood_table,
    people_table,
    strategies_table,
    text_tables,
)
from suasion.reporting.making import RECORDED, judge_sentence, making, number, recorded
from suasion.reporting.results import Curves
from suasion.reporting.table import Table, portable
from suasion.sections.training import DpoArm

REFERENCES = (
    "Angelopoulos et al. (2023). PPI++: efficient prediction-powered inference. arXiv:2311.01453.",
    "Bradley & Terry (1952). Rank analysis of incomplete block designs. Biometrika 39.",
    "Clopper & Pearson (1934). The use of confidence or fiducial limits. Biometrika 26.",
    "Coleman & Liau (1975). A computer readability formula designed for machine scoring. J. Applied Psychology 60.",
    "Covington & McFall (2010). Cutting the Gordian knot: the moving-average type-token ratio. J. Quantitative Linguistics 17.",
    "Dubois et al. (2024). Length-controlled AlpacaEval. arXiv:2404.04475.",
    "Hackenburg et al. (2025). The levers of political persuasion with conversational AI. arXiv:2507.13919.",
    "Hesterberg (2015). What teachers should know about the bootstrap. The American Statistician 69.",
    "Holm (1979). A simple sequentially rejective multiple test procedure. Scand. J. Statistics 6.",
    "Lee et al. (2023). RLAIF: scaling RL from human feedback with AI feedback. arXiv:2309.00267.",
    "Rafailov et al. (2023). Direct preference optimization. arXiv:2305.18290.",
    "Schuirmann (1987). A comparison of the two one-sided tests procedure. J. Pharmacokinet. Biopharm. 15.",
    "Tan et al. (2016). Winning arguments. arXiv:1602.01103.",
    "Wang et al. (2019). Persuasion for good: towards a personalized persuasive dialogue system for social good. ACL.",
)


def build_page(
    summary: dict[str, Any],
    recipe: Recipe,
    examples: list[Example],
    responses: list[Response],
    verdicts: list[ModelVerdict],
    lineages: dict[str, str],
    corpus_counts: Any,
    timings: dict[str, list[dict[str, Any]]] | None = None,
    curves: Curves | None = None,
) -> dict[str, Any]:
    """Everything that the templates need but figures. lineages: model -> lineage hash, as in evaluate's models.json.

    timings: as in the run's timings.json, for the hours of each stage. curves: model -> rows of its training's metrics.jsonl.
    """
    facts = summary["facts"]
    simulated = recipe.human_labels.source.kind == "simulated"
    lineages = {name: lineages[name] for name in recipe.model_names() if name in lineages}
    waiting = [{"model": name, "reason": reason} for name, reason in sorted((facts.get("waiting") or {}).items())]
    absent = [name for name in recipe.model_names() if name not in lineages and name not in (facts.get("waiting") or {})]
    waiting += [{"model": name, "reason": "not trained in this run"} for name in absent]
    tables = _tables(summary, recipe, corpus_counts, lineages, simulated, timings or {}, curves or {})
    return {
        "title": recipe.report.title,
        "run": recipe.name,
        "seed": recipe.seed,
        "summary": summary,
        "simulated": simulated,
        "small": wording.proves_nothing(summary),
        "headline": summary["headline"],
        "caveats": summary["caveats"],
        "waiting": waiting,
        "tables": tables,
        "recorded": [name for name in RECORDED if tables[name].rows],
        "question": _question(recipe, simulated),
        "yardstick": wording.yardstick(recipe),
        "diamonds": bool(equal_length(summary)),
        "method": _method(summary, recipe, simulated),
        "judge": judge_sentence(facts),
        "examples": shown_examples(summary, recipe, examples, responses, verdicts, lineages),
        "sets": SETS,
        "order": {model["name"]: index for index, model in enumerate(summary["models"])},
        "withheld": 0,
        "recipe_yaml": yaml.safe_dump(portable(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=100),
        "references": REFERENCES,
    }


def render(template: str, page: dict[str, Any], **extra: Any) -> str:
    """A template of this package, filled in. HTML is escaped; Markdown is not, its texts are quoted in the template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("suasion.reporting"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pipe"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    environment.filters["quote"] = lambda text: "\n".join(f"> {line}".rstrip() for line in str(text).splitlines())
    environment.filters["percent"] = wording.percent
    environment.filters["unbroken"] = _unbroken
    return environment.get_template(template).render(**page, **extra)


def _unbroken(text: str) -> str:
    """Keep 'p = .03' and '69–83%' on one line."""
    return re.sub(r"(\d)–(\d)", "\\1\u2060–\u2060\\2", re.sub(r"\bp ([<=]) ", "p\u00a0\\1\u00a0", text))


def _tables(
    summary: dict[str, Any],
    recipe: Recipe,
    corpus_counts: Any,
    lineages: dict[str, str],
    simulated: bool,
    timings: dict[str, list[dict[str, Any]]],
    curves: Curves,
) -> dict[str, Table]:
    labels = {model["name"]: model["label"] for model in summary["models"]} | {HUMAN: "human reply"}
    facts = summary["facts"]
    tables = (
        results.models_table(summary),
        results.comparisons_table(summary, labels),
        results.people_comparisons_table(summary, labels),
        results.arms_table(summary, recipe, lineages, labels),
        results.curves_table(curves, labels),
        results.power_table(summary),
        results.agreement_table(facts, simulated),
        *text_tables(summary),
        *honesty_tables(summary),
        likelihood_table(summary),
        strategies_table(summary),
        people_table(summary),
        hours_table(timings, recipe.report.price_per_hour, _stages(recipe)),
        *making(corpus_counts, facts, recipe, {name: labels.get(name, name) for name in lineages}),
        *recorded(corpus_counts, facts, simulated, labels),
        results.matrix_table(summary, labels),
        results.lineage_table(lineages, labels),
        results.packages_table(facts),
    )
    return {table.name: table for table in tables}


def _stages(recipe: Recipe) -> list[str]:
    """The stages that take time, in their order; a report cannot tell its own."""
    arms = [f"dpo-{arm.name}" for arm in recipe.dpo]
    return ["corpus", "pools", "sft", "sample", "ai-labels", "human-labels", "preferences", *arms, "evaluate"]


def _question(recipe: Recipe, simulated: bool) -> str:
    """What this run compares, as a sentence."""
    feedback = ["examples alone (sft)"]
    for arm in recipe.dpo:
        source = "AI" if arm.labels == "ai" else "simulated human" if simulated else "human"
        where = "" if arm.start == "sft" else f" after {arm.start}"
        if arm.matched and not wording.imported_texts(recipe):
            where += " on the pairs with human labels"
        feedback.append(f"{source} preferences{where} ({arm.name})")
    return f"This run compares {wording.listed(feedback)} with the untrained model, on the same sealed prompts and beside {wording.yardstick(recipe)}."


def _method(summary: dict[str, Any], recipe: Recipe, simulated: bool) -> list[str]:
    """How it was done, in paragraphs."""
    grader, sample = recipe.ai_labels.grader, recipe.sample
    names = [
        source.kind.upper() + (" (this project's miniature, invented)" if source.path == "bundled" else "")
        for source in recipe.corpus.sources
    ]
    corpora = ", ".join(dict.fromkeys(names))
    arms = "; ".join(f"{arm.name} from {arm.start} on {_labels_of(arm, recipe, simulated)}" for arm in recipe.dpo)
    planned = [f"{first} against {second}" for first, second in primary_pairs(recipe) if second != "base"]
    return [
        f"Data: {corpora}. Conversations are split into disjoint pools; the evaluation pool is sealed: only the comparison and this report read it.",
        f"Models: the base model is {portable(recipe.model.base)}. sft learns human replies{_persuaded(summary['facts'])}. For every prompt of "
        f"the rlaif and rlhf pools sft writes two responses; AI labels come from a grader of kind “{grader.kind}”"
        f"{_people(recipe, simulated)} Each arm is a DPO training: {arms}.",
        f"Comparison: each model writes one response a prompt (temperature {sample.temperature:g}, top-p {sample.top_p:g}, at most "
        f"{sample.max_new_tokens} tokens, equal random numbers for all). A grader of kind “{recipe.evaluate.grader.kind}” with other training rows judges "
        f"every pair of models and each model against {wording.yardstick(recipe)}, in both orders, which count as one observation. "
        "Identical responses are ties."
        f"{_by_people(summary['facts'].get('people') or {})}",
        f"Statistics: exact sign test by conversation; Holm over {summary['power']['comparisons']} primary comparisons (each trained model "
        f"against base{', and ' + wording.listed(planned) if planned else ''}); equivalence by two one-sided tests. Intervals are Clopper–Pearson with ties as half "
        "wins under 30 conversations and near 0 and 1, which ties make wider than needed; otherwise the expanded percentile bootstrap over "
        "conversations. Length-controlled rates come from a logistic regression read at equal length.",
    ]


def _by_people(asked: dict[str, Any]) -> str:
    """How people compared the models, where they did."""
    if not asked:
        return ""
    drawn = f"{asked['prompts']} of the {asked['of_prompts']} prompts, drawn at random before anybody labelled"
    which = "all prompts" if asked["prompts"] == asked["of_prompts"] else drawn
    who = f"{asked['annotators']} annotator{'s' * (asked['annotators'] != 1)}"
    return (
        f" People compared each trained model with base, each arm with sft and each control with its arm, blind, on {which}: {who}, "
        f"{asked['labels']} labels on {asked['asked']} comparisons, the first label on each binds; {asked['skipped']} were skipped by all."
    )


def _persuaded(facts: dict[str, Any]) -> str:
    """How many of the replies that sft learns persuaded: the pool takes those first, and others where it needs more."""
    share = number(facts, "counts", "sft", "persuaded_share")
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        return ""
    if share in (0, 1):
        return f", {'all' if share else 'none'} of which persuaded"
    return f", {min(99, max(1, round(100 * share)))}% of which persuaded"


def _people(recipe: Recipe, simulated: bool) -> str:
    """The rest of the sentence on labels: what people labelled."""
    if not wording.imported_texts(recipe):
        return f", and {'labels of a simulated annotator, no person,' if simulated else 'human labels'} cover the rlhf pool."
    text = (
        ". Human labels were imported and are off-policy: people judged texts that another model wrote, none of this run's pairs."
    )
    matched = [control.matched for control in controls(recipe)]
    if not matched:
        return text
    return (
        f"{text} The AI-labelled control ({wording.listed(matched)}) uses this run's own pairs, so comparing it with a human arm "
        "compares recipes, not the source of feedback."
    )


def _labels_of(arm: DpoArm, recipe: Recipe, simulated: bool) -> str:
    """Whose labels an arm learns from, and on which pairs."""
    imported = wording.imported_texts(recipe)
    if arm.labels == "human" and imported:
        return "imported human labels"
    source = "simulated human" if arm.labels == "human" and simulated else arm.labels
    decided = " (the pairs that also have a decisive human label)" if arm.matched and not imported else ""
    return f"{source} labels of the {arm.pool} pool{decided}"
