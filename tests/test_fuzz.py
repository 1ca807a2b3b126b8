"""Mutated corpora: every reader ends in an error that names file and line, or in rows that can be written and counts that add up.

Small sound corpora are damaged in their bytes (flipped, cut out, cut short, put twice), in their lines, and in their values (a field
gone, renamed, or with something strange in it), in any of their files. The fast suite takes a few hundred of each reader, `-m slow`
thousands.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accounts import assert_they_add_up

from suasion.corpora.stage import fitted
from suasion.corpora.stats import Report
from suasion.errors import UserError
from suasion.grading.pairs import read_ukp
from suasion.recipe import Recipe
from suasion.records import canonical_json, json_text

FEW, MANY = 250, 3000

Files = dict[str, list[Any]]  # name -> the values of its lines; a .json file has one


def comment(identity: str, thread: str, speaker: str, text: str, parent: str | None, **meta: Any) -> dict[str, Any]:
    meta = {"success": None, "pair_ids": [], "replies": [], **meta}
    return {
        "id": identity,
        "conversation_id": thread,
        "speaker": speaker,
        "text": text,
        "reply_to": parent,
        "timestamp": None,
        "meta": meta,
    }


def threads() -> Files:
    """Two threads: a pair, a branch of several turns, a bot, a deleted comment, and a post that nobody answered."""
    rows = [
        comment("t", "t", "op", "Bread should be sold by weight, as it always was.", None),
        comment("w", "t", "ann", "Scales cost more than the bread that they would save us.", "t", success=1, pair_ids=["p", "q"]),
        comment("o", "t", "op", "How much do they cost, then?", "w"),
        comment("v", "t", "ann", "About as much as a small oven, every second year.", "o", success=1),
        comment("l", "t", "ben", "Nobody would know what a loaf costs any more.", "t", success=0, pair_ids=["p"]),
        comment("m", "t", "cem", "It would take far too long at the counter.", "t", success=0, pair_ids=["q"]),
        comment("d", "t", "DeltaBot", "Confirmed: 1 delta awarded", "v", success=1),
        comment("x", "t", "[deleted]", "[removed]", "l"),
        comment("s", "s", "pat", "Letters are better than calls because one can keep them.", None),
    ]
    metas = {
        "t": {"op-userID": "op", "op-title": "CMV: Sell bread by weight", "op-text-body": "Bread should be sold by weight."},
        "s": {"op-userID": "pat", "op-title": "CMV: Write letters", "op-text-body": ""},
    }
    return {"utterances.jsonl": rows, **outline(metas, ["op", "ann", "ben", "cem", "DeltaBot", "pat"])}


def dialogues() -> Files:
    """Two dialogues of one persuader, with labels, a turn without text and a donation that is a typing error."""
    said = [
        "Hello there.",
        "Hi.",
        "Do you know what the charity does with it?",
        "No, tell me.",
        "It feeds children in five towns.",
        "",
    ]
    rows = []
    for number, dialogue in enumerate(("0", "1")):
        for place, text in enumerate(said):
            role = place % 2
            rows.append(
                {
                    "id": f"{dialogue}_{place}",
                    "conversation_id": dialogue,
                    "speaker": f"persuadee_{number}" if role else "persuader",
                    "text": text,
                    "reply_to": f"{dialogue}_{place - 1}" if place else None,
                    "meta": {"role": role, "label_1": ["greeting"] if place < 2 else ["credibility-appeal"], "sentiment": 0.5},
                }
            )
    metas = {
        str(number): {"user_er": "persuader", "user_ee": f"persuadee_{number}", "donation_ee": donation, "donation_er": 0.0}
        for number, donation in enumerate((700.0, 0.0))
    }
    return {"utterances.jsonl": rows, **outline(metas, ["persuader", "persuadee_0", "persuadee_1"])}


def outline(metas: dict[str, Any], speakers: list[str]) -> Files:
    return {
        "conversations.json": [{name: {"meta": meta, "vectors": []} for name, meta in metas.items()}],
        "speakers.json": [{name: {"meta": {}, "vectors": []} for name in speakers}],
        "index.json": [
            {"utterances-index": {"success": ["<class 'int'>"], "blob": ["bin"]}, "conversations-index": {}, "version": 1}
        ],
    }


def own_rows() -> Files:
    """Examples of two conversations, one of them a prompt, and an outcome pair."""
    turns = [{"role": "user", "text": "I will keep driving to work, because the bus takes twice as long."}]
    longer = [
        *turns,
        {"role": "assistant", "text": "How long is that?", "name": "Challenger 1"},
        {"role": "user", "text": "An hour."},
    ]
    said = {"reply": "But those are minutes in which you can read a book.", "outcome": 1, "strategies": ["logical-appeal"]}
    return {
        "examples.jsonl": [
            {"conversation_id": "1", "author": "ann", "turns": turns, **said},
            {
                "conversation_id": "1",
                "author": "ann",
                "turns": longer,
                "reply": "Then read two books on every one of these days.",
                "id": "x",
            },
            {"conversation_id": "1", "author": "ann", "turns": turns, "reply": None},
            {"conversation_id": "2", "author": "ben", "turns": turns, "reply": None, "outcome": None, "corpus": "mine"},
        ],
        "outcome_pairs.jsonl": [
            {
                "conversation_id": "1",
                "group": "ann",
                "turns": turns,
                "winner": "You could read on the bus.",
                "loser": "It is what all people do.",
            }
        ],
    }


CORPORA: dict[str, Callable[[], Files]] = {"cmv": threads, "p4g": dialogues, "jsonl": own_rows}
DEEP: Any = "deep"
for _ in range(700):
    DEEP = [DEEP]
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 1.0, 1.5, 10**400, float("nan"), float("inf"), "", " ", "t", "1", "p", "\ud800", "a\u0000b", "\u202e\u200b",
    "[deleted]", "[removed]", "[missing]", "<##bin{0}&&@**>", "x" * 5000, "word " * 300, "My view has been changed.", "&amp;lt;" * 9, "(" * 400,
    "EDIT: ", "\u2206", [], [None], ["\udfff"], [["p"]], {}, {"meta": 3}, {"": ""}, {"text": "t", "role": "user"}, DEEP,
]  # fmt: skip


def mutated(files: Files, rng: random.Random) -> dict[str, bytes]:
    """The files as bytes, with one to three faults in them."""
    files = copy.deepcopy(files)
    faults = rng.randint(1, 3)
    for _ in range(faults if rng.random() < 0.6 else 0):
        spoil_value(rng.choice([*files.values(), next(iter(files.values()))]), rng)
        faults -= 1
    for _ in range(rng.randint(0, faults)):
        spoil_lines(next(iter(files.values())), rng)
    written = {name: b"".join(json.dumps(value).encode() + b"\n" for value in values) for name, values in files.items()}
    if rng.random() < 0.4:
        name = rng.choice(list(written))
        written[name] = spoil_bytes(written[name], rng)
    return written


def spoil_value(values: list[Any], rng: random.Random) -> None:
    """Anywhere in a file: a value becomes a strange one or goes, its name becomes another, or one more appears."""
    places = [(holder, key) for value in values for holder, key in walk(value)]
    if not places:
        return
    holder, key = rng.choice(places)
    deed = rng.random()
    if deed < 0.7:
        value = rng.choice(STRANGE)
        holder[key] = value if value is DEEP else copy.deepcopy(value)
    elif deed < 0.85 or isinstance(holder, list):
        del holder[key]
    else:
        holder[rng.choice(["", "new", "\ud800", f"{key}x", "id", "reply-to", "root", "user"])] = holder.pop(key)


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place below a value: the object or list that holds it, and its key. Not into what is nested deeply already."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) and value is not DEEP else ()
    for key in keys:
        yield value, key
        yield from walk(value[key]) if value[key] is not DEEP else ()


def spoil_lines(values: list[Any], rng: random.Random) -> None:
    """A line goes, occurs twice, or stands elsewhere; or one of them holds something else."""
    if not values:
        return
    place = rng.randrange(len(values))
    deed = rng.randrange(4)
    if deed == 0:
        del values[place]
    elif deed == 1:
        values.insert(rng.randint(0, len(values)), copy.deepcopy(values[place]))
    elif deed == 2:
        rng.shuffle(values)
    else:
        values[place] = rng.choice([[], None, 7, "text", {}])


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes become others, go, or occur twice; or the file ends early."""
    place = rng.randrange(len(content) + 1)
    end = min(len(content), place + rng.choice([1, 1, 2, 30]))
    inserted = rng.choice(
        [b"", b"", rng.randbytes(2), b"\xff", b"\x00", b"\n", b'"', b"\xef\xbb\xbf", b"}", b"[" * 3000, b"9" * 5000]
    )
    return rng.choice([content[:place], content[:place] + inserted + content[end:], content[:end] + content[place:]])


