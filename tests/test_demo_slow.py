"""The demo, undisturbed and killed with kill -9 in every stage, and every artefact of it changed by a byte: 18 minutes on two cores with bf16, 35 without.

Run with -m slow.
"""

import os

import pytest
from report_proof import CHROMIUM, axe_finds_nothing, names_no_machine
from test_pipeline import REPOSITORY, finish, kill_in_every_stage, same_results
from test_verify import any_changed_byte_is_found

from suasion.recipe import load_recipe

DEMO = REPOSITORY / "recipes" / "demo.yaml"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_demo_killed_in_every_stage_ends_with_the_same_summary(tmp_path):
    recipe, threads = load_recipe(DEMO), os.cpu_count() or 1
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(DEMO, undisturbed, threads)
    hit, _ = kill_in_every_stage(recipe, DEMO, killed, threads)
    assert {"sft", "sample", "evaluate"} <= set(hit)
    finish(DEMO, killed, threads)
    same_results(recipe, undisturbed, killed)
    report = undisturbed / recipe.name / "10-report"
    names_no_machine(report, REPOSITORY, undisturbed)
    if CHROMIUM is not None:
        axe_finds_nothing(report / "index.html")
    any_changed_byte_is_found(undisturbed / recipe.name, recipe)
