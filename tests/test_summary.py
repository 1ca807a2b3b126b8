"""The summary of a run: made from synthetic rows whose right answer is known, and from degenerate ones."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest

from suasion.evaluation import metrics, wording
from suasion.evaluation.summary import HUMAN, Control, ModelVerdict, controls, primary_pairs, simulated_models, summarise
from suasion.recipe import Recipe, validate_recipe
from suasion.records import Example, Response, Turn, canonical_json, content_id
from suasion.seeding import generator

MODELS = ("base", "sft", "rlaif", "rlhf", "rlaif-rlhf", "rlaif-matched")
OPENINGS = ("I think", "It seems to me that", "Most people assume", "My family always said", "Honestly,", "For years I believed")
TOPICS = ("city buses", "night shifts", "school uniforms", "office plants", "second-hand phones", "morning runs", "paper maps")
CLAIMS = (
    "cost more than they give",
    "are worth defending",
    "should be left to local councils",
    "only help those who need it least",
)
REASONS = (
    "the people who pay for it never see the benefit",
    "a neighbour of mine tried it for a year and came back to the old way",
    "nobody has counted what it does to the small shops on the same street",
    "it sounds fair until you look at who has the time for it",
    "the rule was written for a world that no longer exists",
)


def make_recipe(**evaluate: object) -> Recipe:
    """All four arms, simulated people, two graders."""
    embedding = {"kind": "embedding", "train": {"kind": "grader_pairs"}}
    ngram = {"kind": "ngram", "train": {"kind": "judge_pairs"}}
    return validate_recipe(
        {
            "name": "synthetic",
            "seed": 3,
            "corpus": {"sources": [{"kind": "cmv", "path": "/data/secret-machine/winning-args-corpus"}]},
            "ai_labels": {"grader": embedding},
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [
                {"name": "rlaif", "labels": "ai", "pool": "rlaif"},
                {"name": "rlhf", "labels": "human", "pool": "rlhf"},
                {"name": "rlaif-rlhf", "start": "rlaif", "labels": "human", "pool": "rlhf"},
                {"name": "rlaif-matched", "labels": "ai", "pool": "rlhf", "matched": True},
            ],
            "evaluate": {"grader": ngram, "bootstrap": 200, **evaluate},
        },
        "synthetic recipe",
    )


IMPORTED = {"source": {"kind": "file", "layout": "preferences", "path": "/data/labels.jsonl"}}


def variant(arms: dict[str, dict] | None = None, names: dict[str, str] | None = None, **sections: object) -> Recipe:
    """make_recipe with other fields in some arms, other names of arms, and other sections."""
    data = make_recipe().model_dump(mode="json") | sections
    names = names or {}
    for arm in data["dpo"]:
        arm |= (arms or {}).get(arm["name"], {})
        arm |= {field: names.get(arm[field], arm[field]) for field in ("name", "start", "reference")}
    return validate_recipe(data, "synthetic recipe")


def sentence(rng: np.random.Generator) -> str:
    """One made-up sentence."""
    return f"{rng.choice(OPENINGS)} {rng.choice(TOPICS)} {rng.choice(CLAIMS)}, because {rng.choice(REASONS)}."


def make_prompts(n: int, per_conversation: int = 1) -> list[Example]:
    """Examples with made-up contexts and human replies."""
    prompts = []
    for index in range(n):
        rng = generator(1, "prompt", index)
        turns = (Turn(role="user", text=f"Number {index}: {sentence(rng)} {sentence(rng)}"),)
        reply = " ".join(sentence(rng) for _ in range(3))
        conversation = f"c{index // per_conversation}"
        prompts.append(
            Example(
                id=f"e{index}",
                corpus="cmv",
                conversation_id=conversation,
                author=f"a{index}",
                turns=turns,
                reply=reply,
                outcome=1.0,
            )
        )
    return prompts


def make_responses(prompts: list[Example], models: tuple[str, ...] = MODELS) -> dict[str, dict[str, Response]]:
    """One made-up response a model and prompt; later models write more."""
    made: dict[str, dict[str, Response]] = {}
    for rank, model in enumerate(models):
        made[model] = {}
        for prompt in prompts:
            key = prompt.prompt().id
            rng = generator(2, "response", model, key)
            text = " ".join(sentence(rng) for _ in range(2 + int(rng.integers(0, 2 + rank))))
            made[model][key] = Response(
                id=content_id("response", model, key),
                prompt_id=key,
                n=0,
                text=text,
                finish="length" if rng.random() < 0.1 else "stop",
                tokens=tuple(range(len(text.split()))),
                logprob=-1.0,
                lineage=content_id("lineage", model),
                seed=1,
            )
    return made


def make_verdicts(
    prompts: list[Example], strength: dict[str, float], ties: float = 0.1, missing: float = 0.0
) -> list[ModelVerdict]:
    """Bradley-Terry verdicts from known strengths, every pair and every model against the human reply."""
    rows = []
    for first, second in combinations([*strength], 2):
        for prompt in prompts:
            key = prompt.prompt().id
            u, v, w = generator(3, "verdict", first, second, key).random(3)
            chance = 1 / (1 + math.exp(strength[second] - strength[first]))
            label = "none" if w < missing else "tie" if v < ties else "a" if u < chance else "b"
            rows.append(
                ModelVerdict(
                    prompt_id=key, conversation_id=prompt.conversation_id, first=first, second=second, label=label, p_a=chance
                )
            )
    return rows


STRENGTH = {"base": 0.0, "sft": -0.2, "rlaif": 1.0, "rlhf": 0.7, "rlaif-rlhf": 1.1, "rlaif-matched": 0.7, HUMAN: 1.2}
FACTS = {
    "arms": {
        name: {"margin": 0.42, "kl": 0.031, "changed_share": 0.94, "steps": 34, "first_loss": 0.693147, "moved": name != "rlhf"}
        for name in MODELS[2:]
    },
    "grader": {"name": "ngram", "accuracy": 0.62, "n": 310},
    "labels": {"ai": {"scored": 190, "ties": 12}, "human": {"scored": 48, "ties": 7}},
    "agreement": [{"a": "ai", "b": "evaluation grader", "on": "rlhf pairs", "agree": 0.58, "n": 41}],
    "counts": {"pools": {"sft": 400, "rlaif": 190, "rlhf": 48, "eval": 115}},
}


def finite(value: object) -> bool:
    """No NaN and no infinity anywhere."""
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    if isinstance(value, list):
        return all(finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


@pytest.fixture(scope="module")
def full() -> dict:
    prompts = make_prompts(115)
    return summarise(make_recipe(), prompts, make_responses(prompts), make_verdicts(prompts, STRENGTH), FACTS)


def model(summary: dict, name: str) -> dict:
    return next(m for m in summary["models"] if m["name"] == name)


def comparison(summary: dict, first: str, second: str) -> dict:
    return next(c for c in summary["comparisons"] if (c["first"], c["second"]) == (first, second))


def test_known_strengths_are_found(full):
    assert comparison(full, "rlaif", "base")["verdict"] == "better"
    assert comparison(full, "sft", "base")["verdict"] in ("cannot say", "worse")
    assert comparison(full, "rlaif-matched", "rlhf")["verdict"] in ("cannot say", "equivalent")
    rate = model(full, "rlaif")["win_vs_base"]
    assert rate["low"] < 0.5 + 0.9 * (1 / (1 + math.exp(-1)) - 0.5) < rate["high"]
    assert rate["method"] == "bootstrap"
    strength = model(full, "rlaif-rlhf")["strength"]
    assert strength["low"] < strength["value"] < strength["high"]
    assert np.mean([m["rank_score"]["value"] for m in full["models"]]) == pytest.approx(0.5, abs=1e-6)


def test_primary_family_is_fixed_beforehand(full):
    primary = [(c["first"], c["second"]) for c in full["comparisons"] if c["family"] == "primary"]
    assert primary == primary_pairs(make_recipe())
    assert len(primary) == 6
    assert full["power"]["comparisons"] == 6
    exploratory = [c for c in full["comparisons"] if c["family"] == "exploratory"]
    assert len(exploratory) == 15 - 6 + 6
    assert all(c["p_holm"] is None for c in exploratory)
    for c in full["comparisons"]:
        assert c["wins"] + c["ties"] + c["losses"] == c["n"] == c["asked"] == 115
        assert c["value"] == pytest.approx((c["wins"] + c["ties"] / 2) / c["n"], abs=1e-6)


def test_a_control_is_known_by_what_it_is_not_by_its_name():
    assert controls(make_recipe()) == [Control("rlaif-matched", "rlhf", True, ())]
    renamed = variant(names={"rlaif-matched": "control", "rlhf": "people", "rlaif-rlhf": "both"})
    assert primary_pairs(renamed)[-1] == ("control", "people")
    swapped = variant(names={"rlaif-matched": "rlhf", "rlhf": "rlaif-matched"})
    assert primary_pairs(swapped)[-1] == ("rlhf", "rlaif-matched")
    second = variant({"rlaif-matched": {"start": "rlaif"}})
    assert primary_pairs(second)[-1] == ("rlaif-matched", "rlaif-rlhf")
    same = {"reference": "sft", "micro_batch_tokens": 2, "checkpoints": 1, "report_to": "none"}
    assert primary_pairs(variant({"rlaif-matched": same}))[-1] == ("rlaif-matched", "rlhf")


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 1e-4},
        {"epochs": 2},
        {"batch_size": 4},
        {"beta": 0.2},
        {"loss": "ipo"},
        {"lora": {"r": 4}},
        {"learning_rate": 1e-4, "weight_decay": 0.1},
        {"reference": "rlaif"},
    ],
)
def test_unequal_settings_are_no_planned_comparison(fields):
    recipe, prompts = variant({"rlaif-matched": fields}), make_prompts(12)
    (control,) = controls(recipe)
    assert (control.human, set(control.differing), control.planned) == ("rlhf", set(fields), False)
    got = summarise(recipe, prompts, make_responses(prompts), make_verdicts(prompts, STRENGTH), FACTS)
    assert comparison(got, "rlaif-matched", "rlhf")["family"] == "exploratory"
    assert got["power"]["comparisons"] == 5
    assert "same pairs" not in " ".join(got["headline"])
    text = " ".join(got["caveats"])
    assert "no planned comparison of the source of feedback: they also differ in" in text
    assert all(field in text for field in fields)
    assert "no comparison of this run compares it alone" in text


def test_an_unlike_start_is_a_difference():
    recipe = variant({"rlhf": {"start": "rlaif"}})
    assert controls(recipe) == [Control("rlaif-matched", "rlhf", True, ("start", "reference"))]
    assert all(second == "base" for _, second in primary_pairs(recipe))


def test_imported_preferences_share_no_pair_with_the_control():
    """cmv-cpu-people: rlhf learned from another model's texts, so nothing may be said of the same pairs."""
    recipe, prompts = variant(human_labels=IMPORTED), make_prompts(115)
    strength = STRENGTH | {"rlaif-matched": 2.5}
    got = summarise(recipe, prompts, make_responses(prompts), make_verdicts(prompts, strength), FACTS)
    assert comparison(got, "rlaif-matched", "rlhf")["family"] == "exploratory"
    assert primary_pairs(recipe) == [(name, "base") for name in MODELS[1:]]
    said = " ".join(got["headline"] + got["caveats"])
    for false in ("same pairs:", "taught more", "teach more", "compares the source of feedback alone", "only rlaif-matched"):
        assert false not in said, false
    assert "Off-policy second stage" not in said
    assert "Off-policy human labels: rlhf and rlaif-rlhf learned from imported responses" in said
    assert (
        "rlaif-matched learned from AI labels on this run's own pairs, rlhf from human labels on texts of another model" in said
    )
    assert "two recipes, not the source of feedback" in said
    assert "no comparison of this run compares it alone" in said


