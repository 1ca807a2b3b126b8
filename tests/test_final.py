"""People compare the finished models: what they are asked, how it enters the summary apart from the grader's, and a whole run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from label_run import make_run, sampled_pairs
from test_summary import FACTS, MODELS, STRENGTH, finite, make_prompts, make_recipe, make_responses, make_verdicts

from suasion.errors import UsageError, UserError
from suasion.evaluation.stage import order_facts
from suasion.evaluation.summary import ModelVerdict, summarise
from suasion.grading.base import Judgement
from suasion.grading.llm import combine
from suasion.labeling import final
from suasion.labeling.desk import Desk
from suasion.labeling.server import open_desk
from suasion.labeling.store import EVALUATION_FILE
from suasion.pipeline import run
from suasion.recipe import load_recipe, validate_recipe
from suasion.records import Example, read_json, read_rows, write_json, write_rows
from suasion.reporting.page import build_page, render
from suasion.seeding import generator
from suasion.verify import verify_run

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"


def asked(prompts: int, of: int, **more: object) -> dict:
    """How people were asked, as `hear` says it."""
    return {
        "random": True, "prompts": prompts, "of_prompts": of, "asked": 8 * prompts, "identical": 0, "skipped": 0, "labels": 8 * prompts,
        "annotators": 2, **more,
    }  # fmt: skip


def people_of(verdicts: list[ModelVerdict], keys: set[str], right: float) -> list[ModelVerdict]:
    """Verdicts of people on the planned comparisons of these prompts, who say what the grader says with this probability."""
    pairs = [frozenset(pair) for pair in final.compared(make_recipe(), MODELS)]
    mirror = {"a": "b", "b": "a", "tie": "tie", "none": "tie"}
    return [
        row.model_copy(update={"label": mirror[row.label] if generator(5, "people", row.prompt_id, row.first, row.second).random() > right else row.label})
        for row in verdicts
        if row.prompt_id in keys and frozenset((row.first, row.second)) in pairs and row.label != "none"
    ]  # fmt: skip


def test_people_compare_with_base_with_sft_and_the_sources_of_feedback():
    recipe = make_recipe()
    pairs = final.compared(recipe, MODELS)
    assert [pair for pair in pairs if pair[0] == "base"] == [("base", name) for name in MODELS[1:]]
    assert [pair for pair in pairs if pair[0] == "sft"] == [("sft", name) for name in MODELS[2:]]
    assert pairs[-1] == ("rlhf", "rlaif-matched")
    assert len(pairs) == len({frozenset(pair) for pair in pairs}) == 10
    assert final.compared(recipe, ["base", "sft"]) == [("base", "sft")]


def test_prompts_are_drawn_by_the_seed_and_a_larger_draw_holds_the_smaller():
    keys = [f"k{n}" for n in range(50)]
    assert final.drawn(keys, None, 1) == keys == final.drawn(keys, 50, 1)
    ten, twenty = final.drawn(keys, 10, 1), final.drawn(keys, 20, 1)
    assert len(ten) == 10
    assert set(ten) < set(twenty) < set(keys)
    assert final.drawn(keys, 10, 2) != ten


@pytest.fixture(scope="module")
def graded():
    prompts = make_prompts(115)
    return prompts, make_responses(prompts), make_verdicts(prompts, STRENGTH)


def test_people_stand_apart_and_change_nothing_of_the_graders(graded):
    prompts, responses, verdicts = graded
    recipe, keys = make_recipe(), set(final.drawn([e.prompt().id for e in prompts], 60, 3))
    people = people_of(verdicts, keys, 0.8)
    alone = summarise(recipe, prompts, responses, verdicts, FACTS)
    row = {"a": "people", "b": "ai:ngram (evaluation grader)", "on": "evaluation comparisons", "agree": 0.79, "n": 480, "low": 0.74,
           "high": 0.83, "balanced": {"value": 0.79, "low": 0.75, "high": 0.83}, "people": True}  # fmt: skip
    both = summarise(recipe, prompts, responses, verdicts, FACTS, people=people, asked=asked(60, 115, skipped=3), agreement=row)
    assert finite(both)
    changed = {key for key in both if both[key] != alone[key]}
    assert changed == {"people", "facts", "headline", "caveats"}
    assert {key: value for key, value in both["facts"].items() if key not in ("people", "agreement")} == {
        key: value for key, value in alone["facts"].items() if key != "agreement"
    }
    assert both["people"]["judged"] == len(people)
    tested = {(c["first"], c["second"]): c for c in both["people"]["tested"]}
    assert len(tested) == 10
    primary = [c for c in tested.values() if c["family"] == "primary"]
    assert {(c["first"], c["second"]) for c in primary} == {
        *((name, "base") for name in MODELS[1:]), ("rlaif-matched", "rlhf"),
    }  # fmt: skip
    assert all(c["n"] <= c["asked"] == 60 for c in tested.values())
    assert all(c["p_holm"] >= c["p"] for c in primary)
    for one in both["people"]["comparisons"]:
        assert one["corrected"]["method"] == "prediction-powered", one
        assert one["corrected"]["low"] <= one["corrected"]["value"] <= one["corrected"]["high"]
        assert one["grader"]["n"] > one["people"]["n"]
    assert both["people"]["reason"] == ""
    assert sum(sentence.startswith("In the eyes of people, who judged") for sentence in both["headline"]) == 1
    assert any("agrees with people beyond chance: 79%" in caveat for caveat in both["caveats"])
    assert any(
        "come from 2 annotators" in caveat and "3 comparisons that nobody could judge" in caveat for caveat in both["caveats"]
    )
    assert any(caveat.startswith("No person labelled anything that a model learned from") for caveat in both["caveats"])
    assert not any("people with ai:ngram" in caveat for caveat in both["caveats"])  # they trained no arm
    page = build_page(
        both,
        recipe,
        prompts,
        [r for rows in responses.values() for r in rows.values()],
        verdicts,
        {name: name for name in MODELS},
        {},
    )
    assert len(page["tables"]["people_comparisons"].rows) == 10
    assert "on 60 of the 115 prompts, drawn at random" in page["method"][2]
    for template in ("report.html.j2", "report.md.j2"):
        text = render(template, page, figures={})
        assert "The same in people’s eyes" in text
        assert "prediction-powered" in text
    assert "people_comparisons" not in [name for name, table in build_page(
        alone, recipe, prompts, [r for rows in responses.values() for r in rows.values()], verdicts, {name: name for name in MODELS}, {}
    )["tables"].items() if table.rows]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "random", "reason"),
    [
        (115, True, "people judged every comparison"),
        (20, True, "people judged 20 conversations; 30 are needed"),
        (60, False, "no correction is valid"),
    ],
)
def test_no_correction_without_a_reason(graded, count, random, reason):
    prompts, responses, verdicts = graded
    keys = set(final.drawn([e.prompt().id for e in prompts], count, 3))
    people = people_of(verdicts, keys, 1.0)
    found = summarise(make_recipe(), prompts, responses, verdicts, FACTS, people=people, asked=asked(count, 115, random=random))[
        "people"
    ]
    assert reason in found["reason"]
    assert all(row["corrected"]["value"] is None for row in found["comparisons"])
    assert all(row["people"]["value"] is not None for row in found["comparisons"])
    if count == 115:
        for row in found["comparisons"]:
            assert row["people"] == row["grader"]  # who always agrees wins as often
            assert row["agree"]["value"] == 1.0


def test_the_first_label_binds_a_ruling_before_it_and_a_skip_is_no_tie(tmp_path):
    """Two people on every comparison: the second is agreement, a ruling settles, what both skipped is missing, equal texts are ties."""
    pairs = sampled_pairs(3)
    run = make_run(tmp_path, pairs, overlap=1.0)
    evaluated = run / "09-evaluate"
    evaluated.mkdir()
    examples = [
        Example(id=f"e{n}", corpus="cmv", conversation_id=f"t{n}", author="x", turns=one.prompt.turns, reply="r", outcome=1.0)
        for n, one in enumerate(pairs)
    ]
    write_rows(run / "02-pools" / "eval.jsonl", examples)
    keys = [example.prompt().id for example in examples]
    texts = {"base": "The base.", "sft": "Fine-tuned.", "rlhf": "Rewarded."}
    write_rows(
        evaluated / "responses.jsonl",
        [
            one.a.model_copy(
                update={"id": f"{name}{n}", "prompt_id": keys[n], "lineage": name, "text": "Same." if n == 2 else text}
            )
            for name, text in texts.items()
            for n, one in enumerate(pairs)
        ],
    )
    write_json(evaluated / "models.json", {"models": {name: name for name in texts}})
    write_json(evaluated / "manifest.json", {})
    desk = open_desk(run, "evaluation")
    people = [desk.store.add_annotator("") for _ in range(2)]
    for who in people:
        desk.store.new_token(who, "session")
    assert len(desk.work.planned) == 2 * 3 * 2  # three comparisons on two prompts, each twice
    recipe, prompts, said = load_recipe(run / "recipe.yaml"), [one.prompt() for one in examples], final.read_said(evaluated)
    pair = {models: key for key, models in desk.work.models.items() if desk.work.items[key].group == keys[0]}
    skipped, settled = pair["base", "sft"], pair["sft", "rlhf"]
    first: dict[str, str] = {}
    for _ in range(20):
        for who in people:
            shown = desk.next(who)
            if shown is None:
                continue
            key = shown.task.pair_id
            if key == skipped:
                desk.answer(who, shown.task.id, "skip", None, None, shown.task.id, "I cannot judge this subject")
                continue
            wanted = "a" if key not in first else "b"  # whoever comes second says the contrary
            first.setdefault(key, who)
            side = "left" if (wanted == "a") == (shown.order == "ab") else "right"
            desk.answer(who, shown.task.id, side, 2, 9.0, shown.task.id)
    assert desk.missing() == 0
    desk.store.append("adjudicate", "", {"pair_id": settled, "label": "b", "note": "read twice"})
    desk.store.close()
    heard = final.hear(run, recipe, prompts, said)
    told = {(row.prompt_id, row.first, row.second): row for row in heard.verdicts}
    assert len(told) == 9
    assert told[keys[0], "base", "sft"].label == "none"
    assert told[keys[0], "sft", "rlhf"].label == "b"
    assert told[keys[0], "base", "rlhf"].label == "a"
    assert all(row.label == "a" for (key, *_), row in told.items() if key == keys[1])
    assert all((row.label, row.reason) == ("tie", "identical texts") for (key, *_), row in told.items() if key == keys[2])
    assert {name: heard.facts[name] for name in ("asked", "identical", "skipped", "labels", "annotators", "adjudicated")} == {
        "asked": 6, "identical": 3, "skipped": 1, "labels": 10, "annotators": 2, "adjudicated": 1,
    }  # fmt: skip
    assert heard.facts["between_people"]["agreement"]["value"] == 0.0
    graded = [row.model_copy(update={"first": row.second, "second": row.first, "label": "b"}) for row in heard.verdicts]
    row = final.agreement_row(heard, graded, "ai:ngram", 0)
    assert row is not None
    assert (row["agree"], row["n"]) == (0.8, 5)  # told the other way round: all but the ruling
    assert row["labelled"] == 5
    assert row["kappa"]["value"] == 0.0  # the grader has one word for everything
    assert row["gwet_ac1"]["value"] == pytest.approx(
        (0.8 - 0.18) / (1 - 0.18), abs=1e-4
    )  # q = .9, .1; nobody said tie: p_e = .18 / 1
    tied = [one.model_copy(update={"label": "tie"}) for one in graded]
    row = final.agreement_row(heard, tied, "ai:ngram", 0)
    assert (row["agree"], row["n"], row["labelled"]) == (None, 0, 5)  # ties are labels, where chance is taken out


def test_a_judge_that_flips_says_so_and_counts_no_flip_twice(graded):
    prompts, responses, verdicts = graded
    first, second, tie = Judgement(0.9, "a"), Judgement(0.1, "b"), Judgement(0.5, "tie")
    judged = [combine(one, other, "drop") for one, other in ((first, first), (first, second), (second, second), (tie, first))]
    llm = validate_recipe(
        make_recipe().model_dump(mode="json") | {"evaluate": {"grader": {"kind": "llm", "model": "m", "provider": "openai"}}},
        "test",
    ).evaluate.grader
    facts = order_facts(judged, llm)
    assert facts["orders"] == {"consistent": 2, "flip": 1, "tie": 1, "none": 0}
    assert (facts["flip_rate"], facts["flips"]) == (0.25, "drop")
    assert facts["first_shown_rate"] == pytest.approx(
        4 / 7, abs=1e-4
    )  # a b(no) ...: 7 decisive single answers, 4 for the first shown
    assert order_facts([Judgement(0.9, "a")], llm) == {}
    lost = {}
    for mode in ("drop", "tie", "soft"):
        known = {**FACTS, "grader": {**FACTS["grader"], "flip_rate": 0.25, "flips": mode}}
        power = summarise(make_recipe(), prompts, responses, verdicts, known)["power"]
        lost[mode] = {row["name"]: row["win_rate"] for row in power["detectable"]}
    assert lost["drop"]["grader"] is None or lost["drop"]["grader"] > lost["tie"]["grader"]
    assert "flips" in lost["drop"]
    assert lost["tie"] == lost["soft"]
    assert "flips" not in lost["tie"]


def test_an_evaluation_grader_sees_both_orders():
    data = make_recipe().model_dump(mode="json")
    one = {"kind": "llm", "model": "m", "provider": "openai", "orders": "given"}
    with pytest.raises(UsageError, match="must see both orders"):
        validate_recipe(data | {"evaluate": {"grader": one}}, "test")


# A whole run.


def answer_all(desk: Desk, prefer) -> int:
    """One person answers everything that is asked; prefer(left, right) -> choice."""
    who = desk.store.add_annotator("")
    desk.store.new_token(who, "session")
    given = 0
    while (shown := desk.next(who)) is not None:
        desk.answer(who, shown.task.id, prefer(shown.left, shown.right), 2, 9.0, shown.task.id)
        given += 1
    return given


def test_a_run_is_told_again_once_people_have_spoken(tmp_path, capsys):
    """Labels from the page's desk enter summary and report, a redo from nothing gives the same bytes, and taken back they leave again."""
    recipe = load_recipe(TINY)
    directory, _ = run(recipe, tmp_path)
    evaluate, report = directory.folder("evaluate"), directory.folder("report")
    before = read_json(evaluate / "summary.json")
    said = {name: (evaluate / name).read_bytes() for name in ("responses.jsonl", "verdicts.jsonl", "models.json")}
    with pytest.raises(UsageError, match="this run has 6 evaluation prompts"):
        open_desk(directory.path, "evaluation", 9)
    assert not (directory.path / EVALUATION_FILE).exists()

    desk = open_desk(directory.path, "evaluation", 5)
    assert len({item.group for item in desk.work.items.values()}) == 5
    planned = len(desk.work.planned)
    desk.store.close()
    run(recipe, tmp_path)  # asked, not answered: nothing changes
    assert read_json(evaluate / "summary.json") == before

    desk = open_desk(directory.path, "evaluation")
    assert len(desk.work.planned) == planned
    assert answer_all(desk, lambda left, right: "left" if len(left) >= len(right) else "right") == planned
    desk.store.close()
    with pytest.raises(UserError, match="cannot be changed any more"):
        open_desk(directory.path, "evaluation", 6)
    capsys.readouterr()
    _, waiting = run(recipe, tmp_path)
    printed = capsys.readouterr().out
    assert waiting is None
    assert "evaluate: told again with what people said of the models" in printed
    assert f"people judged {planned} comparisons" in printed
    assert verify_run(directory.path)[0] == []
    after = read_json(evaluate / "summary.json")
    assert {name: (evaluate / name).read_bytes() for name in said} == said
    assert {key for key in after if after[key] != before[key]} == {"people", "facts", "headline", "caveats"}
    facts = after["facts"]["people"]
    assert (facts["prompts"], facts["of_prompts"], facts["annotators"], facts["skipped"]) == (5, 6, 1, 0)
    assert after["people"]["judged"] == planned == facts["asked"]
    rows = list(read_rows(evaluate / "people.jsonl", ModelVerdict))
    assert len(rows) == planned + facts["identical"] == 5 * 10
    texts = {}
    for name, answers in final.read_said(evaluate).items():
        texts |= {(key, name): row.text for key, row in answers.items()}
    for row in rows:  # whoever wrote more won, whatever side it stood on
        first, second = (len(texts[row.prompt_id, name]) for name in (row.first, row.second))
        assert row.label in {"tie": ("tie",), "a": ("a",), "b": ("b",), "ab": ("a", "b")}[
            "tie" if row.reason == "identical texts" else "a" if first > second else "b" if second > first else "ab"
        ]  # fmt: skip
    assert any(sentence.startswith("In the eyes of people") for sentence in after["headline"])
    assert read_json(report / "summary.json") == after
    assert "The same in people’s eyes" in (report / "index.html").read_text()
    assert (report / "tables" / "people_comparisons.csv").is_file()
    assert "People who compared the two blind preferred it" in (report / "cards" / "model-rlhf.md").read_text()

    run(recipe, tmp_path)
    assert "evaluate: done before, skipped" in capsys.readouterr().out
    quick = {name: (evaluate / name).read_bytes() for name in (*said, "summary.json", "people.jsonl", "labels.jsonl")}
    run(recipe, tmp_path, redo="evaluate")
    assert {name: (evaluate / name).read_bytes() for name in quick} == quick

    desk = open_desk(directory.path, "evaluation")
    assert desk.undo("annotator-1", "u") is not None
    desk.store.close()
    capsys.readouterr()
    run(recipe, tmp_path)
    assert "1 are missing" in capsys.readouterr().out
    assert json.dumps(read_json(evaluate / "summary.json")) == json.dumps(before)
    assert not (evaluate / "people.jsonl").exists()
