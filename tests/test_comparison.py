"""What changed between two runs, and several seeds as one answer."""

from __future__ import annotations

import copy
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from test_summary import FACTS, STRENGTH, make_prompts, make_recipe, make_responses, make_verdicts, variant

from suasion.evaluation.pooling import pool
from suasion.evaluation.summary import summarise
from suasion.reporting.comparison import FinishedRun, compare, print_comparison, recipe_changes, write_comparison
from suasion.rundir import Manifest
from suasion.seeding import generator

SUMMARY = summarise(make_recipe(), make_prompts(12), make_responses(make_prompts(12)), make_verdicts(make_prompts(12), STRENGTH), FACTS)  # fmt: skip


def estimate(value, half=0.1):
    return {"value": value, "low": value - half, "high": value + half}


def test_pool_by_hand():
    got = pool([estimate(0.6), estimate(0.7), estimate(0.65)], same_prompts=False, confidence=0.95)
    spread = np.var([0.6, 0.7, 0.65], ddof=1)
    reach = stats.t.ppf(0.975, 2) * math.sqrt(spread / 3)
    assert (got.value, got.low, got.high, got.runs) == (pytest.approx(0.65), pytest.approx(0.65 - reach), pytest.approx(0.65 + reach), 3)  # fmt: skip
    within = 0.1 / stats.norm.ppf(0.975)
    assert got.within == pytest.approx(within)
    assert got.between == pytest.approx(math.sqrt(max(0.0, spread - within**2)))
    wider = pool([estimate(0.6), estimate(0.7), estimate(0.65)], same_prompts=True, confidence=0.95)
    assert wider.high - wider.low > got.high - got.low


def test_pool_without_enough_runs_gives_words():
    assert pool([], True, 0.95).reason
    assert pool([{"value": None, "low": None, "high": None}], True, 0.95).value is None
    one = pool([estimate(0.6)], False, 0.95)
    assert (one.value, one.low, one.runs) == (0.6, None, 1)
    assert "spread" in one.reason
    bare = [{"value": v, "low": None, "high": None} for v in (0.5, 0.6)]
    assert pool(bare, True, 0.95).low is None
    assert pool(bare, False, 0.95).low is not None


def test_pooled_interval_covers_training_runs():
    """500 experiments of four runs whose true rates differ with a standard deviation of .05: coverage of the mean is 93-97%."""
    rng = generator(0, "pooling")
    hits = 0
    for _ in range(500):
        rates = rng.normal(0.6, 0.05, 4)
        shown = rng.normal(rates, 0.04)
        got = pool([estimate(value, 0.04 * 1.96) for value in shown], False, 0.95)
        hits += got.low <= 0.6 <= got.high
    assert 0.93 <= hits / 500 <= 0.975


def finished(name: str, recipe, **changes) -> FinishedRun:
    summary = copy.deepcopy(SUMMARY) | {"seed": recipe.seed}
    for model in summary["models"]:
        if model["name"] in changes:
            model["win_vs_base"]["value"] = changes[model["name"]]
    manifests = {
        stage: Manifest(
            stage=stage, recipe={}, inputs={"external:cmv": changes.get("corpus", "x")}, outputs={}, rows_in=1, rows_out=rows,
            dropped={"too long": changes.get("dropped", 3)}, facts={"eval_seal": changes.get("seal", "s")}, packages={"torch": changes.get("torch", "1"), "peft": "1"}, commit="", device="cpu", dtype=changes.get("dtype", "float32"), threads=1,
        )
        for stage, rows in (("corpus", 40), ("pools", changes.get("rows", 12)), ("evaluate", 9))
    }  # fmt: skip
    return FinishedRun(name, recipe, manifests, summary)


def test_recipe_changes_are_named_without_machine_paths():
    moved = variant(corpus={"sources": [{"kind": "cmv", "path": "/elsewhere/winning-args-corpus"}]})
    assert recipe_changes(make_recipe(), moved) == []
    changed = recipe_changes(make_recipe(), variant({"rlhf": {"beta": 0.3}}, seed=9))
    assert [(row["key"], row["was"], row["is"]) for row in changed] == [("dpo.rlhf.beta", 0.1, 0.3), ("seed", 3, 9)]


def test_everything_that_changed_is_said(tmp_path):
    one = finished("one", make_recipe())
    two = finished(
        "two", variant({"rlhf": {"beta": 0.3}}), corpus="y", dropped=5, rows=20, seal="t", rlaif=0.9, torch="2", dtype="bfloat16"
    )
    found = compare(two, [one])
    (changes,) = found["pairs"]
    assert changes["runs"] == ["one", "two"]
    said = " ".join(row["what"] for row in changes["data"])
    assert "other cmv" in said
    assert "too long: 3 → 5" in said
    assert "other evaluation prompts" in said
    row = next(row for row in changes["numbers"] if row["model"] == "rlaif")
    assert row["is"]["value"] == 0.9
    assert row["change"] == pytest.approx(0.9 - row["was"]["value"])
    assert found["pooled"] == []
    assert "more than the seed" in found["says"][0]
    console = Console(width=160, record=True, file=io.StringIO())
    print_comparison(found, console)
    printed = console.export_text()
    assert "dpo.rlhf.beta" in printed
    assert "packages.torch" in printed
    assert [(row["key"], row["was"], row["is"]) for row in changes["tools"]] == [
        ("dtype", "float32", "bfloat16"),
        ("packages.torch", "1", "2"),
    ]
    write_comparison(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"] == ["one", "two"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| dpo.rlhf.beta | 0.1 | 0.3 |" in text
    assert "None" not in text


def test_seeds_of_one_recipe_are_pooled_and_only_those():
    runs = [finished(f"s{seed}", variant(seed=seed)) for seed in (1, 2, 3)]
    found = compare(runs[2], runs[:2])
    assert {row["runs"] for row in found["pooled"]} == {3}
    assert "3 training runs" in found["says"][0]
    assert "too few" in compare(runs[1], runs[:1])["says"][0]
    elsewhere = compare(finished("other corpus", variant(seed=4), corpus="y"), runs)
    assert elsewhere["pooled"] == []  # one recipe and another corpus are not one experiment
    assert "other files (cmv)" in elsewhere["says"][0]
    twice = compare(finished("again", variant(seed=1)), runs[:1])
    assert twice["pooled"] == []
    assert "same experiment" in twice["says"][0]
