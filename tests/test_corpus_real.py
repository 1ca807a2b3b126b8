"""The two real corpora: what docs/data.md says remains after each rule, exactly. Skipped where ../shared/data is absent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from accounts import assert_they_add_up

from suasion.corpora import cmv, p4g
from suasion.corpora.convokit import Tally
from suasion.corpora.stage import run_stage
from suasion.corpora.stats import source_stats
from suasion.linking import link
from suasion.pools import split, unused
from suasion.recipe import Recipe
from suasion.records import Example, OutcomePair, read_json, read_json_lines, read_rows
from suasion.rundir import StageContext, StageResult
from suasion.sections.corpus import PoolsSection

DATA = Path(__file__).parents[2] / "shared" / "data"
THREADS, CHARITY = DATA / "winning-args-corpus", DATA / "persuasionforgood-corpus"
DATA_SHEET = Path(__file__).parents[1] / "docs" / "data.md"

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="the real corpora are not at ../shared/data; the bundled ones are tested"
)


def extract(kind: str, folder: Path, tmp_path: Path) -> tuple[StageResult, dict[str, Any], StageContext]:
    """Stage corpus with the lengths of the full-size recipe."""
    recipe = Recipe.model_validate(
        {
            "name": "test",
            "corpus": {"sources": [{"kind": kind, "path": str(folder)}]},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [{"name": "rlaif", "labels": "ai", "pool": "rlaif"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        }
    )
    stage = StageContext(recipe=recipe, stage="corpus", folder=tmp_path, inputs={}, cache=tmp_path)
    return run_stage(stage), read_json(tmp_path / "counts.json")[kind], stage


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageResult, dict[str, Any], StageContext]:
    return extract("cmv", THREADS, tmp_path_factory.mktemp("cmv"))


@pytest.fixture(scope="module")
def charity(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageResult, dict[str, Any], StageContext]:
    return extract("p4g", CHARITY, tmp_path_factory.mktemp("p4g"))


CMV_READ = {
    "utterances": 5431,
    "conversations": 1806,
    "conversations without metadata": 0,
    "speakers": 2642,
    "posts": 1806,
    "posts without title": 86,
    "posts without body": 322,
    "posts that nobody answered": 447,
    "winning comments": 1662,
    "losing comments": 1677,
    "comments without an outcome": 0,
    "outcome pairs": 1550,
}
CMV_DROPPED = {
    "poster's own comment with success 1": 136,
    "poster's own comment with success 0": 150,
    "post without title and body": 1,
    "post that reveals the outcome": 52,
    "winning comment under a dropped post": 67,
    "comment that reveals the outcome": 12,
    "context that reveals the outcome": 3,
    "comment that occurs twice": 3,
    "reply too short": 3,
    "reply too long": 788,
    "reply with a context over budget": 1,
    "beyond max_per_conversation": 2,
    "prompt beside a kept reply": 684,
    "pair under a dropped post": 64,
    "pair with a comment that is not kept": 21,
    "pair with a side too short or too long": 888,
}
CMV_KEPT = {
    "conversations": 1753,
    "examples": 783,
    "conversations with an example": 684,
    "prompts without reply": 1069,
    "outcome pairs": 577,
    "conversations with an outcome pair": 524,
    "contexts cut": 315,
}
P4G_READ = {
    "utterances": 20932,
    "conversations": 1017,
    "conversations without metadata": 0,
    "speakers": 1285,
    "persuader turns": 10600,
    "persuadee turns": 10332,
    "dialogues with a donation": 545,
    "dialogues with strategy labels": 300,
}
P4G_DROPPED = {
    "persuader turn before the persuadee has spoken": 1017,
    "off-task chatter": 188,
    "reply too short": 4222,
    "beyond max_per_conversation": 1843,
    "conversation of which nothing is kept": 88,
}
P4G_KEPT = {
    "conversations": 929,
    "examples": 3330,
    "conversations with an example": 929,
    "conversations with an outcome pair": 0,
    "contexts cut": 655,
}


P4G_PERSUADEES: dict[str, Any] = {  # of the sizes of the CPU recipe
    "in": {"sft": 321, "rlaif": 64, "rlhf": 47, "eval": 60},
    "shared": {
        "sft and rlaif": 9,
        "sft and rlhf": 4,
        "sft and eval": 11,
        "rlaif and rlhf": 1,
        "rlaif and eval": 5,
        "rlhf and eval": 2,
    },
    "of eval in any other pool": 14,
    "of eval persuading in any other pool": 17,
}
GROUPS = {"cmv": (1747, 2), "p4g": (601, 140)}  # linked conversations, and the largest group of them


def test_changemyview_counts(threads: tuple[StageResult, dict[str, Any], StageContext]) -> None:
    counts = threads[1]
    assert (counts["read"], counts["dropped"], counts["kept"]) == (CMV_READ, CMV_DROPPED, CMV_KEPT)
    assert counts["longer_wins_rate"] == 0.5477


def test_persuasionforgood_counts(charity: tuple[StageResult, dict[str, Any], StageContext]) -> None:
    counts = charity[1]
    assert (counts["read"], counts["dropped"], counts["kept"]) == (P4G_READ, P4G_DROPPED, P4G_KEPT)
    assert counts["longer_wins_rate"] is None


def test_every_row_is_kept_or_dropped_for_one_reason(
    threads: tuple[StageResult, dict[str, Any], StageContext], charity: tuple[StageResult, dict[str, Any], StageContext]
) -> None:
    assert_they_add_up("cmv", threads[1])
    assert_they_add_up("p4g", charity[1])


def test_funnels_account_for_every_row(
    threads: tuple[StageResult, dict[str, Any], StageContext], charity: tuple[StageResult, dict[str, Any], StageContext]
) -> None:
    cmv_stats, p4g_stats = source_stats("cmv", threads[1]), source_stats("p4g", charity[1])
    offered = {funnel.unit: funnel.offered for funnel in cmv_stats.funnels}
    assert offered == {
        "replies": 1662 + 136,
        "outcome pairs": 1550,
        "prompts without reply": 1806 - 53,
        "conversations": 1806,
        "losing comments": 1677 + 150,
        "utterances": 5431,
    }
    assert (cmv_stats.pairs.longer.count, cmv_stats.pairs.longer.of, cmv_stats.pairs.before.of) == (316, 577, 1465)
    assert f"in {100 * (cmv_stats.pairs.before.value or 0):.1f}% of all" in DATA_SHEET.read_text(encoding="utf-8")
    replies = p4g_stats.funnel("replies")
    assert replies is not None
    assert (replies.offered, replies.kept) == (10600, 3330)
    assert (p4g_stats.persuaded.of, cmv_stats.persuaded.of) == (929, 684)


@pytest.mark.parametrize(
    "counts", [CMV_READ, CMV_DROPPED, CMV_KEPT, P4G_READ, P4G_DROPPED, P4G_KEPT], ids=lambda counts: next(iter(counts))
)
def test_the_data_sheet_says_the_same(counts: dict[str, int]) -> None:
    text = DATA_SHEET.read_text(encoding="utf-8")
    for what, count in counts.items():
        assert not count or f"| {what} | {count:,} |" in text, what


def test_no_kept_text_reveals_the_outcome_and_no_entity_is_left(
    threads: tuple[StageResult, dict[str, Any], StageContext],
) -> None:
    folder = threads[2].folder
    rows = [*read_rows(folder / "examples.jsonl", Example), *read_rows(folder / "outcome_pairs.jsonl", OutcomePair)]
    for row in rows:
        said = [turn.text for turn in row.turns]
        said += [row.reply or ""] if isinstance(row, Example) else [row.winner, row.loser]
        for text in said:
            assert cmv.leaks(text) == [], row.id
            assert not re.search(r"[∆△]|&(?:amp|gt|lt|nbsp|#\d+);|Hello, users of CMV|https?://|(?:^|\s)/?u/\w", text), row.id
            assert not re.search(r"(?m)^\W*(?:edit|update)\W", text, re.IGNORECASE), row.id


def test_posters_are_never_the_persuader() -> None:
    """Of the rows with success 1 in the subset 136 are the poster's own words; none of them is a reply."""
    replies = {example.reply for examples, _ in cmv.extract(THREADS, Tally()) for example in examples}
    metas = read_json(THREADS / "conversations.json")
    own = [
        row
        for _, row in read_json_lines(THREADS / "utterances.jsonl")
        if row["speaker"] == metas[row["conversation_id"]]["meta"]["op-userID"]
    ]
    comments = [row for row in own if row["reply_to"]]
    assert len(comments) == 286
    assert not {cmv.clean(row["text"]) for row in comments if len(row["text"]) > 40} & replies


