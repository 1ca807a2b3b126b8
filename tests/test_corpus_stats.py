"""Corpus statistics: funnels that add up, intervals that are right, figures with equal bytes, and a command that shows them."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint
from typer.testing import CliRunner

from suasion.cli import app
from suasion.corpora.stage import fitted, survey, token_counter
from suasion.corpora.stats import (
    PAIRS,
    REPLIES,
    Funnel,
    Report,
    SourceStats,
    bin_edge,
    funnels,
    read_stats,
    share,
    source_stats,
    unit,
)
from suasion.errors import UserError
from suasion.recipe import Recipe, load_recipe
from suasion.records import Example, Turn, write_json
from suasion.reporting.corpus_figures import _outcome_bars, draw_stats
from suasion.reporting.corpus_tables import as_json, longer_limit, write_stats

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The demo's corpora, with room for every example of a dialogue and the tiny model's tokenizer."""
    return load_recipe(
        REPOSITORY / "recipes" / "demo.yaml", ("model.base=random:tiny", "corpus.sources.1.max_per_conversation=3")
    )


@pytest.fixture(scope="module")
def stats(recipe: Recipe) -> dict[str, SourceStats]:
    return {label: source_stats(label, report.as_json()) for label, report in survey(recipe).items()}


def example(outcome: float | None, *strategies: str, reply: str | None = "r", n: int = 0) -> Example:
    return Example(
        id=str(n),
        corpus="c",
        conversation_id="1",
        author="a",
        turns=(Turn(role="user", text="t"),),
        reply=reply,
        outcome=outcome,
        strategies=strategies,
    )


def funnel(source: SourceStats, unit: str) -> Funnel:
    found = source.funnel(unit)
    assert found is not None
    assert found.offered == found.kept + sum(each.count for each in found.dropped)
    return found


@given(st.integers(0, 400), st.integers(1, 400))
def test_shares_have_wilson_intervals(count: int, of: int) -> None:
    found = share(min(count, of), of)
    low, high = proportion_confint(found.count, of, alpha=0.05, method="wilson")
    assert found.value == found.count / of
    assert found.low == pytest.approx(low, abs=1e-9)
    assert found.high == pytest.approx(high, abs=1e-9)


def test_a_share_of_nothing_is_no_number() -> None:
    assert (share(0, 0).value, share(0, 0).low, share(0, 0).high) == (None, None, None)


@given(st.integers(-3000, 3000))
def test_bins_hold_what_belongs_into_them(tokens: int) -> None:
    edge = bin_edge(tokens)
    assert edge % 8 == 0
    assert abs(edge) - 8 < abs(tokens) <= abs(edge)
    assert edge * tokens >= 0
    assert bin_edge(-tokens) == -edge


def test_reasons_and_their_units() -> None:
    assert unit("pair of equal comments") == PAIRS
    assert unit("post that reveals the outcome") == "conversations"
    assert unit("poster's own comment with success 0") == "losing comments"
    assert unit("poster's own comment with success 1") == REPLIES
    assert unit("prompt with a context over budget") == "prompts without reply"
    assert unit("reply too long") == REPLIES


def test_a_funnel_adds_up_and_sorts_by_size() -> None:
    (replies, pairs, conversations) = funnels(
        {"conversations": 9, "utterances": 0},
        {"examples": 6, "outcome pairs": 1},
        {"reply too short": 1, "reply too long": 3, "post without title and body": 2, "conversation without utterances": 4},
    )
    assert (replies.offered, replies.kept, [(d.reason, d.count, d.share) for d in replies.dropped]) == (
        10,
        6,
        [("reply too long", 3, 0.3), ("reply too short", 1, 0.1)],
    )
    assert (pairs.offered, pairs.kept, pairs.dropped) == (1, 1, ())
    assert (conversations.offered, conversations.kept) == (13, 7)  # of 9 that were read, and 4 that hold nothing


