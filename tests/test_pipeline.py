"""The whole chain on the tiny recipe: run, skip, refuse, redo, wait for people, verify, be killed and go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from forked import Forked
from report_proof import CHROMIUM, axe_finds_nothing, names_no_machine

from suasion.errors import UsageError, UserError
from suasion.pipeline import how_it_computes, needs_people, run, stages, what_it_reads
from suasion.recipe import Recipe, dump_recipe, load_recipe, validate_recipe
from suasion.records import write_json
from suasion.rundir import EVAL_POOL, MANIFEST, RunDir
from suasion.verify import verify_run

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "recipes" / "tiny.yaml"
pytestmark = pytest.mark.timeout(900)


def changed(recipe: Recipe, **sections) -> Recipe:
    data = recipe.model_dump(mode="json")
    for key, value in sections.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    return validate_recipe(data, "test")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(TINY)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """One undisturbed run; tests that change something work on a copy."""
    runs = tmp_path_factory.mktemp("runs")
    directory, waiting = run(recipe, runs)
    assert waiting is None
    return directory.path


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def directory_of(path: Path, recipe: Recipe) -> RunDir:
    return RunDir(path, {stage.name: stage.folder for stage in stages(recipe)})


def test_every_stage_is_complete_and_verified(finished, recipe):
    found = verify_run(finished)
    assert found.faults == found.unfinished == []
    assert (finished / "10-report" / "summary.json").read_bytes() == (finished / "09-evaluate" / "summary.json").read_bytes()


def test_a_model_that_has_not_learned_to_stop_is_told_so(finished, recipe):
    facts = directory_of(finished, recipe).manifest("sample").facts
    assert facts["at_limit_first_draw"] == facts["at_limit"] > 0.1  # the tiny recipe draws nothing again


def test_what_learned_from_simulated_labels_says_so_beside_its_adapter(finished, recipe):
    known = {arm.name: directory_of(finished, recipe).manifest(f"dpo-{arm.name}").facts["label_sources"] for arm in recipe.dpo}
    assert known == {"rlaif": ["ai:ngram"], "rlhf": ["simulated"], "rlaif-rlhf": ["simulated"], "rlaif-matched": ["ai:ngram"]}


def test_manifests_hold_no_time_host_or_path(finished):
    for path in finished.glob("*/manifest.json"):
        text = path.read_text()
        assert str(Path.home()) not in text
        assert str(finished) not in text
        assert str(REPOSITORY) not in text
        assert os.uname().nodename not in text or len(os.uname().nodename) < 4


def test_the_report_of_a_run_names_no_machine(finished, tmp_path):
    names_no_machine(finished / "10-report", REPOSITORY, finished)
    told = Path(shutil.copytree(finished / "10-report", tmp_path / "told"))
    with (told / "report.md").open("a") as paper:
        paper.write(f"\nMade in {finished}.\n")
    with pytest.raises(AssertionError, match=r"report\.md"):  # the check sees a path where there is one
        names_no_machine(told, finished)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_report_of_a_run_is_accessible(finished):
    pytest.importorskip("axe_playwright_python", reason="needs the packages of the extra 'test'")
    axe_finds_nothing(finished / "10-report" / "index.html")


def test_running_again_skips_every_stage(copy, recipe, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("manifest.json")}
    run(recipe, copy.parent)
    assert capsys.readouterr().out.count("skipped") == len(stages(recipe))
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("manifest.json")}


def test_a_death_between_work_and_manifest_loses_nothing(copy, recipe, capsys):
    """The stage's files are there, the manifest is not: the next run takes up the checkpoint and makes the same bytes."""
    folder = copy / "08-dpo-rlaif"
    manifest = (folder / MANIFEST).read_bytes()
    run(recipe, copy.parent, redo="dpo-rlaif", last="dpo-rlaif")
    assert (folder / MANIFEST).read_bytes() == manifest
    (folder / MANIFEST).unlink()
    directory = directory_of(copy, recipe)
    stage = next(stage for stage in stages(recipe) if stage.name == "dpo-rlaif")
    write_json(folder / "attempt.json", {**what_it_reads(directory, recipe, stage), **how_it_computes(recipe)})
    run(recipe, copy.parent, last="dpo-rlaif")
    assert "dpo-rlaif (resumed)" in capsys.readouterr().out
    assert (folder / MANIFEST).read_bytes() == manifest


@pytest.mark.parametrize(("device", "goes_on"), [("cuda", True), ("cpu", False)])
def test_more_vcpus_beside_the_same_gpu_throw_nothing_away(recipe, tmp_path, monkeypatch, capsys, device, goes_on):
    """g5.xlarge and g5.2xlarge differ in them; the checkpoint of a spot machine must outlive the change."""
    threads = 4
    monkeypatch.setattr("suasion.pipeline._hardware", lambda recipe: {"device": device, "dtype": "float32", "threads": threads})
    stage, directory = stages(recipe)[0], directory_of(tmp_path / recipe.name, recipe)
    directory.folder("corpus").mkdir(parents=True)
    write_json(
        directory.folder("corpus") / "attempt.json", {**what_it_reads(directory, recipe, stage), **how_it_computes(recipe)}
    )
    threads = 8
    run(recipe, tmp_path, last="corpus")
    assert ("corpus (resumed)" in capsys.readouterr().out) == goes_on
    assert (directory.path / "attic").exists() != goes_on
    assert directory.manifest("corpus").threads == 8