def test_labels_on_the_own_pairs_are_compared(full):
    """Verdicts that people gave on this run's pairs are as good for the control as simulated ones."""
    verdicts = {"source": {"kind": "file", "path": "/data/verdicts.jsonl"}}
    assert primary_pairs(variant(human_labels=verdicts)) == primary_pairs(make_recipe())
    assert any("on the same pairs" in text.lower() for text in full["headline"])
    assert any("only rlaif-matched against rlhf (simulated) compares it alone" in text for text in full["caveats"])


def test_simulated_labels_are_named_and_inherited(full):
    assert simulated_models(make_recipe()) == {"rlhf", "rlaif-rlhf"}
    assert model(full, "rlaif-rlhf")["label"] == "rlaif-rlhf (simulated)"
    assert model(full, "rlaif-matched")["label"] == "rlaif-matched"
    assert any("simulated" in text and "rlhf (simulated)" in text for text in full["caveats"])


def test_caveats_name_what_stands_in_the_way(full):
    text = " ".join(full["caveats"])
    for needed in (
        "Sample size",
        "rlhf (simulated) did not move",
        "58% of 41",
        "62%",
        "not training runs",
        "Off-policy second stage: rlaif-rlhf",
        "may have read",
        "truth of claims is not measured",
    ):
        assert needed.lower() in text.lower(), needed