def test_donations_and_roles() -> None:
    examples = [example for rows, _ in p4g.extract(CHARITY, Tally()) for example in rows]
    assert len(examples) == 10600 - 1017 - 188
    assert max(example.outcome or 0 for example in examples) == 2.0
    assert {turn.role for example in examples for turn in example.turns} == {"user", "assistant"}
    assert all(example.turns[-1].role == "user" for example in examples)
    assert len({example.author for example in examples}) == 701


@pytest.mark.parametrize("kind", ["cmv", "p4g"])
def test_contexts_and_replies_fit(
    kind: str,
    threads: tuple[StageResult, dict[str, Any], StageContext],
    charity: tuple[StageResult, dict[str, Any], StageContext],
) -> None:
    """As rendered, template and system prompt included."""
    from suasion.chat import Renderer
    from suasion.models import load_tokenizer

    stage = (threads if kind == "cmv" else charity)[2]
    renderer = Renderer(load_tokenizer(stage.recipe.model), stage.recipe.model.system_prompt)
    low, high = stage.recipe.corpus.reply_tokens
    for example in list(read_rows(stage.folder / "examples.jsonl", Example))[::5]:
        rendered = renderer.render(example.turns, example.reply)
        assert len(rendered.prompt_ids) <= stage.recipe.corpus.context_tokens
        assert example.reply is None or low <= len(rendered.reply_ids) - 1 <= high


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        ("cmv", PoolsSection(sft=300, rlaif=100, rlhf=40, eval=60, judge_conversations=100)),
        ("p4g", PoolsSection(sft=400, rlaif=120, rlhf=48, eval=60)),
    ],
    ids=["cmv-cpu", "p4g-cpu"],
)
def test_the_cpu_recipes_can_be_filled(
    kind: str,
    section: PoolsSection,
    threads: tuple[StageResult, dict[str, Any], StageContext],
    charity: tuple[StageResult, dict[str, Any], StageContext],
) -> None:
    folder = (threads if kind == "cmv" else charity)[2].folder
    examples = list(read_rows(folder / "examples.jsonl", Example))
    pairs = list(read_rows(folder / "outcome_pairs.jsonl", OutcomePair))
    components = link(examples, pairs, section.near_duplicate)
    pools = split(components, section, seed=0)
    assert pools.lacking(section) == {}
    assert all((example.outcome or 0) > 0 for example in pools.eval)
    assert kind == "p4g" or (len(pools.grader_pairs) > 200 and len(pools.judge_pairs) > 200)
    assert len(examples) + len(pairs) == sum(unused(len(examples) + len(pairs), components, pools).values()) + sum(
        len(rows) for rows in (pools.sft, pools.rlaif, pools.rlhf, pools.eval, pools.grader_pairs, pools.judge_pairs)
    )
    assert (len(components), max(len(component.conversations) for component in components)) == GROUPS[kind]
    people = pools.facts(components)["persuadees"]
    assert people == {"cmv": {}, "p4g": P4G_PERSUADEES}[kind]
    sheet = " ".join(DATA_SHEET.read_text(encoding="utf-8").split())
    assert f"{GROUPS['cmv'][0]:,} and {GROUPS['p4g'][0]} groups" in sheet
    assert "of the 60 persuadees of evaluation 14 are persuaded in another pool as well and 17 persuade in one" in sheet
