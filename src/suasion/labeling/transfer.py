"""Answers out of a store and into it: what `suasion label export` and `suasion label import` do.

An imported answer on texts of this run is a label like any other, whoever showed them. On other texts it is off-policy: it is kept with
its texts, counted apart everywhere, and never mixed with labels on what this run's model wrote.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suasion.errors import UserError
from suasion.labeling.desk import Desk
from suasion.labeling.events import EventKind, Given, HumanLabel, State, Task, snapshot, verdict_rows
from suasion.labeling.exchange.answers import Answer
from suasion.records import Example, Row, canonical_json, content_id, read_rows, turns_key

SWAPPED = {"a": "b", "b": "a", "tie": "tie", "none": "none"}


@dataclass(frozen=True)
class Taken:
    """What an import did: labels on this run's pairs, off-policy ones (ties among them), those that were there, those of erased people."""

    own: int
    off_policy: int
    ties: int
    known: int
    erased: int


def collect(desk: Desk) -> list[Answer]:
    """Every answer that counts, imported ones included, in order of time; excluded annotators' are left out."""
    state = desk.refresh()
    texts = desk.store.texts()
    given = [one for one in state.labels.values() if state.counts(one.label.annotator)] + [
        one for one in state.imported if state.counts(one.label.annotator)
    ]
    return [_answer(desk, one, texts) for one in sorted(given, key=lambda one: one.n)]


def _answer(desk: Desk, given: Given, texts: dict[str, dict[str, Any]]) -> Answer:
    label = given.label.model_copy(update={"at": given.at})
    item = desk.work.items.get(label.pair_id) if not label.off_policy else None
    if item is not None:
        return Answer(label=label, prompt_id=item.group, turns=item.turns, a=item.a, b=item.b)
    if label.pair_id not in texts:
        raise UserError(
            f"{desk.store.path} holds a label on pair {label.pair_id}, which this run does not have: it was made again since. Move "
            "labels.db away with the older responses, or erase those labels."
        )
    return Answer.model_validate({"label": label, **texts[label.pair_id]})


def verdicts(desk: Desk, run: Path) -> Sequence[Row]:
    """The labels as verdict rows: of the run's pairs as the human-labels stage takes them, or, of finished models, as evaluate writes them.

    Raises UserError for models while labels are missing: whoever sees who leads labels differently.
    """
    from suasion.evaluation.summary import ModelVerdict
    from suasion.status import load_run

    state, work = desk.refresh(), desk.work
    labels = snapshot(state, work.planned, desk.able())
    if not work.models:
        return verdict_rows(labels, state.adjudicated)
    if desk.missing():
        raise UserError(
            f"{desk.missing()} labels are still missing; until they are there nobody sees which model is whose. Go on with: suasion label serve "
            f"{run} --purpose evaluation"
        )
    held = read_rows(load_run(run)[0].folder("pools") / "eval.jsonl", Example)
    conversations = {example.prompt().id: example.conversation_id for example in held}
    rows = []
    for verdict in verdict_rows(labels, state.adjudicated):
        first, second = work.models[verdict.pair_id]
        prompt = work.items[verdict.pair_id].group
        rows.append(
            ModelVerdict(
                prompt_id=prompt, conversation_id=conversations[prompt], first=first, second=second, label=verdict.label, p_a=None,
                reason=f"{verdict.source}: {verdict.reason}" if verdict.reason else verdict.source,
            )
        )  # fmt: skip
    return rows


def take_in(desk: Desk, answers: Sequence[Answer]) -> Taken:
    """Store answers as events, all or none. The same file twice changes nothing, and the first answer of a person to a task binds.

    An answer that names no task of this run is its person's first to the pair: the pair's first label where there is none, else its second.
    """
    state, work = desk.refresh(), desk.work
    pairs = {(turns_key(item.turns), item.a, item.b): pair for pair, item in work.items.items()}
    tasks: dict[str, list[Task]] = defaultdict(list)
    for task in sorted(work.tasks, key=lambda task: task.kind == "second"):
        tasks[task.pair_id].append(task)
    done = {task.id for task in work.tasks if state.done(task)}
    texts = desk.store.texts()
    fresh: dict[str, dict[str, Any]] = {}
    gone = {str(event.body["annotator"]) for event in state.erasures}
    before, own, rows = state.last, [], []
    known = erased = 0
    for answer in answers:
        label = answer.label
        if label.annotator in gone:
            erased += 1
            continue
        key = turns_key(answer.turns)
        pair, swapped = pairs.get((key, answer.a, answer.b)), pairs.get((key, answer.b, answer.a))
        if pair is None and swapped is not None:
            pair, label = swapped, _swap(label)
        if pair is not None:
            named = work.by_id.get(label.task)
            if named is not None and named.pair_id == pair:
                task = named
            else:
                who = label.annotator
                theirs = [one for one in tasks[pair] if (who, one.id) in state.labels or (who, one.id) in own]
                wanting = [one for one in tasks[pair] if one.id not in done]
                task = [*theirs, *wanting, *tasks[pair]][0]
            label = label.model_copy(update={"task": task.id, "kind": task.kind, "pair_id": pair, "off_policy": False})
            if _answered(state, label) or (label.annotator, task.id) in own:
                known += 1
                continue
            own.append((label.annotator, task.id))
            if label.label != "none":
                done.add(task.id)
        else:
            body = answer.model_dump(mode="json", exclude={"label"})
            mine = label.pair_id
            if mine in work.items or {**texts, **fresh}.get(mine, body) != body:
                mine = content_id("imported pair", key, answer.a, answer.b)
            fresh[mine] = body
            label = label.model_copy(update={"pair_id": mine, "off_policy": True})
        rows.append(label)
    for who in {label.annotator for label in rows}:
        desk.store.ensure_annotator(who)
    kind: EventKind = "import"
    events = [(kind, one.annotator, one.model_dump(mode="json"), _request(one)) for one in rows]
    new = {number: label for number, label in zip(desk.store.append_all(events, fresh), rows, strict=True) if number > before}
    foreign = [label for label in new.values() if label.off_policy]
    ties = sum(label.label == "tie" for label in foreign)
    return Taken(len(new) - len(foreign), len(foreign), ties, known + len(rows) - len(new), erased)


def _answered(state: State, label: HumanLabel) -> bool:
    return (label.annotator, label.task) in state.labels


def _request(label: HumanLabel) -> str:
    """Equal answers have equal keys, so that a file that is read twice is stored once."""
    return "import:" + content_id("answer", canonical_json(label.model_dump(mode="json")))


def _swap(label: HumanLabel) -> HumanLabel:
    """The same answer where the pair's own order is the other one."""
    return label.model_copy(update={"label": SWAPPED[label.label], "order": "ba" if label.order == "ab" else "ab"})