def test_invented_data_are_said_to_be_invented(full):
    """The miniatures look like real corpora in every table: a reader of the demo must not take its replies for people's."""
    assert "invented" not in " ".join(full["caveats"])

    def caveats(*sources: dict) -> str:
        return " ".join(wording.caveats(full, variant(corpus={"sources": list(sources)}), []))

    assert "The data are this project's miniatures: invented dialogues" in caveats({"kind": "cmv"}, {"kind": "p4g"})
    mixed = caveats({"kind": "cmv", "path": "/data/winning-args-corpus"}, {"kind": "p4g"})
    assert "The data of p4g are this project's miniatures" in mixed
    real, bundled = ({"kind": "cmv", "path": "/data/winning-args-corpus"}, {"kind": "p4g"})
    for sources, beside in (((real, bundled), "the real human reply"), ((bundled,), "the invented reply that the corpus holds")):
        said = " ".join(wording.headline(full, variant(corpus={"sources": list(sources)})))
        assert f"Against {beside}, no model does better than" in said


def test_every_model_that_does_best_against_the_human_reply_is_named(full):
    """Of 12 prompts several models often win the same share, and the first of them is not "the best"."""
    rates = {"base": 0.1, "sft": 0.2, "rlaif": 0.2}
    rivals = [
        {**one, "win_vs_human": {"value": rates.get(one["name"]), "low": 0.05, "high": 0.45, "n": 12}} for one in full["models"]
    ]
    said = " ".join(wording.headline({**full, "models": rivals}, make_recipe()))
    assert "no model does better than sft and rlaif: preferred by the grader on 20% of prompts (5–45%)" in said


