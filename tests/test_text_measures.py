"""Measures of the text by hand, their differences from base, likelihood of real replies, similarity and strategies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from suasion.bases import TINY
from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.evaluation import likelihood, measuring, metrics, strategies, style
from suasion.evaluation.measuring import read_oracle, similarity
from suasion.evaluation.statistics import resample_weights
from suasion.models import Compute, Lineage, compute, load_base, load_tokenizer
from suasion.recipe import load_recipe
from suasion.records import Example, OutcomePair, Response, Turn
from suasion.sampling.respond import Journal
from suasion.sections.training import ModelSection
from suasion.seeding import generator


def test_reading_grade_is_coleman_liau():
    """By hand: 8 words, 34 letters, 2 sentences: 0.0588 x 425 - 0.296 x 25 - 15.8."""
    text = "Buses help everyone. Trams cost more money today."
    assert len(metrics.words(text)) == 8
    letters = sum(map(len, metrics.words(text)))
    assert metrics.reading_grade([text]) == pytest.approx(0.0588 * 100 * letters / 8 - 0.296 * 100 * 2 / 8 - 15.8)
    assert metrics.reading_grade([""]) is None


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=40), st.integers(1, 6))
def test_moving_type_token_ratio_equals_its_definition(tokens, window):
    got = metrics.moving_type_token_ratio([" ".join(tokens)], window)
    if len(tokens) < window:
        assert got is None
        return
    shares = [len(set(tokens[i : i + window])) / window for i in range(len(tokens) - window + 1)]
    assert got == pytest.approx(np.mean(shares))


def test_diversity_in_a_window_does_not_fall_with_length():
    rng = generator(0, "mattr")
    short = " ".join(map(str, rng.integers(0, 60, 100)))
    long = " ".join(map(str, rng.integers(0, 60, 5000)))
    assert metrics.moving_type_token_ratio([short]) == pytest.approx(metrics.moving_type_token_ratio([long]), abs=0.03)
    assert metrics.distinct([short]) > metrics.distinct([long]) + 0.2


def test_counts_by_hand():
    text = "Perhaps you might pay 20 euros. I think your bus, no. 7, is late! See www.example.org."
    words = len(metrics.words(text))
    assert metrics.hedging(text) == pytest.approx(100 * 3 / words)  # perhaps, might, think
    assert metrics.second_person(text) == pytest.approx(100 * 2 / words)
    assert metrics.numbers(text) == pytest.approx(100 * 2 / words)
    assert metrics.links(text) == 1
    assert metrics.hedging("") is None
    assert metrics.sentences('He said "no." Then left.\nAnd came…  back') == ['He said "no.', "Then left.", "And came…", "back"]


@pytest.mark.parametrize(
    ("sentence", "claim"),
    [
        ("In 1990 it rained.", 1.0),
        ("The mayor of Lisbon agreed.", 1.0),
        ("Most research says so.", 1.0),
        ("Three of them left.", 1.0),
        ("I like it on Monday.", 0.0),
        ("Is it 20 euros?", 0.0),
        ("It is better that way.", 0.0),
    ],
)
def test_what_counts_as_a_claim(sentence, claim):
    assert metrics.claims(sentence) == claim


def sample(n: int) -> style.Sample:
    weights = resample_weights(n, 400, generator(0, "style"))
    return style.Sample(tuple(f"p{i}" for i in range(n)), ("a context",) * n, np.arange(n), weights, 0.95)


def test_drift_is_the_paired_difference_with_an_interval():
    base = style.Speech("base", tuple("word " * (10 + i % 7) for i in range(40)))
    longer = style.Speech("sft", tuple("word " * (15 + i % 7 + i % 2) for i in range(40)))
    drift = style.drift(longer, base, sample(40), style.Measured())
    assert drift["words"]["value"] == pytest.approx(5.5)
    assert 5 < drift["words"]["low"] < 5.5 < drift["words"]["high"] < 6
    assert drift["questions"]["value"] == 0
    assert "same on every prompt" in drift["questions"]["reason"]
    few = style.drift(*(style.Speech(s.name, s.texts[:12]) for s in (longer, base)), sample(12), style.Measured())
    assert few["words"]["low"] is None
    assert "30" in few["words"]["reason"]


def test_prompts_that_one_side_did_not_answer_are_left_out():
    base = style.Speech("base", ("one two", None, "one two"))
    other = style.Speech("sft", ("one two three", "x y z w", None))
    drift = style.drift(other, base, sample(3), style.Measured())
    assert (drift["words"]["value"], drift["words"]["n"]) == (1.0, 1)
    facts = style.facts(style.Speech("silent", (None, None, None)), sample(3), style.Measured())
    assert set(facts.values()) == {None}


def test_numbers_made_elsewhere_join_by_prompt():
    measured = style.Measured(per_response={"human_similarity": {"sft": {"p0": 0.5, "p2": 0.1}}})
    facts = style.facts(style.Speech("sft", ("a", "b", "c")), sample(3), measured)
    assert facts["human_similarity"] == pytest.approx(0.3)


def test_honesty_rates_use_trusted_rules_only():
    speeches = [
        style.Speech("base", ("Plain words here.",) * 40),
        style.Speech("sft", ("My sister came.", "According to a study, yes.") * 20),
    ]
    found = style.honesty(speeches, sample(40))
    trusted = {rule["kind"] for rule in found["rules"] if rule["trusted"]}
    assert found["speakers"]["sft"]["rates"].keys() == trusted
    assert found["speakers"]["sft"]["rates"]["identity"]["value"] == 0.5
    assert found["speakers"]["sft"]["vs_base"]["identity"]["low"] > 0.2
    assert found["speakers"]["sft"]["counts"]["studies-show"] == 20  # a count, though no finding
    assert "source" not in found["speakers"]["sft"]["rates"]


def pair(number: int, winner: str, loser: str) -> OutcomePair:
    return OutcomePair(
        id=f"o{number}", corpus="cmv", conversation_id=f"c{number}", group=f"g{number}",
        turns=(Turn(role="user", text="Buses should be free. Change my view."),), winner=winner, loser=loser,
    )  # fmt: skip


def test_likelihood_is_the_mean_log_probability_of_each_reply(tmp_path):
    """Against a plain forward pass of each reply alone; a second call takes the journal's numbers."""
    import torch

    section = ModelSection(base=TINY, device="cpu", dtype="float32")
    renderer, hardware, model = Renderer(load_tokenizer(section), section.system_prompt), compute(section), load_base(section)
    pairs = [pair(n, "They cost the town more than fares bring in. " * (1 + n % 3), "No, they should not.") for n in range(4)]
    for one in pairs:
        for got, reply in zip(likelihood.mean_logprobs(model, one, renderer, hardware), (one.winner, one.loser), strict=True):
            rendered = renderer.render(one.turns, reply=reply)
            ids = torch.tensor([rendered.ids])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(rendered.prompt_ids)
            alone = [float(logs[i - 1, ids[0, i]]) for i in range(start, len(rendered.ids))]
            assert got == pytest.approx(np.mean(alone), abs=1e-4)
    arguments = (pairs, renderer, hardware)
    first = likelihood.compare({"base": Lineage(section)}, *arguments, Journal(tmp_path / "j"), 1, 100, 0.95)
    again = likelihood.compare({"base": Lineage(section)}, *arguments, Journal(tmp_path / "j"), 1, 100, 0.95)
    assert first == again
    assert first["models"]["base"]["pairs"] == 4
    assert likelihood.compare({"base": Lineage(section)}, [], renderer, hardware, Journal(tmp_path / "k"), 1, 100, 0.95) == {}
    assert likelihood.chosen_pairs(pairs, 2, renderer, 512, 1) == likelihood.chosen_pairs(pairs[::-1], 2, renderer, 512, 1)
    assert likelihood.chosen_pairs(pairs, 9, renderer, 20, 1) == []


