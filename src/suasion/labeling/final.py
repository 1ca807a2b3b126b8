"""The blind final comparison of a run's models by people: what they are asked, and what `evaluate` takes from their answers.

People compare each trained model with base, each arm with sft, and each control with the arm that it is the control of: on every
sealed prompt, or on some of them that the seed draws before anybody labels, so that what they judged is a random subset. Reads
labels-evaluation.db beside the stages and, to serve the page, what `evaluate` wrote; writes nothing. People's verdicts
count once every label is there: who sees who leads labels differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suasion.errors import UserError
from suasion.evaluation.summary import ModelVerdict, controls
from suasion.grading.base import MIRROR
from suasion.grading.pairs import SampledPair
from suasion.labeling.agreement import Labelled, between_people, compare, told
from suasion.labeling.events import ADJUDICATOR, HumanLabel, fold, labels_digest, open_tasks, plan_tasks, snapshot, verdict_rows
from suasion.labeling.stage import chose_first, first_rate
from suasion.labeling.store import EVALUATION_FILE, Store
from suasion.recipe import Recipe
from suasion.records import Example, Label, Pair, Prompt, Response, content_id, read_json, read_rows
from suasion.rundir import RunDir
from suasion.sections.labeling import LabellingPage
from suasion.seeding import uniforms

SAID = "people's verdicts"  # the name under which manifests hold what people said of the models
ON = "evaluation comparisons"

Answers = Mapping[str, Mapping[str, Response]]


@dataclass(frozen=True)
class Heard:
    """What people said of the models. verdicts: one a comparison, of (reference, model). labels: the snapshot they come from.

    chose_first: (prompt, first, second) -> whether the response on the left was chosen (not for ties), for what people judged. facts: how they were
    asked, for the summary. missing: labels of the plan that are not there yet; then all else is empty.
    """

    verdicts: list[ModelVerdict] = field(default_factory=list)
    labels: list[HumanLabel] = field(default_factory=list)
    chose_first: dict[tuple[str, str, str], bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    missing: int = 0


def settings_of(recipe: Recipe) -> LabellingPage:
    """The page's settings: the recipe's own where people label on it anyway, else each comparison once."""
    source = recipe.human_labels.source
    return source if isinstance(source, LabellingPage) else LabellingPage(kind="page", overlap=0)


def compared(recipe: Recipe, models: Sequence[str]) -> list[tuple[str, str]]:
    """(reference, model) of each comparison that people are asked for. It grows with the number of models, not with its square."""
    found = [("base", model) for model in models if model != "base"]
    found += [("sft", model) for model in models if model not in ("base", "sft")]
    planned = [(control.human, control.matched) for control in controls(recipe) if control.planned]
    return found + [pair for pair in planned if set(pair) <= set(models) and pair not in found]


def drawn(prompt_ids: Sequence[str], count: int | None, seed: int) -> list[str]:
    """The prompts that people see: all, or `count` of them drawn by the seed, in the order given."""
    if count is None or count >= len(prompt_ids):
        return list(prompt_ids)
    draws = {key: float(uniforms(1, seed, "people's prompts", key)[0]) for key in prompt_ids}
    chosen = set(sorted(prompt_ids, key=lambda key: (draws[key], key))[:count])
    return [key for key in prompt_ids if key in chosen]


def final_pairs(recipe: Recipe, prompts: Sequence[Prompt], said: Answers, count: int | None) -> list[SampledPair]:
    """Everything that people compare, as pairs whose `lineage` is the model's name; equal texts are among them (see `is_asked`).

    said: model -> prompt id -> response.
    """
    known = {prompt.id: prompt for prompt in prompts}
    pairs = []
    for key in drawn(sorted(known), count, recipe.seed):
        for reference, model in compared(recipe, list(said)):
            one, other = said[reference].get(key), said[model].get(key)
            if one is None or other is None:
                continue
            pair = Pair(
                id=content_id("people", key, reference, model, one.id, other.id), prompt_id=key, pool="eval", a=one.id, b=other.id
            )
            left, right = (row.model_copy(update={"lineage": name}) for row, name in ((one, reference), (other, model)))
            pairs.append(SampledPair(pair, known[key], left, right))
    return pairs


def is_asked(pair: SampledPair) -> bool:
    """Equal texts are a tie for people as for a grader: nobody is asked."""
    return pair.a.text.strip() != pair.b.text.strip()


def evaluated(directory: RunDir) -> tuple[list[Prompt], dict[str, dict[str, Response]]]:
    """The sealed prompts and what each model said to them, from a finished evaluation. Raises UserError where there is none."""
    if directory.state("evaluate") != "complete":
        raise UserError(
            f"{directory.path} has no evaluation yet: there is nothing to compare. Finish it with: {directory.go_on()}"
        )
    prompts = [example.prompt() for example in read_rows(directory.folder("pools") / "eval.jsonl", Example)]
    return prompts, read_said(directory.folder("evaluate"))


def read_said(folder: Path) -> dict[str, dict[str, Response]]:
    """model -> prompt id -> response, as `evaluate` wrote them."""
    by_lineage: dict[str, dict[str, Response]] = {}
    for response in read_rows(folder / "responses.jsonl", Response):
        by_lineage.setdefault(response.lineage, {})[response.prompt_id] = response
    names: dict[str, str] = read_json(folder / "models.json")["models"]
    return {name: by_lineage.get(lineage, {}) for name, lineage in names.items()}


def external_hashes(run: Path) -> dict[str, str]:
    """A hash of what people said of the models, once their plan is complete; {} before.

    It needs the store alone, so that it is the same before `evaluate` has run and after.
    """
    path = run / EVALUATION_FILE
    if not path.is_file():
        return {}
    store = Store(path)
    try:
        state, tasks, annotators = fold(store.events()), store.tasks(), store.reachable()
    finally:
        store.close()
    if not tasks or open_tasks(state, tasks, annotators):
        return {}
    return {SAID: labels_digest(snapshot(state, tasks, annotators), state.adjudicated)}


def hear(run: Path, recipe: Recipe, prompts: Sequence[Prompt], said: Answers) -> Heard:
    """What people said of these very responses; empty where nobody was asked, or while labels are missing.

    The first label on a comparison binds, an adjudication before it.
    """
    path = run / EVALUATION_FILE
    if not path.is_file():
        return Heard()
    store = Store(path)
    try:
        state, annotators, count = fold(store.events()), store.reachable(), store.prompts()
    finally:
        store.close()
    pairs = {item.pair.id: item for item in final_pairs(recipe, prompts, said, count)}
    asked = [key for key, item in pairs.items() if is_asked(item)]
    tasks = plan_tasks(asked, settings_of(recipe).overlap, recipe.seed)
    missing = len(open_tasks(state, tasks, annotators))
    if missing or not tasks:
        return Heard(missing=missing)
    labels = snapshot(state, tasks, annotators)
    rows = verdict_rows(labels, state.adjudicated)
    binding = {verdict.pair_id: verdict for verdict in reversed(rows)}
    binding |= {verdict.pair_id: verdict for verdict in rows if verdict.source == ADJUDICATOR}
    verdicts, sides = [], {}
    for key, item in sorted(pairs.items()):
        verdict = binding.get(key)
        label: Label = "tie" if verdict is None else verdict.label
        reason = "identical texts" if verdict is None else " ".join(part for part in (verdict.source, verdict.reason) if part)
        place = (item.prompt.id, item.a.lineage, item.b.lineage)
        verdicts.append(
            ModelVerdict(
                prompt_id=place[0], conversation_id=item.prompt.conversation_id, first=place[1], second=place[2], label=label, p_a=None, reason=reason
            )
        )  # fmt: skip
        if verdict is not None and label != "none":
            sides[place] = chose_first(verdict)
    by_pair: dict[str, dict[str, Label]] = {}
    for one in (one for one in labels if one.label != "none"):
        by_pair.setdefault(one.pair_id, {}).setdefault(one.annotator, one.label)
    decisive = [row for row in rows if row.source != ADJUDICATOR and row.label in ("a", "b")]
    facts = {
        "random": True,
        "prompts": len({item.prompt.id for item in pairs.values()}),
        "of_prompts": len(prompts),
        "asked": len(asked),
        "identical": len(pairs) - len(asked),
        "skipped": sum(binding[key].label == "none" for key in asked),
        "labels": sum(one.label != "none" for one in labels),
        "annotators": len({one.annotator for one in labels}),
        "both_bad": sum(one.both_bad for one in labels),
        "adjudicated": len(rows) - len(labels),
        "excluded": sorted(state.excluded),
        "guidelines": sorted({one.guideline for one in labels}),
        "last_event": state.last,
        "first_rate": first_rate(sum(map(chose_first, decisive)), len(decisive)),
        "between_people": between_people(
            [(pairs[key].prompt.id, list(given.values())) for key, given in sorted(by_pair.items())], recipe.seed
        ),
    }
    return Heard(verdicts, labels, sides, facts)


def agreement_row(heard: Heard, graded: Sequence[ModelVerdict], grader: str, seed: int) -> dict[str, Any] | None:
    """How people and the evaluation grader agree on the comparisons that both judged; None where nobody judged.

    The same fields as the agreement of label sources (`agreement.told`); intervals by prompt.
    """
    by_place = {(row.prompt_id, *sorted((row.first, row.second))): row for row in graded}
    rows = []
    for verdict in heard.verdicts:
        other = by_place.get((verdict.prompt_id, *sorted((verdict.first, verdict.second))))
        first = heard.chose_first.get((verdict.prompt_id, verdict.first, verdict.second))
        if other is None or first is None or other.label == "none":
            continue
        theirs = other.label if other.first == verdict.first else MIRROR[other.label]
        rows.append(Labelled(verdict.prompt_id, verdict.label, theirs, first))
    if not heard.verdicts:
        return None
    return {"a": "people", "b": f"{grader} (evaluation grader)", "on": ON, **told(compare(rows, seed)), "people": True}