def test_outcomes_and_strategies_count_conversations_once() -> None:
    report = Report()
    report.end_conversation([example(0.5, "plea", "plea", n=1), example(0.5, "plea", "fact", n=2)], 0)
    report.end_conversation([example(0.0, "fact")], 0)
    report.end_conversation([example(0.0, n=1), example(1.0, n=2)], 2)  # own rows: one of the replies persuaded
    report.end_conversation([example(None)], 0)
    report.end_conversation([example(1.0, "plea", reply=None)], 0)  # a prompt has no outcome
    known = source_stats("own", json.loads(json.dumps(report.as_json())))
    assert known.outcomes == {0.0: 1, 0.5: 1, 1.0: 1}
    assert (known.outcome_unknown, known.outcome_mean) == (1, 0.5)
    assert (known.persuaded.count, known.persuaded.of) == (2, 3)
    assert (known.labelled.count, known.labelled.of) == (1, 2)
    by_label = report.as_json()["strategy_conversations"]
    assert by_label == {"plea": [1, 1], "fact": [2, 1]}
    assert report.kept == {"conversations": 5, "conversations with an example": 4, "conversations with an outcome pair": 1}
    report.end_conversation([], 0)
    assert report.tally.dropped == {"conversation of which nothing is kept": 1}


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=30))
def test_pairs_are_counted_by_length(pairs: list[tuple[int, int]]) -> None:
    report = Report()
    for winner, loser in pairs:
        report.offer_pair(winner, loser)
        report.keep_pair(winner, loser)
    known = source_stats("own", report.as_json())
    assert known.pairs.longer.count == sum(winner > loser for winner, loser in pairs)
    assert known.pairs.equal == sum(winner == loser for winner, loser in pairs)
    assert known.pairs.before == known.pairs.longer
    assert report.as_json()["longer_wins_rate"] == round(known.pairs.longer.count / len(pairs), 4)
    difference = known.bins["winner minus loser"]
    assert sum(count for edge, count in difference.items() if edge > 0) == known.pairs.longer.count
    assert difference.get(0, 0) == known.pairs.equal


def test_every_row_of_the_bundled_corpora_is_accounted_for(stats: dict[str, SourceStats]) -> None:
    """Of each unit, what was read is what was kept and dropped; tests/test_corpus_real.py asserts the same of real data."""
    cmv, p4g = stats["cmv"], stats["p4g"]
    own = next(each.count for each in funnel(cmv, REPLIES).dropped if each.reason == "poster's own comment with success 1")
    assert funnel(cmv, REPLIES).offered - own == cmv.read["winning comments"]
    assert funnel(cmv, PAIRS).offered == cmv.read["outcome pairs"]
    assert funnel(p4g, REPLIES).offered == p4g.read["persuader turns"]
    for source in stats.values():
        later = ("reply too", "reply with", "reply that", "beyond max")
        replies = funnel(source, REPLIES)
        dropped = sum(each.count for each in replies.dropped if each.reason.startswith(later))
        assert sum(source.bins["reply offered"].values()) == replies.kept + dropped


def test_statistics_are_those_of_the_rows(recipe: Recipe, stats: dict[str, SourceStats]) -> None:
    """Counted again, from the rows that the stage writes."""
    count = token_counter(recipe)
    for label, source in zip(stats, recipe.corpus.sources, strict=True):
        read = list(fitted(label, source, recipe, count, Report()))
        examples = [row for rows, _ in read for row in rows]
        pairs = [row for _, rows in read for row in rows]
        known = stats[label]
        replies = [count(row.reply) for row in examples if row.reply is not None]
        assert sum(known.bins["reply"].values()) == len(replies) == known.kept["examples"]
        assert (known.tokens["reply"]["min"], known.tokens["reply"]["max"]) == (min(replies), max(replies))
        assert Counter(map(bin_edge, replies)) == known.bins["reply"]
        assert {each.label: each.sentences for each in known.strategies} == Counter(s for row in examples for s in row.strategies)
        assert known.pairs.longer.of == len(pairs)
        assert known.pairs.longer.count == sum(count(pair.winner) > count(pair.loser) for pair in pairs)
        cut = sum("[...]" in row.turns[0].text for row in examples)
        assert known.kept.get("contexts cut", 0) == cut == sum(known.bins.get("context cut", {}).values())


def test_figures_answer_what_the_source_can_and_have_equal_bytes(recipe: Recipe, stats: dict[str, SourceStats]) -> None:
    drawings = draw_stats(stats, recipe.corpus)
    assert [drawing.name for drawing in drawings] == [
        "cmv-reply-lengths",
        "cmv-context-lengths",
        "cmv-dropped",
        "cmv-longer-wins",  # and no outcomes: all kept replies persuaded
        "p4g-reply-lengths",
        "p4g-context-lengths",
        "p4g-dropped",
        "p4g-outcomes",
        "p4g-strategies",
    ]
    for one, other in zip(drawings, draw_stats(stats, recipe.corpus), strict=True):
        assert (one.svg, one.png) == (other.svg, other.png)
        assert len(one.alt) > 40
        assert one.svg.count(b"<text") > 3
        assert b"nan" not in one.svg.lower()
    said = drawings[3].alt
    assert f"of {stats['cmv'].pairs.longer.of:,} kept outcome pairs" in said


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("offered", [0, 1, 5000])
def test_figures_of_odd_sources(recipe: Recipe, offered: int) -> None:
    """Nothing kept, a single row, replies far beyond every limit."""
    report = Report()
    for n in range(min(offered, 3)):
        report.offer_reply(max(offered, 60))
        report.keep_example(example(-1.0 + n, "s", n=n), context=offered, reply=60, cut=False)
        report.keep_pair(60, 60 + n)
        report.end_conversation([example(-1.0 + n, "s", n=n)], 1)
    known = {"own": source_stats("own", report.as_json())}
    drawings = draw_stats(known, recipe.corpus)
    assert bool(drawings) == bool(offered)
    json.dumps(as_json(known, recipe), allow_nan=False)


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([0.0, 1.0], [("0", 0.0, 1), ("1", 1.0, 1)]),
        (
            [0.0, 0.1, 0.5, 0.6, 1.0, 1.5, 2.0],
            [("0", 0.0, 1), ("≤ 0.5", 0.5, 2), ("≤ 1", 1.0, 2), ("≤ 1.5", 1.5, 1), ("≤ 2", 2.0, 1)],
        ),
        ([-3.0, -2.0, -1.0, -0.5, -0.4, -0.3, 0.0], [("≤ 0", 0.0, 7)]),
    ],
)
def test_outcomes_are_grouped_without_loss(values: list[float], bars: list[tuple[str, float, int]]) -> None:
    assert _outcome_bars(dict.fromkeys(values, 1)) == bars