def test_a_grader_that_labelled_and_judges_is_said():
    same = {**make_recipe().evaluate.model_dump(mode="json"), "grader": make_recipe().ai_labels.grader.model_dump(mode="json")}
    forced = variant(evaluate={**same, "allow_same_grader": True})
    prompts = make_prompts(12)
    told = summarise(forced, prompts, make_responses(prompts), make_verdicts(prompts, STRENGTH), FACTS)["caveats"]
    assert "The recipe lets the labelling grader judge the result: its own arms are favoured." in told


@pytest.mark.parametrize(("shares", "said"), [({"base": 0.87, "sft": 0.19}, "base in 87% of theirs."), ({"base": 0.2, "sft": 0.5}, "base in 20% and sft in 50% of theirs."), ({"base": 0.19}, None)])  # fmt: skip
def test_models_that_rarely_come_to_an_end_are_named(full, shares, said):
    models = [{**m, "text": {**m["text"], "cut_off": shares.get(m["name"], 0.0)}} for m in full["models"]]
    caveats = wording.caveats({**full, "models": models}, make_recipe(), [])
    found = [caveat for caveat in caveats if "cut off at the limit" in caveat]
    assert found == (
        [f"Responses cut off at the limit of length: {said} Unfinished texts are judged as they are."] if said else []
    )


def test_json_able_rounded_and_independent_of_row_order(full):
    assert finite(full)
    assert json.loads(canonical_json(full)) == full
    prompts = make_prompts(115)
    again = summarise(make_recipe(), prompts[::-1], make_responses(prompts), make_verdicts(prompts, STRENGTH)[::-1], FACTS)
    assert canonical_json(again) == canonical_json(full)


def test_size_decides_what_is_claimed(full):
    assert not wording.proves_nothing(full)
    assert "proves nothing" not in " ".join(full["headline"])
    prompts = make_prompts(12)
    small = summarise(make_recipe(), prompts, make_responses(prompts), make_verdicts(prompts, STRENGTH), {})
    assert small["headline"][0].startswith("A run of this size proves nothing: on 12 evaluation prompts")
    assert model(small, "rlaif")["win_vs_base"]["method"] == "exact"
    assert model(small, "rlaif")["strength"]["low"] is None
    assert "30" in model(small, "rlaif")["strength"]["reason"]
    one = summarise(make_recipe(), prompts[:1], make_responses(prompts[:1]), make_verdicts(prompts[:1], STRENGTH), {})
    assert "not even a model that always wins" in one["headline"][0]
    assert finite(one)


