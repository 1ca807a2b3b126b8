"""The store of labels, the events in it and the desk that hands out tasks: nothing lost, nothing doubled, nothing left after an erasure."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_labeling import pair

from suasion.errors import UsageError, UserError
from suasion.labeling.desk import CHOICES, Desk
from suasion.labeling.events import conflicts, fold, labels_digest, open_tasks, plan_tasks, snapshot, task_order, verdict_rows
from suasion.labeling.store import Store
from suasion.labeling.work import make_work
from suasion.preferences import settle
from suasion.sections.labeling import LabellingPage

PAGE = LabellingPage(kind="page")


def sampled(count: int):
    return [pair(i, f"first response {i}", f"second response {i}") for i in range(count)]


class Room:
    """A desk with a clock that the test moves."""

    def __init__(self, folder: Path, pairs: int = 8, **fields):
        self.now = 0.0
        self.path = folder / "labels.db"
        self.store = Store(self.path)
        self.work = make_work(sampled(pairs), LabellingPage(kind="page", **fields), 5)
        self.desk = Desk(self.store, self.work, lambda: self.now)
        self.clicks = 0

    def person(self, name: str = "") -> str:
        who = self.store.add_annotator(name)
        self.store.new_token(who, "invitation")
        return who

    def answer(self, who: str, choice: str = "left", **fields) -> int | None:
        shown = self.desk.next(who)
        assert shown is not None
        self.clicks += 1
        self.now += 10
        return self.desk.answer(who, shown.task.id, choice, 2, 9.0, str(self.clicks), **fields)


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path)


# The plan


def test_two_hundred_pairs_make_three_hundred_tasks():
    tasks = plan_tasks([f"p{i}" for i in range(200)], PAGE.overlap, 0)
    assert Counter(task.kind for task in tasks) == {"first": 200, "second": 100}
    assert len({task.id for task in tasks}) == 300
    again = plan_tasks([f"p{i}" for i in reversed(range(200))], PAGE.overlap, 0)
    assert set(tasks) == set(again)  # whatever order the pairs stand in
    assert set(tasks) != set(plan_tasks([f"p{i}" for i in range(200)], PAGE.overlap, 1))


def test_orders_differ_between_annotators_and_never_between_visits():
    tasks = plan_tasks([f"p{i}" for i in range(40)], 0.5, 0)
    one = task_order(tasks, "annotator-1", 0)
    assert one == task_order(tasks[::-1], "annotator-1", 0)
    assert one != task_order(tasks, "annotator-2", 0)
    assert [task.kind for task in one] == ["first"] * 40 + ["second"] * 20


def test_sides_are_balanced(tmp_path):
    room = Room(tmp_path, 300, overlap=0)
    orders = Counter(room.desk.show("annotator-1", task).order for task in room.work.planned)
    assert 110 < orders["ab"] < 190  # 300 fair coins: 4.6 standard deviations


# The desk


def test_one_person_repeats_with_sides_swapped(room):
    who = room.person()
    while room.desk.next(who):
        room.answer(who)
    state = room.desk.refresh()
    twice = [given for given in state.decisions().values() if len(given) == 2]
    assert len(twice) == 4
    for first, second in twice:
        assert {first.label.order, second.label.order} == {"ab", "ba"}
        assert {first.label.label, second.label.label} == {"a", "b"}  # left both times: a flip, and preferences sees it
    assert room.desk.missing() == 0
    verdicts = verdict_rows(snapshot(state, room.work.planned, room.desk.able()), {})
    pair_id = twice[0][0].label.pair_id
    assert settle([verdict for verdict in verdicts if verdict.pair_id == pair_id], "drop") == "flip"


def test_two_people_never_meet_a_pair_twice_and_share_the_second_tasks(room):
    people = [room.person(), room.person()]
    while any(room.desk.next(who) for who in people):
        for who in people:
            if room.desk.next(who):
                room.answer(who)
    state = room.desk.refresh()
    assert room.desk.missing() == 0
    assert len(state.labels) == 12
    for decisions in state.decisions().values():
        assert len({given.label.annotator for given in decisions}) == len(decisions)


def test_a_held_task_is_nobody_elses_until_the_hold_runs_out(room):
    one, two = room.person(), room.person()
    shown = room.desk.next(one)
    assert shown == room.desk.next(one)
    seen = set()
    for _ in range(7):
        other = room.desk.next(two)
        seen.add(other.task.id)
        room.answer(two)
    assert shown.task.id not in seen
    room.now += 31 * 60
    left = set()
    while (other := room.desk.next(two)) is not None:
        left.add(other.task.id)
        room.answer(two)
    assert shown.task.id in left


def test_resuming_after_a_restart_shows_the_same_task(room):
    who = room.person()
    room.answer(who)
    shown = room.desk.next(who)
    assert Desk(room.store, room.work).next(who) == shown


def test_the_same_click_twice_is_one_label(room):
    who = room.person()
    task = room.desk.next(who).task.id
    first = room.desk.answer(who, task, "left", 1, 3.0, "click")
    assert room.desk.answer(who, task, "left", 1, 3.0, "click") is None
    assert room.desk.answer(who, task, "right", 1, 3.0, "another click") is None
    assert room.store.append("label", who, {}, f"{who}:click") == first
    assert len(room.store.events()) == 1


def test_undo_takes_back_one_after_another_and_leads_to_the_task(room):
    who = room.person()
    tasks = []
    for choice in ("left", "tie", "skip"):
        tasks.append(room.desk.next(who).task.id)
        room.answer(who, choice, reason="I know this thread" if choice == "skip" else "")
    assert room.desk.undo(who, "u1").id == tasks[2]
    assert room.desk.undo(who, "u1") is None  # the same click
    assert room.desk.next(who).task.id == tasks[2]
    assert room.desk.undo(who, "u2").id == tasks[1]
    assert room.desk.next(who).task.id == tasks[1]
    room.answer(who, "right")
    state = room.desk.refresh()
    assert [given.label.label for given in state.history[who]].count("tie") == 0
    assert state.undone == 2
    assert len(room.store.events()) == 6  # nothing was overwritten
    for n in range(9):
        room.desk.undo(who, f"v{n}")
    assert room.desk.undo(who, "w") is None
    assert not room.desk.refresh().labels


def test_what_the_page_would_not_send_is_refused(room):
    who = room.person()
    task = room.desk.next(who).task.id
    for bad in (("nowhere", "left", 2), (task, "model", 2), (task, "left", None), (task, "left", 4)):
        with pytest.raises(UsageError):
            room.desk.answer(who, *bad, 1.0, "x")
    assert room.store.events() == []


def test_active_seconds_are_never_more_than_the_time_since_it_was_shown(room):
    who = room.person()
    task = room.desk.next(who).task.id
    room.now += 5
    room.desk.answer(who, task, "left", 1, 9999.0, "x")
    assert room.desk.refresh().labels[who, task].label.seconds == 5.0


def test_skipped_by_everybody_is_an_answer_and_no_label(tmp_path):
    room = Room(tmp_path, 2, overlap=0)
    who = room.person()
    room.answer(who, "skip", reason="It upsets me")
    room.answer(who, "bad")
    assert room.desk.missing() == 0
    labels = snapshot(room.desk.refresh(), room.work.planned, [who])
    assert sorted((label.label, label.both_bad, label.reason) for label in labels) == [
        ("none", False, "It upsets me"),
        ("tie", True, ""),
    ]
    another = room.person()  # somebody who has not skipped it can still judge it
    assert room.desk.missing() == 1
    assert room.desk.next(another).task.pair_id == labels[-1].pair_id


def test_a_skip_never_leaves_a_task_that_nobody_may_answer(tmp_path):
    """Two people and every pair twice: where one skips, the second label can come from nobody, and the plan is complete without it."""
    room = Room(tmp_path, 3, overlap=1.0)
    one, two = room.person(), room.person()
    room.answer(one, "skip", reason="I know this thread")
    while room.desk.next(one) is not None or room.desk.next(two) is not None:
        for who in (one, two):
            if room.desk.next(who) is not None:
                room.answer(who)
    assert room.desk.missing() == 0
    state = room.desk.refresh()
    assert sorted(len(given) for given in state.decisions().values()) == [1, 2, 2]
    assert len(snapshot(state, room.work.planned, [one, two])) == 5  # the pair has its label: no "none" beside it
    third = room.person()  # somebody new can give what was missing
    assert room.desk.missing() == 1
    room.answer(third)
    assert room.desk.missing() == 0
    assert room.desk.next(third) is None


def test_excluded_labels_do_not_count_and_their_tasks_open_again(room):
    one, two = room.person(), room.person()
    for _ in range(3):
        room.answer(one)
    missing = room.desk.missing()
    room.store.append("exclude", "", {"annotator": one, "reason": "too fast"})
    assert room.desk.missing() == missing + 3
    assert room.desk.next(one) is None
    with pytest.raises(UsageError, match="closed"):
        room.desk.answer(one, room.work.planned[0].id, "left", 1, 1.0, "late")
    assert snapshot(room.desk.refresh(), room.work.planned, [two]) == []
    room.store.append("include", "", {"annotator": one})
    assert room.desk.missing() == missing


def test_checks_come_with_the_tasks_and_are_never_labels(tmp_path):
    gold = tmp_path / "gold.jsonl"
    gold.write_text('{"context": "A view", "a": "Yes, because of this.", "b": "No.", "label": "a"}\n')
    room = Room(tmp_path, 40, overlap=0, attention=2, gold=str(gold))
    who = room.person()
    kinds = []
    while (shown := room.desk.next(who)) is not None:
        kinds.append(shown.task.kind)
        if shown.task.is_check:
            assert {shown.item.a, shown.item.b} >= {shown.left}
        room.answer(who)
    assert Counter(kinds) == {"first": 40, "attention": 2, "gold": 1}
    assert set(kinds[:3]) == {"first"}
    assert {"attention", "gold"} & set(kinds[:-3])  # not all at the end
    labels = snapshot(room.desk.refresh(), room.work.planned, [who])
    assert {label.kind for label in labels} == {"first"}
    gold.write_text('{"a": "only one"}\n')
    with pytest.raises(UserError, match=r"gold.jsonl, line 1"):
        make_work(sampled(3), LabellingPage(kind="page", gold=str(gold)), 0)


def test_adjudication_settles_a_conflict_only_where_the_recipe_says_so(room):
    one, two = room.person(), room.person()
    while room.desk.next(one) or room.desk.next(two):
        for who in (one, two):
            shown = room.desk.next(who)
            if shown:
                room.answer(who, "left" if (shown.order == "ab") == (who == one) else "right")  # one always says a, two always b
    state = room.desk.refresh()
    assert len(conflicts(state)) == 4
    pair_id = next(iter(conflicts(state)))
    room.store.append("adjudicate", "", {"pair_id": pair_id, "label": "b", "note": "answers the question"})
    state = room.desk.refresh()
    assert len(conflicts(state)) == 3
    given = [v for v in verdict_rows(snapshot(state, room.work.planned, [one, two]), state.adjudicated) if v.pair_id == pair_id]
    assert [verdict.source for verdict in given][-1] == "adjudicator"
    first = given[0].label
    assert (settle(given, "drop"), settle(given, "first"), settle(given, "adjudicate")) == ("conflict", first, "b")


def test_progress_and_time_left(room):
    who = room.person()
    assert (room.desk.progress(who).done, room.desk.progress(who).total) == (0, 12)
    room.answer(who)
    progress = room.desk.progress(who)
    assert (progress.done, progress.total, progress.seconds, progress.shared) == (1, 12, 11 * 9.0, False)
    room.person()
    assert room.desk.progress(who).shared


# The store


def test_events_cannot_be_changed_or_deleted(room):
    who = room.person()
    room.answer(who)
    other = sqlite3.connect(room.path)
    for statement in ("update events set body = '{}'", "delete from events"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            other.execute(statement)
    other.close()


def test_erasure_leaves_a_tombstone_and_no_byte(tmp_path):
    room = Room(tmp_path)
    gone, stays = room.person("Zebedee Quill"), room.person("Other")
    for _ in range(3):
        room.answer(gone, "skip", reason="unmistakable-reason-of-zebedee")
        room.answer(stays)
    room.store.append("exclude", "", {"annotator": gone, "reason": "unmistakable-reason for excluding"})
    numbers = [event.n for event in room.store.events()]
    assert room.store.erase(gone) == 3
    state = room.desk.refresh()
    assert gone not in state.history or not state.history[gone]
    assert [event.body for event in state.erasures] == [{"annotator": gone, "events": 3}]
    assert state.last == max(numbers) + 1  # numbers are never used again
    for file in tmp_path.glob("labels.db*"):
        content = file.read_bytes()
        assert b"Zebedee" not in content
        assert b"unmistakable-reason" not in content
    assert len(state.history[stays]) == 3
    assert room.store.add_annotator("new") == "annotator-3"


def test_an_erasure_beside_a_reader_says_so_and_is_finished_later(tmp_path):
    """SQLite cannot empty its log while another program reads from it: then bytes are left, and nobody may believe otherwise."""
    room = Room(tmp_path)
    gone = room.person("Zebedee Quill")
    room.answer(gone, "skip", reason="unmistakable-reason-of-zebedee")
    room.store._db.execute("pragma busy_timeout = 50")
    reader = sqlite3.connect(room.path)
    reader.execute("begin")
    reader.execute("select count(*) from events").fetchone()
    with pytest.raises(UserError, match="old bytes still stand"):
        room.store.erase(gone)
    assert [event.kind for event in room.store.events()] == ["erase"]
    reader.close()
    room.store.close()
    Store(room.path).close()
    assert not any(
        b"Zebedee" in file.read_bytes() or b"unmistakable" in file.read_bytes() for file in tmp_path.glob("labels.db*")
    )


def test_tokens_are_stored_as_hashes(room):
    who = room.store.add_annotator("x")
    token = room.store.new_token(who, "invitation")
    room.store.close()
    assert token.encode() not in room.path.read_bytes()
    store = Store(room.path)
    assert store.annotator_of(token, "invitation") == who
    assert store.annotator_of(token, "session") is None
    assert store.annotator_of(token[:-1], "invitation") is None
    store.revoke(who)
    assert store.annotator_of(token, "invitation") is None
    assert room.path.stat().st_mode & 0o077 == 0


def test_another_process_is_seen(room):
    who = room.person()
    second = Desk(Store(room.path), room.work)
    task = second.next(who).task.id
    second.answer(who, task, "left", 1, 1.0, "there")
    assert (who, task) in room.desk.refresh().labels


def test_many_threads_lose_and_double_nothing(tmp_path):
    room = Room(tmp_path, 60, overlap=0)
    people = [room.person() for _ in range(6)]

    def work(who: str) -> None:
        clicks = 0
        while (shown := room.desk.next(who)) is not None:
            clicks += 1
            room.desk.answer(who, shown.task.id, "left", 1, 1.0, str(clicks))

    threads = [threading.Thread(target=work, args=(who,)) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(event.body["pair_id"] for event in room.store.events()) == {f"p{i}": 1 for i in range(60)}


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 4000])
def test_a_broken_file_is_a_message(tmp_path, content):
    path = tmp_path / "labels.db"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"labels\.db"):
        Store(path)


def test_another_format_is_refused(room):
    room.store.close()
    other = sqlite3.connect(room.path)
    other.execute("pragma user_version = 99")
    other.close()
    with pytest.raises(UserError, match="format 99"):
        Store(room.path)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([*CHOICES, "skip", "undo", "exclude", "include"])), max_size=60))
def test_whatever_people_do_the_books_balance(tmp_path_factory, actions):
    """The state kept while people work equals the state folded afresh, every answer is in it once, and digests follow labels."""
    room = Room(tmp_path_factory.mktemp("room"), 5)
    people = [room.person() for _ in range(3)]
    for n, (i, action) in enumerate(actions):
        who = people[i]
        if action == "undo":
            room.desk.undo(who, f"u{n}")
        elif action in ("exclude", "include"):
            room.store.append(action, "", {"annotator": who, "reason": "test"})
        elif room.desk.next(who):
            room.answer(who, action)
    state, fresh = room.desk.refresh(), fold(room.store.events())
    assert state == fresh
    given = [event for event in room.store.events() if event.kind in ("label", "skip")]
    assert len(state.labels) == len(given) - state.undone
    rows = snapshot(state, room.work.planned, people)
    assert len({(row.annotator, row.task) for row in rows}) == len(rows)
    open_pairs = {task.pair_id for task in open_tasks(state, room.work.planned, people) if task.kind == "first"}
    assert open_pairs.isdisjoint({row.pair_id for row in rows if row.kind == "first"})
    digest = labels_digest(rows, state.adjudicated)
    room.store.append("consent", people[0], {"version": "x"})
    after = snapshot(room.desk.refresh(), room.work.planned, people)
    assert labels_digest(after, state.adjudicated) == digest
    room.store.close()