def test_a_longer_limit_is_offered_where_it_matters(recipe: Recipe, stats: dict[str, SourceStats]) -> None:
    assert longer_limit(stats["p4g"], recipe) == ""
    report = Report()
    for tokens in (5, 100, 112, 113, 224, 225):
        report.offer_reply(tokens)
    report.kept["examples"] = 2
    report.tally.dropped.update({"reply too long": 3, "reply too short": 1})
    said = longer_limit(source_stats("own", report.as_json()), recipe)
    assert "3 of 6 replies (50%) are longer than 112 tokens" in said
    assert "Up to 224 there are 4" in said
    assert "--set corpus.reply_tokens=[12,224] --set sample.max_new_tokens=224 --set model.max_length=512" in said
    settings = tuple(word for word in said.split() if "=" in word)
    assert load_recipe(REPOSITORY / "recipes" / "demo.yaml", settings).corpus.reply_tokens == (12, 224)


def test_a_broken_counts_file_is_named(tmp_path: Path, stats: dict[str, SourceStats]) -> None:
    counts: Any = {"cmv": Report().as_json()}
    write_json(tmp_path / "counts.json", counts)
    assert read_stats(tmp_path / "counts.json")["cmv"].funnels == ()
    for key in ("bins", "outcomes", "pair_lengths"):
        write_json(tmp_path / "counts.json", {"cmv": {name: value for name, value in counts["cmv"].items() if name != key}})
        with pytest.raises(UserError, match=rf"counts.json was changed, or written by another version .*{key}"):
            read_stats(tmp_path / "counts.json")
    write_json(tmp_path / "counts.json", [])
    with pytest.raises(UserError, match="written by another version"):
        read_stats(tmp_path / "counts.json")


def test_written_statistics_are_complete_and_hold_no_text(tmp_path: Path, recipe: Recipe, stats: dict[str, SourceStats]) -> None:
    figures = write_stats(stats, recipe, tmp_path / "new" / "folder")
    assert all(path.is_file() and path.with_suffix(".svg").is_file() for path in figures)
    written = json.loads((tmp_path / "new" / "folder" / "stats.json").read_text())
    assert written["reply_tokens"] == [12, 112]
    assert set(written["sources"]["cmv"]) == set(asdict(stats["cmv"]))
    assert math.isclose(written["sources"]["p4g"]["persuaded"]["value"], 24 / 42)
    labels = {each.label for each in stats["p4g"].strategies}

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for each in value.values() for text in texts(each)]
        return [text for each in value for text in texts(each)] if isinstance(value, list) else [str(value)]

    assert max(len(text) for text in texts(written) if text not in labels) < 60


def test_recipe_and_run_show_the_same(tmp_path: Path) -> None:
    runner = CliRunner()
    tiny = str(REPOSITORY / "recipes" / "tiny.yaml")
    from_recipe = runner.invoke(app, ["corpus", "stats", tiny, "--out", str(tmp_path / "a")])
    assert from_recipe.exit_code == 0
    assert runner.invoke(app, ["run", tiny, "--runs", str(tmp_path / "runs"), "--until", "corpus"]).exit_code == 0
    run = str(tmp_path / "runs" / "tiny")
    from_run = runner.invoke(app, ["corpus", "stats", run, "--out", str(tmp_path / "b")])
    assert from_run.exit_code == 0
    assert from_run.output.replace("/b:", "/a:") == from_recipe.output
    for word in ("longer reply wins", "what is dropped, and why", "reply too long", "Wilson"):
        assert word in from_run.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()
    }
    refused = runner.invoke(app, ["corpus", "stats", run, "--set", "seed=1"])
    assert isinstance(refused.exception, UserError)
    assert "--set changes a recipe" in str(refused.exception)
    (tmp_path / "runs" / "tiny" / "01-corpus" / "manifest.json").unlink()
    unfinished = runner.invoke(app, ["corpus", "stats", run])
    assert "no finished corpus stage" in str(unfinished.exception)
