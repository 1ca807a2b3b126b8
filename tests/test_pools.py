"""Pools: exact sizes, disjoint in every way, the same whatever the order of the rows."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from suasion.errors import UserError
from suasion.linking import link
from suasion.pools import Pools, apportion, attainable, conversation_hash, eval_seal, run_stage, split, unused
from suasion.recipe import Recipe
from suasion.records import Example, OutcomePair, Prompt, Turn, content_id, read_json, read_rows, write_rows
from suasion.rundir import Input, StageContext
from suasion.sections.corpus import PoolsSection

WORDS = [f"{a}{b}" for a in "bcdfghjklmnprstvwz" for b in ("ale", "ime", "ond", "ush", "ark")]


def prose(seed: str, count: int = 40) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def example(
    conversation: str,
    n: int = 0,
    corpus: str = "cmv",
    author: str = "",
    replied: bool = True,
    outcome: float = 1.0,
    text: str = "",
) -> Example:
    turns = (Turn(role="user", text=text or prose(f"{corpus}{conversation}")),) + (Turn(role="user", text=f"turn {n}"),) * (n > 0)
    reply = f"reply {n} {prose(f'{corpus}{conversation}{n}', 12)}" if replied else None
    return Example(
        id=content_id("example", corpus, conversation, n),
        corpus=corpus,
        conversation_id=conversation,
        author=author or conversation,
        turns=turns,
        reply=reply,
        outcome=outcome if replied else None,
    )


def pair(row: Example) -> OutcomePair:
    return OutcomePair(
        id=content_id("outcome-pair", row.corpus, row.conversation_id),
        corpus=row.corpus,
        conversation_id=row.conversation_id,
        group=row.author,
        turns=row.turns,
        winner=row.reply or "yes",
        loser="no",
    )


def corpus(cmv: int = 120, p4g: int = 40) -> tuple[list[Example], list[OutcomePair]]:
    """Threads of which a third has no reply, some posters write twice; dialogues of few persuaders, one of whom has many."""
    rows = [example(f"t{i}", replied=i % 3 > 0, author=f"poster{i // 2 if i % 10 < 2 else i + 1000}") for i in range(cmv)]
    pairs = [pair(row) for row in rows if row.reply] + [pair(example(f"only-a-pair-{i}")) for i in range(6)]
    for i in range(p4g):
        author = "busy" if i % 4 == 0 else f"worker{i}"
        rows += [example(f"d{i}", n, "p4g", author, outcome=float(i % 2)) for n in range(3)]
    return rows, pairs


COMPONENT_ROWS = corpus()
COMPONENTS = link(*COMPONENT_ROWS, near_duplicate=0.5)
SECTION = PoolsSection(sft=30, rlaif=24, rlhf=12, eval=10, judge_conversations=8, rlaif_per_conversation=2)


def whole(rows: list[Example], pairs: list[OutcomePair], pools: Pools) -> dict[str, list[Any]]:
    """Pool -> the rows that the stage would write, in their order."""
    return {
        "sft": [rows[entry.place] for entry in pools.sft],
        "rlaif": [rows[entry.place].prompt() for entry in pools.rlaif],
        "rlhf": [rows[entry.place].prompt() for entry in pools.rlhf],
        "eval": [rows[entry.place] for entry in pools.eval],
        "grader_pairs": [pairs[entry.place] for entry in pools.grader_pairs],
        "judge_pairs": [pairs[entry.place] for entry in pools.judge_pairs],
    }


def write_stage(
    folder: Path, section: PoolsSection, rows: list[Example], pairs: list[OutcomePair], seed: int = 0
) -> StageContext:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "examples.jsonl", rows)
    write_rows(folder / "outcome_pairs.jsonl", pairs)
    out = folder / "pools"
    out.mkdir(exist_ok=True)
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "seed": seed,
            "corpus": {"sources": [{"kind": "cmv"}]},
            "pools": section.model_dump(),
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [{"name": "rlaif", "labels": "ai", "pool": "rlaif"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        }
    )
    inputs = {Input("corpus", file): folder / file for file in ("examples.jsonl", "outcome_pairs.jsonl")}
    return StageContext(recipe=recipe, stage="pools", folder=out, inputs=inputs, cache=folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    sizes=st.fixed_dictionaries(
        {
            "sft": st.one_of(st.integers(1, 30), st.just("rest")),
            "rlaif": st.integers(1, 24),
            "rlhf": st.integers(1, 12),
            "eval": st.integers(1, 12),
            "judge_conversations": st.integers(0, 10),
            "rlaif_per_conversation": st.integers(1, 3),
        }
    ),
)
def test_sizes_are_exact_and_nothing_is_in_two_pools(seed: int, sizes: dict[str, int | str]) -> None:
    section = PoolsSection.model_validate(sizes)
    pools = split(COMPONENTS, section, seed)
    assert pools.lacking(section) == {}
    for name in ("sft", "rlaif", "rlhf", "eval"):
        assert sizes[name] in ("rest", len(getattr(pools, name)))
    written = whole(*COMPONENT_ROWS, pools)
    grader_pairs = written.pop("grader_pairs")
    keys = {name: {(row.corpus, row.conversation_id) for row in rows} for name, rows in written.items()}
    authors = {name: {(row.corpus, getattr(row, "author", None) or row.group) for row in rows} for name, rows in written.items()}
    for one, other in combinations(keys, 2):
        assert not keys[one] & keys[other]
        assert not authors[one] & authors[other]
    assert len(keys["eval"]) == len(pools.eval)
    assert len(keys["rlhf"]) == len(pools.rlhf)
    each = [(row.corpus, row.conversation_id) for row in pools.rlaif]
    assert max(map(each.count, each)) <= section.rlaif_per_conversation
    assert all(row.reply for row in [*written["eval"], *written["sft"]])
    assert all((row.outcome or 0) > 0 for row in written["eval"])
    assert {(row.corpus, row.conversation_id) for row in grader_pairs} <= keys["sft"]
    assert pools.judge >= section.judge_conversations
    ids = [row.id for name in ("sft", "eval", "rlaif", "rlhf") for row in written[name]]
    assert len(ids) == len(set(ids))
    assert ids == [entry.id for entry in (*pools.sft, *pools.eval, *pools.rlaif, *pools.rlhf)]


def test_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    rows, pairs = corpus()
    written = []
    for n in range(3):
        rng = random.Random(n)
        rng.shuffle(rows)
        rng.shuffle(pairs)
        stage = write_stage(tmp_path / str(n), SECTION, rows, pairs)
        result = run_stage(stage)
        written.append(({path.name: path.read_bytes() for path in stage.folder.iterdir()}, result.facts))
    assert written[0] == written[1] == written[2]
    assert set(written[0][0]) == {
        *(f"{name}.jsonl" for name in ("sft", "rlaif", "rlhf", "eval", "grader_pairs", "judge_pairs")),
        "held_out.json",
    }


def test_evaluation_takes_replies_that_did_not_persuade_last_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [example(f"c{i}", outcome=float(i < 5)) for i in range(40)]
    section = PoolsSection(sft="rest", rlaif=4, rlhf=4, eval=5)
    for size, told in ((5, False), (8, True)):
        stage = write_stage(tmp_path / str(size), section.model_copy(update={"eval": size}), rows, [])
        facts = run_stage(stage).facts
        assert (
            facts["eval_replies_that_persuaded"]
            == sum((row.outcome or 0) > 0 for row in read_rows(stage.folder / "eval.jsonl", Example))
            == 5
        )
        assert (
            "3 of 8 evaluation prompts have a human reply that is not known to have persuaded"
            in " ".join(capsys.readouterr().out.split())
        ) == told


def test_another_seed_draws_others(tmp_path: Path) -> None:
    rows, pairs = corpus()
    seals = {run_stage(write_stage(tmp_path / str(seed), SECTION, rows, pairs, seed)).facts["eval_seal"] for seed in range(3)}
    assert len(seals) == 3


def test_the_seal_and_what_is_held_out(tmp_path: Path) -> None:
    stage = write_stage(tmp_path, SECTION, *corpus())
    facts = run_stage(stage).facts
    sealed = list(read_rows(stage.folder / "eval.jsonl", Example))
    assert eval_seal(sealed[::-1]) == facts["eval_seal"]
    assert eval_seal(sealed[1:]) != facts["eval_seal"]
    changed = sealed[0].model_copy(update={"reply": "another"})
    assert eval_seal([changed, *sealed[1:]]) != facts["eval_seal"]
    judge = list(read_rows(stage.folder / "judge_pairs.jsonl", OutcomePair))
    taken = {row.conversation_id for row in [*sealed, *judge]}
    linked = {
        each.key[1]
        for component in COMPONENTS
        if any(each.key[1] in taken for each in component.conversations)
        for each in component.conversations
    }
    held = read_json(stage.folder / "held_out.json")["conversation_hashes"]
    assert held == sorted(map(conversation_hash, linked))
    assert facts["held_out_conversations"] == len(linked)
    assert list(read_rows(stage.folder / "rlhf.jsonl", Prompt))


def test_pools_take_each_corpus_by_its_share() -> None:
    pools = split(COMPONENTS, SECTION, 1)
    replied = {"cmv": 80, "p4g": 20}  # conversations with a reply that persuaded
    assert [row.corpus for row in pools.eval].count("cmv") == apportion(10, Counter(replied))["cmv"]
    assert {row.corpus for row in pools.rlhf} == {"cmv", "p4g"}


def test_many_dialogues_of_one_persuader_go_to_sft() -> None:
    pools = split(COMPONENTS, SECTION, 2)
    small = [*pools.eval, *pools.rlaif, *pools.rlhf]
    assert not any(row.author == "busy" for row in small)
    assert any(row.author == "busy" for row in split(COMPONENTS, PoolsSection(sft="rest", rlaif=4, rlhf=4, eval=4), 2).sft)


def test_bare_posts_become_prompts_before_anything_else() -> None:
    pools = split(COMPONENTS, PoolsSection(sft=10, rlaif=10, rlhf=5, eval=5), 3)
    bare = {row.conversation_id for row in COMPONENT_ROWS[0] if row.reply is None}
    assert all(row.conversation_id in bare for row in [*pools.rlaif, *pools.rlhf] if row.corpus == "cmv")


def test_near_duplicates_are_linked_and_chance_likeness_is_not() -> None:
    text = prose("the same", 100)
    altered = " ".join(text.split()[:90] + prose("other end", 10).split())
    rows = [example("a", text=text), example("b", text=altered), example("c", text=prose("else", 100))]
    rows += [example("d", text="Hello, how are you today, my friend?"), example("e", text="Hello, how are you today, my friend?")]
    together = [[conversation.key[1] for conversation in component.conversations] for component in link(rows, [], 0.5)]
    assert together == [["a", "b"], ["c"], ["d"], ["e"]]
    assert len(link(rows, [], 0.99)) == 5


def test_rows_are_not_held_in_memory(tmp_path: Path) -> None:
    """Four times the rows take less memory on top than half of their bytes in the file; the sketch of one text takes the most."""

    def peak(count: int) -> tuple[int, int]:
        rows = [example(f"t{i}", text=prose(f"long {i}", 600)) for i in range(count)]
        section = PoolsSection(sft="rest", rlaif=10, rlhf=5, eval=5)
        stage = write_stage(tmp_path / str(count), section, rows, [])
        tracemalloc.start()
        run_stage(stage)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held, (tmp_path / str(count) / "examples.jsonl").stat().st_size

    peak(40)  # what is imported
    (few, few_bytes), (many, many_bytes) = peak(80), peak(320)
    assert many - few < (many_bytes - few_bytes) / 2


def test_links_are_followed_through() -> None:
    rows = [
        example("a", author="x"),
        example("b", author="x"),
        example("b", 1, author="x"),
        example("c", author="y"),
        example("c", corpus="cmv-2", author="x"),  # of a second folder of the same forum
    ]
    assert [len(component.conversations) for component in link(rows, [], 0.5)] == [3, 1]


def test_what_is_linked_to_held_out_conversations_is_held_out_too(tmp_path: Path) -> None:
    rows = [example(f"t{i}", author=f"poster{i // 2}") for i in range(40)]
    rows += [example(f"bare{i}", author=f"poster{i}", replied=False) for i in range(20)]
    section = PoolsSection(sft=6, rlaif=4, rlhf=2, eval=5, judge_conversations=3)
    stage = write_stage(tmp_path, section, rows, [pair(row) for row in rows if row.reply])
    run_stage(stage)
    held = read_json(stage.folder / "held_out.json")["conversation_hashes"]
    taken = [*read_rows(stage.folder / "eval.jsonl", Example), *read_rows(stage.folder / "judge_pairs.jsonl", OutcomePair)]
    posters = {getattr(row, "author", None) or row.group for row in taken}
    theirs = {row.conversation_id for row in rows if row.author in posters}
    assert theirs > {row.conversation_id for row in taken}
    assert set(map(conversation_hash, theirs)) <= set(held)
    for name, kind in (("sft", Example), ("rlaif", Prompt), ("rlhf", Prompt)):
        assert not {conversation_hash(row.conversation_id) for row in read_rows(stage.folder / f"{name}.jsonl", kind)} & set(held)


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_every_author_of_a_conversation_links(rng: random.Random) -> None:
    rows = [
        example("a", author="x"),
        example("a", 1, author="y"),
        example("b", author="y"),
        example("c", author="z"),
        example("c", 1, author="a"),
        example("d", author="z"),
    ]
    rng.shuffle(rows)
    assert linked_ids(rows) == [["a", "b"], ["c", "d"]]
    theirs = example("e", author="nobody")
    assert linked_ids([*rows, theirs], [pair(theirs).model_copy(update={"group": "y"})]) == [["a", "b", "e"], ["c", "d"]]


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_a_pasted_reply_links_and_a_short_one_does_not(rng: random.Random) -> None:
    pasted, short = prose("pasted", 12), prose("short", 11)
    rows = [
        example("a").model_copy(update={"reply": pasted}),
        example("b").model_copy(update={"reply": f"  {pasted.upper().replace(' ', ', ')}!"}),
        example("c").model_copy(update={"reply": short}),
        example("d").model_copy(update={"reply": short}),
        example("e", corpus="p4g"),
        example("f"),
    ]
    pairs = [pair(rows[4]).model_copy(update={"loser": pasted})]
    rng.shuffle(rows)
    assert linked_ids(rows, pairs) == [["a", "b", "e"], ["c"], ["d"], ["f"]]


def test_rows_that_contradict_each_other_are_refused() -> None:
    """Ids that somebody gave by hand may collide between two files of own rows."""
    rows = [example("a"), example("b").model_copy(update={"id": example("a").id, "corpus": "jsonl-2"})]
    with pytest.raises(UserError, match=r"two rows have the id [0-9a-f]{16}: .* cmv a and jsonl-2 b"):
        link(rows, [], 0.5)
    assert len(link([rows[0], rows[0]], [], 0.5)) == 1


def linked_ids(rows: list[Example], pairs: list[OutcomePair] | None = None) -> list[list[str]]:
    return [[conversation.key[1] for conversation in component.conversations] for component in link(rows, pairs or [], 0.5)]


def test_too_large_pools_say_by_how_much_and_what_fits(tmp_path: Path) -> None:
    rows, pairs = corpus()
    section = PoolsSection(sft=30, rlaif=400, rlhf=50, eval=40, judge_conversations=8)
    with pytest.raises(UserError, match=r"pools\.rlaif needs 400 but \d+ can be had \(\d+ too few\)") as raised:
        run_stage(write_stage(tmp_path, section, rows, pairs))
    sizes = attainable(COMPONENTS, section, seed=0)
    assert f"--set pools.rlaif={sizes['rlaif']}" in str(raised.value)
    assert 0 < sizes["rlaif"] < 400
    run_stage(write_stage(tmp_path, section.model_copy(update=sizes), rows, pairs))
    assert not (tmp_path / "pools" / "sft.jsonl.tmp").exists()


def test_attainable_is_the_recipe_where_it_fits_and_nothing_where_nothing_does() -> None:
    assert attainable(COMPONENTS, SECTION, 0) == {"sft": 30, "rlaif": 24, "rlhf": 12, "eval": 10, "judge_conversations": 8}
    rest = attainable(COMPONENTS, SECTION.model_copy(update={"sft": "rest"}), 0)
    assert rest["sft"] > 30
    assert rest["rlaif"] == 24
    assert set(attainable(link(COMPONENT_ROWS[0][:2], [], 0.5), SECTION, 0).values()) == {0}


def test_every_row_is_in_a_pool_or_dropped_for_one_reason(tmp_path: Path) -> None:
    rows, pairs = corpus()
    for n, section in enumerate((SECTION, SECTION.model_copy(update={"sft": "rest"}))):
        stage = write_stage(tmp_path / str(n), section, [*rows, *rows[:3]], [*pairs, pairs[0]])
        result = run_stage(stage)
        written = sum(len(path.read_text().splitlines()) for path in stage.folder.glob("*.jsonl"))
        assert result.rows_out == written
        assert result.rows_in == len(rows) + len(pairs) + 4 == written + sum(result.dropped.values())
        assert result.dropped["row that occurs twice"] == 4
        assert result.dropped["pair of a conversation in pool eval"] > 0


def test_shared_persuadees_are_counted(tmp_path: Path) -> None:
    """Each persuader talks to one persuadee, each persuadee hears two persuaders, and one of them persuades as well."""
    rows = [
        example(f"d{i}", n, "p4g", f"persuader{i}").model_copy(update={"persuadee": f"persuadee{i // 2}"})
        for i in range(40)
        for n in range(2)
    ]
    rows += [example("both", 0, "p4g", "persuadee0")]
    stage = write_stage(tmp_path, PoolsSection(sft="rest", rlaif=6, rlhf=5, eval=8), rows, [])
    facts = run_stage(stage).facts["persuadees"]
    of = {row.conversation_id: row.persuadee for row in rows}
    pools: dict[str, list[Example] | list[Prompt]] = {
        "sft": list(read_rows(stage.folder / "sft.jsonl", Example)),
        "rlaif": list(read_rows(stage.folder / "rlaif.jsonl", Prompt)),
        "rlhf": list(read_rows(stage.folder / "rlhf.jsonl", Prompt)),
        "eval": list(read_rows(stage.folder / "eval.jsonl", Example)),
    }
    people = {name: {of[row.conversation_id] for row in members} - {None} for name, members in pools.items()}
    assert facts["in"] == {name: len(theirs) for name, theirs in people.items()}
    assert facts["shared"] == {f"{one} and {two}": len(people[one] & people[two]) for one, two in combinations(people, 2)}
    elsewhere = people["sft"] | people["rlaif"] | people["rlhf"]
    assert facts["of eval in any other pool"] == len(people["eval"] & elsewhere) > 0
    trainers = {row.author for name in ("sft", "rlaif", "rlhf") for row in pools[name]}
    assert facts["of eval persuading in any other pool"] == len(people["eval"] & trainers)
    assert run_stage(write_stage(tmp_path / "none", SECTION, *corpus())).facts["persuadees"] == {}


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[Example], list[OutcomePair]]:
    """Any number of conversations, with few authors and few posts among them, so that many are linked."""
    rows, pairs = [], []
    for i in range(draw(st.integers(1, 24))):
        name, author = draw(st.sampled_from(["cmv", "p4g"])), f"author{draw(st.integers(0, 60))}"
        post = prose(f"post{draw(st.integers(0, 50))}")
        for n in range(draw(st.integers(1, 3))):
            replied, outcome = draw(st.booleans()), float(draw(st.integers(0, 1)))
            row = example(f"c{i}", n, name, author, replied=replied, outcome=outcome, text=post)
            rows.append(row)
            pairs += [pair(row).model_copy(update={"id": f"pair {i} {n}"})] * (replied and draw(st.booleans()))
    return rows, pairs


@settings(max_examples=20, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(corpora(), st.randoms(use_true_random=False), st.integers(1, 6), st.integers(0, 3), st.integers(0, 99))
def test_any_corpus_is_split_without_overlap_in_any_order(
    rows: tuple[list[Example], list[OutcomePair]], rng: random.Random, size: int, judged: int, seed: int
) -> None:
    examples, pairs = rows
    section = PoolsSection(sft="rest", rlaif=size, rlhf=size, eval=size, judge_conversations=judged)
    components = link(examples, pairs, 0.5)
    pools = split(components, section, seed)
    shuffled = rng.sample(examples, len(examples)), rng.sample(pairs, len(pairs))
    written = whole(examples, pairs, pools)
    assert whole(*shuffled, split(link(*shuffled, 0.5), section, seed)) == written
    if not pools.lacking(section):
        assert (len(pools.rlaif), len(pools.rlhf), len(pools.eval)) == (size, size, size)
    texts = {(row.corpus, row.conversation_id): row.turns[0].text for row in examples}
    shared: dict[str, set[tuple[str, str]]] = {}
    for name in ("sft", "rlaif", "rlhf", "eval", "judge_pairs"):
        for row in written[name]:
            key = (row.corpus, row.conversation_id)
            for mark in (f"conversation {key}", f"author {getattr(row, 'author', None) or row.group}", f"post {texts[key]}"):
                shared.setdefault(mark, set()).add(name)
    assert all(len(names) == 1 for names in shared.values())
    for name in ("rlhf", "eval"):
        keys = [(row.corpus, row.conversation_id) for row in written[name]]
        assert len(keys) == len(set(keys))
    rows_in = len(examples) + len(pairs)
    assert sum(map(len, written.values())) + sum(unused(rows_in, components, pools).values()) == rows_in


def test_only_what_lacks_rows_shrinks_where_that_suffices() -> None:
    section = SECTION.model_copy(update={"rlaif": 5000})
    sizes = attainable(COMPONENTS, section, 0)
    assert 24 < sizes["rlaif"] < 5000
    assert {name: size for name, size in sizes.items() if name not in ("rlaif", "sft")} == {
        "rlhf": 12,
        "eval": 10,
        "judge_conversations": 8,
    }
    assert sizes["sft"] <= SECTION.sft
    assert not split(COMPONENTS, section.model_copy(update=sizes), 0).lacking(section.model_copy(update=sizes))
    everything = attainable(COMPONENTS, section.model_copy(update={"eval": 3000}), 0)  # evaluation, filled first, would take all
    assert all(everything.values())


def test_apportion() -> None:
    assert apportion(10, Counter(a=1, b=1, c=1)) == {"a": 4, "b": 3, "c": 3}
    assert apportion(3, Counter(a=90, b=10)) == {"a": 3, "b": 0}
    assert apportion(5, Counter()) == {}


@given(st.integers(0, 500), st.dictionaries(st.text("ab", min_size=1, max_size=3), st.integers(1, 50), min_size=1))
def test_apportion_adds_up(total: int, weights: dict[str, int]) -> None:
    seats = apportion(total, Counter(weights))
    assert sum(seats.values()) == total
    assert all(abs(seats[name] - total * weights[name] / sum(weights.values())) < 1 for name in weights)
