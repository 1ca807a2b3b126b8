"""`suasion verify` on a tiny run: changed bytes, false counts, leaked pools, wrong models and losses, and runs that are not finished.

Forged runs have manifests that fit their changed files, as a careless colleague might leave them: bytes agree, meaning does not. Arm
rlaif-rlhf has another reference than its start, so that its first loss is none of the constants.
"""

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from suasion.cli import app
from suasion.pipeline import run, stages
from suasion.recipe import Recipe, load_recipe
from suasion.records import Preference, content_id, read_json, read_rows, sha256_file, write_json
from suasion.rundir import MANIFEST, RunDir
from suasion.sections.training import DpoArm
from suasion.status import load_run
from suasion.verify import verify_run
from suasion.verifying.losses import can_be_computed

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
QUICK = (
    "dpo.rlaif-rlhf.reference=sft", "sft.epochs=1", "evaluate.bootstrap=100", "evaluate.likelihood_pairs=2",
    *(f"dpo.{arm}.epochs=1" for arm in ("rlhf", "rlaif-rlhf", "rlaif-matched")),
)  # fmt: skip
TITLES = {
    "rows add up",
    "pools are disjoint",
    "evaluation pool is sealed",
    "lineages fit together",
    "text is rendered in one way",
    "first losses are right",
}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(TINY, QUICK)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    directory, waiting = run(recipe, tmp_path_factory.mktemp("runs"))
    assert waiting is None
    return directory.path


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def forge(run: Path) -> None:
    """Make every manifest fit the files as they are now, and the manifests before it."""
    directory, recipe = load_run(run)
    for stage in stages(recipe):
        path = directory.folder(stage.name) / MANIFEST
        if not path.is_file():
            continue
        manifest = read_json(path)
        for name, output in manifest["outputs"].items():
            file = path.parent / name
            output.update(sha256=sha256_file(file), bytes=file.stat().st_size)
        manifest["inputs"].update(directory.input_hashes(stage.name, stage.inputs))
        seal(path, manifest)


def seal(path: Path, manifest: dict) -> None:
    manifest["digest"] = ""
    write_json(path, manifest)
    from suasion.rundir import Manifest

    manifest["digest"] = Manifest.model_validate(manifest).computed_digest()
    write_json(path, manifest)


def folder(run: Path, stage: str) -> Path:
    return load_run(run)[0].folder(stage)


def edit(run: Path, stage: str, file: str, change: Callable[[list[dict]], list[dict]]) -> None:
    """Change the rows of a file and forge the manifests."""
    path = folder(run, stage) / file
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    forge(run)


def tell(run: Path, stage: str, change: Callable[[dict], object]) -> None:
    """Change what a manifest says."""
    path = folder(run, stage) / MANIFEST
    manifest = read_json(path)
    change(manifest)
    seal(path, manifest)
    forge(run)


def test_a_finished_run_is_sound(finished, recipe):
    found = verify_run(finished)
    assert found.faults == found.unfinished == []
    assert set(found.checks) >= TITLES
    assert len(found.checks) == len(TITLES) + len(stages(recipe))


# Bytes.


def any_changed_byte_is_found(run: Path, recipe: Recipe) -> None:
    """Change one byte of every artefact in turn, and change it back."""
    directory = RunDir(run, {stage.name: stage.folder for stage in stages(recipe)})
    folders = [directory.folder(stage.name) for stage in stages(recipe)]  # beside them stand logs, times and labels: no artefacts
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 60
    for path in files:
        original = path.read_bytes()
        place = random.Random(str(path.relative_to(run))).randrange(len(original))
        path.write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
        assert verify_run(run).faults, f"{path.relative_to(run)} was changed and verify saw nothing"
        path.write_bytes(original)
    assert verify_run(run).faults == []


def test_any_changed_byte_of_any_artefact_is_found(copy, recipe):
    any_changed_byte_is_found(copy, recipe)


def test_white_space_in_a_manifest_is_found(copy):
    path = copy / "02-pools" / MANIFEST
    path.write_text(path.read_text().replace("\n", " ", 1))
    assert any("was changed" in fault for fault in verify_run(copy).faults)


def test_missing_and_foreign_files_are_found(copy):
    (copy / "02-pools" / "eval.jsonl").unlink()
    (copy / "03-sft" / "extra.bin").write_bytes(b"x")
    faults = verify_run(copy).faults
    assert any("eval.jsonl is missing" in fault for fault in faults)
    assert any("extra.bin does not belong" in fault for fault in faults)


