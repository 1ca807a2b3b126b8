"""What the dashboard says of annotators and agreement: numbers counted by hand, each remark with a case on either side of its line."""

from __future__ import annotations

import pytest
from statsmodels.stats.proportion import proportion_confint
from test_labeling import pair

from suasion.labeling import insight
from suasion.labeling.events import Event, HumanLabel, fold
from suasion.labeling.work import make_work
from suasion.sections.labeling import LabellingPage

PAIRS = 24
WORDS = 40  # of both responses of a pair together


@pytest.fixture(scope="module")
def work():
    pairs = [pair(i, f"first {i} " + "word " * 18, f"second {i} " + "word " * 18) for i in range(PAIRS)]
    return make_work(pairs, LabellingPage(kind="page", overlap=1.0, attention=4), 5)


def label(work, n: int, who: str, side: str = "left", seconds: float | None = 10.0, kind: str = "first", both_bad: bool = False):
    """An answer to the n-th task of a kind; order ab and ba in turn, side as the annotator saw it."""
    task = [one for one in work.tasks if one.kind == kind][n]
    order = "ab" if n % 2 == 0 else "ba"
    said = {"left": order[0], "right": order[1]}.get(side, side)
    return HumanLabel(
        task=task.id, kind=kind, pair_id=task.pair_id, annotator=who, order=order, label=said, clarity=2, seconds=seconds, both_bad=both_bad
    )  # fmt: skip


def state(*labels: HumanLabel, events: tuple[Event, ...] = ()):
    given = [
        Event(n, "2026-01-01", "skip" if one.label == "none" else "label", one.annotator, one.model_dump(mode="json"))
        for n, one in enumerate(labels, start=1)
    ]
    return fold([*given, *events])


def person(work, *labels, who: str = "ann") -> insight.Person:
    return next(one for one in insight.people(state(*labels), work, sorted({one.annotator for one in labels})) if one.id == who)


def test_one_annotator_in_numbers(work):
    labels = [label(work, n, "ann", "left" if n < 6 else "right", 8.0 + n) for n in range(9)]
    labels += [
        label(work, 9, "ann", "tie", None),
        label(work, 10, "ann", "tie", 40.0, both_bad=True),
        label(work, 11, "ann", "none"),
    ]
    one = person(work, *labels)
    assert (one.labels, one.skips, one.excluded, one.checks) == (11, 1, None, None)
    assert one.tie_share == pytest.approx(2 / 11, abs=1e-4)
    assert one.seconds == 12.5  # of 8 to 16 and 40, the missing time left out
    low, high = proportion_confint(6, 9, method="beta")
    assert one.left["value"] == pytest.approx(6 / 9, abs=1e-4)
    assert (one.left["low"], one.left["high"], one.left["n"]) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4), 9)
    assert one.warnings == ()


def test_a_side_that_is_favoured(work):
    """Two-sided exact: 11 of 12 on one side have p = .0063, 10 of 12 p = .039; 9 of 9 (p = .0039) are too few labels to speak of."""

    def remarks(left: int, of: int) -> tuple[str, ...]:
        return person(work, *[label(work, n, "ann", "left" if n < left else "right") for n in range(of)]).warnings

    assert remarks(11, 12) == remarks(1, 12) == ("favours one side",)
    assert remarks(10, 12) == remarks(9, 9) == ()


def test_faster_than_reading(work):
    """40 words in under 3 seconds are more than 800 a minute; a fifth of the labels may be so."""

    def remarks(fast: int, of: int) -> insight.Person:
        seconds = [2.9] * fast + [3.1] * (of - fast)
        return person(work, *[label(work, n, "ann", "left" if n % 4 < 2 else "right", seconds[n]) for n in range(of)])

    assert remarks(5, 20).warnings == ("faster than reading",)
    assert remarks(4, 20).warnings == ()
    assert remarks(4, 20).fast_share == 0.2
    assert remarks(9, 9).warnings == ()  # too few to point anybody out


def test_much_slower_than_the_others(work):
    """Beside two others with 10 labels each: three times their median is the line, and nobody is slow beside one other."""

    def remarks(seconds: dict[str, float]) -> dict[str, tuple[str, ...]]:
        labels = [label(work, n, who, "left" if n % 4 < 2 else "right", took) for who, took in seconds.items() for n in range(12)]
        return {one.id: one.warnings for one in insight.people(state(*labels), work, list(seconds))}

    assert remarks({"ann": 10, "bob": 12, "cleo": 40}) == {"ann": (), "bob": (), "cleo": ("much slower than the others",)}
    assert set(remarks({"ann": 10, "bob": 12, "cleo": 32}).values()) == {()}
    assert set(remarks({"ann": 10, "cleo": 90}).values()) == {()}


def test_checks_measure_the_annotator_and_are_no_labels(work):
    checks = [task for task in work.tasks if task.kind == "attention"]

    def answered(right: int) -> insight.Person:
        labels = [label(work, 0, "ann")]
        for n, task in enumerate(checks):
            wrong = {"a": "b", "b": "a"}[task.expected]
            labels.append(
                label(work, n, "ann", kind="attention").model_copy(update={"label": task.expected if n < right else wrong})
            )
        return person(work, *labels)

    assert (answered(3).labels, answered(3).skips) == (1, 0)
    assert answered(3).checks["value"] == 0.75
    assert answered(3).warnings == ()
    assert answered(2).warnings == ("fails checks",)


def test_the_labelling_as_a_whole_by_hand(work):
    """Two people on four pairs: they agree on two of three where both are decisive; one says the same twice of two pairs."""
    one = [label(work, n, "ann", "a") for n in range(4)]
    others = ("a", "b", "a", "tie")
    other = [
        label(work, n, "bob", said, kind="second").model_copy(update={"pair_id": one[n].pair_id}) for n, said in enumerate(others)
    ]
    found = insight.overall(state(*one, *other), work)
    assert (found["labels"], found["pairs"], found["both_bad"]) == (8, 4, 0)
    assert found["tie_share"] == 0.125
    assert found["people"]["n"] == 4
    assert found["people"]["agreement"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["self_consistency"] is None  # nobody met a pair twice
    alone = [
        label(work, n, "ann", said, kind="second").model_copy(update={"pair_id": one[n].pair_id}) for n, said in enumerate("aabb")
    ]
    again = insight.overall(state(*one, *alone), work)
    assert again["self_consistency"]["value"] == 0.5
    assert again["people"]["n"] == 0  # repeating oneself is never agreement


def test_what_an_exclusion_would_do_is_what_it_does(work):
    labels = [label(work, n, who, side) for who, side in (("ann", "left"), ("bob", "right"), ("cleo", "tie")) for n in range(12)]
    before = insight.without_each(state(*labels), work, ["bob"])["bob"]
    exclusion = Event(99, "2026-01-01", "exclude", "", {"annotator": "bob", "reason": "asked to"})
    after = state(*labels, events=(exclusion,))
    assert before == insight.overall(after, work) != insight.overall(state(*labels), work)
    back = insight.without_each(after, work, ["bob"])["bob"]
    assert back == insight.overall(state(*labels), work)
    assert after.excluded == {"bob": "asked to"}  # looking changes nothing
