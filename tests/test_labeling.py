"""Human labels: the simulated annotator, imported files, waiting for people, and agreement statistics against their sources."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suasion import recipe
from suasion.errors import UserError, WaitingForPeople
from suasion.grading.pairs import SampledPair
from suasion.labeling import agreement, annotator, imports, stage
from suasion.labeling.agreement import Labelled
from suasion.labeling.desk import Desk
from suasion.labeling.store import Store
from suasion.labeling.work import make_work
from suasion.records import Pair, Preference, Prompt, Response, Turn, Verdict, read_rows, write_json, write_rows
from suasion.rundir import Input, StageContext
from suasion.sections.labeling import SimulatedAnnotator

DATA = Path(__file__).parents[2] / "shared" / "data"
PLAIN = "We went home. It was late. He was fine. She was not. We all sat down. It was ok."
RICH = (
    "Consider the neighbours. Whoever defends cheaper evening parking forgets that deliveries, ambulances and visiting relatives already "
    "struggle through our narrow streets, particularly during winter. Nobody wins."
)


def pair(i: int, a: str, b: str, pool: str = "rlhf") -> SampledPair:
    prompt = Prompt(id=f"q{i}", corpus="cmv", conversation_id=f"t{i}", author="x", turns=(Turn(role="user", text=f"view {i}"),))
    left, right = (
        Response(
            id=f"q{i}-{n}", prompt_id=prompt.id, n=n, text=text, finish="stop", tokens=tuple(range(len(text.split()))), logprob=-1.0,
            lineage="sft", seed=0,
        )
        for n, text in enumerate((a, b))
    )  # fmt: skip
    return SampledPair(Pair(id=f"p{i}", prompt_id=prompt.id, pool=pool, a=left.id, b=right.id), prompt, left, right)


def some_pairs(count: int) -> list[SampledPair]:
    words = [*RICH.split(), *PLAIN.split()]
    random = np.random.default_rng(0)
    return [pair(i, *(" ".join(random.choice(words, 30)) for _ in range(2))) for i in range(count)]


SETTINGS = SimulatedAnnotator(kind="simulated")


# The simulated annotator


def test_the_annotator_likes_what_its_docstring_says():
    assert annotator.score(RICH) > annotator.score(PLAIN) > annotator.score(" ") == -math.inf
    assert annotator.score(RICH) > annotator.score((RICH + " ") * 3)  # the same thing three times
    assert sum(weight**2 for weight in annotator.WEIGHTS) == pytest.approx(1, abs=0.02)
    assert annotator.long_words("tiny enormous") == 0.5
    assert annotator.sentence_variation("one two. one two three four.") == pytest.approx(1 / 3)
    assert annotator.sentence_variation("only one sentence") == 0.0


@given(st.text(max_size=120))
def test_the_annotator_scores_any_text(text):
    value = annotator.score(text)
    assert value == -math.inf if not text.strip() else abs(value) <= 3 * sum(map(abs, annotator.WEIGHTS))


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_the_tie_band_gives_the_share_asked_for(share):
    verdicts = annotator.annotate(some_pairs(200), SimulatedAnnotator(kind="simulated", tie_share=share), 3)
    assert sum(verdict.label == "tie" for verdict in verdicts) == round(share * 200)
    assert {verdict.source for verdict in verdicts} == {"simulated"}
    assert all(verdict.p_a is None and verdict.label != "none" for verdict in verdicts)


def test_labels_belong_to_the_pair_not_to_its_position():
    pairs = some_pairs(60)
    once = {verdict.pair_id: verdict for verdict in annotator.annotate(pairs, SETTINGS, 3)}
    again = {verdict.pair_id: verdict for verdict in annotator.annotate(pairs[::-1], SETTINGS, 3)}
    assert once == again
    assert once != {verdict.pair_id: verdict for verdict in annotator.annotate(pairs, SETTINGS, 4)}
    assert {verdict.order for verdict in once.values()} == {"ab", "ba"}


def test_side_bias_favours_the_left_and_noise_free_labels_follow_the_score():
    pairs = some_pairs(300)
    biased = annotator.annotate(pairs, SimulatedAnnotator(kind="simulated", side_bias=50.0, tie_share=0), 0)
    assert all(stage.chose_first(verdict) for verdict in biased)
    quiet = SimulatedAnnotator(kind="simulated", noise=1e-9, side_bias=0.0, tie_share=0.0)
    for orders in (None, {item.pair.id: "ab" for item in pairs}, {item.pair.id: "ba" for item in pairs}):
        for item, verdict in zip(pairs, annotator.annotate(pairs, quiet, 0, orders), strict=True):
            assert verdict.label == ("a" if annotator.score(item.a.text) > annotator.score(item.b.text) else "b")
            assert orders is None or verdict.order == orders[item.pair.id]


def test_identical_texts_are_ties_and_empty_ones_lose():
    settings = SimulatedAnnotator(kind="simulated", side_bias=5.0, tie_share=0.0)
    verdicts = annotator.annotate([pair(1, PLAIN, PLAIN + " "), pair(2, "", PLAIN), pair(3, PLAIN, "\n")], settings, 0)
    assert [verdict.label for verdict in verdicts] == ["tie", "b", "a"]
    assert annotator.annotate([], settings, 0) == []


# Imported preferences


def row(
    chosen: str, rejected: str, conversation: str = "t3_x", context: str = "Original Post: I dislike trams.", **metadata
) -> dict:
    prompt = f"[SYSTEM] Be honest.\n\n[CONTEXT]\n{context}\n\n[TASK]\nWrite the next message.\n\n[RESPONSE]\n"
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "metadata": {"source": "cmv", "conversation_id": conversation, "preference": "1", "is_equal": False, **metadata},
    }


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_import_keeps_decisive_rows_and_counts_the_rest(tmp_path):
    rows = [
        row("Good.", "Bad and cut", "t3_a"),
        row("Second won.", "First lost.", "t3_b", preference="2"),
        row("Tie.", "Tied.", "t3_c", is_equal=True),
        row("Sealed.", "Also sealed.", "t3_sealed"),
        row("Same &gt; text", "Same > text ", "t3_d"),
        row("Good.", "Bad and cut", "t3_a"),
        row(" ", "Words.", "t3_e"),
    ]
    result = imports.import_preferences(
        write_lines(tmp_path / "x.jsonl", rows), "people", {imports.conversation_hash("t3_sealed")}
    )
    assert result.dropped == {"empty": 1, "held out for evaluation": 1, "identical": 1, "repeated": 1, "tie": 1}
    assert (result.labelled, result.ties, result.decisive, result.first, result.unfinished) == (7, 1, 6, 5, 1)
    first, second = result.preferences
    assert (first.chosen.text, first.rejected.text, first.chosen.n, first.rejected.n) == ("Good.", "Bad and cut", 0, 1)
    assert (second.chosen.text, second.chosen.n, second.rejected.n) == ("Second won.", 1, 0)
    assert first.rejected.flags == ("imported", "unfinished")
    for one in result.preferences:
        assert not one.on_policy
        assert one.sources == ("people",)
        for response in (one.chosen, one.rejected):
            assert (response.tokens, response.logprob, response.lineage, response.finish) == (None, None, "imported", "unknown")
            assert response.prompt_id == one.prompt.id


def test_threads_are_parsed_into_turns_without_guessing_speakers():
    context = (
        "Original Post: I &gt; dislike trams.\n\nThey are loud.\n\nComment 1: Are they?\n\nComment 2: See [a st"
        "udy](http://www.exam\n[...context truncated...]"
    )
    turns = imports.parse_context(row("a", "b", context=context)["prompt"])
    assert [(turn.role, turn.name) for turn in turns] == [("user", None), ("user", "Comment 1"), ("user", "Comment 2")]
    assert turns[0].text == "I > dislike trams.\n\nThey are loud."
    assert turns[2].text == "See a study\n[...]"
    assert imports.parse_context("no template at all") == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "line 1: 'chosen' must be a text"),
        ({"metadata": {}}, "conversation_id is missing"),
        ({"prompt": "something else"}, r"no '\[CONTEXT\]"),
        ({"metadata": {"conversation_id": "t3_a", "preference": "3"}}, "must be 1 or 2"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        imports.import_preferences(write_lines(tmp_path / "x.jsonl", [{**row("a", "b"), **change}]), "people", set())


def test_the_real_labelled_file():
    file = DATA / "persuasion-rl-labels" / "human_pool_labeled.jsonl"
    if not file.is_file():
        pytest.skip("../shared/data/persuasion-rl-labels is not there")
    result = imports.import_preferences(file, "human", set())
    assert (result.labelled, result.ties, result.decisive, result.first) == (189, 29, 160, 100)
    assert result.dropped == {"tie": 29}
    assert len({one.id for one in result.preferences}) == 160
    assert all("Hello, users of CMV" not in turn.text for one in result.preferences for turn in one.prompt.turns)
    sealed = {imports.conversation_hash(one.prompt.conversation_id) for one in result.preferences[:5]}
    assert {imports.conversation_hash(one.prompt.conversation_id) for one in imports.import_preferences(file, "human", sealed).preferences}.isdisjoint(sealed)  # fmt: skip


# The stage


def human_stage(tmp_path: Path, source: dict) -> StageContext:
    pairs = some_pairs(12)
    for name in ("sample", "pools", "human-labels"):
        (tmp_path / name).mkdir(exist_ok=True)
    write_rows(tmp_path / "pools" / "rlhf.jsonl", [item.prompt for item in pairs])
    write_json(tmp_path / "pools" / "held_out.json", {"conversation_hashes": [imports.conversation_hash("t3_sealed")]})
    write_rows(tmp_path / "sample" / "responses.jsonl", [response for item in pairs for response in (item.a, item.b)])
    write_rows(tmp_path / "sample" / "pairs.jsonl", [item.pair for item in pairs])
    settings = recipe.validate_recipe(
        {
            "name": "test",
            "corpus": {"sources": [{"kind": "cmv"}]},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": source},
            "dpo": [{"name": "rlhf", "labels": "human", "pool": "rlhf"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        },
        "test",
    )
    files = [("sample", "pairs.jsonl"), ("sample", "responses.jsonl"), ("pools", "rlhf.jsonl"), ("pools", "held_out.json")]
    inputs = {Input(where, file): tmp_path / where / file for where, file in files}
    return StageContext(settings, "human-labels", tmp_path / "human-labels", inputs, tmp_path / "cache")


def test_simulated_stage(tmp_path):
    context = human_stage(tmp_path, {"kind": "simulated", "tie_share": 0.25})
    result = stage.run_stage(context)
    assert (result.rows_in, result.rows_out) == (12, 12)
    assert result.facts["simulated"] is True
    assert (result.facts["source"], result.facts["ties"], result.facts["n"]) == ("simulated", 3, 12)
    assert result.facts["first_rate"]["n"] == 9
    assert len(list(read_rows(context.folder / "verdicts.jsonl", Verdict))) == 12
    assert (context.folder / "imported.jsonl").read_bytes() == b""
    assert stage.external_hashes(context.recipe, tmp_path) == {}


def verdict(pair_id: str, label: str = "a", order: str = "ab", source: str = "ann") -> Verdict:
    return Verdict(pair_id=pair_id, source=source, order=order, label=label, p_a=None)


def test_verdict_files_wait_for_people_until_complete(tmp_path):
    file = tmp_path / "labels.jsonl"
    context = human_stage(tmp_path, {"kind": "file", "path": str(file), "source": "ann"})
    with pytest.raises(WaitingForPeople, match="12 rlhf pairs"):
        stage.run_stage(context)
    write_rows(file, [verdict(f"p{i}") for i in range(9)])
    with pytest.raises(WaitingForPeople, match="missing on 3 of 12"):
        stage.run_stage(context)
    write_rows(file, [verdict("elsewhere")])
    with pytest.raises(UserError, match="another run"):
        stage.run_stage(context)
    write_rows(
        file, [*(verdict(f"p{i}", "tie" if i == 0 else "none" if i == 1 else "a", "ba") for i in range(12)), verdict("elsewhere")]
    )
    result = stage.run_stage(context)
    assert result.dropped == {"verdict on a pair outside the rlhf pool": 1}
    assert (result.facts["simulated"], result.facts["ties"], result.facts["none"]) == (False, 1, 1)
    assert result.facts["first_rate"]["value"] == 0.0  # a was shown second every time
    assert stage.external_hashes(context.recipe, tmp_path) != {}


def test_imported_preferences_stage(tmp_path):
    file = write_lines(
        tmp_path / "x.jsonl", [row("Good.", "Bad", "t3_a"), row("S.", "T.", "t3_sealed"), row("U.", "V.", is_equal=True)]
    )
    context = human_stage(tmp_path, {"kind": "file", "path": str(file), "layout": "preferences"})
    result = stage.run_stage(context)
    rows = list(read_rows(context.folder / "imported.jsonl", Preference))
    assert [one.prompt.conversation_id for one in rows] == ["t3_a"]
    assert (context.folder / "verdicts.jsonl").read_bytes() == b""
    assert result.dropped == {"held out for evaluation": 1, "tie": 1}
    assert "off-policy" in result.facts["note"]
    write_lines(file, [row("S.", "T.", "t3_sealed")])
    with pytest.raises(UserError, match="no usable preference"):
        stage.run_stage(context)


def test_page_stage_waits_then_takes_a_snapshot(tmp_path):
    context = human_stage(tmp_path, {"kind": "page"})
    with pytest.raises(WaitingForPeople, match=r"18 of 18 human labels are missing.*suasion label serve"):
        stage.run_stage(context)
    store = Store(tmp_path / "labels.db")
    desk = Desk(store, make_work(some_pairs(12), context.recipe.human_labels.source, context.recipe.seed))
    who = store.add_annotator("A Name")
    store.new_token(who, "invitation")
    for n in range(18):
        with pytest.raises(WaitingForPeople, match=f"{18 - n} of 18"):
            stage.run_stage(context)
        shown = desk.next(who)
        desk.answer(who, shown.task.id, "tie" if n == 0 else "left", 3, 5.0, str(n))
    result = stage.run_stage(context)
    verdicts = list(read_rows(context.folder / "verdicts.jsonl", Verdict))
    assert (result.rows_in, result.rows_out, len(verdicts)) == (12, 18, 18)
    assert result.facts["last_event"] == 18
    assert result.facts["first_rate"]["value"] == 1.0
    written = (context.folder / "labels.jsonl").read_bytes()
    assert b"A Name" not in written
    assert written.count(b"\n") == 18
    stage.run_stage(context)
    assert (context.folder / "labels.jsonl").read_bytes() == written
    store.close()


def test_page_labels_make_the_stage_stale_only_when_they_count(tmp_path):
    for name in ("02-pools", "04-sample"):
        (tmp_path / name).mkdir()
    context = human_stage(tmp_path, {"kind": "page", "overlap": 0})
    for name in ("pools/rlhf.jsonl", "sample/pairs.jsonl"):
        folder, file = name.split("/")
        numbered = {"pools": "02-pools", "sample": "04-sample"}[folder]
        (tmp_path / numbered / file).write_bytes((tmp_path / folder / file).read_bytes())

    def hashes() -> dict:
        return stage.external_hashes(context.recipe, tmp_path)

    assert hashes() == {}
    store = Store(tmp_path / "labels.db")
    desk = Desk(store, make_work(some_pairs(12), context.recipe.human_labels.source, context.recipe.seed))
    who = store.add_annotator("")
    store.new_token(who, "invitation")
    for n in range(12):
        assert hashes() == {}
        desk.answer(who, desk.next(who).task.id, "left", 3, 5.0, str(n))
    complete = hashes()
    assert complete
    store.append("consent", who, {"version": "x"})
    assert hashes() == complete
    desk.undo(who, "u")
    assert hashes() == {}
    desk.answer(who, desk.next(who).task.id, "right", 3, 5.0, "other")
    assert hashes() not in ({}, complete)
    store.append("adjudicate", "", {"pair_id": "p1", "label": "a"})
    assert len({str(hashes()), str(complete)}) == 2
    store.close()


def test_first_rate_is_the_exact_binomial():
    rate = stage.first_rate(100, 160)
    assert (rate["value"], rate["p_value"]) == (0.625, 0.002)  # as ../shared/data/README.md says of the published labels
    assert rate["low"] < 0.55
    assert rate["high"] > 0.69
    assert stage.first_rate(5, 5)["low"] == pytest.approx(0.025 ** (1 / 5), abs=1e-4)  # Clopper-Pearson's closed form at k = n
    assert stage.first_rate(0, 0) is None


# Agreement


def table_rows(table: list[list[int]]) -> list[Labelled]:
    labels = agreement.CATEGORIES
    rows = [(labels[i], labels[j]) for i in range(3) for j in range(3) for _ in range(table[i][j])]
    return [Labelled(f"q{k}", human, ai, k % 2 == 0) for k, (human, ai) in enumerate(rows)]


@given(st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=3, max_size=3))
def test_kappa_equals_statsmodels(table):
    from statsmodels.stats.inter_rater import cohens_kappa

    counts = np.array(table, dtype=float)
    ours = float(agreement.cohen_kappa(counts))
    if counts.sum() == 0 or (counts.sum(0) * counts.sum(1)).sum() == counts.sum() ** 2:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(cohens_kappa(counts, return_results=False), abs=1e-9)


def test_gwet_by_hand():
    """Two categories used evenly, 80% agreement: p_e = (.5 * .5 + .5 * .5) / (3 - 1) = .25, AC1 = .55 / .75."""
    assert float(agreement.gwet_ac1(np.array([[4.0, 1, 0], [1, 4, 0], [0, 0, 0]]))) == pytest.approx(0.55 / 0.75)
    # One label almost always: kappa collapses below 0 though people agree on 90%, AC1 does not (Gwet's paradox).
    skewed = np.array([[90.0, 5, 0], [5, 0, 0], [0, 0, 0]])
    assert float(agreement.cohen_kappa(skewed)) < 0
    assert float(agreement.gwet_ac1(skewed)) > 0.85


def test_compare_reports_everything_with_intervals():
    result = agreement.compare(table_rows([[30, 10, 2], [10, 30, 2], [3, 3, 0]]), 0)
    assert (result["n"], result["both_decisive"], result["prompts"]) == (90, 80, 90)
    assert result["agreement"]["value"] == 0.75
    for name in ("agreement", "balanced_agreement", "kappa", "gwet_ac1"):
        assert result[name]["low"] < result[name]["value"] < result[name]["high"]
    assert result["table"]["b"]["tie"] == 2
    assert result == agreement.compare(table_rows([[30, 10, 2], [10, 30, 2], [3, 3, 0]]), 0)


def test_balanced_agreement_does_not_reward_a_shared_position_bias():
    """People take the first position in 80 of 100 pairs and the grader in all: raw agreement .8, balanced .5."""
    rows = [Labelled(f"q{i}", "a" if i < 80 else "b", "a", i < 80) for i in range(100)]
    result = agreement.compare(rows, 0)
    assert (result["agreement"]["value"], result["balanced_agreement"]["value"]) == (0.8, 0.5)


ratings = st.lists(st.lists(st.sampled_from([*agreement.CATEGORIES, None]), min_size=3, max_size=3), min_size=2, max_size=25)


@given(ratings)
def test_alpha_equals_evalica(table):
    import evalica

    tables = np.array([agreement.coincidences([value for value in row if value]) for row in table])
    ours = float(agreement.krippendorff_alpha(tables.sum(axis=0)))
    used = {value for row in table for value in row if value and sum(map(bool, row)) > 1}
    if len(used) < 2:
        assert math.isnan(ours)
        return
    numbered = pd.DataFrame(
        [[None if value is None else agreement.CATEGORIES.index(value) for value in row] for row in table], dtype=float
    )
    assert ours == pytest.approx(evalica.alpha(numbered.T, distance="nominal").alpha, abs=1e-9)


def test_agreement_between_people_by_hand():
    """Two people, 10 pairs, 8 agreed, labels used evenly: alpha = 1 - 19 * 4 / 200 ... written out below; AC1 of two labels, p_e = .5."""
    units = (
        [(f"q{i}", ["a", "a"]) for i in range(4)]
        + [(f"r{i}", ["b", "b"]) for i in range(4)]
        + [("s", ["a", "b"]), ("t", ["b", "a"])]
    )
    result = agreement.between_people([*units, ("alone", ["a"])], 0)
    assert (result["n"], result["agreement"]["value"]) == (10, 0.8)
    assert result["alpha"]["value"] == pytest.approx(1 - 0.2 / (1 - (10 * 9 + 10 * 9) / (20 * 19)), abs=1e-4)
    assert result["gwet_ac1"]["value"] == pytest.approx(0.3 / 0.5, abs=1e-4)
    for name in ("agreement", "alpha", "gwet_ac1"):
        assert result[name]["low"] < result[name]["value"] < result[name]["high"]
    assert agreement.between_people([("q", ["a"])], 0) == {
        "n": 0,
        "prompts": 0,
        "agreement": None,
        "alpha": None,
        "gwet_ac1": None,
    }


@settings(max_examples=8)
@given(st.lists(st.tuples(st.sampled_from(agreement.CATEGORIES), st.sampled_from(agreement.CATEGORIES)), min_size=1, max_size=20))
def test_two_people_have_one_ac1(rows):
    """The formula for several people, asked about two, is the formula for two."""
    table = np.zeros((3, 3))
    for left, right in rows:
        table[agreement.CATEGORIES.index(left), agreement.CATEGORIES.index(right)] += 1
    result = agreement.between_people([(str(i), list(row)) for i, row in enumerate(rows)], 0)["gwet_ac1"]
    expected = float(agreement.gwet_ac1(table if table[2].any() or table[:, 2].any() else table[:2, :2]))
    assert result is None if math.isnan(expected) else result["value"] == pytest.approx(expected, abs=1e-4)


def test_a_coin_agrees_with_nobody_beyond_chance():
    """Where nobody says tie there are two labels to draw from; one tie among 400 makes AC1's chance a draw among three."""
    rows = [Labelled(f"q{i}", "ab"[i % 2], "ab"[i // 2 % 2], i % 2 == 0) for i in range(400)]
    found = agreement.compare(rows, 0)
    assert {found[name]["value"] for name in ("balanced_agreement", "agreement")} == {0.5}
    assert (found["kappa"]["value"], found["gwet_ac1"]["value"]) == (0.0, 0.0)
    assert agreement.compare([*rows, Labelled("t", "tie", "tie", False)], 0)["gwet_ac1"]["value"] > 0.3
    told = agreement.told(found)
    assert (told["agree"], told["n"], told["labelled"]) == (0.5, 400, 400)
    assert agreement.told(agreement.compare([], 0))["agree"] is None


def test_undefined_statistics_are_null():
    nothing = agreement.compare([], 0)
    assert nothing["n"] == 0
    assert all(nothing[name] is None for name in ("agreement", "balanced_agreement", "kappa", "gwet_ac1"))
    ties = agreement.compare([Labelled("q", "tie", "tie", False)], 0)
    assert ties["agreement"] is None
    assert ties["kappa"] is None
    json.dumps(ties, allow_nan=False)
