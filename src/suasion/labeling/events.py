"""What happened while people labelled, and what follows from it: pure functions from events to labels, tasks and progress.

An event is written once and never changed; undoing a label is another event. `State.apply` folds events in their order, so that the
same events always give the same labels, whoever reads them and however often. Nothing here touches a file, a clock or a generator:
the store (`labeling/store.py`) keeps events, the desk (`labeling/desk.py`) hands out tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from suasion.records import Label, Row, Verdict, canonical_json, content_id
from suasion.seeding import uniforms

Order = Literal["ab", "ba"]
TaskKind = Literal["first", "second", "gold", "attention"]
EventKind = Literal["consent", "label", "skip", "undo", "exclude", "include", "adjudicate", "erase", "import"]
ADJUDICATOR = "adjudicator"  # source of the verdicts that settle a conflict
CHECK_EVERY = 15  # labels between two gold or attention tasks


class HumanLabel(Row):
    """One answer of one person, in the pair's own (a, b) order; `order` says which response stood on the left.

    label "none" is a skip, with its reason. both_bad: a tie between two responses that would persuade nobody. clarity: 1 hard to say,
    2 fairly clear, 3 very clear. seconds: active time, without pauses. off_policy: on texts that this run's model did not write. at: when
    it was given, for labels that come from a file; others have the time of their event.
    """

    format: Literal["human-label/1"] = "human-label/1"
    task: str
    kind: TaskKind
    pair_id: str
    annotator: str
    order: Order
    label: Label
    both_bad: bool = False
    clarity: int | None = None
    seconds: float | None = None
    reason: str = ""
    guideline: str = ""
    origin: str = "page"
    off_policy: bool = False
    at: str = ""


@dataclass(frozen=True)
class Event:
    """One line of the store. n counts up and is never used twice, not even after an erasure; at: UTC, ISO 8601."""

    n: int
    at: str
    kind: EventKind
    annotator: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One question. Every pair has a `first` task, some have a `second`; gold and attention tasks have a known answer."""

    id: str
    kind: TaskKind
    pair_id: str
    expected: Label | None = None

    @property
    def is_check(self) -> bool:
        """Whether the answer is known, so that it measures the annotator and not the pair."""
        return self.kind in ("gold", "attention")


@dataclass(frozen=True)
class Given:
    """A label that counts, with the event that gave it."""

    n: int
    at: str
    label: HumanLabel


def plan_tasks(pair_ids: Sequence[str], overlap: float, seed: int) -> list[Task]:
    """Every pair once, and round(overlap * n) of them, drawn by seed, a second time. 200 pairs and .5 make 300 tasks."""
    draws = {pair: float(uniforms(1, seed, "label overlap", pair)[0]) for pair in pair_ids}
    again = sorted(pair_ids, key=lambda pair: (draws[pair], pair))[: round(overlap * len(pair_ids))]
    return [Task(content_id("task", pair, "first"), "first", pair) for pair in pair_ids] + [
        Task(content_id("task", pair, "second"), "second", pair) for pair in again
    ]


def task_order(tasks: Iterable[Task], annotator: str, seed: int) -> list[Task]:
    """The order in which this annotator meets the tasks: first tasks before second ones, each drawn from (seed, annotator, task).

    Second tasks come late so that nobody meets a pair again soon.
    """
    return sorted(
        tasks, key=lambda task: (task.kind == "second", float(uniforms(1, seed, "label task", annotator, task.id)[0]), task.id)
    )


def side_order(annotator: str, task: Task, seed: int, before: Order | None = None) -> Order:
    """Which response stands on the left for this annotator. before: how they saw the pair earlier; then sides are swapped."""
    if before is not None:
        return "ba" if before == "ab" else "ab"
    return "ab" if uniforms(1, seed, "label side", annotator, task.id)[0] < 0.5 else "ba"


