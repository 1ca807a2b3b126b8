"""The demo, undisturbed and killed with kill -9 in every stage: about 40 minutes on two cores. Run with -m slow."""

import pytest
from test_pipeline import MANIFEST, REPOSITORY, finish, kill_in_every_stage

from suasion.pipeline import stages
from suasion.recipe import load_recipe
from suasion.verify import verify_run

DEMO = REPOSITORY / "recipes" / "demo.yaml"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_demo_killed_in_every_stage_ends_with_the_same_summary(tmp_path):
    recipe = load_recipe(DEMO)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(DEMO, undisturbed)
    hit, _ = kill_in_every_stage(recipe, DEMO, killed)
    assert {"sft", "sample", "evaluate"} <= set(hit)
    finish(DEMO, killed)
    for stage in stages(recipe):
        one, other = (runs / "demo" / stage.folder / MANIFEST for runs in (undisturbed, killed))
        assert one.read_bytes() == other.read_bytes(), f"{stage.name} differs after kills"
    assert verify_run(killed / "demo")[0] == []