def test_a_changed_recipe_file_is_found(copy):
    path = copy / "recipe.yaml"
    path.write_text(path.read_text().replace("beta: 0.1", "beta: 0.2", 1))
    assert any("recipe" in fault for fault in verify_run(copy).faults)


@pytest.mark.parametrize("text", ["name: [", "- a list", "nmae: tiny\n"])
def test_a_recipe_file_that_is_none_any_more_is_a_fault(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    found = verify_run(tmp_path)
    assert str(tmp_path / "recipe.yaml") in found.faults[0]
    assert not found.checks


# Row counts.


@pytest.mark.parametrize(
    ("stage", "file", "messages"),
    [
        ("corpus", "examples.jsonl", ("corpus/counts.json says", "corpus made", "pools took")),
        ("corpus", "outcome_pairs.jsonl", ("outcome pairs of cmv", "corpus made", "pools took")),
        ("pools", "sft.jsonl", ("pools says 32 rows of sft, 31", "the recipe asks for 32", "sft took 32 rows, but 31 lie")),
        ("pools", "rlaif.jsonl", ("pools says 12 rows of rlaif, 11", "sample took 22 rows, but 21 lie")),
        ("pools", "grader_pairs.jsonl", ("rows of grader_pairs", "pools made")),
        ("pools", "eval.jsonl", ("evaluate took 6 rows, but 5 lie", "its texts give 105 comparisons")),
        ("sft", "metrics.jsonl", ("sft: 32 rows give 8 steps, it says 8, and 7 lie",)),
        ("sample", "responses.jsonl", ("sample says 44 responses to 22 prompts, 43 lie",)),
        ("sample", "pairs.jsonl", ("sample made", "ai-labels took", "human-labels took")),
        ("ai-labels", "verdicts.jsonl", ("ai-labels made", "preferences took")),
        ("human-labels", "verdicts.jsonl", ("human-labels made", "preferences took")),
        ("preferences", "rlhf.jsonl", ("counts.json says", "the manifest says", "dpo-rlhf took")),
        ("dpo-rlaif", "metrics.jsonl", ("dpo-rlaif: ",)),
        ("dpo-rlhf", "reference.jsonl", ("dpo-rlhf made",)),
        ("evaluate", "responses.jsonl", ("6 models and 6 prompts do not give the 35 responses",)),
        ("evaluate", "verdicts.jsonl", ("evaluate made 126 rows, but 125 lie", "report took 126 rows, but 125 lie")),
    ],
)
def test_a_row_that_is_gone_is_missed(copy, stage, file, messages):
    edit(copy, stage, file, lambda rows: rows[:-1])
    faults = verify_run(copy).faults
    for message in messages:
        assert any(message in fault for fault in faults), f"'{message}' is not among {faults}"


@pytest.mark.parametrize("stage", ["pools", "sft", "sample", "ai-labels", "dpo-rlaif"])
def test_rows_that_went_in_come_out_or_are_dropped(copy, stage):
    tell(copy, stage, lambda manifest: manifest["dropped"].update(lost=1))
    assert any("rows in are not" in fault for fault in verify_run(copy).faults)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: counts["cmv"]["kept"].update({"outcome pairs": 7}), "says 7 outcome pairs of cmv"),
        (lambda counts: counts["cmv"]["dropped"].update({"reply too long": 999}), "dropped is not what the manifest says"),
        (lambda counts: counts.update(p4g={**counts["cmv"]}), "examples of p4g, but 0 are there"),
    ],
)
def test_counts_of_a_corpus_are_those_of_its_rows(copy, change, message):
    path = copy / "01-corpus" / "counts.json"
    counts = read_json(path)
    change(counts)
    write_json(path, counts)
    forge(copy)
    assert any(message in fault for fault in verify_run(copy).faults)


# Pools, seal and models.


def test_an_evaluation_row_in_a_training_pool_is_found(copy):
    stolen = json.loads((copy / "02-pools" / "eval.jsonl").read_text().splitlines()[0])
    edit(copy, "pools", "sft.jsonl", lambda rows: [*rows[1:], stolen])
    faults = verify_run(copy).faults
    assert any("is in the pools sft and eval" in fault for fault in faults)


