"""Stage `evaluate`: every model answers the sealed prompts, the evaluation grader compares all answers, and `summary.json` says
what follows.

One response a model and prompt, with the sampling stage's settings and the same random numbers for every model: two models with
equal weights give equal texts, up to floating-point ties. The grader is Bradley-Terry, so that both orders are one observation; identical responses are ties
without a call. Writes responses.jsonl, models.json (model -> lineage), verdicts.jsonl (ModelVerdict), summary.json; where people have
compared the models on the labelling page, also people.jsonl (their verdicts, one a comparison) and labels.jsonl (the snapshot behind
them). Their verdicts can only come after the responses: the stage then takes its earlier files and tells the summary again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from suasion.chat import Renderer, as_text
from suasion.evaluation.measuring import measure_texts
from suasion.evaluation.summary import HUMAN, ModelVerdict, summarise, with_people
from suasion.grading.base import Comparison, Judgement, source_name
from suasion.grading.build import announce, build_grader, measure
from suasion.grading.canaries import failing, require_canaries, tested
from suasion.grading.pairs import SampledPair, sampled_pairs
from suasion.grading.panel import members_facts
from suasion.grading.stage import asked_as_canaries, both_orders, canary_count, measured_line, training_of
from suasion.labeling.agreement import Labelled, compare, told
from suasion.labeling.events import ADJUDICATOR
from suasion.labeling.final import Answers, agreement_row, hear, read_said
from suasion.labeling.stage import chose_first
from suasion.models import Compute, Lineage, compute, load_tokenizer
from suasion.progress import console
from suasion.recipe import Recipe
from suasion.records import Example, OutcomePair, Prompt, Response, Verdict, read_json, read_rows, write_json, write_rows
from suasion.rundir import JOURNAL, MANIFEST, StageContext, StageResult, package_versions
from suasion.sampling.joint import respond_jointly
from suasion.sampling.respond import Journal, respond
from suasion.sections.grading import AnyGrader, LlmGrader, title
from suasion.sections.sampling import SampleSection
from suasion.training.dpo import start_lineage


@dataclass(frozen=True)
class Judged:
    """What the evaluation grader said. facts: how good it is, for the summary; agreement: with the label sources; dollars: what it cost."""

    verdicts: list[ModelVerdict]
    facts: dict[str, Any]
    agreement: list[dict[str, Any]]
    dollars: float


def run_stage(stage: StageContext) -> StageResult:
    """See the module's docstring."""
    examples = sorted(read_rows(stage.input("pools", "eval.jsonl"), Example), key=lambda example: example.prompt().id)
    if stage.earlier is not None:
        return _told_again(stage, examples, stage.earlier)
    recipe = stage.recipe
    hardware = compute(recipe.model)
    renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
    journal = Journal(stage.folder / JOURNAL)
    lineages = {name: start_lineage(stage, name) for name in trained_models(stage)}
    respond_jointly(
        {label_of(name): lineage for name, lineage in lineages.items()},
        [example.prompt() for example in examples],
        settings_of(recipe),
        renderer,
        hardware,
        recipe.seed,
        journal,
        recipe.processes.count,
    )
    said = {name: answers(stage, examples, name, lineage, renderer, hardware, journal) for name, lineage in lineages.items()}
    judged = judge(stage, examples, said)
    pairs = list(read_rows(stage.input("pools", "judge_pairs.jsonl"), OutcomePair))
    measured = measure_texts(recipe, examples, said, lineages, pairs, renderer, hardware, journal)
    summary = summarise(recipe, examples, said, judged.verdicts, summary_facts(stage, said, judged), measured)
    models = {name: lineage.hash for name, lineage in lineages.items()}
    write_rows(stage.folder / "responses.jsonl", [own[example.prompt().id] for own in said.values() for example in examples])
    write_json(stage.folder / "models.json", {"models": models})
    write_rows(stage.folder / "verdicts.jsonl", judged.verdicts)
    _conclude(stage, examples, said, judged.verdicts, summary)
    return StageResult(
        rows_in=len(examples),
        rows_out=len(judged.verdicts),
        dollars=judged.dollars,
        facts={
            "models": models,
            "template_hash": renderer.template_hash,
            "grader": judged.facts,
            "agreement": judged.agreement,
        },
    )


def _told_again(stage: StageContext, examples: list[Example], earlier: Path) -> StageResult:
    """The earlier evaluation with what people said since: no model and no grader is asked again."""
    for name in ("responses.jsonl", "models.json", "verdicts.jsonl"):
        shutil.copy2(earlier / name, stage.folder / name)
    verdicts = list(read_rows(earlier / "verdicts.jsonl", ModelVerdict))
    _conclude(stage, examples, read_said(earlier), verdicts, read_json(earlier / "summary.json"))
    manifest = read_json(earlier / MANIFEST)
    return StageResult(
        rows_in=manifest["rows_in"],
        rows_out=manifest["rows_out"],
        facts={**manifest["facts"], "told_again_from": manifest["digest"]},
    )