@dataclass
class State:
    """Everything that follows from the events so far. `apply` takes them in order of n."""

    last: int = 0
    labels: dict[tuple[str, str], Given] = field(default_factory=dict)  # (annotator, task) -> answer that counts
    history: dict[str, list[Given]] = field(default_factory=lambda: defaultdict(list))  # annotator -> answers not undone
    by_task: dict[str, dict[str, Given]] = field(default_factory=lambda: defaultdict(dict))  # task -> annotator -> answer
    by_pair: dict[str, list[Given]] = field(default_factory=lambda: defaultdict(list))  # pair -> decisions, no skips or checks
    imported: list[Given] = field(default_factory=list)  # off-policy labels on other texts
    consents: dict[str, str] = field(default_factory=dict)  # annotator -> version of the text agreed to
    excluded: dict[str, str] = field(default_factory=dict)  # annotator -> reason
    adjudicated: dict[str, tuple[Label, str]] = field(default_factory=dict)  # pair -> (label, note)
    erasures: list[Event] = field(default_factory=list)
    undone: int = 0

    def apply(self, event: Event) -> None:
        """Take one more event. An event that means nothing now (a second answer to one task) changes nothing but `last`."""
        self.last = event.n
        who, body = event.annotator, event.body
        if event.kind in ("label", "skip"):
            self._answer(Given(event.n, event.at, HumanLabel.model_validate(body)))
        elif event.kind == "import":
            imported = HumanLabel.model_validate(body)
            given = Given(event.n, imported.at or event.at, imported)
            if given.label.off_policy:
                self.imported.append(given)
            else:
                self._answer(given)
        elif event.kind == "undo":
            self._undo(who, int(body["event"]))
        elif event.kind == "consent":
            self.consents[who] = str(body["version"])
        elif event.kind == "exclude":
            self.excluded[str(body["annotator"])] = str(body["reason"])
        elif event.kind == "include":
            self.excluded.pop(str(body["annotator"]), None)
        elif event.kind == "adjudicate":
            self.adjudicated[str(body["pair_id"])] = (body["label"], str(body.get("note", "")))
        elif event.kind == "erase":
            self.erasures.append(event)

    def _answer(self, given: Given) -> None:
        label = given.label
        key = (label.annotator, label.task)
        if key in self.labels:
            return  # the first answer binds until it is undone
        self.labels[key] = given
        self.history[label.annotator].append(given)
        self.by_task[label.task][label.annotator] = given
        if label.label != "none" and label.kind in ("first", "second"):
            self.by_pair[label.pair_id].append(given)

    def _undo(self, annotator: str, n: int) -> None:
        for given in reversed(self.history[annotator]):
            if given.n == n:
                self.history[annotator].remove(given)
                del self.labels[annotator, given.label.task]
                del self.by_task[given.label.task][annotator]
                if given in self.by_pair.get(given.label.pair_id, []):
                    self.by_pair[given.label.pair_id].remove(given)
                self.undone += 1
                return

    def of(self, annotator: str) -> list[Given]:
        """This annotator's answers that are not undone, in order of time."""
        return self.history.get(annotator, [])

    def counts(self, annotator: str) -> bool:
        """Whether this annotator's labels count."""
        return annotator not in self.excluded

    def done(self, task: Task) -> bool:
        """Whether somebody whose labels count has decided this task."""
        return any(given.label.label != "none" and self.counts(who) for who, given in self.by_task.get(task.id, {}).items())

    def decisions(self, without: Collection[str] = ()) -> dict[str, list[Given]]:
        """Pair -> its decisions that count, in order of time. without: annotators to leave out besides the excluded ones."""
        kept = {
            pair: sorted(
                (g for g in given if self.counts(g.label.annotator) and g.label.annotator not in without), key=lambda g: g.n
            )
            for pair, given in self.by_pair.items()
        }
        return {pair: given for pair, given in kept.items() if given}

    def skipped_by_all(self, task: Task, annotators: Collection[str]) -> bool:
        """Whether every annotator who may label has skipped the task: then nobody can judge it, and that is its answer."""
        given = self.by_task.get(task.id, {})
        able = [who for who in annotators if self.counts(who)]
        return bool(able) and all(who in given and given[who].label.label == "none" for who in able)