def test_clusters_not_prompts_carry_the_interval():
    """Ten conversations of twelve prompts that all go one way are ten observations."""
    prompts = make_prompts(120, per_conversation=12)
    verdicts = [
        ModelVerdict(
            prompt_id=p.prompt().id,
            conversation_id=p.conversation_id,
            first="sft",
            second="base",
            label="a" if int(p.conversation_id[1:]) < 7 else "b",
            p_a=None,
        )
        for p in prompts
    ]
    got = comparison(summarise(make_recipe(), prompts, make_responses(prompts, ("base", "sft")), verdicts, {}), "sft", "base")
    assert got["p"] == pytest.approx(0.34375)
    assert got["clusters"] == 10
    assert got["low"] < 0.4
    assert got["verdict"] == "cannot say"


@pytest.mark.parametrize("case", ["all ties", "silent model", "identical models", "no verdicts", "only base", "nothing"])
def test_degenerate_input_gives_words_not_nan(case):
    prompts = make_prompts(40)
    models = {"only base": ("base",), "nothing": ()}.get(case, ("base", "sft", "rlaif"))
    responses = make_responses(prompts, models)
    verdicts = make_verdicts(prompts, dict.fromkeys((*models, HUMAN), 0.0), ties=1.0 if case == "all ties" else 0.1)
    if case == "silent model":
        responses["rlaif"] = {}
        verdicts = [v.model_copy(update={"label": "none"}) if "rlaif" in (v.first, v.second) else v for v in verdicts]
    if case == "identical models":
        responses["rlaif"] = responses["sft"]
    if case == "no verdicts":
        verdicts = []
    got = summarise(make_recipe(), prompts, responses, verdicts, {})
    assert finite(got)
    assert got["headline"]
    assert got["caveats"]
    if case == "all ties":
        assert comparison(got, "sft", "base")["verdict"] == "equivalent" or comparison(got, "sft", "base")["p"] == 1.0
    if case in ("silent model", "no verdicts"):
        assert comparison(got, "rlaif", "base")["verdict"] == "cannot say"
        assert comparison(got, "rlaif", "base")["reason"]
    if case == "identical models":
        assert model(got, "rlaif")["text"]["same_as_sft"] == 1.0
    if case == "silent model":
        assert model(got, "rlaif")["text"]["words"] is None
        assert model(got, "rlaif")["responses"] == 0


def test_missing_verdicts_are_counted_never_ties():
    prompts = make_prompts(40)
    strength = {name: STRENGTH[name] for name in ("base", "sft", HUMAN)}
    got = summarise(
        make_recipe(), prompts, make_responses(prompts, ("base", "sft")), make_verdicts(prompts, strength, 0.0, 0.3), {}
    )
    c = comparison(got, "sft", "base")
    assert c["ties"] == 0
    assert c["n"] < c["asked"] == 40
    assert got["n"]["scored"] < got["n"]["asked"] == 120
    assert got["matrix"]["scored"][0][1] == c["n"]


