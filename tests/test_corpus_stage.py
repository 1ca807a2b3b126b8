"""The corpus stage: lengths at turn borders, counts that add up, own rows, and nothing left to chance."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from accounts import assert_they_add_up
from hypothesis import given
from hypothesis import strategies as st

from suasion.corpora import cmv, p4g
from suasion.corpora.convokit import Tally
from suasion.corpora.stage import (
    CUT,
    FIXED_TURN_TOKENS,
    LEAST_CLAIM,
    TURN_TOKENS,
    bundled_path,
    choose,
    external_hashes,
    fit_context,
    labels,
    run_stage,
    shorten,
)
from suasion.corpora.stats import QUANTILES, quantiles
from suasion.errors import UserError
from suasion.recipe import Recipe
from suasion.records import Example, OutcomePair, Turn, content_id, read_json, read_rows, sha256_file, turns_key, write_rows
from suasion.rundir import StageContext

EXTRACT = {"cmv": cmv.extract, "p4g": p4g.extract}


def count(text: str) -> int:
    """A tokenizer for tests: one token a word."""
    return len(text.split())


def turn(role: Any, words: int, mark: str = "w") -> Turn:
    return Turn(role=role, text=" ".join(f"{mark}{i}" for i in range(words)))


def cost(turns: tuple[Turn, ...]) -> int:
    fixed = FIXED_TURN_TOKENS * ((turns[0].role == "assistant") + (turns[-1].role == "assistant"))
    return fixed + sum(TURN_TOKENS + count(each.text) + count(each.name or "") for each in turns)


dialogues = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.integers(1, 60)), min_size=1, max_size=8).map(
    lambda rows: tuple(turn(role, words, f"t{n}w") for n, (role, words) in enumerate(rows))
)


@given(dialogues, st.integers(32, 300), st.booleans())
def test_contexts_fit_and_keep_what_matters(turns: tuple[Turn, ...], budget: int, keep_first: bool) -> None:
    fitted = fit_context(turns, budget, keep_first, count)
    if cost(turns) <= budget:
        assert fitted == turns
    elif fitted is None:
        assert cost(turns[-1:]) + 3 > budget or (
            keep_first and budget - cost((turns[0], *turns[-1:])) + count(turns[0].text) < LEAST_CLAIM + 24
        )
    else:
        assert cost(fitted) <= budget
        assert CUT in fitted[0].text
        if keep_first:
            assert fitted[0].text.startswith("t0w0")
            assert fitted[1:] == turns[len(turns) - len(fitted) + 1 :]
        else:
            assert fitted[0].text == f"{CUT} {turns[len(turns) - len(fitted)].text}"
            assert fitted[1:] == turns[len(turns) - len(fitted) + 1 :]


def test_the_oldest_turns_go_first() -> None:
    turns = (
        turn("user", 50, "post"),
        turn("assistant", 50, "old"),
        turn("user", 50, "mid"),
        turn("assistant", 50, "new"),
        turn("user", 20, "last"),
    )
    fitted = fit_context(turns, 170, True, count)
    assert fitted is not None
    assert fitted[0].text == f"{turns[0].text}\n\n{CUT}"
    assert fitted[1:] == turns[3:]
    assert fit_context(turns, cost(turns), True, count) == turns


def test_a_post_alone_is_shortened_from_its_end() -> None:
    post = Turn(role="user", text="Title here\n\n" + " ".join(f"w{i}" for i in range(300)))
    (fitted,) = fit_context((post,), 100, True, count) or ()
    assert fitted.text.startswith("Title here\n\nw0 w1")
    assert fitted.text.endswith(f"\n\n{CUT}")
    assert cost((fitted,)) <= 100
    assert fit_context((post, turn("user", 90)), 100, True, count) is None  # the answered turn leaves no room for the post
    assert fit_context((turn("assistant", 5), turn("user", 90)), 80, False, count) is None


@pytest.mark.parametrize("answered", [(), (turn("user", 9),)])
def test_names_of_speakers_count(answered: tuple[Turn, ...]) -> None:
    """Own rows may name every speaker, also the one who makes the claim."""
    post = turn("user", 300).model_copy(update={"name": "a speaker with a name of nine words in all"})
    fitted = fit_context((post, *answered), 120, True, count)
    assert fitted is not None
    assert cost(fitted) <= 120


@given(st.text("ab \n", max_size=60), st.integers(0, 20))
def test_shorten_is_the_longest_beginning_that_fits(text: str, budget: int) -> None:
    short = shorten(text, budget, count)
    assert text.startswith(short)
    assert count(short) == min(count(text), budget)


def example(n: int, reply: str | None = "a reply") -> Example:
    return Example(
        id=content_id("x", n), corpus="mine", conversation_id="c", author="a", turns=(turn("user", 3),), reply=reply, outcome=None
    )


def test_examples_are_drawn_by_id_and_not_by_position() -> None:
    rows = [example(n) for n in range(9)]
    bare = example(99, None)
    drawn = choose([*rows, bare], 3, seed=5)
    assert len(drawn) == 3
    assert drawn == choose([bare, *rows[::-1]], 3, seed=5)
    assert bare not in drawn
    assert any(choose(rows, 3, seed) != drawn for seed in range(6, 12))
    assert choose([bare], 3, 0) == [bare]
    prompts = [example(n, None) for n in range(90, 99)]
    assert len(choose(prompts, 3, 0)) == 3
    assert choose([], 3, 0) == []
    assert set(choose(rows, 3, 5)) <= set(choose(rows, 4, 5))


@given(st.lists(st.integers(0, 40), min_size=1))
def test_quantiles_of_counts_are_those_of_the_sorted_values(values: list[int]) -> None:
    ranked = sorted(values)
    found = quantiles(Counter(values))
    assert found["min"] == ranked[0]
    assert found["max"] == ranked[-1]
    for q in QUANTILES:
        assert found[f"p{round(100 * q):02d}"] == ranked[min(int(q * len(ranked)), len(ranked) - 1)]


def test_labels_and_quantiles() -> None:
    sources = recipe([{"kind": "cmv"}, {"kind": "p4g"}, {"kind": "cmv"}]).corpus.sources
    assert labels(sources) == ["cmv", "p4g", "cmv-2"]
    assert quantiles(Counter()) == {}
    assert quantiles(Counter(range(100))) == {"min": 0, "p05": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 99}


def recipe(sources: list[dict[str, Any]], **corpus: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"max_length": 512, "system_prompt": "Be kind."},
            "corpus": {"sources": sources, "reply_tokens": [3, 100], "context_tokens": 256, **corpus},
            "sample": {"max_new_tokens": 128},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [{"name": "rlaif", "labels": "ai", "pool": "rlaif"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        }
    )


class WordTokenizer:
    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(count(text)))}


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suasion.models.load_tokenizer", lambda section: WordTokenizer())


def run(folder: Path, wanted: Recipe) -> tuple[Any, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return run_stage(StageContext(recipe=wanted, stage="corpus", folder=folder, inputs={}, cache=folder)), folder


def test_the_bundled_corpora(tmp_path: Path, words: None) -> None:
    wanted = recipe([{"kind": "cmv"}, {"kind": "p4g", "max_per_conversation": 2}])
    result, folder = run(tmp_path / "one", wanted)
    again, other = run(tmp_path / "two", wanted)
    assert result == again
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }
    examples = list(read_rows(folder / "examples.jsonl", Example))
    pairs = list(read_rows(folder / "outcome_pairs.jsonl", OutcomePair))
    counts = read_json(folder / "counts.json")
    assert result.rows_out == len(examples) + len(pairs)
    assert result.rows_in == 567 + 557
    assert len(pairs) == counts["cmv"]["kept"]["outcome pairs"] == 234
    assert counts["cmv"]["kept"]["examples"] == 153
    assert counts["p4g"]["kept"]["examples"] == 84
    assert counts["p4g"]["dropped"]["beyond max_per_conversation"] + 84 + 8 + 42 == counts["p4g"]["read"]["persuader turns"]
    for kind in ("cmv", "p4g"):
        assert_they_add_up(kind, counts[kind])
    assert len({row.id for row in examples}) == len(examples)
    clean = {row.reply for kind in ("cmv", "p4g") for rows, _ in EXTRACT[kind](bundled_path(kind), Tally()) for row in rows}
    for row in examples:
        assert row.reply in clean  # whole: a reply is never cut
        assert row.id == content_id("example", row.corpus, row.conversation_id, turns_key(row.turns), row.reply or "")
    assert external_hashes(wanted)["cmv:utterances.jsonl"] == sha256_file(bundled_path("cmv") / "utterances.jsonl")


def test_own_rows(tmp_path: Path, words: None) -> None:
    own = tmp_path / "own"
    own.mkdir()
    rows = [
        example(1, "one two three"),
        example(2, "too short"),
        example(3, "word " * 101),
        example(4, None),
        example(5, "one two three").model_copy(update={"turns": (), "conversation_id": "d"}),
        example(6, None).model_copy(update={"conversation_id": "e"}),
    ]
    pair = OutcomePair(
        id="p",
        corpus="mine",
        conversation_id="c",
        group="a",
        turns=rows[0].turns,
        winner="one two three four",
        loser="one two three",
    )
    write_rows(own / "examples.jsonl", rows)
    write_rows(own / "outcome_pairs.jsonl", [pair, pair.model_copy(update={"id": "q", "loser": "no"})])
    wanted = recipe([{"kind": "jsonl", "path": str(own)}])
    result, folder = run(tmp_path / "out", wanted)
    assert [(row.conversation_id, row.reply) for row in read_rows(folder / "examples.jsonl", Example)] == [
        ("c", "one two three"),
        ("e", None),
    ]
    assert result.dropped == {
        "reply too short": 1,
        "reply too long": 1,
        "example without a turn, or with an empty one": 1,
        "conversation of which nothing is kept": 1,
        "prompt beside a kept reply": 1,
        "pair with a side too short or too long": 1,
    }
    counts = read_json(folder / "counts.json")["jsonl"]
    assert counts["longer_wins_rate"] == 1.0
    assert_they_add_up("jsonl", counts)
    assert set(external_hashes(wanted)) == {"jsonl:examples.jsonl", "jsonl:outcome_pairs.jsonl"}


def test_a_corpus_of_which_nothing_is_left(tmp_path: Path, words: None) -> None:
    own = tmp_path / "own"
    own.mkdir()
    write_rows(own / "examples.jsonl", [example(2, "too short")])
    with pytest.raises(UserError, match=r"no example is left of jsonl: 1 reply too short"):
        run(tmp_path / "out", recipe([{"kind": "jsonl", "path": str(own)}]))


def test_a_missing_corpus(tmp_path: Path, words: None) -> None:
    with pytest.raises(UserError, match="the folder does not exist"):
        run(tmp_path / "out", recipe([{"kind": "cmv", "path": str(tmp_path / "nowhere")}]))
    with pytest.raises(UserError, match=r"examples\.jsonl does not exist"):
        run(tmp_path / "out", recipe([{"kind": "jsonl", "path": str(tmp_path / "nowhere")}]))