def fold(events: Iterable[Event]) -> State:
    """The state after these events."""
    state = State()
    for event in events:
        state.apply(event)
    return state


def open_tasks(state: State, tasks: Iterable[Task], annotators: Collection[str]) -> list[Task]:
    """Tasks of the plan that still want a label and may still get one; checks are none of them.

    Nobody meets a pair twice, so that a task is closed once everybody who may label has answered or skipped its pair: the second label of
    a pair that one of two people skipped can come from nobody. Somebody alone gets second tasks too.
    """
    able = [who for who in annotators if state.counts(who)]
    met = [{given.label.pair_id for given in state.of(who)} for who in able]

    def closed(task: Task) -> bool:
        if state.done(task) or state.skipped_by_all(task, annotators):
            return True
        return bool(able) and not (task.kind == "second" and len(able) == 1) and all(task.pair_id in pairs for pairs in met)

    return [task for task in tasks if not task.is_check and not closed(task)]


def snapshot(state: State, tasks: Iterable[Task], annotators: Collection[str]) -> list[HumanLabel]:
    """The labels that count on the planned pairs, by pair and time, and one "none" for each pair that everybody skipped."""
    tasks = list(tasks)
    planned, decided = {task.pair_id for task in tasks if task.kind == "first"}, state.decisions()
    wanting = {task.pair_id for task in open_tasks(state, tasks, annotators)}
    rows = [given.label for pair, found in sorted(decided.items()) if pair in planned for given in found]
    skips: dict[str, Given] = {}
    for task in tasks:
        for who, given in state.by_task.get(task.id, {}).items():
            if state.counts(who) and given.label.label == "none" and given.n <= skips.get(task.pair_id, given).n:
                skips[task.pair_id] = given
    silent = [task for task in tasks if task.kind == "first" and task.pair_id in skips]
    silent = [task for task in silent if task.pair_id not in decided and task.pair_id not in wanting]
    return rows + [skips[task.pair_id].label for task in sorted(silent, key=lambda task: task.id)]


def verdict_rows(labels: Iterable[HumanLabel], adjudicated: dict[str, tuple[Label, str]]) -> list[Verdict]:
    """Labels as verdicts, the first on each pair first: it binds where a recipe says so. An adjudication stands last on its pair."""
    verdicts: dict[str, list[Verdict]] = defaultdict(list)
    for label in labels:
        verdicts[label.pair_id].append(
            Verdict(
                pair_id=label.pair_id,
                source=label.annotator,
                order=label.order,
                label=label.label,
                p_a=None,
                reason="both bad" if label.both_bad else label.reason,
                template_hash=label.guideline,
            )
        )
    for pair, (settled, note) in sorted(adjudicated.items()):
        if pair in verdicts:
            verdicts[pair].append(Verdict(pair_id=pair, source=ADJUDICATOR, order="both", label=settled, p_a=None, reason=note))
    return [verdict for pair in sorted(verdicts) for verdict in verdicts[pair]]


def conflicts(state: State) -> dict[str, list[Given]]:
    """Pair -> its decisions, where they differ and nobody has adjudicated yet."""
    return {
        pair: given
        for pair, given in sorted(state.decisions().items())
        if len({one.label.label for one in given}) > 1 and pair not in state.adjudicated
    }


def labels_digest(labels: Iterable[HumanLabel], adjudicated: dict[str, tuple[Label, str]]) -> str:
    """A hash of what the human-labels stage would take: later consents or undone labels do not change it, a new label does."""
    text = canonical_json([[label.model_dump(mode="json") for label in labels], sorted(adjudicated.items())])
    return content_id("labels", text)
