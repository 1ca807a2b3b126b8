"""ChangeMyView: nobody trains on the persuaded person, and no kept text says how the thread ended."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suasion.corpora.cmv import clean, clean_post, extract, leaks, outcome_pairs
from suasion.corpora.convokit import Tally
from suasion.records import Example, OutcomePair

POST = "Bread should be sold by weight. It always was, and loaves have shrunk since."


def comment(
    identity: str, speaker: str, text: str, success: int | None, parent: str = "t", pairs: tuple[str, ...] = ()
) -> dict[str, Any]:
    return {
        "id": identity,
        "conversation_id": "t",
        "speaker": speaker,
        "text": text,
        "reply_to": parent,
        "meta": {"success": success, "pair_ids": list(pairs), "replies": []},
    }


def thread(
    tmp_path: Path, *comments: dict[str, Any], title: Any = "CMV: Sell bread by weight", post: Any = POST, poster: Any = "op"
) -> Path:
    root = {
        "id": "t",
        "conversation_id": "t",
        "speaker": poster,
        "text": post,
        "reply_to": None,
        "meta": {"success": None, "pair_ids": []},
    }
    rows = [root, *comments]
    (tmp_path / "utterances.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metas = {"t": {"meta": {"op-userID": poster, "op-title": title, "op-text-body": post, "pair_ids": []}}}
    (tmp_path / "conversations.json").write_text(json.dumps(metas), encoding="utf-8")
    return tmp_path


def read(folder: Path) -> tuple[list[Example], list[OutcomePair], dict[str, int]]:
    tally = Tally()
    found = list(extract(folder, tally))
    examples = [example for rows, _ in found for example in rows]
    return (
        examples,
        [pair for _, rows in found for pair in rows],
        {reason: count for reason, count in tally.dropped.items() if count},
    )


def replies(folder: Path) -> list[str]:
    return sorted(example.reply for example in read(folder)[0] if example.reply is not None)


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("Salt &amp; pepper &lt; 3, &amp;gt; twice, a&nbsp;b", "Salt & pepper < 3, > twice, a b"),
        ("&gt; you said this\n\nNo.", "> you said this\n\nNo."),
        ("see [this study](http://example.org/a_(b)) and [that](/r/x)", "see this study and that"),
        ("see [this] (http://example.org/x) now, [not] (this)", "see this now, [not] (this)"),
        ("at https://www.example.org/long/path?q=1 today", "at example.org today"),
        ("as /u/some_body and u/other-one said, and/or not", "as [user] and [user] said, and/or not"),
        ("A point of some length.\n\nEDIT: thanks for the delta!\n\nMore thanks.", "A point of some length."),
        ("A point, of some length.\n\n**Edit 2:** spelling", "A point, of some length."),
        (
            "A point that is long enough to count.  Edit: My view has been changed.  Thank you.",
            "A point that is long enough to count.",
        ),
        ("A point that is long enough to count. EDIT: gold, wow", "A point that is long enough to count."),
        (
            "UPDATE - view changed\n\nThe long post itself, which goes on and on and on.",
            "The long post itself, which goes on and on and on.",
        ),
        ("A point that is long enough to count.\n\nEdit2: Additional information", "A point that is long enough to count."),
        ("A point that is long enough to count.  edit i have no scales", "A point that is long enough to count."),
        (
            "A point that is long enough to count.\n\nEdit[1] thanks to a friend who knows",
            "A point that is long enough to count.",
        ),
        ("I like it (edit: fixed a typo) a lot", "I like it a lot"),
        ("The edit button is missing. Editors edit: that is their job, is it not so, and they do it daily.", None),
        ("You are right.\n\n!delta", "You are right."),
        ("&#8710;\n\nYou are right.", "You are right."),
        ("A post.\n_____\n\n&gt; *Hello, users of CMV! This is a footnote from your moderators. Happy CMVing!*", "A post."),
        ("A post. _____  > *from your moderators, please remember to* ***[read our rules](http://x.y)***.", "A post."),
        ("A post.\n\n---\n> Hello, users of CMV! Anything at all.", "A post."),
        ("fill in the _____ here", "fill in the _____ here"),
    ],
)
def test_clean(raw: str, wanted: str | None) -> None:
    assert clean(raw) == (raw if wanted is None else wanted)


@pytest.mark.parametrize(
    "text",
    [
        "Have a ∆ for that",
        "I'll award you a delta tomorrow",
        "Confirmed: 1 delta awarded to somebody",
        "My view has been changed.",
        "my opinion was slightly altered by this",
        "View changed, at least in part.",
        "I had my mind changed here",
        "You've changed my view",
        "this shifts my perspective",
        "I know your view has already been changed, but",
        "I\u2019ve since changed my mind about that",
        "Okay, you convinced me",
        "she won me over",
        "I stand corrected",
        "consider me persuaded",
        "I've come round",
        "CMV'd, thanks",
        "Thanks everyone for the discussion",
        "You have all made excellent points",
        "This is a footnote from your moderators",
        "MODIFICATION OF MY VIEW credit to /u/somebody:",
        "So I guess I'd like to amend my CMV to bread in general",
        "After some discussion, I now realize that it depends on the loaf",
        "I still like scales, but I now see that they cost something",
        "I now believe that loaves will do",
        "Thank you to /u/somebody for pointing out a better word",
        "[Response to your replies]: scales are cheap",
        "A lot of you have pointed out that scales cost money",
        "Wow, thank you for the gold!! :)",
        "Some of you guys have had the best arguments I've yet heard",
    ],
)
def test_leaks_are_found(text: str) -> None:
    text = clean(text)
    assert leaks(text)
    assert leaks(f"Some words before.\n\n{text}\n\nSome after.")


@pytest.mark.parametrize(
    "text",
    [
        "Please change my view!",
        "I would like to have my view changed.",
        "I am open to having my mind changed here.",
        "What would it take to change your view?",
        "To change my view you will need to show that it costs more.",
        "I'm not going to try and change your view so much as to add to it.",
        "The Nile delta floods, Delta Air Lines flies, and Delta IV rockets too.",
        "The law was changed in 1990 and opinions differ.",
        "Thanks in advance for your replies!",
        "Thanks to everyone who reads this, in advance.",
        "Now I understand that some people like scales.",
        "I used to buy loaves, and I now buy flour. Thank you for the golden loaf.",
        "Many of you have ovens. I amended my recipe twice.",
        "I am convinced that bread is good, and nobody can convince me of less.",
    ],
)
def test_asking_for_arguments_is_no_leak(text: str) -> None:
    assert leaks(text) == []


@given(st.text(alphabet=st.sampled_from("aE dit:\n.>*_[]()∆!&gt;u/#"), max_size=80))
def test_clean_takes_anything_and_settles(text: str) -> None:
    once = clean(text)
    assert once == once.strip()
    assert "\n\n\n" not in once
    assert leaks(clean_post(once)) == leaks(clean_post(clean_post(once)))


@pytest.mark.parametrize(
    "unit", ["view ", "my view has ", "edit ", "[a](", "> ", "_", " ", "\n", "thank you ", "(edit", "has been "]
)
def test_no_text_is_slow(unit: str) -> None:
    text = unit * (20_000 // len(unit))
    began = time.perf_counter()
    leaks(clean(text))
    assert time.perf_counter() - began < 2


def test_the_poster_is_never_a_reply(tmp_path: Path) -> None:
    folder = thread(
        tmp_path,
        comment("w", "ann", "Scales cost money.", 1, pairs=("p1", "p2")),
        comment("l1", "ben", "No.", 0, pairs=("p1",)),
        comment("l2", "cat", "Never.", 0, pairs=("p2",)),
        comment("o1", "op", "Fair, how much?", 1, "w"),
        comment("w2", "ann", "About forty a year.", 1, "o1"),
        comment("o2", "op", "∆ then", 1, "w2"),
        comment("late", "ann", "You are welcome.", 1, "o2"),
    )
    examples, pairs, dropped = read(folder)
    assert replies(folder) == ["About forty a year.", "Scales cost money."]
    assert dropped == {"poster's own comment with success 1": 2, "context that reveals the outcome": 1}
    second = next(example for example in examples if example.reply == "About forty a year.")
    assert [(turn.role, turn.name, turn.text) for turn in second.turns] == [
        ("user", None, f"CMV: Sell bread by weight\n\n{POST}"),
        ("assistant", None, "Scales cost money."),
        ("user", None, "Fair, how much?"),
    ]
    assert {example.author for example in examples} == {"op"}
    assert second.outcome == 1.0
    assert sorted((pair.winner, pair.loser) for pair in pairs) == [
        ("Scales cost money.", "Never."),
        ("Scales cost money.", "No."),
    ]
    assert {pair.group for pair in pairs} == {"op"}
    assert all(len(pair.turns) == 1 for pair in pairs)
    assert len(outcome_pairs(folder)) == 2


def test_several_challengers_are_told_apart(tmp_path: Path) -> None:
    folder = thread(
        tmp_path,
        comment("a", "ann", "First.", None),
        comment("o", "op", "And?", None, "a"),
        comment("b", "ben", "Second.", 1, "o"),
    )
    (example, bare) = read(folder)[0]
    assert [(turn.role, turn.name) for turn in example.turns] == [("user", None), ("assistant", "Challenger 1"), ("user", None)]
    assert bare.reply is None
    assert bare.outcome is None
    assert len(bare.turns) == 1


def test_losing_comments_are_only_losers(tmp_path: Path) -> None:
    examples, pairs, _ = read(thread(tmp_path, comment("l", "ben", "No.", 0, pairs=("p",))))
    assert [example.reply for example in examples] == [None]
    assert pairs == []


def test_deleted_poster_is_no_identity(tmp_path: Path) -> None:
    """Comments of other deleted accounts may be the poster's own, so that only named challengers remain."""
    folder = thread(
        tmp_path,
        comment("a", "[deleted]", "By whom?", 1),
        comment("b", "ben", "By ben.", 1),
        poster="[deleted]",
        title="Bread, CMV",
    )
    examples, _, dropped = read(folder)
    assert replies(folder) == ["By ben."]
    assert {example.author for example in examples} == {"t"}
    assert dropped == {"comment with success 1 whose author may be the poster": 1}


