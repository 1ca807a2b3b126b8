"""Labelling over ssh: `suasion label serve RUN --terminal`, line by line, into the same events as the page's."""

from __future__ import annotations

import io

import pytest
from label_run import make_run, sampled_pairs
from rich.console import Console

from suasion.labeling.server import open_desk
from suasion.labeling.terminal import label


class Session:
    """One person at a terminal, who types lines and reads what is printed."""

    def __init__(self, run, lines: list[str]):
        self.output, self.lines, self.asked = io.StringIO(), list(lines), []
        self.desk = open_desk(run)
        label(self.desk, Console(file=self.output, width=100), self.type)
        self.state = self.desk.refresh()
        self.who = self.desk.store.annotators()[0].id
        self.desk.store.close()

    def type(self, prompt: str) -> str:
        self.asked.append(prompt)
        if not self.lines:
            raise EOFError  # the connection is gone
        return self.lines.pop(0)

    @property
    def said(self) -> str:
        return " ".join(self.output.getvalue().split())


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, sampled_pairs(3), overlap=0)


def test_nobody_labels_without_agreeing(run):
    session = Session(run, ["n", "a3"])
    assert "Nothing was stored." in session.said
    assert "physically removed" in session.said  # the consent text, before the question
    assert "can upset" in session.said  # the content warning
    assert session.lines == ["a3"]  # the answer was never read
    assert (session.state.consents, session.state.history) == ({}, {})


def test_a_whole_labelling_with_undo_skip_and_help(run):
    lines = ["y", "nonsense", "a4", "a3", "u", "b1", "g", "s", "9", "s", "2", "x2"]
    session = Session(run, lines)
    assert session.lines == []
    given = session.state.of(session.who)
    assert [one.label.label for one in given][1:] == ["none", "tie"]
    first = given[0].label
    assert first.label == ("b" if first.order == "ab" else "a")  # b1, after a3 was taken back
    assert (first.clarity, given[1].label.reason, given[2].label.both_bad) == (1, "I know this thread", True)
    assert {one.label.origin for one in given} == {"terminal"}
    assert session.state.undone == 1
    assert session.said.count("for example a3") >= 2 + 3  # help under each task, and for what is no answer
    assert "Not skipped." in session.said
    assert "Judge persuasion, not your own opinion" in session.said
    assert session.said.endswith("Nothing is left for you. Thank you.")


def test_who_quits_goes_on_where_they_were(run):
    begun = Session(run, ["y", "a2", "q"])
    assert "Everything you answered is saved." in begun.said
    resumed = Session(run, ["b3"])  # and the connection breaks
    assert resumed.who == begun.who  # one person a terminal, who agreed before
    assert resumed.asked[0] == "> "
    assert "task 2 of 3" in resumed.said
    assert [one.label.clarity for one in resumed.state.of(resumed.who)] == [2, 3]


def test_a_text_cannot_steer_the_terminal(tmp_path):
    texts = ("Harmless \x1b[2J\x1b]0;owned\x07 text [bold red]not markup[/].", "Second.")
    session = Session(make_run(tmp_path, sampled_pairs(1, texts), overlap=0), ["y", "q"])
    printed = session.output.getvalue()
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "[bold red]not markup[/]" in session.said
    assert "sft-secret-model" not in printed  # blind here too
