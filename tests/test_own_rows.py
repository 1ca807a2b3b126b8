"""Own rows: what may be left out, what may not, and what a person who wrote a line by hand is told about it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from suasion.corpora import own
from suasion.corpora.convokit import Tally
from suasion.corpora.stage import external_hashes, survey
from suasion.errors import UserError
from suasion.recipe import Recipe
from suasion.records import Example, OutcomePair, content_id, example_id, outcome_pair_id, turns_key, write_rows

TURNS = [{"role": "user", "text": "Why should I cycle to work?"}]
LEAST = {"conversation_id": "c1", "author": "ann", "turns": TURNS, "reply": "You said that you like quiet mornings."}
PAIR = {"conversation_id": "c1", "group": "ann", "turns": TURNS, "winner": "Mornings are quiet.", "loser": "Everybody does."}


def write(folder: Path, *rows: Any, name: str = "examples.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return folder


def read(path: Path, corpus: str = "jsonl", **options: Any) -> tuple[list[Example], list[OutcomePair], Tally]:
    tally = Tally()
    found = list(own.extract(path, tally, corpus, **options))
    return [row for rows, _ in found for row in rows], [row for _, rows in found for row in rows], tally


def test_what_follows_from_the_rest_may_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "own", LEAST)
    write(tmp_path / "own", PAIR, name="outcome_pairs.jsonl")
    (example,), (pair,), tally = read(tmp_path / "own", "jsonl-2")
    assert (example.corpus, example.outcome, example.strategies, example.format) == ("jsonl-2", None, (), "example/1")
    assert example.id == content_id("example", "jsonl-2", "c1", turns_key(example.turns), LEAST["reply"])
    assert example.id == example_id("jsonl-2", "c1", example.turns, example.reply)
    assert pair.id == outcome_pair_id("jsonl-2", "c1", pair.turns, pair.winner, pair.loser)
    assert tally.read == {"rows": 2, "examples": 1, "outcome pairs": 1, "conversations": 1}
    assert not +tally.dropped


def test_what_is_given_stays(tmp_path: Path) -> None:
    given_row = {**LEAST, "id": "mine", "corpus": "mine", "outcome": 0.5, "strategies": ["plea"], "format": "example/1"}
    (example,), _, _ = read(write(tmp_path, given_row))
    assert (example.id, example.corpus, example.outcome, example.strategies) == ("mine", "mine", 0.5, ("plea",))


def test_rows_that_a_run_wrote_come_back_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first, _, _ = read(write(tmp_path / "b", LEAST, {**LEAST, "conversation_id": "c2", "reply": None}))
    write_rows(tmp_path / "a" / "examples.jsonl", first)
    assert read(tmp_path / "a", "another name")[0] == first


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**LEAST, "repley": "x"},
            "line 2: unknown field repley, did you mean 'reply'? (known: author, conversation_id, corpus,",
        ),
        (
            {**LEAST, "turns": [{"role": "user", "txt": "x"}]},
            "unknown field turns.0.txt, did you mean 'text'? (known: name, role, text)",
        ),
        (
            {**LEAST, "turns": [{"role": "human", "text": "x"}]},
            "turns.0.role: Input should be 'user' or 'assistant' (it is 'human')",
        ),
        ({**LEAST, "conversation_id": 7}, "conversation_id: Input should be a valid string (it is 7)"),
        ({name: LEAST[name] for name in LEAST if name != "author"}, "line 2: field author is missing"),
        ({name: LEAST[name] for name in LEAST if name != "reply"}, "line 2: field reply is missing"),
        ({**LEAST, "author": "  "}, "line 2: author is empty"),
        ({**LEAST, "id": ""}, "line 2: id is empty"),
        ({**LEAST, "id": None}, "id: Input should be a valid string (it is None)"),
        ({**LEAST, "format": "example/2"}, "format: Input should be 'example/1' (it is 'example/2')"),
        (json.dumps(LEAST)[:-2] + ', "outcome": NaN}', "line 2: not valid JSON"),
        ('{"conversation_id": "c", "author": "a", "turns": [], "reply": null, "outcome": NaN}', "outcome: nan is no number"),
        ('{"conversation_id": "c", "author": "a", "turns": [], "reply": null, "outcome": 1e999}', "outcome: inf is no number"),
        ("[]", "line 2: expected a JSON object"),
        (PAIR, "this is an outcome pair: it belongs into outcome_pairs.jsonl"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    write(tmp_path, {**LEAST, "conversation_id": "c0"}, row)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(tmp_path / "examples.jsonl") in str(error.value)
    assert message in str(error.value)


def test_a_wrong_pair_is_named(tmp_path: Path) -> None:
    write(tmp_path, LEAST)
    write(tmp_path, PAIR, {**PAIR, "author": "ann"}, name="outcome_pairs.jsonl")
    with pytest.raises(UserError, match=r"outcome_pairs\.jsonl, line 2: unknown field author \(known: conversation_id, corpus,"):
        read(tmp_path)


def test_a_row_twice_is_one_row_and_a_contradiction_is_an_error(tmp_path: Path) -> None:
    examples, _, tally = read(write(tmp_path / "a", LEAST, LEAST, {**LEAST, "reply": None}, {**LEAST, "reply": None}))
    assert len(examples) == 2
    assert +tally.dropped == {"example that occurs twice": 1, "prompt that occurs twice": 1}
    write(tmp_path / "b", LEAST, {**LEAST, "conversation_id": "c2"}, {**LEAST, "outcome": 1})
    with pytest.raises(UserError, match=r"line 3: has the id of .*line 1 \([0-9a-f]{16}\) but another outcome"):
        read(tmp_path / "b")
    write(tmp_path / "c", {**LEAST, "id": "1"}, {**LEAST, "id": "1", "conversation_id": "c2"})
    with pytest.raises(UserError, match=r"line 2: has the id of .*line 1 \(1\) but another conversation_id"):
        read(tmp_path / "c")


@pytest.mark.parametrize("bucket_bytes", [50, 10**9])
def test_a_contradiction_is_found_wherever_its_rows_stand(tmp_path: Path, bucket_bytes: int) -> None:
    """Rows of different conversations are never in memory together where the file is read in parts."""
    rows = [{**LEAST, "id": f"r{i}", "conversation_id": f"c{i}"} for i in range(60)]
    write(tmp_path, *rows, {**rows[0], "reply": "Another one."}, {**rows[7], "conversation_id": "c8"}, rows[3])
    tally = Tally()
    with pytest.raises(UserError, match=r"line 61: has the id of .*line 1 \(r0\) but another reply"):
        next(own.extract(tmp_path, tally, "jsonl", bucket_bytes))
    write(tmp_path, *rows, {**rows[7], "conversation_id": "c8"}, rows[3])
    with pytest.raises(UserError, match=r"line 61: has the id of .*line 8 \(r7\) but another conversation_id"):
        next(own.extract(tmp_path, tally, "jsonl", bucket_bytes))
    pair = {**PAIR, "id": "r1"}  # ids of examples and of pairs are apart
    write(tmp_path, pair, pair, name="outcome_pairs.jsonl")
    examples, pairs, tally = read(write(tmp_path, *rows, rows[3]), bucket_bytes=bucket_bytes)
    assert (len(examples), len(pairs)) == (60, 1)
    assert +tally.dropped == {"example that occurs twice": 1, "pair that occurs twice": 1}


def test_hashes_that_agree_by_chance_are_no_contradiction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_hash64", lambda data: len(data) if b"{" in data else 1)
    examples, _, _ = read(write(tmp_path, LEAST, {**LEAST, "reply": "No."}, {**LEAST, "reply": "Perhaps not."}))
    assert len(examples) == 3


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(30)), bucket_bytes=st.sampled_from([300, 3000, 10**9]))
def test_neither_row_order_nor_parts_change_what_is_read(tmp_path: Path, order: list[int], bucket_bytes: int) -> None:
    replies = [None if i % 5 == 0 else f"R\u00e9ply {i}" for i in range(30)]
    rows = [
        {**LEAST, "corpus": f"k{i % 2}", "conversation_id": f"c{i % 7}", "reply": replies[i], "outcome": i / 7} for i in range(30)
    ]
    write(tmp_path, *(rows[i] for i in order))
    write(tmp_path, *({**PAIR, "loser": f"Not {i}", "conversation_id": f"c{i}"} for i in range(3)), name="outcome_pairs.jsonl")
    found = list(own.extract(tmp_path, tally := Tally(), "jsonl", bucket_bytes))
    assert all(len({(row.corpus, row.conversation_id) for row in (*examples, *pairs)}) == 1 for examples, pairs in found)
    assert len(found) == tally.read["conversations"] == 14 + 3  # the pairs are of corpus jsonl
    assert {row.outcome: (row.corpus, row.conversation_id, row.reply) for rows, _ in found for row in rows} == {
        i / 7: (f"k{i % 2}", f"c{i % 7}", replies[i]) for i in range(30)
    }
    assert sorted(pair.loser for _, pairs in found for pair in pairs) == ["Not 0", "Not 1", "Not 2"]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        folder = write(tmp_path / str(count))
        with (folder / "examples.jsonl").open("w") as file:
            for i in range(count):
                file.write(json.dumps({**LEAST, "conversation_id": f"c{i // 5}", "reply": f"{i} " + "word " * 1000}) + "\n")
        tracemalloc.start()
        total = sum(len(examples) for examples, _ in own.extract(folder, Tally(), "jsonl", bucket_bytes=500_000))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == count
        return size

    assert peak(1_600) < 1.5 * peak(400)


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    empty = [{"role": "user", "text": " \u200b "}]
    write(tmp_path, {**LEAST, "turns": []}, {**LEAST, "turns": empty}, {**LEAST, "turns": [], "reply": None})
    write(tmp_path, {**PAIR, "turns": []}, {**PAIR, "loser": PAIR["winner"] + "\r\n"}, name="outcome_pairs.jsonl")
    examples, pairs, tally = read(tmp_path)
    assert examples == pairs == []
    assert +tally.dropped == {
        "example without a turn, or with an empty one": 2,
        "prompt without a turn, or with an empty one": 1,
        "pair without a turn, or with an empty one": 1,
        "pair of equal replies": 1,
    }


texts = st.text(st.characters(exclude_categories=()), min_size=1, max_size=20)


@given(texts, texts)
def test_any_text_can_be_written_again(tmp_path_factory: pytest.TempPathFactory, text: str, reply: str) -> None:
    """Lone surrogates, control characters, line separators: json.loads lets them all through."""
    folder = write(tmp_path_factory.mktemp("own"), {**LEAST, "turns": [{"role": "user", "text": text}], "reply": reply})
    examples, _, _ = read(folder)
    write_rows(folder / "again.jsonl", examples)
    assert read(folder / "again.jsonl")[0] == examples


def test_one_file_of_examples(tmp_path: Path) -> None:
    write(tmp_path, LEAST, name="mine.jsonl")
    write(tmp_path, PAIR, name="outcome_pairs.jsonl")
    examples, pairs, _ = read(tmp_path / "mine.jsonl")
    assert (len(examples), pairs) == (1, [])
    assert set(external_hashes(recipe(tmp_path / "mine.jsonl"))) == {"jsonl:mine.jsonl"}


def test_a_path_without_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"examples\.jsonl does not exist: there is no such folder or file"):
        read(tmp_path / "nowhere")
    write(tmp_path, LEAST, name="exampels.jsonl")
    with pytest.raises(UserError, match=r"examples\.jsonl does not exist \(there is: exampels\.jsonl\)"):
        read(tmp_path)


def recipe(path: Path, **corpus: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "own",
            "model": {"base": "random:tiny", "max_length": 512, "system_prompt": "Be kind."},
            "corpus": {
                "sources": [{"kind": "jsonl", "path": str(path)}],
                "reply_tokens": [2, 100],
                "context_tokens": 80,
                **corpus,
            },
            "sample": {"max_new_tokens": 128},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [{"name": "rlaif", "labels": "ai", "pool": "rlaif"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        }
    )


def test_contexts_that_become_equal_when_cut_give_one_row(tmp_path: Path) -> None:
    claim, last = {"role": "user", "text": "The claim."}, {"role": "user", "text": "So?"}
    middles = [{"role": "assistant", "text": f"{word} " * 90} for word in ("one", "two")]
    write(tmp_path, *({**LEAST, "turns": [claim, middle, last]} for middle in middles))
    counts = survey(recipe(tmp_path))["jsonl"].as_json()
    assert counts["kept"]["examples"] == counts["kept"]["contexts cut"] == 1
    assert counts["dropped"] == {"reply that occurs twice once its context is cut": 1}