@pytest.mark.parametrize(
    ("title", "post", "wanted"),
    [
        ("Title", "", "Title"),
        (None, "Body", "Body"),
        ("Title", "[deleted]", "Title"),
        ("[removed]", "Body", "Body"),
        ("Title", "Body\n\nEDIT: view changed", "Title\n\nBody"),
        ("Title", "Body.\n\nView changed, thanks to ann.\n\nMore body.", "Title\n\nBody.\n\nMore body."),
    ],
)
def test_title_or_body_may_be_missing(tmp_path: Path, title: Any, post: Any, wanted: str) -> None:
    (bare,) = read(thread(tmp_path, title=title, post=post))[0]
    assert bare.turns[0].text == wanted


def test_posts_that_cannot_be_kept(tmp_path: Path) -> None:
    winner = comment("w", "ann", "Because.", 1, pairs=("p",))
    loser = comment("l", "ben", "No.", 0, pairs=("p",))
    assert read(thread(tmp_path, winner, loser, title=None, post="[removed]")) == (
        [],
        [],
        {"post without title and body": 1, "winning comment under a dropped post": 1, "pair under a dropped post": 1},
    )
    revealing = (
        "The view of this post, which is about bread, was changed by ann " + "and went on " * 20 + ": my view has been changed."
    )
    assert read(thread(tmp_path, winner, loser, post=revealing))[2]["post that reveals the outcome"] == 1


