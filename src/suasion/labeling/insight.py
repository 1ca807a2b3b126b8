"""What a researcher watches while people label: pure functions from a state to numbers with intervals.

A side bias, a fast hand or a failed check says something about the annotator; agreement says something about the question. Excluding
somebody is shown before it is done: every statistic with and without them.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from suasion.labeling.agreement import between_people
from suasion.labeling.events import Given, State
from suasion.labeling.stage import first_rate
from suasion.labeling.work import Work
from suasion.records import Label

# Adults read English silently at about 240 words a minute and at most at about 400 (Brysbaert 2019, doi 10.1016/j.jml.2019.104047);
# somebody who gets through both responses at twice that did not read them.
TOO_FAST = 800 / 60  # words a second
FAST_SHARE = 0.2  # share of such labels from which an annotator is pointed out
FEWEST = 10  # labels before anybody is pointed out
TOO_SLOW = 3  # times slower than the others' median: what ran was perhaps the clock, while nobody read


@dataclass(frozen=True)
class Person:
    """One annotator in numbers. Rates are dictionaries with value, low, high (exact 95%), None without labels."""

    id: str
    labels: int
    skips: int
    tie_share: float | None
    left: dict[str, Any] | None
    seconds: float | None
    fast_share: float | None
    checks: dict[str, Any] | None
    excluded: str | None
    warnings: tuple[str, ...]


def chose_left(given: Given) -> bool:
    """Whether a decisive answer took the response on the left."""
    return given.label.label == ("a" if given.label.order == "ab" else "b")


def people(state: State, work: Work, annotators: Sequence[str]) -> list[Person]:
    """Every annotator, in the order given, with remarks on those who stand out; too slow is only said beside two others at least."""
    pace = {who: median for who in annotators if (median := _pace(state, work, who)) is not None}
    found = []
    for who in annotators:
        person = _person(state, work, who)
        others = [own for other, own in pace.items() if other != who]
        if who in pace and len(others) > 1 and pace[who] * TOO_SLOW < statistics.median(others):
            person = replace(person, warnings=(*person.warnings, "much slower than the others"))
        found.append(person)
    return found


def _person(state: State, work: Work, who: str) -> Person:
    answers = state.of(who)
    labels = [given for given in answers if given.label.label != "none" and given.label.kind in ("first", "second")]
    decisive = [given for given in labels if given.label.label != "tie"]
    left = first_rate(sum(map(chose_left, decisive)), len(decisive))
    timed = [given.label.seconds for given in labels if given.label.seconds is not None]
    fast = [speed > TOO_FAST for given in labels if (speed := _speed(given, work)) is not None]
    checks = [
        given.label.label == task.expected
        for given in answers
        if (task := work.by_id.get(given.label.task)) is not None and task.is_check and given.label.label != "none"
    ]
    passed = first_rate(sum(checks), len(checks))
    warnings = []
    if len(decisive) >= FEWEST and left is not None and left["p_value"] < 0.01:
        warnings.append("favours one side")
    if len(fast) >= FEWEST and sum(fast) / len(fast) > FAST_SHARE:
        warnings.append("faster than reading")
    if passed is not None and passed["n"] >= 2 and passed["value"] < 0.75:
        warnings.append("fails checks")
    return Person(
        id=who,
        labels=len(labels),
        skips=len(answers)
        - len(labels)
        - len([g for g in answers if g.label.kind in ("gold", "attention") and g.label.label != "none"]),
        tie_share=round(1 - len(decisive) / len(labels), 4) if labels else None,
        left=left,
        seconds=statistics.median(timed) if timed else None,
        fast_share=round(sum(fast) / len(fast), 4) if fast else None,
        checks=passed,
        excluded=state.excluded.get(who),
        warnings=tuple(warnings),
    )


def _pace(state: State, work: Work, who: str) -> float | None:
    """Median words a second of this annotator's labels, None for too few."""
    labels = [given for given in state.of(who) if given.label.label != "none" and given.label.kind in ("first", "second")]
    speeds = [speed for given in labels if (speed := _speed(given, work)) is not None]
    return statistics.median(speeds) if len(speeds) >= FEWEST else None


def _speed(given: Given, work: Work) -> float | None:
    """Words of both responses a second of active time, None where unknown."""
    item = work.items.get(given.label.pair_id)
    if item is None or not given.label.seconds:
        return None
    return (len(item.a.split()) + len(item.b.split())) / given.label.seconds


def overall(state: State, work: Work, without: Collection[str] = ()) -> dict[str, Any]:
    """The labelling as a whole: labels, ties, side, agreement between people, self-consistency. without: people left out besides."""
    decisions = {pair: given for pair, given in state.decisions(without).items() if pair in work.items}
    given = [one for found in decisions.values() for one in found]
    decisive = [one for one in given if one.label.label != "tie"]
    ties = len(given) - len(decisive)
    return {
        "labels": len(given),
        "pairs": len(decisions),
        "tie_share": round(ties / len(given), 4) if given else None,
        "both_bad": sum(one.label.both_bad for one in given),
        "left": first_rate(sum(map(chose_left, decisive)), len(decisive)),
        "people": between_people(
            [(work.items[pair].group, _first_of_each(found)) for pair, found in decisions.items()], work.seed
        ),
        "self_consistency": self_consistency(decisions.values()),
    }


def self_consistency(decisions: Collection[Sequence[Given]]) -> dict[str, Any] | None:
    """How often one person said the same when they met a pair again with the sides swapped: never agreement. None if nobody did."""
    same = [
        one.label.label == other.label.label
        for found in decisions
        for who in {given.label.annotator for given in found}
        for one, other in pairwise([given for given in found if given.label.annotator == who])
    ]
    return first_rate(sum(same), len(same))


def without_each(state: State, work: Work, annotators: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Annotator -> the statistics of everybody else (or, for an excluded one, with them back in): what the switch would do."""
    found = {}
    for who in annotators:
        if who in state.excluded:
            reason = state.excluded.pop(who)
            found[who] = overall(state, work)
            state.excluded[who] = reason
        elif state.of(who):
            found[who] = overall(state, work, {who})
    return found


def model_scores(state: State, work: Work) -> list[dict[str, Any]]:
    """Blind final comparison: how often people preferred each model's response to the reference model's, ties one half.

    Rows {model, reference, wins, ties, losses, value, low, high}; the first label on each pair counts.
    """
    rows: dict[tuple[str, str], list[float]] = {}
    for pair, given in state.decisions().items():
        if pair in work.models:
            reference, model = work.models[pair]
            rows.setdefault((model, reference), []).append({"a": 0.0, "b": 1.0}.get(given[0].label.label, 0.5))
    found = []
    for (model, reference), scores in sorted(rows.items()):
        from suasion.evaluation.statistics import clopper_pearson

        low, high = clopper_pearson(sum(scores), len(scores), 0.95)
        found.append(
            {
                "model": model, "reference": reference, "wins": scores.count(1.0), "ties": scores.count(0.5), "losses": scores.count(0.0),
                "value": sum(scores) / len(scores), "low": low, "high": high,
            }
        )  # fmt: skip
    return found


def _first_of_each(found: Sequence[Given]) -> list[Label]:
    """One label a person: the first."""
    first: dict[str, Label] = {}
    for given in found:
        first.setdefault(given.label.annotator, given.label.label)
    return list(first.values())