def test_similarity_is_one_to_itself_and_skips_the_silent():
    said = {"base": {"p": "Buses are cheap.", "q": ""}, "human": {"p": "Buses are cheap.", "q": "x"}}
    found = similarity(said, said["human"], "human")
    assert found == {"base": {"p": pytest.approx(1.0)}}


@pytest.mark.parametrize("wanted", [True, False])
def test_likeness_to_the_human_reply_is_measured_where_it_is_wanted(wanted, renderer, tmp_path, monkeypatch):
    def embedded():
        assert wanted, "texts are embedded for nothing"
        return lambda texts: np.array([[1.0, 0.0] if "tram" in text else [0.0, 1.0] for text in texts])

    monkeypatch.setattr(measuring, "embedder", embedded)
    recipe = load_recipe(
        Path(__file__).parents[1] / "recipes" / "tiny.yaml", (f"evaluate.human_similarity={str(wanted).lower()}",)
    )
    prompt = Example(
        id="e", corpus="own", conversation_id="c", author="a", turns=(Turn(role="user", text="Cars."),), reply="A tram.", outcome=1.0
    )  # fmt: skip
    key = prompt.prompt().id
    said = {
        name: {
            key: Response(id=name, prompt_id=key, n=0, text=text, finish="stop", tokens=(1,), logprob=-1.0, lineage="l", seed=0)
        }
        for name, text in (("base", "A bus."), ("sft", "Take the tram."))
    }
    journal = Journal(tmp_path / "journal.jsonl")
    found = measuring.measure_texts(recipe, [prompt], said, {}, [], renderer, Compute("cpu", "float32", 1), journal)
    likeness = {"human_similarity": {"base": {key: 0.0}, "sft": {key: 1.0}}}
    assert found.per_response == (likeness if wanted else {})