@pytest.mark.parametrize(
    ("comments", "reason"),
    [
        ([comment("w", "ann", "x", 1, "gone")], "missing parent"),
        ([comment("w", "ann", "x", 1, "v"), comment("v", "ben", "y", None, "w")], "cycle of replies"),
        ([comment("w", "ann", "[deleted]", 1)], "comment without text"),
        ([comment("w", "ann", "EDIT: never mind", 1)], "comment without text"),
        ([comment("w", "ann", "I know your view has been changed already", 1)], "comment that reveals the outcome"),
        ([comment("v", "ben", "[removed]", None), comment("w", "ann", "x", 1, "v")], "turn without text in the context"),
        ([comment("w", "ann", "same", 1), comment("v", "ben", "same", 1)], "comment that occurs twice"),
        ([comment("w", "ann", "x", 1, pairs=("p",))], "pair with one side only"),
        ([comment("w", "ann", "x", 1, pairs=("p",)), comment("l", "ben", "x", 0, pairs=("p",))], "pair of equal comments"),
        ([comment("w", "ann", "x", 1, pairs=("p",)), comment("l", "ben", "y", 0, "w", pairs=("p",))], "pair with two contexts"),
        (
            [comment("w", "ann", "x", 1, pairs=("p",)), comment("l", "ben", "", 0, pairs=("p",))],
            "pair with a comment that is not kept",
        ),
    ],
)
def test_every_drop_has_a_reason(tmp_path: Path, comments: list[dict[str, Any]], reason: str) -> None:
    assert read(thread(tmp_path, *comments))[2] == {reason: 1}


def test_bots_are_nobody(tmp_path: Path) -> None:
    folder = thread(
        tmp_path,
        comment("w", "ann", "Because.", 1),
        comment("bot", "DeltaBot", "Confirmed: 1 delta", 1, "w"),
        comment("w2", "ann", "And besides.", 1, "bot"),
    )
    examples, _, dropped = read(folder)
    assert replies(folder) == ["And besides.", "Because."]
    assert dropped == {"bot's comment with success 1": 1}
    assert all("delta" not in turn.text for example in examples for turn in example.turns)


def test_a_pair_that_names_a_branch_stands_for_its_first_comment(tmp_path: Path) -> None:
    folder = thread(
        tmp_path,
        comment("w2", "ann", "Later.", 1, "o", pairs=("p",)),
        comment("w1", "ann", "At first.", 1, pairs=("p",)),
        comment("o", "op", "Hm.", 1, "w1", pairs=("p",)),
        comment("l1", "ben", "No.", 0, pairs=("p",)),
    )
    (pair,) = read(folder)[1]
    assert (pair.winner, pair.loser) == ("At first.", "No.")