def _conclude(
    stage: StageContext, examples: list[Example], said: Answers, verdicts: list[ModelVerdict], summary: dict[str, Any]
) -> None:
    """Add what people said of these responses to the summary, or to one that was told before, and write both."""
    recipe = stage.recipe
    heard = hear(stage.folder.parent, recipe, [example.prompt() for example in examples], said)
    if heard.missing:
        console.print(f"  people's verdicts count once all are there: {heard.missing} are missing")
    elif heard.verdicts:
        console.print(f"  people judged {heard.facts['asked'] - heard.facts['skipped']} comparisons")
    if heard.verdicts or stage.earlier is not None:  # they may have taken back what was told before
        shared = agreement_row(heard, verdicts, source_name(recipe.evaluate.grader.kind), recipe.seed)
        summary = with_people(summary, recipe, examples, verdicts, heard.verdicts, heard.facts, shared)
    if heard.verdicts:
        write_rows(stage.folder / "people.jsonl", heard.verdicts)
        write_rows(stage.folder / "labels.jsonl", heard.labels)
    write_json(stage.folder / "summary.json", summary)


def trained_models(stage: StageContext) -> list[str]:
    """base, and every model whose adapter is among the stage's inputs, in the order of the tables."""
    trained = {item.stage for item in stage.inputs if item.file == "adapter"}
    return [name for name in stage.recipe.model_names() if name == "base" or name in trained or f"dpo-{name}" in trained]


def settings_of(recipe: Recipe) -> SampleSection:
    """How models answer: as in stage sample, but nothing is drawn again, because a model that does not stop must show it."""
    return recipe.sample.model_copy(update={"resample": 0})


def label_of(model: str) -> str:
    """What a model's answers are called in the journal and on the screen."""
    return f"responses of {model}"


def answers(
    stage: StageContext,
    examples: list[Example],
    model: str,
    lineage: Lineage,
    renderer: Renderer,
    hardware: Compute,
    journal: Journal,
) -> dict[str, Response]:
    """One response of a model to every prompt, by prompt id."""
    recipe = stage.recipe
    made = respond(
        model, lineage, [example.prompt() for example in examples], 1, settings_of(recipe), recipe.model, renderer, hardware, recipe.seed,
        journal, label_of(model), recipe.processes.count,
    )  # fmt: skip
    return {row.prompt_id: row for row in made.rows}


def judge(stage: StageContext, examples: list[Example], said: Answers) -> Judged:
    """The grader's verdict on every two texts of a prompt, the human reply among them, once it has passed its canaries."""
    recipe = stage.recipe
    spec, scope = recipe.evaluate.grader, f"{recipe.name} {stage.stage}"
    training = training_of(stage)
    grader = build_grader(spec, training, recipe.seed, scope, recipe.processes.count)
    asked, items = comparisons(examples, said)
    pairs = sampled_pairs(stage)
    announce(grader, spec, training, recipe.seed, *asked_as_canaries(spec, items), items, [pair.comparison() for pair in pairs])
    measured = measure(spec, training, recipe.seed, grader, scope)
    console.print(measured_line(spec, measured), markup=False, soft_wrap=True)
    canaries = require_canaries(grader, items, recipe.evaluate.allow_failed_canaries, canary_count(spec))
    judged = grader.grade(items)
    verdicts = [
        ModelVerdict(
            prompt_id=prompt.id, conversation_id=prompt.conversation_id, first=first, second=second, label=one.label, p_a=one.p_a, reason=one.reason
        )
        for (prompt, first, second), one in zip(asked, judged, strict=True)
    ]  # fmt: skip
    facts = {
        "name": title(spec),
        **(measured.as_facts() if measured else {}),
        **order_facts(judged, spec),
        **members_facts(grader),
        "canaries": canaries,
        "canary_pairs": len(tested(items, canary_count(spec))),
        "canaries_failed": failing(canaries),
        "same_as_labelling_grader": recipe.ai_labels.grader == spec,
    }
    return Judged(verdicts, facts, judge_agreement(stage, grader, pairs), sum(one.cost for one in judged))


def comparisons(examples: list[Example], said: Answers) -> tuple[list[tuple[Prompt, str, str]], list[Comparison]]:
    """Every two speakers on every prompt, as (prompt, first, second), and what a grader reads of them."""
    asked, items = [], []
    for example in examples:
        prompt = example.prompt()
        texts = {name: own[prompt.id].text for name, own in said.items()} | ({HUMAN: example.reply} if example.reply else {})
        context = as_text(prompt.turns)
        for first, second in combinations(texts, 2):
            asked.append((prompt, first, second))
            items.append(Comparison(context, texts[first], texts[second]))
    return asked, items