def test_oracle_texts_are_checked(tmp_path):
    file = tmp_path / "oracle.jsonl"
    file.write_text('{"prompt_id": "p"}\n')
    with pytest.raises(UserError, match=r"line 1.*prompt_id and text"):
        read_oracle(file, [])
    file.write_text('{"prompt_id": "p", "text": "t"}\n')
    with pytest.raises(UserError, match="none of the 0"):
        read_oracle(file, [])


def test_labelled_sentences_of_the_bundled_dialogues():
    rows = strategies.read_sentences(strategies.corpus_folder("bundled"))
    assert len({row.dialogue for row in rows}) == 42
    assert {row.label for row in rows} <= {*strategies.STRATEGIES, strategies.NONE}
    fold = strategies.folds(rows, 1)
    for dialogue in {row.dialogue for row in rows}:
        assert len({int(f) for f, row in zip(fold, rows, strict=True) if row.dialogue == dialogue}) == 1
    assert set(fold.tolist()) == set(range(strategies.FOLDS))
    assert strategies.external_hashes("bundled").keys() == {"strategies/utterances.jsonl"}


def test_a_classifier_learns_strategies_that_words_give_away(monkeypatch):
    """Fast twin of the measurement on real dialogues: made sentences, embeddings replaced by letters' counts."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    monkeypatch.setattr(
        strategies, "embedder", lambda: lambda texts: np.array([[text.count(c) / 9 for c in letters] for text in texts])
    )
    phrases = {"donation-information": "they take any gift by card", "personal-story": "my aunt once lived there", "none": "hello and thanks"}  # fmt: skip
    rows = [
        strategies.Sentence(f"d{n}", f"{phrase} {n}", "why?", 0, n % 3, label)
        for n in range(15)
        for label, phrase in phrases.items()
    ]
    facts, f1 = strategies.quality(rows, 1)
    assert facts["macro_f1"] == facts["accuracy"] == 1.0
    assert f1.keys() == set(phrases)
    shuffled = [
        strategies.Sentence(row.dialogue, row.text, row.before, row.place, row.turn, rows[other].label)
        for row, other in zip(rows, generator(0, "shuffled").permutation(len(rows)), strict=True)
    ]
    assert strategies.quality(shuffled, 1)[0]["macro_f1"] < 0.9


@pytest.mark.slow
def test_strategies_on_the_labelled_p4g_dialogues():
    """Macro-F1 at least .55 by dialogue, and above TF-IDF; published 59.6-63.9 (arXiv 2310.10467)."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "persuasionforgood-corpus"
    if not folder.is_dir():
        pytest.skip("needs the research corpora in ../shared/data")
    rows = strategies.read_sentences(folder)
    assert len({row.dialogue for row in rows}) == 300
    facts, _ = strategies.quality(rows, 7)
    assert facts["macro_f1"] >= 0.55, facts
    assert facts["macro_f1"] > facts["tfidf_macro_f1"]
    assert math.isfinite(facts["accuracy"])