def test_a_changed_recipe_is_refused_before_anything_is_touched(copy, recipe):
    before = sorted(str(path) for path in copy.rglob("*"))
    text = (copy / "recipe.yaml").read_text()
    with pytest.raises(UsageError, match=r"sft.learning_rate was 0.001, is now 0.5[\s\S]*--redo sft"):
        run(changed(recipe, sft={"learning_rate": 0.5}), copy.parent)
    assert (copy / "recipe.yaml").read_text() == text
    assert before == sorted(str(path) for path in copy.rglob("*"))


def test_redo_moves_to_the_attic_and_makes_the_same_again(copy, recipe):
    summary = (copy / "09-evaluate" / "summary.json").read_bytes()
    run(recipe, copy.parent, redo="evaluate")
    attic = next((copy / "attic").iterdir())
    assert sorted(path.name for path in attic.iterdir()) == ["09-evaluate", "10-report"]
    assert (copy / "09-evaluate" / "summary.json").read_bytes() == summary


def test_a_redo_with_another_setting_goes_through(copy, recipe):
    other = changed(recipe, report={"title": "Another title"})
    run(other, copy.parent, redo="report")
    assert "Another title" in (copy / "10-report" / "index.html").read_text()
    assert verify_run(copy)[0] == []


def test_until_and_from(recipe, tmp_path):
    directory, _ = run(recipe, tmp_path, last="pools")
    assert [directory.state(name) for name in ("corpus", "pools", "sft")] == ["complete", "complete", "absent"]
    with pytest.raises(UsageError, match="stage sft before it is absent"):
        run(recipe, tmp_path, first="sample", last="sample")
    with pytest.raises(UsageError, match="no such stage"):
        run(recipe, tmp_path, last="nonsense")


def test_two_runs_at_once_are_refused(copy, recipe):
    with directory_of(copy, recipe).lock(), pytest.raises(UserError, match="another suasion run"):
        run(recipe, copy.parent)


def test_only_evaluate_and_report_may_read_the_evaluation_pool(recipe, finished):
    assert {stage.name for stage in stages(recipe) if EVAL_POOL in stage.inputs} == {"evaluate", "report"}
    with pytest.raises(ValueError, match="must not read the evaluation pool"):
        directory_of(finished, recipe).input_hashes("sft", (EVAL_POOL,))


def test_arms_that_need_people_are_known(recipe):
    assert needs_people(recipe) == {"dpo-rlhf", "dpo-rlaif-rlhf", "dpo-rlaif-matched"}


def test_missing_labels_block_only_their_arms_and_labels_complete_the_run(copy, recipe, tmp_path, capsys):
    labels = tmp_path / "verdicts.jsonl"
    waiting_recipe = changed(recipe, human_labels={"source": {"kind": "file", "path": str(labels), "source": "ann"}})
    directory, waiting = run(waiting_recipe, copy.parent, redo="human-labels")
    assert waiting is not None
    assert "12" in str(waiting) or "verdicts.jsonl" in str(waiting)
    assert directory.state("dpo-rlaif") == directory.state("evaluate") == directory.state("report") == "complete"
    assert directory.state("dpo-rlhf") == "absent"
    assert set(directory.manifest("evaluate").facts["models"]) == {"base", "sft", "rlaif"}
    assert verify_run(copy)[0] == []
    trained = (directory.folder("dpo-rlaif") / MANIFEST).read_bytes()

    pairs = [json.loads(line) for line in (copy / "04-sample" / "pairs.jsonl").read_text().splitlines()]
    rows = [
        {"format": "verdict/1", "pair_id": pair["id"], "source": "ann", "order": "ab", "label": "ab"[number % 2], "p_a": None}
        for number, pair in enumerate(pair for pair in pairs if pair["pool"] == "rlhf")
    ]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory, waiting = run(waiting_recipe, copy.parent)
    assert waiting is None
    assert set(directory.manifest("evaluate").facts["models"]) == set(recipe.model_names())
    assert (directory.folder("dpo-rlaif") / MANIFEST).read_bytes() == trained  # nothing that did not need the labels was redone
    assert verify_run(copy)[0] == []
    assert any((copy / "attic").iterdir())


def test_an_unfinished_attempt_with_other_settings_is_set_aside(recipe, tmp_path):
    directory, _ = run(recipe, tmp_path, last="pools")
    folder = directory.folder("sft")
    folder.mkdir()
    (folder / "attempt.json").write_text('{"recipe": {}, "inputs": {}}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 99.0}\n')
    run(recipe, tmp_path, last="sft")
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] < 20
    assert any((directory.path / "attic").rglob("metrics.jsonl"))


# Kill -9, again and again.