def test_waiting_arms_keep_their_place_in_the_correction():
    """Three of six planned comparisons done: corrected as one of six, or waiting for people would buy significance."""
    prompts = make_prompts(60)
    models = ("base", "sft", "rlaif")
    strength = {name: STRENGTH[name] for name in (*models, HUMAN)}
    facts = {"waiting": {"rlhf": "no human labels yet"}}
    got = summarise(make_recipe(), prompts, make_responses(prompts, models), make_verdicts(prompts, strength), facts)
    smallest = min((c for c in got["comparisons"] if c["family"] == "primary"), key=lambda c: c["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 6 * smallest["p"]), abs=1e-5)
    assert "Missing: rlhf (no human labels yet)." in got["caveats"]


def test_a_double_or_unknown_verdict_is_refused():
    prompts = make_prompts(3)
    verdicts = make_verdicts(prompts, {"base": 0.0, "sft": 0.0})
    swapped = verdicts[0].model_copy(update={"first": "sft", "second": "base"})
    for bad in (swapped, swapped.model_copy(update={"prompt_id": "x"}), swapped.model_copy(update={"first": "gpt"})):
        with pytest.raises(ValueError, match="double, or unknown"):
            summarise(make_recipe(), prompts, make_responses(prompts), [*verdicts, bad], {})


def test_text_metrics_by_hand():
    assert metrics.words("Don't stop – it’s 3 o'clock!") == ["don't", "stop", "it’s", "3", "o'clock"]
    assert metrics.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert metrics.repetition("a b") == 0
    assert metrics.distinct(["a b a b", "a b"]) == pytest.approx(2 / 4)
    assert metrics.distinct(["a", ""]) is None
    assert metrics.questions("Why? Really?! No!! What??? ok") == 3
    assert metrics.context_overlap("I like red cars", "You said: I like red boats") == pytest.approx(1 / 2)
    assert metrics.same_text("a  b\n", "a b")
    assert not metrics.same_text("a b", "ab")


def test_words_for_numbers():
    assert wording.at_least(0.6334) == "64%"
    assert wording.at_least(0.64) == "64%"
    assert wording.percent(None) == "–"
    assert [wording.p_value(p) for p in (0.00001, 0.031, 1.0, None)] == ["p < .001", "p = .031", "p = 1", "no p-value"]
    assert wording.listed(["a", "b", "c"]) == "a, b and c"


@pytest.mark.parametrize(
    ("agreement", "said"),
    [
        ([], "was not compared with people"),
        ([{"people": False, "agree": 0.9, "n": 50, "balanced": {"value": 0.9, "low": 0.8, "high": 0.95}}], "was not compared with people"),
        ([{"people": True, "agree": 0.7, "n": 50, "balanced": {"value": 0.7, "low": 0.6, "high": 0.8}}], "agrees with people beyond chance: 70%"),
        ([{"people": True, "agree": 0.7, "n": 50, "balanced": {"value": 0.55, "low": 0.45, "high": 0.65}}], "which may be chance"),
        ([{"people": True, "agree": 0.3, "n": 50, "balanced": None, "low": 0.2, "high": 0.4}], "judges against them"),
        ([{"people": True, "agree": 1.0, "n": 1, "balanced": None, "low": None, "high": None}], "too few"),
        ([{"people": True, "labelling": True, "agree": 0.9, "n": 50, "balanced": {"value": 0.9, "low": 0.8, "high": 0.95}}], "was not compared with people"),
    ],
)  # fmt: skip
def test_a_win_rate_is_a_claim_about_people_only_where_they_agree_with_the_judge(agreement, said):
    sentence = wording._people_caveat({"agreement": agreement})
    assert said in sentence
    assert ("No win rate here is a claim about people" in sentence) == ("beyond chance" not in sentence)


def test_a_difference_that_is_gone_at_equal_length_is_not_told_without_it():
    def entry(name: str, words: float, rate: tuple[float, float, float] | None) -> dict:
        estimate = None if rate is None else dict(zip(("value", "low", "high"), rate, strict=True))
        return {"name": name, "label": name, "text": {"words": words}, "length_controlled_vs_base": estimate}

    models = [entry("base", 196.2, None), entry("sft", 108.7, (0.374, 0.159, 0.694)), entry("rlaif", 96.6, (0.2, 0.1, 0.3))]
    told = [{"first": name, "verdict": "worse"} for name in ("sft", "rlaif")]
    assert wording.at_equal_length(told, models) == [
        "Length may be all of it: at equal length, no difference from the base can be told for sft 37% (16–69%). "
        "The base writes 196 words a response, it 109."
    ]
    assert wording.at_equal_length([{"first": "sft", "verdict": "cannot say"}, told[1]], models) == []


@pytest.mark.parametrize(
    ("verdict", "rate", "said"),
    [
        ("worse", (0.78, 0.51, 0.98), "opposite"),
        ("better", (0.2, 0.1, 0.3), "opposite"),
        ("worse", (0.2, 0.1, 0.3), ""),
        ("better", (0.78, 0.51, 0.98), ""),
        ("worse", (0.5, 0.5, 0.6), "Length may be all of it"),
        ("cannot say", (0.78, 0.51, 0.98), ""),
    ],
)
def test_a_difference_that_turns_round_at_equal_length_is_told(verdict, rate, said):
    models = [
        {"name": "base", "label": "base", "text": {"words": 197}, "length_controlled_vs_base": None},
        {
            "name": "rlhf",
            "label": "rlhf",
            "text": {"words": 103},
            "length_controlled_vs_base": dict(zip(("value", "low", "high"), rate, strict=True)),
        },
    ]
    sentences = wording.at_equal_length([{"first": "rlhf", "verdict": verdict}], models)
    assert bool(sentences) == bool(said)
    assert said in " ".join(sentences)
    if sentences:
        assert sentences[-1].endswith("The base writes 197 words a response, it 103.")


@pytest.mark.parametrize(("longer", "said"), [(0.759, True), (0.738, True), (0.6, False), (None, False)])
def test_a_judge_no_better_than_length_is_called_so(full, longer, said):
    facts = {**full["facts"], "grader": {"accuracy": 0.738, "longer": longer}}
    assert ("little but length" in " ".join(wording.caveats({**full, "facts": facts}, make_recipe(), []))) is said