@pytest.mark.parametrize(
    ("file", "pool", "said"),
    [
        ("grader_pairs.jsonl", "rlhf.jsonl", "is of a conversation in pool rlhf, not sft"),
        ("judge_pairs.jsonl", "sft.jsonl", "is of a conversation in pool sft, not none"),
    ],
)
def test_a_pair_of_a_pools_conversation_trains_no_grader(copy, file, pool, said):
    pools = copy / "02-pools"
    row = json.loads((pools / pool).read_text().splitlines()[0])
    edit(copy, "pools", file, lambda rows: [{**rows[0], "conversation_id": row["conversation_id"]}, *rows[1:]])
    (fault,) = verify_run(copy).faults
    assert said in fault
    edit(
        copy,
        "pools",
        file,
        lambda rows: [{**rows[0], "conversation_id": rows[1]["conversation_id"], "group": row["author"]}, *rows[1:]],
    )
    (fault,) = verify_run(copy).faults
    assert f"is of an author in pool {pool.removesuffix('.jsonl')}" in fault


def test_a_stage_that_read_the_evaluation_pool_is_found(copy):
    tell(copy, "sample", lambda manifest: manifest["inputs"].update({"02-pools/eval.jsonl": "0"}))
    assert "sample read the evaluation pool" in verify_run(copy).faults


def test_a_changed_evaluation_pool_breaks_the_seal(copy):
    edit(copy, "pools", "eval.jsonl", lambda rows: [{**rows[0], "reply": rows[0]["reply"] + " Really."}, *rows[1:]])
    assert verify_run(copy).faults == ["the evaluation pool is not the one that was sealed"]


def test_stages_that_rendered_text_in_different_ways_are_found(copy):
    """Pitfall 7: template drift between training, sampling and evaluation. Of one base the lineages would not tell it."""
    tell(copy, "sample", lambda manifest: manifest["facts"].update(template_hash=content_id("another template")))
    (fault,) = verify_run(copy).faults
    assert "stages rendered text in different ways" in fault
    assert f"sample {content_id('another template')}" in fault


def test_another_adapter_than_the_one_that_was_trained_is_found(copy):
    shutil.copy(copy / "08-dpo-rlhf" / "adapter" / "adapter_model.safetensors", copy / "08-dpo-rlaif" / "adapter")
    forge(copy)
    faults = verify_run(copy).faults
    assert "dpo rlaif: the adapter is not the one that its manifest names" in faults
    assert "dpo rlaif-rlhf did not start from rlaif" in faults
    assert "evaluate used another rlaif than the one trained here" in faults


def test_a_manifest_that_lacks_what_it_should_say_is_a_fault(copy):
    tell(copy, "sft", lambda manifest: manifest["facts"].pop("base_hash"))
    assert any("a manifest or a row lacks what it should say" in fault for fault in verify_run(copy).faults)


# First losses.


def first_loss(loss: float) -> Callable[[list[dict]], list[dict]]:
    return lambda rows: [{**rows[0], "loss": loss}, *rows[1:]]


def test_a_false_first_loss_is_found(copy):
    edit(copy, "dpo-rlaif", "metrics.jsonl", first_loss(0.3))
    assert any("dpo rlaif: first loss 0.300000, expected 0.693147" in fault for fault in verify_run(copy).faults)