def start(recipe_file: Path, runs: Path, threads: int) -> Forked:
    return Forked(["run", str(recipe_file), "--runs", str(runs)], runs.with_suffix(".log"), threads)


def work_to_resume(folder: Path, stage: str) -> bool:
    """Whether a stage has made something that a resumed run must take up, not only a folder."""
    if stage == "sft" or stage.startswith("dpo-"):
        return any(folder.glob("checkpoints/*/complete"))
    if stage in ("sample", "evaluate"):
        journal = folder / "journal.jsonl"
        return journal.is_file() and journal.read_bytes().count(b"\n") >= 1
    return (folder / "attempt.json").is_file()


def wait_for_work(process: Forked, directory: RunDir, stage: str) -> None:
    """Until a stage has something to resume, is complete, or its process has ended."""
    folder = directory.folder(stage)
    while process.poll() is None and directory.state(stage) != "complete" and not work_to_resume(folder, stage):
        time.sleep(0.002)


def kill_in_every_stage(recipe: Recipe, recipe_file: Path, runs: Path, threads: int = 1) -> tuple[list[str], str]:
    """Kill the run with SIGKILL once each stage in turn has work to resume. Returns the stages hit, and all that was printed."""
    directory = directory_of(runs / recipe.name, recipe)
    hit, printed = [], ""
    for stage in stages(recipe):
        process = start(recipe_file, runs, threads)
        wait_for_work(process, directory, stage.name)
        if process.poll() is None:
            process.kill()
        printed += process.wait(60)
        if directory.state(stage.name) == "unfinished":
            hit.append(stage.name)
    return hit, printed


def finish(recipe_file: Path, runs: Path, threads: int = 1) -> str:
    process = start(recipe_file, runs, threads)
    output = process.wait(3600)
    assert process.poll() == 0, output
    return output


def same_results(recipe: Recipe, undisturbed: Path, killed: Path) -> None:
    """Both runs end with the same summary and the same manifests, and the killed one is sound."""
    summary = Path(recipe.name, "09-evaluate", "summary.json")
    assert (killed / summary).read_bytes() == (undisturbed / summary).read_bytes()
    assert verify_run(killed / recipe.name)[0] == []
    for stage in stages(recipe):
        one, other = (json.loads((runs / recipe.name / stage.folder / MANIFEST).read_text()) for runs in (undisturbed, killed))
        if stage.name == "report":  # it tells hours: its page, its paper and that table differ, and nothing else
            for manifest in (one, other):
                for file in ("index.html", "report.md", "tables/hours.csv"):
                    del manifest["outputs"][file]
                del manifest["digest"]
        assert one == other, f"{stage.name} differs after kills"


def test_a_run_killed_in_every_stage_ends_with_the_same_summary(recipe, tmp_path):
    small = changed(recipe, sample={"max_new_tokens": 128, "batch_size": 16})  # several batches to be cut between
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_recipe(small))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(file, undisturbed)
    hit, printed = kill_in_every_stage(small, file, killed)
    heavy = {"sft", "sample", "evaluate", *(f"dpo-{arm.name}" for arm in small.dpo)}
    assert {"sft", "sample", "evaluate"} <= set(hit), f"only {hit} were killed with work to resume"
    assert len(heavy & set(hit)) >= 5, f"only {hit} were killed with work to resume: too few to prove anything"
    printed += finish(file, killed)
    for name in heavy & set(hit):
        assert f"{name} (resumed)" in printed
    same_results(small, undisturbed, killed)


def test_ctrl_c_in_every_stage_is_a_message_and_the_next_run_goes_on(finished, recipe, tmp_path):
    """In one run after the other, once each stage has work to resume; the end is that of a run which nobody disturbed."""
    file, runs = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(dump_recipe(recipe))
    directory = directory_of(runs / recipe.name, recipe)
    threads, hit = torch.get_num_threads(), []  # as `finished`, whose manifests are compared
    for stage in stages(recipe):
        process = start(file, runs, threads)
        wait_for_work(process, directory, stage.name)
        if process.poll() is None:
            process.interrupt()
        printed = process.wait(120)
        assert "Traceback" not in printed
        if process.poll() == 130:
            assert "Run the same command again" in printed
            hit.append(stage.name)
        else:  # it was done before the signal came
            assert process.poll() == 0, printed
    assert {"sft", "sample", "evaluate"} <= set(hit)
    assert len(hit) >= 6, f"only {hit} were interrupted"
    finish(file, runs, threads)
    same_results(recipe, finished.parent, runs)


def test_interrupt_says_what_to_do_and_exits_130(tmp_path, recipe):
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_recipe(recipe))
    process = subprocess.Popen(
        [sys.executable, "-m", "suasion", "--threads", "1", "run", str(file), "--runs", str(tmp_path / "runs")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it, which is inherited
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "runs" / "tiny" / "03-sft").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Run the same command again" in output
    assert "Traceback" not in output
    assert yaml.safe_load((tmp_path / "runs" / "tiny" / "recipe.yaml").read_text())["name"] == "tiny"
