"""From verdicts to training pairs: what may never become a preference, what is counted, and the stage with and without people."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suasion import preferences, recipe
from suasion.errors import UserError
from suasion.grading.pairs import SampledPair
from suasion.records import Pair, Preference, Prompt, Response, Turn, Verdict, read_json, read_rows, write_rows
from suasion.rundir import Input, StageContext
from suasion.sections.labeling import PreferencesSection
from suasion.sections.training import DpoArm

DROP, FIRST = PreferencesSection(), PreferencesSection(conflicts="first")
RLAIF = DpoArm(name="rlaif", labels="ai", pool="rlaif")
RLHF = DpoArm(name="rlhf", labels="human", pool="rlhf")
MATCHED = DpoArm(name="rlaif-matched", labels="ai", pool="rlhf", matched=True)


def sampled(i: int, pool: str = "rlhf", a: str = "First words here.", b: str = "Second.") -> SampledPair:
    prompt = Prompt(
        id=f"{pool}{i}", corpus="cmv", conversation_id=f"t{pool}{i}", author="x", turns=(Turn(role="user", text=f"view {i}"),)
    )
    left, right = (
        Response(
            id=f"{prompt.id}-{n}", prompt_id=prompt.id, n=n, text=text, finish="stop" if n else "length",
            tokens=tuple(range(len(text.split()))), logprob=-1.0, lineage="sft", seed=0,
        )
        for n, text in enumerate((a, b))
    )  # fmt: skip
    return SampledPair(Pair(id=f"p-{prompt.id}", prompt_id=prompt.id, pool=pool, a=left.id, b=right.id), prompt, left, right)


def verdict(item: SampledPair, label: str, order: str = "both", source: str = "ai:embedding") -> Verdict:
    return Verdict(pair_id=item.pair.id, source=source, order=order, label=label, p_a=None)


labels = st.sampled_from(["a", "b", "tie", "none"])
orders = st.sampled_from(["ab", "ba", "both"])
said = st.lists(st.tuples(labels, orders, st.sampled_from(["one", "two"])), max_size=4)
words = st.sampled_from(["yes", "no", "yes ", ""])


@given(
    st.lists(st.tuples(said, said, words, words), max_size=8),
    st.sampled_from([DROP, FIRST]),
    st.sampled_from([RLHF, MATCHED, RLAIF]),
)
def test_no_tie_or_missing_label_becomes_a_preference_and_every_pair_counts_once(cases, settings, arm):
    pool = "rlaif" if arm is RLAIF else "rlhf"
    pairs = [sampled(i, pool, a, b) for i, (_, _, a, b) in enumerate(cases)]
    ai = [verdict(item, *one) for item, case in zip(pairs, cases, strict=True) for one in case[0]]
    human = [verdict(item, *one) for item, case in zip(pairs, cases, strict=True) for one in case[1]]
    rows, counts = preferences.build(arm, pairs, ai, human, None, settings)
    assert counts["pairs"] == len(pairs) == counts["n"] + sum(counts[reason] for reason in preferences.REASONS)
    assert counts["n"] == len(rows)
    by_prompt = {item.prompt.id: (item, case) for item, case in zip(pairs, cases, strict=True)}
    for row in rows:
        item, case = by_prompt[row.prompt.id]
        given_labels = {one[0] for one in case[1 if arm is RLHF else 0]} - {"none"}
        winner = "a" if row.chosen == item.a else "b"
        assert winner in given_labels
        assert settings is FIRST or given_labels == {winner}
        assert row.chosen.text.strip() != row.rejected.text.strip()
        assert {row.chosen.id, row.rejected.id} == {item.a.id, item.b.id}


@given(said, st.sampled_from([DROP, FIRST]))
def test_swapping_a_pair_and_its_verdicts_gives_the_same_preference(given_verdicts, settings):
    item = sampled(0)
    turned = SampledPair(item.pair.model_copy(update={"a": item.pair.b, "b": item.pair.a}), item.prompt, item.b, item.a)
    verdicts = [verdict(item, *one) for one in given_verdicts]
    rows, counts = preferences.build(RLHF, [item], [], verdicts, None, settings)
    swapped = preferences.build(RLHF, [turned], [], [one.swapped() for one in verdicts], None, settings)
    assert (rows, counts) == swapped


def test_settle_tells_flips_from_conflicts():
    item = sampled(0)

    def settle(*given_verdicts, policy="drop"):
        return preferences.settle([verdict(item, *one) for one in given_verdicts], policy)

    assert settle() == settle(("none", "ab", "x")) == "none"
    assert settle(("a", "ab", "x"), ("none", "ba", "y"), ("a", "ba", "y")) == "a"
    assert settle(("a", "ab", "x"), ("b", "ba", "x")) == "flip"
    assert settle(("a", "ab", "x"), ("b", "ba", "y")) == "conflict"
    assert settle(("a", "ab", "x"), ("b", "ab", "x")) == "conflict"
    assert settle(("a", "ab", "x"), ("tie", "ba", "x")) == "conflict"
    assert settle(("tie", "ab", "x"), ("a", "ba", "y"), policy="first") == "tie"
    assert settle(("none", "ab", "x"), ("b", "ba", "y"), ("a", "ab", "z"), policy="first") == "b"


def test_matched_takes_exactly_the_pairs_with_a_decisive_human_label():
    pairs = [sampled(i) for i in range(5)]
    ai = [verdict(item, "a") for item in pairs]
    human = [verdict(item, label, "ab", "ann") for item, label in zip(pairs, ("a", "b", "tie", "none"), strict=False)]
    rows, counts = preferences.build(MATCHED, pairs, ai, human, None, DROP)
    assert [row.prompt.id for row in rows] == ["rlhf0", "rlhf1"]
    assert counts["unmatched"] == 3
    assert all(row.sources == ("ai:embedding",) and row.chosen.n == 0 for row in rows)


def imported_row(i: int) -> Preference:
    item = sampled(100 + i)
    gone = {"tokens": None, "logprob": None, "lineage": "imported", "finish": "unknown"}
    chosen, rejected = item.b.model_copy(update=gone), item.a.model_copy(update=gone)
    return Preference(id=f"i{i}", prompt=item.prompt, chosen=chosen, rejected=rejected, sources=("people",), on_policy=False)


def test_imported_labels_train_the_human_arms_and_leave_matched_its_own_pairs():
    pairs, imported = [sampled(i) for i in range(3)], [imported_row(i) for i in range(4)]
    ai = [verdict(item, "b") for item in pairs]
    rows, counts = preferences.build(RLHF, pairs, ai, [], imported, DROP)
    assert rows == imported
    assert counts["n"] == 4
    rows, counts = preferences.build(MATCHED, pairs, ai, [], imported, DROP)
    assert (counts["n"], counts["unmatched"]) == (3, 0)
    assert all(row.on_policy for row in rows)


def test_describe_by_hand():
    facts = preferences.describe([preferences.to_preference(sampled(0), "a", ("x",), True), imported_row(0)])
    assert facts["length_accuracy"] == 0.5  # 3 tokens over 1, then 7 characters against 17
    assert facts["finish"] == {"chosen": {"length": 1, "unknown": 1}, "rejected": {"stop": 1, "unknown": 1}}
    assert (facts["on_policy"], facts["sources"]) == (False, ["people", "x"])
    assert preferences.describe([])["length_accuracy"] is None


def test_an_arm_with_too_little_says_why():
    pairs = [sampled(i, "rlaif") for i in range(6)]
    ai = [verdict(item, "tie" if i else "a") for i, item in enumerate(pairs)]
    rows, counts = preferences.build(RLAIF, pairs, ai, None, None, DROP)
    with pytest.raises(UserError, match=r"arm 'rlaif' has 1 preferences from 6 rlaif pairs \(5 tie\)"):
        preferences.require_enough(RLAIF, rows, counts)


# The stage


def context(
    tmp_path: Path, with_people: bool, source: dict | None = None, imported: list[Preference] | None = None
) -> StageContext:
    pairs = [sampled(i, pool) for pool in ("rlaif", "rlhf") for i in range(8)]
    for name in ("sample", "pools", "ai-labels", "human-labels", "preferences"):
        (tmp_path / name).mkdir(exist_ok=True)
    for pool in ("rlaif", "rlhf"):
        write_rows(tmp_path / "pools" / f"{pool}.jsonl", [item.prompt for item in pairs if item.pair.pool == pool])
    write_rows(tmp_path / "sample" / "pairs.jsonl", [item.pair for item in pairs])
    write_rows(tmp_path / "sample" / "responses.jsonl", [response for item in pairs for response in (item.a, item.b)])
    write_rows(tmp_path / "ai-labels" / "verdicts.jsonl", [verdict(item, "ab"[i % 2]) for i, item in enumerate(pairs)])
    people = [
        verdict(item, ("a", "a", "b", "tie")[i % 4], "ab", "simulated")
        for i, item in enumerate(pairs)
        if item.pair.pool == "rlhf"
    ]
    write_rows(tmp_path / "human-labels" / "verdicts.jsonl", [] if imported else people)
    write_rows(tmp_path / "human-labels" / "imported.jsonl", imported or [])
    files = [
        ("sample", "pairs.jsonl"),
        ("sample", "responses.jsonl"),
        ("pools", "rlaif.jsonl"),
        ("pools", "rlhf.jsonl"),
        ("ai-labels", "verdicts.jsonl"),
    ]
    files += [("human-labels", "verdicts.jsonl"), ("human-labels", "imported.jsonl")] if with_people else []
    settings = recipe.validate_recipe(
        {
            "name": "test",
            "corpus": {"sources": [{"kind": "cmv"}]},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": source or {"kind": "simulated"}},
            "dpo": [arm.model_dump(mode="json") for arm in (RLAIF, RLHF, MATCHED)],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        },
        "test",
    )
    inputs = {Input(where, file): tmp_path / where / file for where, file in files}
    return StageContext(settings, "preferences", tmp_path / "preferences", inputs, tmp_path / "cache")


def read(folder: Path, arm: str) -> list[Preference]:
    return list(read_rows(folder / f"{arm}.jsonl", Preference))


def test_stage_with_people(tmp_path):
    stage = context(tmp_path, with_people=True)
    result = preferences.run_stage(stage)
    assert {arm: len(read(stage.folder, arm)) for arm in ("rlaif", "rlhf", "rlaif-matched")} == {
        "rlaif": 8,
        "rlhf": 6,
        "rlaif-matched": 6,
    }
    assert {row.prompt.id for row in read(stage.folder, "rlhf")} == {row.prompt.id for row in read(stage.folder, "rlaif-matched")}
    assert result.dropped == {"rlhf: tie": 2, "rlaif-matched: unmatched": 2}
    assert (result.rows_in, result.rows_out) == (24, 20)
    agreement = read_json(stage.folder / "agreement.json")
    assert (agreement["n"], agreement["both_decisive"]) == (8, 6)
    assert agreement["sources"] == {"ai": ["ai:embedding"], "human": ["simulated"]}
    assert agreement["page"] == "preferences/disagreements.html"
    page = (stage.folder / "disagreements.html").read_text()
    differ = agreement["n"] - sum(agreement["table"][label][label] for label in ("a", "b", "tie"))
    assert f"{differ} of 8 pairs" in page
    assert page.count("<article>") == differ > 0
    assert read_json(stage.folder / "counts.json")["arms"]["rlhf"]["tie"] == 2
    assert Counter(row.chosen.n for row in read(stage.folder, "rlhf")) == {0: 4, 1: 2}
    json.dumps(result.facts, allow_nan=False)
    before = {file.name: file.read_bytes() for file in stage.folder.iterdir()}
    preferences.run_stage(stage)
    assert before == {file.name: file.read_bytes() for file in stage.folder.iterdir()}


def test_stage_without_people_goes_on_with_the_arms_that_need_none(tmp_path):
    stage = context(tmp_path, with_people=False)
    result = preferences.run_stage(stage)
    assert sorted(file.name for file in stage.folder.iterdir()) == ["counts.json", "rlaif.jsonl"]
    assert result.facts["left_out"] == ["rlhf", "rlaif-matched"]
    assert result.facts["agreement"] is None


def test_stage_with_imported_labels(tmp_path):
    source = {"kind": "file", "path": "x.jsonl", "layout": "preferences"}
    stage = context(tmp_path, True, source, [imported_row(i) for i in range(5)])
    result = preferences.run_stage(stage)
    assert len(read(stage.folder, "rlhf")) == 5
    assert result.facts["arms"]["rlhf"]["on_policy"] is False
    assert "not on the pairs that people labelled" in result.facts["arms"]["rlaif-matched"]["note"]
    assert not (stage.folder / "agreement.json").exists()