def test_with_another_reference_the_first_loss_is_that_of_its_margins(copy):
    """rlaif-rlhf starts from rlaif and is measured against sft: its first loss is not ln 2, and ln 2 would be wrong."""
    true = json.loads((copy / "08-dpo-rlaif-rlhf" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert abs(true - math.log(2)) > 0.01
    edit(copy, "dpo-rlaif-rlhf", "metrics.jsonl", first_loss(math.log(2)))
    (fault,) = verify_run(copy).faults
    said = re.search(r"dpo rlaif-rlhf: first loss 0\.693147, expected ([\d.]+) within ([\d.]+)", fault)
    assert said is not None, fault
    expected, rounding = map(float, said.groups())
    assert rounding < 0.005
    assert expected == pytest.approx(true, abs=rounding)


def test_a_reference_that_is_the_start_model_after_all_is_found(copy):
    shutil.copy(copy / "08-dpo-rlaif-rlhf" / "start.jsonl", copy / "08-dpo-rlaif-rlhf" / "reference.jsonl")
    forge(copy)
    faults = verify_run(copy).faults
    assert any("dpo rlaif-rlhf: first loss" in fault and "expected 0.693147" in fault for fault in faults)
    assert any("the reference model's log-prob of response" in fault for fault in faults)


@pytest.mark.parametrize(("arm", "whose"), [("rlaif", "start"), ("rlaif-rlhf", "reference")])
def test_a_log_prob_other_than_the_one_stored_while_sampling_is_found(copy, arm, whose):
    """Equal in reference and start, a wrong model leaves the first loss at ln 2; what sampling stored tells it."""
    edit(copy, f"dpo-{arm}", "reference.jsonl", lambda rows: [{**rows[0], "chosen": rows[0]["chosen"] - 90.0}, *rows[1:]])
    assert any(f"dpo {arm}: the {whose} model's log-prob of response" in fault for fault in verify_run(copy).faults)


def test_a_response_that_another_model_wrote_is_no_own_one(copy):
    def change(rows):
        rows[0]["chosen"]["lineage"] = content_id("another model")
        return rows

    edit(copy, "preferences", "rlaif.jsonl", change)
    assert any("counts as the start model's own, another model wrote it" in fault for fault in verify_run(copy).faults)


def test_a_loss_that_needs_unknown_token_counts_is_left_open(finished):
    rows = list(read_rows(finished / "07-preferences" / "rlhf.jsonl", Preference))
    unknown = [row.model_copy(update={"chosen": row.chosen.model_copy(update={"tokens": None})}) for row in rows]
    arm = DpoArm(name="x", labels="human", pool="rlhf", reference="sft", loss="length-normalised")
    assert can_be_computed(arm, rows)
    assert not can_be_computed(arm, unknown)
    assert can_be_computed(arm.model_copy(update={"loss": "sigmoid"}), unknown)


# Runs that are not finished.


@pytest.fixture
def unfinished(copy) -> Path:
    """Ended before rlhf was trained."""
    for name in ("08-dpo-rlhf", "08-dpo-rlaif-rlhf", "08-dpo-rlaif-matched", "09-evaluate", "10-report"):
        shutil.rmtree(copy / name)
    return copy


def test_an_unfinished_run_is_judged_as_far_as_it_goes(unfinished):
    found = verify_run(unfinished)
    assert found.faults == []
    assert set(found.checks) >= TITLES
    assert found.unfinished == [
        f"{name} is not finished (absent)" for name in ("dpo-rlhf", "dpo-rlaif-rlhf", "dpo-rlaif-matched", "evaluate", "report")
    ]


def test_faults_of_an_unfinished_run_are_found(unfinished):
    edit(unfinished, "pools", "eval.jsonl", lambda rows: [{**rows[0], "reply": "Another."}, *rows[1:]])
    edit(unfinished, "dpo-rlaif", "metrics.jsonl", first_loss(0.3))
    faults = verify_run(unfinished).faults
    assert "the evaluation pool is not the one that was sealed" in faults
    assert any("first loss 0.300000" in fault for fault in faults)
    assert len(faults) == 2


def test_a_fault_in_one_stage_hides_none_in_another(copy):
    edit(copy, "pools", "eval.jsonl", lambda rows: [{**rows[0], "reply": "Another."}, *rows[1:]])
    (copy / "03-sft" / "metrics.jsonl").write_text("")
    faults = verify_run(copy).faults
    assert "03-sft/metrics.jsonl was changed after the stage finished" in faults
    assert "the evaluation pool is not the one that was sealed" in faults


def test_what_is_finished_may_not_stand_on_what_is_not(copy):
    (copy / "02-pools" / MANIFEST).unlink()
    found = verify_run(copy)
    assert found.unfinished == ["pools is not finished (unfinished)"]
    assert "sft is finished, but pools, which it reads, is not there as it was" in found.faults


def command(capsys, *arguments: str) -> tuple[int, str]:
    code = app(list(arguments), standalone_mode=False)
    return code, " ".join(capsys.readouterr().out.split())


def test_the_command_says_what_is_open_and_how_to_go_on(unfinished, capsys):
    code, said = command(capsys, "verify", str(unfinished))
    assert code == 4
    assert "open dpo-rlhf is not finished (absent)" in said
    assert f"is sound as far as it goes, and not finished. Go on with: suasion run {unfinished}/recipe.yaml --runs" in said
    assert load_recipe(unfinished / "recipe.yaml") == load_run(unfinished)[1]  # so that this command is right


def test_status_verify_and_report_take_a_run_or_its_recipe(copy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    copy.rename(tmp_path / "runs" / "tiny")
    for source in ("runs/tiny", "runs/tiny/recipe.yaml", str(TINY)):
        for verb, words in (
            ("status", "finished; report: runs/tiny"),
            ("verify", "runs/tiny is sound"),
            ("report", "report: runs/tiny"),
        ):
            code, said = command(capsys, verb, source)
            assert code in (0, None), said
            assert words in said
