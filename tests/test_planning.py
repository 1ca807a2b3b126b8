"""The plan: token counts over rates, the pools that the corpus can fill, and honest words about what is assumed."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from suasion import planning
from suasion.errors import UserError
from suasion.evaluation.power import detectable_win_rate
from suasion.evaluation.summary import primary_pairs
from suasion.models import Compute
from suasion.planning import (
    Lengths,
    Plan,
    Rates,
    StagePlan,
    detectable,
    make_plan,
    mean_lengths,
    print_plan,
    sft_rows,
    stage_plans,
)
from suasion.recipe import Recipe, load_recipe
from suasion.records import Example, Turn

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
RATES = Rates(prefill=1000.0, decode=100.0, train=500.0)
LENGTHS = Lengths(context=200.0, reply=50.0)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(TINY)


def by_stage(plans: list[StagePlan]) -> dict[str, StagePlan]:
    return {plan.stage: plan for plan in plans}


def example(n: int, reply: str | None = "You could try it for one week.") -> Example:
    turns = (Turn(role="user", text=f"Number {n} is the best number."),)
    return Example(id=str(n), corpus="own", conversation_id=str(n), author=str(n), turns=turns, reply=reply, outcome=None)


def preferences(path: Path, count: int) -> Path:
    rows = [
        {
            "prompt": f"[SYSTEM] Be honest.\n\n[CONTEXT]\nOriginal Post: Trams of line {n} are loud.\n\n[TASK]\nReply.\n",
            "chosen": f"Line {n} was made quieter.",
            "rejected": "No.",
            "metadata": {"conversation_id": f"t{n}", "preference": "1", "is_equal": n == 0},
        }
        for n in range(count + 1)  # the first is a tie
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_labels(path: Path) -> Recipe:
    return load_recipe(TINY, (f"human_labels.source={{kind: file, layout: preferences, path: {path}}}",))


def test_seconds_are_tokens_over_rates(recipe: Recipe) -> None:
    plans = by_stage(stage_plans(recipe, LENGTHS, RATES, rows=32))
    load = planning.MODEL_LOAD_SECONDS
    assert list(plans)[:3] == ["corpus", "pools", "sft"]
    assert plans["sft"].steps == 2 * 8
    assert plans["sft"].seconds == pytest.approx(2 * 32 * 250 / 500 + load)
    assert plans["sample"].rows == 2 * 22
    assert plans["sample"].seconds == pytest.approx(22 * 200 / 1000 + 1.1 * 44 * 50 / 100 + load)
    assert (plans["dpo-rlaif"].rows, plans["dpo-rlaif"].steps) == (12, 18)
    assert plans["human-labels"].rows == 10
    assert plans["dpo-rlhf"].rows == plans["dpo-rlaif-matched"].rows == 8  # two of ten simulated labels are ties
    assert plans["dpo-rlaif"].seconds == pytest.approx(12 * 300 / 1000 + 3 * 12 * 300 / 500 + 2 * 5 * 300 / 1000 + load)
    assert plans["evaluate"].rows == 6 * 6
    answers, likelihoods = 6 * 200 / 1000 + 1.1 * 6 * 50 / 100 + load, 4 * 300 / 1000
    assert plans["evaluate"].seconds == pytest.approx(6 * (answers + likelihoods) + 20)


def test_each_rate_matters_where_it_should(recipe: Recipe) -> None:
    def slower(**rates: float) -> set[str]:
        before, after = (by_stage(stage_plans(recipe, LENGTHS, r, 32)) for r in (RATES, replace(RATES, **rates)))
        return {name for name in before if after[name].seconds > before[name].seconds}

    trained = {"sft", "dpo-rlaif", "dpo-rlhf", "dpo-rlaif-rlhf", "dpo-rlaif-matched"}
    assert slower(train=50.0) == trained
    assert slower(decode=10.0) == {"sample", "evaluate"}
    assert slower(prefill=10.0) == {"sample", "evaluate"} | trained - {"sft"}


def test_human_arms_train_on_the_imported_rows(recipe: Recipe) -> None:
    plans = by_stage(stage_plans(recipe, LENGTHS, RATES, rows=32, imported=160))
    assert plans["dpo-rlhf"].rows == plans["dpo-rlaif-rlhf"].rows == plans["human-labels"].rows == 160
    assert plans["dpo-rlhf"].steps == 3 * 80
    assert (plans["dpo-rlaif"].rows, plans["dpo-rlaif-matched"].rows) == (12, 8)


def test_responses_are_no_longer_than_allowed(recipe: Recipe) -> None:
    long, longest = (stage_plans(recipe, Lengths(200.0, reply), RATES, 32) for reply in (128.0, 1280.0))
    assert by_stage(long)["sample"] == by_stage(longest)["sample"]


def test_the_rest_is_what_the_pools_leave(recipe: Recipe) -> None:
    sizes = {"sft": 77, "rlaif": 12, "rlhf": 10, "eval": 6, "judge_conversations": 12}
    assert sft_rows(recipe, sizes) == 32
    assert sft_rows(load_recipe(TINY, ("pools.sft=rest",)), sizes) == 77


def test_mean_lengths_are_of_rendered_examples_with_a_reply(recipe: Recipe, renderer) -> None:
    rendered = renderer.render(example(1).turns, example(1).reply)
    bare = [example(n, None) for n in range(300)]
    bare[7] = example(1)  # a stride over all rows would miss it
    assert mean_lengths(recipe, bare) == Lengths(len(rendered.prompt_ids), len(rendered.reply_ids))
    with pytest.raises(UserError, match="no human reply"):
        mean_lengths(recipe, bare[:7])


def test_what_is_detectable_names_its_assumptions(recipe: Recipe) -> None:
    lines = detectable(recipe, 0.65, 0.1)
    count = len(primary_pairs(recipe))
    assert lines[1] == (f"{count} primary comparisons, a perfect judge, no ties", detectable_win_rate(6, comparisons=count))
    assert "if the judge is right 65% of the time and 10% are ties" in lines[2][0]
    many = recipe.model_copy(update={"pools": recipe.pools.model_copy(update={"eval": 200})})
    rates = [detectable(many, accuracy, ties)[2][1] for accuracy, ties in ((0.9, 0.0), (0.9, 0.4), (0.75, 0.4))]
    assert rates == sorted(rates)  # a worse judge and more ties hide more
    assert rates[0] < rates[1] < rates[2]


def test_warnings(recipe: Recipe) -> None:
    stages = [StagePlan("sft", 9, 20, 1.0), StagePlan("dpo-a", 0, 0, 1.0), StagePlan("sample", 9, 0, 1.0)]
    sizes = {"sft": 32, "rlaif": 11, "rlhf": 10, "eval": 6, "judge_conversations": 12}
    found = planning.warnings(recipe, Plan("x", stages, RATES, disk_bytes=2, free_bytes=1, attainable=sizes))
    assert [line.split()[0] for line in found] == ["dpo-a", "pools.rlaif", "needs"]
    tight = replace(RATES, train_bytes=4e9, write_bytes=math.inf)
    memory = planning.warnings(recipe, Plan("x", [], tight, 1, 2, memory_bytes=3 * 10**9, attainable=dict.fromkeys(sizes, 99)))
    assert memory[0].startswith("training needs 4.0 GB of memory, this machine has 3.0 GB. Set recompute_activations: true")
    assert memory[1].startswith(
        "sampling needs more memory than there is, this machine has 3.0 GB. Set a lower sample.batch_size"
    )
    roomy = planning.warnings(recipe, Plan("x", [], tight, 1, 2, memory_bytes=5 * 10**9, attainable=dict.fromkeys(sizes, 99)))
    assert [line.split()[0] for line in roomy] == ["sampling"]
    nothing = Plan("x", [], RATES, disk_bytes=1, free_bytes=2, attainable=dict.fromkeys(sizes, 0))
    assert planning.warnings(recipe, nothing) == [planning.NOTHING_FITS]


def test_a_plan_says_what_it_cannot_know() -> None:
    recipe = load_recipe(
        TINY,
        (
            "ai_labels.grader=../graders/llm-server.yaml",
            "sample.engine={kind: endpoint, server: vllm, urls: ['http://127.0.0.1:1/v1']}",
        ),
    )
    said = planning.warnings(recipe, Plan("x", [], RATES, disk_bytes=1, free_bytes=2, attainable={"rlaif": 12}))
    assert said[0].startswith("ai-labels asks a language model: its time and price are not in these hours")
    assert "draw from servers" in said[1]
    assert len(said) == 2


@pytest.fixture
def one_thread():
    """Two threads of a tiny model wait for one another most of the time when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_plan_of_the_tiny_recipe(tmp_path: Path, one_thread: None) -> None:
    recipe = with_labels(preferences(tmp_path / "labels.jsonl", 5))
    plan = make_plan(recipe, tmp_path / "runs" / "none", seconds=0.2)
    stages = by_stage(plan.stages)
    assert plan.attainable == {"sft": 32, "rlaif": 12, "rlhf": 10, "eval": 6, "judge_conversations": 12}
    assert stages["dpo-rlhf"].rows == 5
    assert all(item.seconds > 0 for item in plan.stages)
    assert min(plan.rates.prefill, plan.rates.decode, plan.rates.train) > 0
    assert plan.rates.decode < 1e7  # the difference of two timings, not its floor
    assert plan.rates.train_bytes is not None
    assert 1e8 < plan.rates.train_bytes < plan.memory_bytes  # of a process that has imported torch
    assert planning.stage_memory(stages["evaluate"], plan.rates) == plan.rates.write_bytes
    assert planning.stage_memory(stages["report"], plan.rates) is None
    assert not (tmp_path / "runs").exists()
    console = Console(width=200, record=True, file=io.StringIO())
    print_plan(plan, console)
    text = console.export_text()
    assert f"{len(primary_pairs(recipe))} primary comparisons, if the judge is right 65% of the time" in text
    assert "pools this corpus can fill: sft 32" in text
    assert text.count(f"{plan.rates.train_bytes / 1e9:.1f} GB") >= 5


