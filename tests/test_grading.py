"""Graders: exact rules, antisymmetry, what is learned from made-up pairs, the readers of training data, and the ai-labels stage."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_server import Reply, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from suasion.errors import UserError
from suasion.evaluation.stage import judge_agreement, labeller_agreement
from suasion.grading import base, build, canaries, embedding, features, linear, measure, pairs, stage
from suasion.grading.base import BASELINES, COIN, FIRST_POSITION, LONGER_WINS, BradleyTerryGrader, Comparison, Judgement
from suasion.grading.files import load_grader
from suasion.grading.pairs import TrainingPair, sampled_pairs
from suasion.labeling import annotator
from suasion.labeling.agreement import Labelled, compare
from suasion.pipeline import recipe_slice
from suasion.preferences import settle
from suasion.recipe import Recipe, validate_recipe
from suasion.records import OutcomePair, Pair, Prompt, Response, Turn, Verdict, read_json, read_rows, write_rows
from suasion.rundir import Input, StageContext
from suasion.sections import grading as sections

DATA = Path(__file__).parents[2] / "shared" / "data"
TRAIN = sections.PairData(kind="grader_pairs")
TOPICS = ("trams", "school uniforms", "night shifts", "paper maps", "city bees", "cold showers", "old phones", "loud cafes")
GOOD = (
    "because the figures of last year show it",
    "for example my own street got quieter",
    "however you may count the cost first",
)
BAD = ("everybody knows that", "this is just silly", "no idea what you mean", "whatever works I guess")


class FakeEmbedder:
    """Unit vectors from a hash of the text: the same width and norm as the real ones, without a model."""

    def __call__(self, texts):
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
            vector = np.random.Generator(np.random.Philox(key=seed)).normal(size=384)
            rows.append(vector / np.linalg.norm(vector))
        return np.stack(rows)


@pytest.fixture
def fake_embedder(monkeypatch):
    fake = FakeEmbedder()
    monkeypatch.setattr(embedding, "embedder", lambda: fake)


def training_pairs(count: int = 48) -> list[TrainingPair]:
    """Winners give reasons, losers do not; every second winner is the shorter text."""
    made = []
    for i in range(count):
        topic = TOPICS[i % len(TOPICS)]
        winner = f"On {topic} number {i}: {GOOD[i % 3]}, and {GOOD[(i + 1) % 3]}."
        loser = f"On {topic} number {i}: {BAD[i % 4]}. {BAD[(i + 1) % 4]}!"
        if i % 2:
            loser += " " + " ".join(BAD)
        made.append(TrainingPair(f"I dislike {topic}. Change my view.", winner, loser, topic))
    return made


def embedding_spec(**fields) -> sections.EmbeddingGrader:
    return sections.EmbeddingGrader(kind="embedding", train=TRAIN, **fields)


def ngram_spec(**fields) -> sections.NgramGrader:
    return sections.NgramGrader(kind="ngram", train=TRAIN, **fields)


def readable_spec(**fields) -> sections.ReadableGrader:
    return sections.ReadableGrader(kind="readable", train=TRAIN, **fields)


SPECS = {
    "embedding": embedding_spec(),
    "readable": readable_spec(),
    "length": embedding_spec(residualise_length=False, embedding_weight=0.0),
    "ngram": ngram_spec(),
}


class ByWords(BradleyTerryGrader):
    """Strength = a tenth of the words, plus how often the letter e occurs."""

    kind = "words"

    def strengths(self, contexts, replies):
        return np.array([len(reply.split()) / 10 + reply.count("e") / 7 for reply in replies])


def cross_validated(spec, rows) -> measure.Measurement:
    return build.measure(spec, lambda _: rows, 0)


# Rules and mathematics


texts = st.text(alphabet="abe .!\n", max_size=40)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8), st.floats(0, 0.3))
def test_swapping_mirrors_every_judgement_exactly(written, margin):
    grader = ByWords(margin, "f")
    items = [Comparison("c", a, b) for a, b in written]
    for one, other in zip(grader.grade(items), grader.grade([item.swapped() for item in items]), strict=True):
        assert one.p_a == 1.0 - other.p_a
        assert one.label == {"a": "b", "b": "a", "tie": "tie"}[other.label]
        assert base.to_verdict("p", one, "s").swapped().label == base.to_verdict("p", other, "s").label


@given(texts, texts)
def test_rules_come_before_the_model(a, b):
    judged = ByWords(0.0, "f").grade([Comparison("c", a, b)])[0]
    if a.strip() == b.strip():
        assert (judged.label, judged.p_a) == ("tie", 0.5)
    elif not a.strip() or not b.strip():
        assert judged.label == ("a" if a.strip() else "b")
        assert judged.p_a in (0.0, 1.0)
        assert "empty" in judged.reason


@given(texts, texts)
def test_baselines_obey_the_same_rules_and_all_but_position_are_symmetric(a, b):
    item = Comparison("c", a, b)
    for baseline in BASELINES:
        one, other = baseline.grade([item])[0], baseline.grade([item.swapped()])[0]
        if a.strip() == b.strip():
            assert one.label == other.label == "tie"
        elif baseline is not FIRST_POSITION:
            assert one.p_a == pytest.approx(1.0 - other.p_a)


def test_baselines_say_what_their_names_say():
    item = Comparison("c", "one two three", "one two")
    assert LONGER_WINS.grade([item])[0].label == "a"
    assert FIRST_POSITION.grade([item, item.swapped()]) == [Judgement(1.0, "a")] * 2
    tosses = [COIN.grade([Comparison("c", f"left {i}", f"right {i}")])[0].label for i in range(400)]
    assert 160 < tosses.count("a") < 240
    assert COIN.grade([item]) == COIN.grade([item])


def test_bradley_terry_by_hand():
    p = base.bradley_terry(np.array([1.0, 0.0, -700.0]), np.array([0.0, 1.0, 700.0]))
    assert p[0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert p[0] + p[1] == 1.0
    assert p[2] == pytest.approx(0.0, abs=1e-300)


def test_tie_margin_widens_the_tie():
    item = Comparison("c", "a", "b")
    assert [base.decide(item, p, 0.1).label for p in (0.39, 0.45, 0.5, 0.6, 0.61)] == ["b", "tie", "tie", "tie", "a"]
    assert base.decide(item, 0.5, 0.0).label == "tie"


def test_fit_has_no_intercept_and_finds_the_optimum():
    """One feature, d = +1 three times and -1 once: the gradient 3 s(-w) - s(w) - ridge w must vanish."""
    weight = base.fit_bradley_terry(np.array([[1.0], [1.0], [1.0], [-1.0]]), ridge=0.5)[0]
    sigmoid = 1 / (1 + math.exp(-weight))
    assert 3 * (1 - sigmoid) - sigmoid - 0.5 * weight == pytest.approx(0, abs=1e-4)


def test_identical_replies_are_tied_by_every_trained_grader(fake_embedder):
    for spec in SPECS.values():
        judged = base.train_grader(spec, training_pairs(), 0).grade([Comparison("c", "the same words", "the same words ")])[0]
        assert (judged.label, judged.p_a) == ("tie", 0.5)


# Trained graders


@pytest.mark.parametrize("name", SPECS)
def test_trained_graders_are_antisymmetric_and_pass_the_canaries(name, fake_embedder):
    grader = base.train_grader(SPECS[name], training_pairs(), 0)
    items = [Comparison(pair.context, pair.winner, pair.loser) for pair in training_pairs(16)]
    rates = canaries.require_canaries(grader, items, ("injected", "padded"))
    assert {name: rates[name] for name in ("empty", "identical", "swapped")} == {"empty": 1.0, "identical": 1.0, "swapped": 1.0}
    alone = [grader.grade([item])[0] for item in items]
    assert [one.p_a for one in alone] == pytest.approx([one.p_a for one in grader.grade(items)], abs=1e-5)
    assert all("strength_a" in json.loads(one.raw) for one in alone)


@pytest.mark.parametrize("name", SPECS)
def test_trained_graders_learn_on_held_out_groups(name, fake_embedder):
    result = cross_validated(SPECS[name], training_pairs())
    assert result.accuracy > 0.75
    assert result.low <= result.accuracy <= result.high
    assert (result.n, result.groups, result.folds) == (48, 8, 5)
    assert 0.4 < result.longer < 0.6
    assert result == cross_validated(SPECS[name], training_pairs())
    json.dumps(result.as_facts(), allow_nan=False)


@pytest.mark.parametrize("made_of", [embedding_spec, readable_spec])
def test_a_grader_without_length_does_not_follow_length(made_of, fake_embedder):
    """Winners are simply longer and otherwise random: without residuals length is learned, with residuals it is not."""
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(300)]

    def text(count):
        return " ".join(random.choice(words, count))

    made = [TrainingPair("view", text(40 + i % 20), text(15 + i % 20), f"g{i}") for i in range(80)]
    fresh = [Comparison("view", text(60), text(20)) for _ in range(60)]
    plain = base.train_grader(made_of(residualise_length=False), made, 0)
    neutral = base.train_grader(made_of(), made, 0)
    assert np.mean([one.label == "a" for one in plain.grade(fresh)]) > 0.95
    assert neutral.fit.weights[linear.LENGTH] == 0.0
    assert "log_words" not in neutral.largest_weights(50)
    before = neutral.fingerprint
    assert build.neutralise_length(made_of(), neutral, fresh) == {neutral.kind: neutral.length_slope}
    assert neutral.fingerprint != before
    assert build.neutralise_length(made_of(residualise_length=False), plain, fresh) == {}
    strengths = neutral._each([(item.context, reply) for item in fresh for reply in (item.a, item.b)])
    margins = np.array([strengths["view", item.a] - strengths["view", item.b] for item in fresh])
    lengths = np.array([base._log_words(item.a) - base._log_words(item.b) for item in fresh])
    assert margins @ lengths / (lengths @ lengths) == pytest.approx(0, abs=1e-5)
    assert canaries.canaries(neutral, fresh)["swapped"] == 1.0


def test_neutralising_texts_of_one_length_changes_nothing():
    grader = ByWords(0.0, "f")
    grader.neutralise_length([Comparison("c", "one two", "two ones"), Comparison("c", "", "one")])
    assert grader.length_slope == 0.0


def test_too_few_pairs_and_too_few_groups_are_refused(fake_embedder):
    with pytest.raises(UserError, match="cannot learn from 3"):
        base.train_grader(ngram_spec(), training_pairs(3), 0)
    one_group = [TrainingPair(p.context, p.winner, p.loser, "one") for p in training_pairs()]
    with pytest.raises(UserError, match="fewer than two groups"):
        cross_validated(ngram_spec(), one_group)
    with pytest.raises(UserError, match="min_count"):
        base.train_grader(ngram_spec(min_count=500), training_pairs(), 0)


def test_fingerprint_follows_settings_and_rows(fake_embedder):
    def fingerprint(spec, rows):
        return base.train_grader(spec, rows, 0).fingerprint

    rows = training_pairs()
    assert fingerprint(ngram_spec(), rows) == fingerprint(ngram_spec(), rows)
    assert (
        len({fingerprint(ngram_spec(), rows), fingerprint(ngram_spec(ridge=2.0), rows), fingerprint(ngram_spec(), rows[1:])}) == 3
    )


def test_the_real_embedder_gives_unit_vectors_and_knows_near_from_far():
    vectors = embedding.Embedder()(["Trams are quieter than buses.", "A bus is louder than a tram.", "I had soup for lunch.", ""])
    assert vectors.shape == (4, 384)
    assert np.linalg.norm(vectors[:3], axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


# Features


@given(st.text(max_size=200), st.text(max_size=200))
@settings(max_examples=60)
def test_features_are_finite_and_never_negative(context, reply):
    values = features.readable(context, reply)
    assert values.shape == (len(features.NAMES),)
    assert np.isfinite(values).all()
    assert (values >= 0).all()


def test_features_by_hand():
    context = "Trams should be free for everyone."
    reply = "> Trams should be free\n\nMaybe. But who pays 20 dollars? For example, I don't; see www.example.com/x. NEVER!"
    value = dict(zip(features.NAMES, features.readable(context, reply), strict=True))
    for name, count in {
        "paragraphs": 2, "questions": 1, "exclamations": 1, "quotes": 1, "links": 1, "numbers": 1, "examples": 1, "hedges": 1,
        "first_person": 1, "second_person": 0, "negations": 2, "connectives": 1, "shouting": 1, "content_shared": 2, "words_shared": 5,
    }.items():  # fmt: skip
        assert value[name] == pytest.approx(math.log1p(count)), name
    assert value["share_of_context"] == pytest.approx(2 / 3)  # trams and free, of trams, free, everyone


def test_interplay_by_hand_and_only_where_it_is_asked_for(fake_embedder):
    value = dict(zip(features.NAMES, features.readable("the cat and the dog", "the cat or a bird"), strict=True))
    # context: the cat and dog; reply: the cat or a bird; stop words: the, and | the, or, a
    assert value["all_share_of_reply"] == pytest.approx(2 / 5)
    assert value["all_share_of_context"] == pytest.approx(2 / 4)
    assert value["all_jaccard"] == pytest.approx(2 / 7)
    assert value["stop_shared"] == pytest.approx(math.log(2))
    assert value["stop_share_of_reply"] == pytest.approx(1 / 3)
    assert value["stop_share_of_context"] == pytest.approx(1 / 2)
    assert value["stop_jaccard"] == pytest.approx(1 / 4)
    some = base.train_grader(embedding_spec(), training_pairs(), 0)
    every = base.train_grader(embedding_spec(interplay="all"), training_pairs(), 0)
    assert not features.INTERPLAY & some.largest_weights(50).keys()
    assert features.INTERPLAY & every.largest_weights(50).keys()


def test_readable_features_alone_need_no_embeddings_and_are_those_of_the_embedding_grader(monkeypatch):
    monkeypatch.setattr(embedding, "embedder", lambda: pytest.fail("an embedding was asked for"))
    rows = training_pairs()
    grader = base.train_grader(readable_spec(), rows, 0)
    fit = linear.fit_differences(
        np.stack([features.readable(p.context, p.winner) - features.readable(p.context, p.loser) for p in rows]),
        linear.weighed(features.NAMES, "content"), 30.0, True,
    )  # fmt: skip
    items = [Comparison(pair.context, pair.winner, pair.loser) for pair in rows]
    margins = fit.margins(np.stack([features.readable(c.context, c.a) - features.readable(c.context, c.b) for c in items]))
    assert [one.p_a for one in grader.grade(items)] == pytest.approx(1 / (1 + np.exp(-margins)), abs=1e-5)
    assert grader.largest_weights(50).keys() <= set(features.NAMES) - features.INTERPLAY - {"log_words"}
    assert features.INTERPLAY & base.train_grader(readable_spec(interplay="all"), rows, 0).largest_weights(50).keys()
    assert sections.families(embedding_spec()) & sections.families(readable_spec())  # they may not judge one another
    assert not sections.families(ngram_spec()) & sections.families(readable_spec())


def test_tuning_sees_training_pairs_only_and_finds_that_noise_wants_no_embeddings(fake_embedder):
    """The fake embeddings are noise and the readable features tell everything: a strong embedding block can only hurt."""
    rows = training_pairs()
    grader = base.train_grader(embedding_spec(tune=True), rows, 0)
    assert grader.settings in embedding.GRID
    assert grader.settings == base.train_grader(embedding_spec(tune=True), rows, 0).settings
    assert grader.settings[1] <= 0.1
    one_group = [TrainingPair(p.context, p.winner, p.loser, "one") for p in rows]
    assert base.train_grader(embedding_spec(tune=True, ridge=7.0), one_group, 0).settings == (7.0, 0.3)
    assert cross_validated(embedding_spec(tune=True), rows[:24]).accuracy > 0.7


def test_graders_and_the_simulated_annotator_share_no_feature():
    """No readable feature may be redundancy, long words or sentence variation: each of the three can move while none of these does."""
    reply = "we went home early today and then saw him. it was fun to do so."
    longer_letters = reply.replace("early", "eeeaaarly")
    assert annotator.long_words(reply) != annotator.long_words(longer_letters)
    assert np.array_equal(features.readable("view", reply), features.readable("view", longer_letters))
    moved_border = reply.replace(". it was", " it. was")
    assert annotator.sentence_variation(reply) != annotator.sentence_variation(moved_border)
    assert np.array_equal(features.readable("view", reply), features.readable("view", moved_border))


# Measuring


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40), st.integers(2, 6))
def test_folds_keep_groups_together(groups, folds):
    assigned = measure.fold_assignment(groups, folds, 7)
    assert all(len({fold for group, fold in zip(groups, assigned, strict=True) if group == name}) == 1 for name in groups)
    assert set(assigned) == set(range(min(folds, len(set(groups)))))


def test_score_by_hand():
    rows = [TrainingPair("c", "one two three", "one", "g"), TrainingPair("c", "one", "two", "h")]
    result = measure.score(rows, [Judgement(0.8, "a"), Judgement(0.4, "b")], 0, 0)
    assert (result.accuracy, result.longer) == (0.5, 0.75)
    assert result.brier == pytest.approx((0.04 + 0.36) / 2)


def test_cluster_interval_is_wider_than_the_rows_suggest():
    values = np.repeat([1.0, 0.0, 1.0, 1.0], 50)
    low, high = measure.cluster_interval(values, [str(i // 50) for i in range(200)], 0)
    alone = measure.cluster_interval(values, [str(i) for i in range(200)], 0)
    assert high - low > 2 * (alone[1] - alone[0])
    assert alone[0] == pytest.approx(0.75 - 1.96 * math.sqrt(0.75 * 0.25 / 200), abs=0.01)


# Training data


def test_ukp_reader(tmp_path):
    file = tmp_path / "is-tea-better-than-coffee-_yes-tea.csv"
    file.write_text(
        '#id\tlabel\ta1\ta2\nx_y\ta1\tTea "calms <br/> and warms.\tCoffee\x85wakes.\nx_z\ta2\tbad\tgood\n',
        encoding="utf-8",
        newline="",
    )
    first, second = pairs.read_ukp(file)
    assert first == TrainingPair(
        "Is tea better than coffee?", 'Tea "calms\nand warms.', "Coffee\x85wakes.", "is-tea-better-than-coffee-"
    )
    assert (second.winner, second.loser) == ("good", "bad")
    file.write_text("#id\tlabel\ta1\ta2\nx\ta3\tb\tc\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        pairs.read_ukp(file)
    with pytest.raises(UserError, match="found 1"):
        pairs.load_training_pairs(sections.PairData(kind="ukp", path=str(tmp_path)), None, None)


def test_real_ukp_has_its_published_size():
    folder = DATA / "ukpconvarg1"
    if not folder.is_dir():
        pytest.skip("../shared/data/ukpconvarg1 is not there")
    spec = sections.PairData(kind="ukp", path=str(folder))
    rows, hashes = pairs.load_training_pairs(spec, None, None), pairs.training_hashes(spec)
    assert len(rows) == 11650
    assert len({row.group for row in rows}) == 16
    assert list(hashes) == ["ukp"]


def outcome_row(i: int, corpus: str = "cmv") -> OutcomePair:
    made = training_pairs(i + 1)[i]
    turns = (Turn(role="user", text=made.context),)
    return OutcomePair(
        id=f"o{i}", corpus=corpus, conversation_id=f"t{i}", group=made.group, turns=turns, winner=made.winner, loser=made.loser
    )


def test_cmv_pairs_come_from_the_corpus_reader(tmp_path, monkeypatch):
    monkeypatch.setattr("suasion.corpora.cmv.outcome_pairs", lambda folder: [outcome_row(i) for i in range(3)])
    spec = sections.PairData(kind="cmv", path=str(tmp_path))
    with pytest.raises(UserError, match=r"utterances\.jsonl is missing"):
        pairs.load_training_pairs(spec, None, None)
    (tmp_path / "utterances.jsonl").write_text("x")
    rows, hashes = pairs.load_training_pairs(spec, None, None), pairs.training_hashes(spec)
    assert len(rows) == 3
    assert rows[0].context.endswith("I dislike trams. Change my view.")
    assert list(hashes) == ["cmv/utterances.jsonl"]
    assert hashes == pairs.training_hashes(spec)


def test_pairs_that_teach_nothing_are_left_out_and_none_at_all_is_an_error(tmp_path):
    good = outcome_row(0)
    rows = [good, good.model_copy(update={"loser": good.winner + " "}), good.model_copy(update={"winner": " "})]
    assert len(pairs.from_outcome_pairs(rows)) == 1
    write_rows(tmp_path / "grader_pairs.jsonl", rows[1:])
    with pytest.raises(UserError, match="no outcome pairs"):
        pairs.load_training_pairs(TRAIN, tmp_path / "grader_pairs.jsonl", None)


# The stage


def sampled(pool: str, count: int) -> tuple[list[Prompt], list[Response], list[Pair]]:
    """Prompts, two responses each, pairs."""
    prompts, responses, made = [], [], []
    for i in range(count):
        prompt = Prompt(
            id=f"{pool}{i}",
            corpus="cmv",
            conversation_id=f"c-{pool}{i}",
            author="x",
            turns=(Turn(role="user", text=f"{TOPICS[i % 8]} {i}"),),
        )
        prompts.append(prompt)
        for n, text in enumerate(
            (f"Take {i}: {GOOD[i % 3]} and so on.", f"Take {i}: {BAD[i % 4]} {BAD[(i + 1) % 4]} {'truly ' * (i % 5)}")
        ):
            responses.append(
                Response(
                    id=f"{prompt.id}-{n}",
                    prompt_id=prompt.id,
                    n=n,
                    text=text,
                    finish="stop",
                    tokens=(1,) * len(text.split()),
                    logprob=-1.0,
                    lineage="sft",
                    seed=1,
                )
            )
        made.append(Pair(id=f"p-{prompt.id}", prompt_id=prompt.id, pool=pool, a=f"{prompt.id}-0", b=f"{prompt.id}-1"))
    return prompts, responses, made


def make_recipe(**changes) -> Recipe:
    return validate_recipe(
        {
            "name": "test",
            "corpus": {"sources": [{"kind": "cmv"}]},
            "ai_labels": {
                "grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}},
                "allow_failed_canaries": ["injected", "padded"],
            },
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [{"name": "rlaif", "labels": "ai", "pool": "rlaif"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
            **changes,
        },
        "test",
    )


def stage_context(tmp_path: Path, name: str, settings: Recipe, files: list[tuple[str, str]]) -> StageContext:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    inputs = {Input(source, file): tmp_path / source / file for source, file in files}
    return StageContext(recipe=settings, stage=name, folder=folder, inputs=inputs, cache=tmp_path / "cache")


def write_sampled(tmp_path: Path) -> None:
    for name in ("sample", "pools"):
        (tmp_path / name).mkdir()
    pools = {pool: sampled(pool, 10) for pool in ("rlaif", "rlhf")}
    for pool, (prompts, _, _) in pools.items():
        write_rows(tmp_path / "pools" / f"{pool}.jsonl", prompts)
    write_rows(tmp_path / "sample" / "responses.jsonl", [row for made in pools.values() for row in made[1]])
    write_rows(tmp_path / "sample" / "pairs.jsonl", [row for made in pools.values() for row in made[2]])
    write_rows(tmp_path / "pools" / "grader_pairs.jsonl", [outcome_row(i) for i in range(32)])
    write_rows(tmp_path / "pools" / "judge_pairs.jsonl", [])


AI_FILES = [
    ("sample", "pairs.jsonl"), ("sample", "responses.jsonl"), ("pools", "rlaif.jsonl"), ("pools", "rlhf.jsonl"),
    ("pools", "grader_pairs.jsonl"), ("pools", "judge_pairs.jsonl"),
]  # fmt: skip


def test_ai_labels_stage(tmp_path, fake_embedder, capsys):
    write_sampled(tmp_path)
    context = stage_context(tmp_path, "ai-labels", make_recipe(), AI_FILES)
    result = stage.run_stage(context)
    verdicts = list(read_rows(context.folder / "verdicts.jsonl", Verdict))
    assert result.rows_in == result.rows_out == len(verdicts) == 20
    assert {verdict.source for verdict in verdicts} == {"ai:embedding"}
    assert {verdict.order for verdict in verdicts} == {"both"}
    assert {result.facts["canaries"][name] for name in ("empty", "identical", "swapped")} == {1.0}
    assert list(read_rows(context.folder / "orders.jsonl", Verdict)) == []
    assert result.facts["pools"]["rlhf"]["n"] == 10
    assert read_json(context.folder / "grader.json")["training_pairs"] == 32
    assert str(tmp_path) not in (context.folder / "grader.json").read_text()
    json.dumps(result.facts, allow_nan=False)
    before = {file.name: file.read_bytes() for file in context.folder.iterdir()}
    stage.run_stage(context)
    assert before == {file.name: file.read_bytes() for file in context.folder.iterdir()}


def test_ai_labels_warns_when_length_predicts_them(tmp_path, fake_embedder, capsys):
    write_sampled(tmp_path)
    settings = make_recipe(ai_labels={"grader": {"kind": "ngram", "train": {"kind": "grader_pairs"}}, "allow_failed_canaries": ["injected", "padded"]},
                           evaluate={"grader": {"kind": "embedding", "train": {"kind": "judge_pairs"}}})  # fmt: skip
    result = stage.run_stage(stage_context(tmp_path, "ai-labels", settings, AI_FILES))
    warned = "length alone predicts" in " ".join(capsys.readouterr().out.split())
    assert warned == (result.facts["length_predicts"] > 0.75)


@pytest.mark.parametrize(("share", "warned"), [(0.75, False), (0.76, True), (None, False)])
def test_the_warning_starts_above_three_quarters(share, warned, capsys):
    stage.warn({"length_predicts": share, "none": 0, "n": 100, "outcomes": {}})
    assert ("length alone predicts 76%" in " ".join(capsys.readouterr().out.split())) == warned


def test_label_facts_by_hand():
    prompts, responses, made = sampled("rlaif", 4)
    rows = pairs.join_pairs(made, prompts, responses)
    longer = [base.longer(row.a.text, row.b.text) for row in rows]
    verdicts = [base.to_verdict(row.pair.id, Judgement(0.9, side), "s") for row, side in zip(rows, longer, strict=True)]
    facts = stage.label_facts(rows, verdicts)
    assert facts["length_predicts"] == 1.0
    assert facts["first_rate"] == pytest.approx(longer.count("a") / sum(side != "tie" for side in longer), abs=1e-4)
    nothing = stage.label_facts(rows, [base.to_verdict(row.pair.id, Judgement(0.5, "tie"), "s") for row in rows])
    assert (nothing["tie_share"], nothing["first_rate"], nothing["length_predicts"]) == (1.0, None, None)


def test_broken_references_are_refused():
    prompts, responses, made = sampled("rlaif", 2)
    with pytest.raises(UserError, match="not in the run"):
        pairs.join_pairs(made, prompts, responses[1:])
    crossed = made[0].model_copy(update={"b": made[1].b})
    with pytest.raises(UserError, match="not in the run"):
        pairs.join_pairs([crossed], prompts, responses)


def test_every_shipped_grader_file_is_valid():
    files = sorted((Path(__file__).parents[1] / "graders").glob("*.yaml"))
    assert files
    assert {load_grader(file).kind for file in files} == set(sections.KINDS)


def test_ai_labels_of_a_language_model_keep_both_orders_and_no_address(tmp_path, monkeypatch, capsys):
    """A judge that takes the first reply unless one of them gives reasons: some pairs flip, and flips are no labels."""
    monkeypatch.setenv("SUASION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(stage, "require_canaries", lambda *rest: {"empty": 1.0})

    def answer(body, number):
        first, second = (re.search(rf"<<<{side} reply \w+>>>\n(.*?)\n<<<end", body["messages"][1]["content"], re.DOTALL)[1] for side in ("first", "second"))  # fmt: skip
        swayed = "Take 3" in first or ("because" in first) >= ("because" in second)
        return Reply(json.dumps({"reasons": "r", "verdict": "first" if swayed else "second", "confidence": 0.8}))

    write_sampled(tmp_path)
    with serving(answer) as served:
        llm = {"kind": "llm", "model": "judge", "base_url": served.url, "key_env": None, "price_in": 1, "price_out": 1}
        settings = make_recipe(ai_labels={"grader": llm})
        context = stage_context(tmp_path, "ai-labels", settings, AI_FILES)
        result = stage.run_stage(context)
        asked = len(served.bodies)
        again = stage.run_stage(context)
        assert len(served.bodies) == asked == 20  # the two pools hold the same texts here: equal requests are asked once
    assert again.facts == result.facts
    verdicts = list(read_rows(context.folder / "verdicts.jsonl", Verdict))
    orders = list(read_rows(context.folder / "orders.jsonl", Verdict))
    assert len(verdicts) == 20
    assert [verdict.order for verdict in orders] == ["ab", "ba"] * 20
    flipped = [verdict for verdict in verdicts if verdict.outcome == "flip"]
    assert len(flipped) == result.facts["outcomes"]["flip"] == result.facts["none"] > 0
    assert {settle([verdict], "drop") for verdict in flipped} == {"flip"}
    assert {settle([verdict], "drop") for verdict in verdicts if verdict.outcome == "consistent"} <= {"a", "b"}
    assert result.facts["first_shown_rate"] > 0.5
    assert {verdict.template_hash for verdict in verdicts} == {"7b2dc62842fe67eb"}
    kept = "".join(file.read_text() for file in context.folder.iterdir())
    assert "127.0.0.1" not in kept
    assert "127.0.0.1" not in json.dumps(recipe_slice(settings, ("ai_labels", "evaluate")))


def test_agreement_with_the_judge_has_intervals_and_tells_people_from_simulated_ones(tmp_path, capsys):
    write_sampled(tmp_path)
    (tmp_path / "human-labels").mkdir()
    made = list(read_rows(tmp_path / "sample" / "pairs.jsonl", Pair))
    said = [
        Verdict(
            pair_id=pair.id,
            source="human",
            order="ab",
            label="none" if i == 0 else "tie" if i == 1 else "a" if i % 3 else "b",
            p_a=None,
        )
        for i, pair in enumerate(made)
    ]
    write_rows(tmp_path / "human-labels" / "verdicts.jsonl", said)
    files = [*AI_FILES[:4], ("human-labels", "verdicts.jsonl")]
    for source, people in (({"kind": "simulated"}, False), ({"kind": "page"}, True)):
        context = stage_context(tmp_path, "evaluate", make_recipe(human_labels={"source": source}), files)
        (row,) = judge_agreement(context, FIRST_POSITION, sampled_pairs(context))
        right = sum(verdict.label == "a" for verdict in said)
        decisive = sum(verdict.label in "ab" for verdict in said)
        assert (row["n"], row["people"]) == (decisive, people) == (18, people)
        assert row["agree"] == pytest.approx(right / decisive, abs=1e-4)
        assert row["low"] < row["agree"] < row["high"]
        assert row["balanced"]["value"] == 0.5  # the judge takes the first position: with such people it agrees by chance alone
        assert row["labelled"] == 19  # the tie counts where chance is taken out
        assert row["kappa"]["value"] == 0.0  # one label for everything is no more than chance
        assert row["gwet_ac1"]["low"] < row["gwet_ac1"]["value"] < row["gwet_ac1"]["high"]
        assert row["alpha"]["value"] < 0


def test_a_claim_about_people_rests_on_all_annotators_and_not_on_the_busiest(tmp_path):
    write_sampled(tmp_path)
    (tmp_path / "human-labels").mkdir()
    made = list(read_rows(tmp_path / "sample" / "pairs.jsonl", Pair))
    said = [
        Verdict(pair_id=pair.id, source=f"annotator {i % 3}", order="ab", label="a" if i % 4 else "b", p_a=None)
        for i, pair in enumerate(made)
    ]
    ruled = Verdict(pair_id=made[0].id, source="adjudicator", order="both", label="a", p_a=None)
    write_rows(tmp_path / "human-labels" / "verdicts.jsonl", [*said, ruled])
    context = stage_context(
        tmp_path,
        "evaluate",
        make_recipe(human_labels={"source": {"kind": "page"}}),
        [*AI_FILES[:4], ("human-labels", "verdicts.jsonl")],
    )
    (row,) = judge_agreement(context, FIRST_POSITION, sampled_pairs(context))
    assert (row["a"], row["n"], row["agree"], row["people"]) == ("people", 20, 0.75, True)


def test_people_and_the_labelling_grader_stand_apart_from_the_judge(tmp_path):
    write_sampled(tmp_path)
    context = stage_context(tmp_path, "evaluate", make_recipe(human_labels={"source": {"kind": "page"}}), AI_FILES[:4])
    assert labeller_agreement(context) == []
    rows = [Labelled(f"q{i}", "a" if i % 2 else "b", "a", i % 2 == 0) for i in range(20)]
    found = {
        **compare(rows, 0),
        "sources": {"human": ["anna", "ben"], "ai": ["ai:ngram"]},
        "page": "07-preferences/disagreements.html",
    }
    (row,) = labeller_agreement(replace(context, facts={"preferences": {"agreement": found}}))
    assert (row["a"], row["b"], row["agree"], row["labelled"]) == ("people", "ai:ngram (labelling grader)", 0.5, 20)
    assert row["labelling"]
    assert row["people"]
    assert row["kappa"]["value"] == 0.0
