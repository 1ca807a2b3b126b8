"""PersuasionForGood: roles from the utterances, donations capped, chatter left out by its labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from suasion.corpora.convokit import Tally
from suasion.corpora.p4g import donation, extract, is_chatter
from suasion.records import Example

SAID = [
    (0, "Hello there.", ["greeting"]),
    (1, "Hi.", ["greeting"]),
    (0, "Do you know the charity?", ["source-related-inquiry"]),
    (1, "No, what is it?", ["ask-org-info"]),
    (0, "It feeds children. Would you give a dollar?", ["donation-information", "proposition-of-donation"]),
    (1, "Sure.", ["agree-donation"]),
    (0, "Thanks! Goodbye.", ["thank", "closing"]),
]


def corpus(folder: Path, said: list[tuple[Any, str, Any]] = SAID, reverse: bool = False, **meta: Any) -> Path:
    rows = [
        {
            "id": str(i),
            "conversation_id": "0",
            "speaker": f"worker_{role}",
            "text": text,
            "reply_to": str(i - 1) if i else None,
            "meta": {"role": role, "label_1": labels},
        }
        for i, (role, text, labels) in enumerate(said)
    ]
    (folder / "utterances.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[::-1] if reverse else rows)))
    meta = {"user_er": "worker_0", "user_ee": "worker_1", "donation_ee": 1.0, **meta}
    (folder / "conversations.json").write_text(json.dumps({"0": {"meta": meta, "vectors": []}}))
    return folder


def read(folder: Path, **options: Any) -> tuple[list[Example], dict[str, int]]:
    tally = Tally()
    found = [example for examples, pairs in extract(folder, tally, **options) for example in examples if pairs == []]
    return found, {reason: count for reason, count in tally.dropped.items() if count}


@pytest.mark.parametrize("reverse", [False, True])
def test_examples_are_persuader_turns_with_their_dialogue(tmp_path: Path, reverse: bool) -> None:
    examples, dropped = read(corpus(tmp_path, reverse=reverse))
    assert [example.reply for example in examples] == ["Do you know the charity?", "It feeds children. Would you give a dollar?"]
    assert dropped == {"persuader turn before the persuadee has spoken": 1, "off-task chatter": 1}
    last = examples[-1]
    assert [turn.role for turn in last.turns] == ["assistant", "user", "assistant", "user"]
    assert [turn.text for turn in last.turns] == [text for _, text, _ in SAID[:4]]
    assert (last.author, last.outcome, last.strategies) == ("worker_0", 1.0, ("donation-information", "proposition-of-donation"))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (0.0, 0.0),
        (0.35, 0.35),
        (2, 2.0),
        (700.0, 2.0),
        ("1.5", 1.5),
        (-1, 0.0),
        (None, None),
        ("a lot", None),
        (math.nan, None),
        ([], None),
    ],
)
def test_donations(value: Any, wanted: float | None) -> None:
    assert donation(value) == wanted


def test_chatter_needs_labels() -> None:
    assert is_chatter(("off-task", "greeting"))
    assert not is_chatter(("off-task", "emotion-appeal"))
    assert not is_chatter(())


def test_only_dialogues_with_a_donation(tmp_path: Path) -> None:
    assert read(corpus(tmp_path, donation_ee=0.0), donating_only=True) == (
        [],
        {"dialogue without donation": 1, "persuader turn in a dialogue without donation": 4},
    )
    assert len(read(corpus(tmp_path, donation_ee=None))[0]) == 2
    assert {example.outcome for example in read(corpus(tmp_path, donation_ee=50.0), donating_only=True)[0]} == {2.0}


def test_roles_come_from_the_utterances(tmp_path: Path) -> None:
    said = [(None, text, labels) for _, text, labels in SAID]
    dropped = {"dialogue without roles": 1, "utterance of a dialogue without roles": len(said)}
    assert read(corpus(tmp_path, said)) == ([], dropped)
    assert read(corpus(tmp_path, [(True, "x", None)])) == ([], {**dropped, "utterance of a dialogue without roles": 1})


def test_who_speaks_in_a_dialogue(tmp_path: Path) -> None:
    """As its metadata say; where they do not, whoever speaks in the role."""
    for meta, who in (
        ({"user_er": "ann\u200b", "user_ee": "ben\ud800"}, ("ann", "ben?")),
        ({"user_er": None, "user_ee": "[deleted]"}, ("worker_0", "worker_1")),
    ):
        assert {(example.author, example.persuadee) for example in read(corpus(tmp_path, **meta))[0]} == {who}


def test_turns_without_text_or_labels(tmp_path: Path) -> None:
    said = [(1, "Hi.", None), (0, " ", None), (0, "Unlabelled.", None), (0, "Twice in a row.", "no list")]
    examples, dropped = read(corpus(tmp_path, said, user_er=None))
    assert [(example.reply, len(example.turns), example.strategies) for example in examples] == [
        ("Unlabelled.", 1, ()),
        ("Twice in a row.", 2, ()),
    ]
    assert dropped == {"persuader turn without text": 1}
    assert examples[0].author == "worker_0"