def summary_facts(stage: StageContext, said: Answers, judged: Judged) -> dict[str, Any]:
    """What earlier stages and the grader found out, as the summary keeps it."""
    recipe = stage.recipe
    labels = {"ai": "ai-labels"} | ({} if stage.waiting else {"human": "human-labels"})
    return {
        "grader": judged.facts,
        "arms": {
            arm.name: arm_facts(stage.facts[f"dpo-{arm.name}"], said[arm.name], said["sft"])
            for arm in recipe.dpo
            if arm.name in said
        },
        "labels": {source: stage.facts[name] for source, name in labels.items() if name in stage.facts},
        "preferences": read_json(stage.input("preferences", "counts.json")),
        "agreement": [*judged.agreement, *labeller_agreement(stage)],
        "counts": {name: stage.facts[name] for name in ("pools", "sft", "sample") if name in stage.facts},
        "waiting": {name: stage.waiting for name in recipe.model_names() if name not in said},
        "packages": package_versions(),
    }


def order_facts(judged: Sequence[Judgement], spec: AnyGrader) -> dict[str, Any]:
    """How the grader's two orders relate on the evaluation comparisons; {} for one that cannot tell positions apart.

    flip_rate: share of the comparisons answered in both orders on which it named another model when they were swapped; flips: what
    became of those. first_shown_rate: how often it named the response shown first, over both orders.
    """
    known = both_orders(judged)
    if known.get("flip_rate") is None:
        return {}
    return {
        "orders": known["outcomes"],
        "flip_rate": known["flip_rate"],
        "flips": spec.flips if isinstance(spec, LlmGrader) else None,
        "first_shown_rate": known["first_shown_rate"],
    }


def arm_facts(trained: dict[str, Any], own: Mapping[str, Response], sft: Mapping[str, Response]) -> dict[str, Any]:
    """What an arm's training did to the model: the report calls an arm that did not move by that name."""
    changed = [own[prompt_id].text != sft[prompt_id].text for prompt_id in own]
    return {
        "margin": trained["final_margin"],
        "kl": trained["kl_to_start"],
        "changed_share": sum(changed) / len(changed),
        "steps": trained["steps"],
        "first_loss": trained["first_loss"],
        "expected_first_loss": trained["expected_first_loss"],
        "moved": trained["moved"] and any(changed),
        "preferences": trained["off_policy"] + trained["on_policy"],
        "off_policy": trained["off_policy"],
    }


def judge_agreement(stage: StageContext, grader: Any, pairs: Sequence[SampledPair]) -> list[dict[str, Any]]:
    """How each label source agrees with the evaluation grader on the same pairs (`agreement.told`), with 95% intervals by prompt.

    agree leaves ties on either side out; balanced: agreement where people took the first and where they took the second position,
    averaged. people: the labels are real people's. The arm whose labels resemble the judge's has an advantage, and a win rate is a claim
    about people only where they agree with the judge beyond chance: the report shows these numbers beside the result.
    """
    judged = {
        pair.pair.id: one.label for pair, one in zip(pairs, grader.grade([pair.comparison() for pair in pairs]), strict=True)
    }
    prompt_of = {pair.pair.id: pair.prompt.id for pair in pairs}
    rows = []
    for item, path in sorted(stage.inputs.items(), key=lambda entry: entry[0].stage):
        if item.file != "verdicts.jsonl":
            continue
        labelled: dict[str, list[Verdict]] = {}
        for verdict in read_rows(path, Verdict):
            labelled.setdefault(verdict.source, []).append(verdict)
        if item.stage == "human-labels" and len(labelled) > 1:  # a claim about people rests on all of them
            labelled = {"people": [one for source, given in labelled.items() if source != ADJUDICATOR for one in given]}
        for source, verdicts in sorted(labelled.items()):
            labels = [
                Labelled(prompt_of[v.pair_id], v.label, judged[v.pair_id], chose_first(v))
                for v in verdicts
                if v.pair_id in judged and v.label != "none" and judged[v.pair_id] != "none"
            ]
            shared = told(compare(labels, stage.recipe.seed))
            rows.append(
                {
                    "a": source,
                    "b": source_name(grader.kind) + " (evaluation grader)",
                    "on": "this run's pairs",
                    **shared,
                    "people": item.stage == "human-labels" and stage.recipe.human_labels.source.kind != "simulated",
                }
            )
            if shared["agree"] is not None:
                console.print(
                    f"  {source} and the evaluation grader agree on {shared['agree']:.0%} of {shared['n']} common pairs"
                )
    return rows


def labeller_agreement(stage: StageContext) -> list[dict[str, Any]]:
    """How the labelling grader agrees with people on the rlhf pairs, as `preferences` found it; none where nobody labelled those.

    labelling: that it is not the evaluation grader, so that it says nothing of a win rate. page: the file to read them in.
    """
    found = stage.facts.get("preferences", {}).get("agreement")
    if not found:
        return []
    sources = found["sources"]
    return [
        {
            "a": sources["human"][0] if len(sources["human"]) == 1 else "people",
            "b": f"{' and '.join(sources['ai'])} (labelling grader)",
            "on": "this run's rlhf pairs",
            **told(found),
            "people": stage.recipe.human_labels.source.kind != "simulated",
            "labelling": True,
            "page": found.get("page"),
        }
    ]