def recipe(kind: str, folder: Path) -> Recipe:
    source: dict[str, Any] = {"kind": kind, "path": str(folder), "max_per_conversation": 1}
    return Recipe.model_validate(
        {
            "name": "fuzz",
            "model": {"base": "random:tiny", "max_length": 512, "system_prompt": "Be kind."},
            "corpus": {"sources": [source], "reply_tokens": [5, 40], "context_tokens": 100},
            "sample": {"max_new_tokens": 64},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [{"name": "rlaif", "labels": "ai", "pool": "rlaif"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        }
    )


def outcome(kind: str, folder: Path) -> str:
    """ "rows" or "error", after what is asserted of each."""
    report = Report()
    settings = recipe(kind, folder)
    examples, pairs, fault = [], [], ""
    try:
        for some, others in fitted(kind, settings.corpus.sources[0], settings, lambda text: len(text.split()), report):
            examples += some
            pairs += others
    except UserError as error:
        fault = str(error)
    if fault:
        assert re.search(rf"{re.escape(str(folder))}/[a-z_]+\.jsonl?\b.*\bline \d+", fault, re.DOTALL), fault
        return "error"
    for row in (*examples, *pairs):
        canonical_json(row.model_dump(mode="json")).encode()
    counts = json.loads(json_text(report.as_json()))
    assert counts["kept"].get("examples", 0) + counts["kept"].get("prompts without reply", 0) == len(examples)
    assert counts["kept"].get("outcome pairs", 0) == len(pairs)
    assert_they_add_up(kind, counts)
    return "rows"


def fuzz(kind: str, seeds: range, folder: Path) -> Counter[str]:
    sound, found = CORPORA[kind](), Counter[str]()
    for seed in seeds:
        for path in folder.iterdir():
            path.unlink()
        for name, content in mutated(sound, random.Random(f"{kind} {seed}")).items():
            (folder / name).write_bytes(content)
        try:
            found[outcome(kind, folder)] += 1
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {error!r}") from error
    return found


@pytest.mark.parametrize("kind", CORPORA)
def test_the_sound_corpora_give_what_is_in_them(kind: str, tmp_path: Path) -> None:
    """Else the mutations below would test a reader that never gets anywhere."""
    for name, values in CORPORA[kind]().items():
        (tmp_path / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    report, settings = Report(), recipe(kind, tmp_path)
    for _ in fitted(kind, settings.corpus.sources[0], settings, lambda text: len(text.split()), report):
        pass
    counts = report.as_json()
    assert_they_add_up(kind, counts)
    kept = {"cmv": (1, 1, 2), "p4g": (2, 0, 0), "jsonl": (1, 1, 1)}[kind]
    assert tuple(counts["kept"].get(name, 0) for name in ("examples", "prompts without reply", "outcome pairs")) == kept


@pytest.mark.parametrize("kind", CORPORA)
def test_some_mutated_corpora(kind: str, tmp_path: Path) -> None:
    found = fuzz(kind, range(FEW), tmp_path)
    assert min(found["rows"], found["error"]) > FEW / 10, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", CORPORA)
def test_thousands_of_mutated_corpora(kind: str, tmp_path: Path) -> None:
    found = fuzz(kind, range(FEW, FEW + MANY), tmp_path)
    assert min(found["rows"], found["error"]) > MANY / 10, found


def test_mutated_files_of_arguments(tmp_path: Path) -> None:
    """UKPConvArg1's reader, which graders are trained with."""
    file = tmp_path / "tv-is-better-than-books_tv.csv"
    sound = b"#id\tlabel\ta1\ta2\n" + b"".join(
        f"arg{n}\ta{1 + n % 2}\tTelevision shows it.<br/>Books tell\tR\u00e9ading takes {n} hours\n".encode() for n in range(5)
    )
    found: Counter[str] = Counter()
    for seed in range(FEW):
        file.write_bytes(spoil_bytes(sound, random.Random(seed)))
        fault = ""
        try:
            found["rows"] += bool(read_ukp(file))
        except UserError as error:
            fault = str(error)
            found["error"] += 1
        assert not fault or re.search(rf"{re.escape(str(file))}, line \d+", fault), fault
    assert min(found["rows"], found["error"]) > FEW / 10, found