def test_labels_that_are_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure", lambda recipe, seconds: RATES)
    plan = make_plan(with_labels(tmp_path / "labels.jsonl"), tmp_path, seconds=0)
    assert by_stage(plan.stages)["dpo-rlhf"].rows == 10
    assert "no human labels at" in plan.warnings[0]


def test_data_that_a_grader_will_miss_is_said_before(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    recipe = load_recipe(TINY, (f"evaluate.grader.train={{kind: ukp, path: {nowhere}}}",))
    plan = make_plan(recipe, tmp_path, seconds=0.5)
    assert any(str(nowhere) in warning for warning in plan.warnings)


def test_the_longest_rows_fill_a_micro_batch_or_stand_alone() -> None:
    """Contexts of 288 and two responses of 128 are 544 tokens, more than a processor's 512; on a GPU seven of them are packed."""
    device = (f"{section}.micro_batch_tokens=null" for section in ("sft", "dpo.0", "dpo.1", "dpo.2", "dpo.3"))
    long = ("corpus.context_tokens=288", "corpus.reply_tokens=[12,128]", "sample.max_new_tokens=128", *device)
    recipe = load_recipe(TINY, long)
    assert planning.longest_rows(recipe, Compute("cpu", "float32", 1)) == (1, 288, 128)
    assert planning.longest_rows(recipe, Compute("cuda", "bfloat16", 1)) == (4096 // 544, 288, 128)
    short = load_recipe(
        TINY, (*long, "sample.max_new_tokens=64", "corpus.reply_tokens=[12,64]")
    )  # then SFT's rows are the longest
    assert planning.longest_rows(short, Compute("cpu", "float32", 1)) == (1, 512 - 64, 32)


def test_memory_that_does_not_suffice_is_no_number() -> None:
    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert planning._peak(too_much, "cpu") == math.inf
    before = planning._peak(lambda: None, "cpu")
    held = []
    assert planning._peak(lambda: held.append(bytearray(2 * 10**8)), "cpu") - before > 1.5e8
