"""The command line as a user meets it: exit codes, messages without tracebacks, help that teaches."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from suasion.recipe import dump_recipe, load_recipe

REPOSITORY = Path(__file__).parents[1]


def suasion(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "suasion", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


def flat(done: subprocess.CompletedProcess) -> str:
    """Output without the line breaks that fit it to a terminal."""
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def recipe_file(tmp_path):
    """The tiny recipe as data, to be changed and written."""
    data = yaml.safe_load(dump_recipe(load_recipe(REPOSITORY / "recipes" / "tiny.yaml")))

    def write(change) -> str:
        change(data)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
        return str(tmp_path / "tiny.yaml")

    return write


def test_help_names_every_command_and_the_first_steps():
    done = suasion("--help")
    assert done.returncode == 0
    for word in ("run", "plan", "status", "verify", "report", "show", "export", "fetch", "corpus", "label", "Start with"):
        assert word in done.stdout


def test_the_version_is_the_packages():
    from suasion import __version__

    done = suasion("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"suasion {__version__}")


@pytest.mark.parametrize("command", ["status", "verify", "report"])
def test_a_run_may_be_named_by_its_recipe(command, tmp_path):
    assert "RUN|RECIPE" in suasion(command, "--help").stdout
    done = suasion(command, str(REPOSITORY / "recipes" / "tiny.yaml"), cwd=tmp_path)
    assert done.returncode == 2
    assert "has no run at runs/tiny. Start one with: suasion run" in flat(done)


@pytest.mark.parametrize(
    "command", ["run", "plan", "status", "verify", "report", "show", "export", "fetch", "corpus stats", "label serve"]
)
def test_every_command_explains_itself(command):
    done = suasion(*command.split(), "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["run", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["run", "recipes/tiny.yaml", "--until", "nonsense"], "no such stage"),
        (["run", "recipes/tiny.yaml", "--set", "sft.epoch=1"], "did you mean 'epochs'?"),
        (["status", "nowhere"], "is not a run directory"),
        (["verify", "nowhere"], "is not a run directory"),
        (["corpus", "stats", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["corpus", "stats", "docs"], "is not a run directory"),
        (["show", "recipes/tiny.yaml"], "Missing option"),
        (["export", "nowhere", "sft", "--to", "x"], "is not a run directory"),
        (["nonsense"], "No such command"),
    ],
)
def test_wrong_use_exits_with_2_and_says_why(arguments, message):
    done = suasion(*arguments)
    assert done.returncode == 2
    assert message in flat(done)
    assert "Traceback" not in flat(done)


def fails(recipe: str, tmp_path: Path, message: str, code: int = 1) -> None:
    done = suasion("run", recipe, "--runs", str(tmp_path / "runs"), "--until", "pools")
    assert done.returncode == code, flat(done)
    assert message in flat(done)
    assert "Traceback" not in flat(done)


def test_a_missing_corpus_folder(recipe_file, tmp_path):
    fails(recipe_file(lambda d: d["corpus"].update(sources=[{"kind": "cmv", "path": "nowhere"}])), tmp_path, "suasion fetch cmv")


def test_a_corrupt_corpus_line_is_named(recipe_file, tmp_path):
    from suasion.corpora.stage import bundled_path

    corpus = shutil.copytree(bundled_path("cmv"), tmp_path / "corpus")
    lines = (corpus / "utterances.jsonl").read_text().splitlines()
    lines[41] = lines[41][:-20]
    (corpus / "utterances.jsonl").write_text("\n".join(lines) + "\n")
    fails(
        recipe_file(lambda d: d["corpus"].update(sources=[{"kind": "cmv", "path": str(corpus)}])),
        tmp_path,
        "utterances.jsonl, line 42: not valid JSON",
    )
    assert "Repair or remove this line, then run again" in flat(
        suasion("run", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs"), "--until", "corpus")
    )


def test_data_of_a_late_stage_is_missed_before_the_first(recipe_file, tmp_path):
    """A grader's corpus that is not there would else be missed after hours of training."""

    def change(data):
        data["ai_labels"]["grader"] = {"kind": "embedding", "train": {"kind": "ukp", "path": "nowhere"}}
        data["evaluate"]["grader"] = {"kind": "ngram", "train": {"kind": "judge_pairs"}}

    recipe = recipe_file(change)
    done = suasion("run", recipe, "--runs", str(tmp_path / "runs"))
    assert done.returncode == 1
    assert "suasion fetch ukp" in flat(done)
    assert "--set ai_labels.grader.train.path=FOLDER" in flat(done)
    assert not (tmp_path / "runs" / "tiny" / "01-corpus").exists()


def test_a_folder_that_may_not_be_written_is_a_message(monkeypatch, capsys):
    from suasion import cli

    def closed(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "runs/x")

    monkeypatch.setattr(cli, "app", closed)
    monkeypatch.delenv("SUASION_DEBUG", raising=False)
    assert cli._run() == 1
    assert "runs/x: permission denied" in " ".join(capsys.readouterr().err.split())


def test_a_pool_larger_than_the_corpus(recipe_file, tmp_path):
    fails(recipe_file(lambda d: d["pools"].update(rlaif=5000)), tmp_path, "These sizes fit: --set pools.rlaif=")


def test_a_model_folder_without_a_tokenizer(recipe_file, tmp_path, tiny):
    from suasion.bases import base_folder

    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base_folder(tiny) / name, model)
    fails(recipe_file(lambda d: d["model"].update(base=str(model))), tmp_path, "holds no tokenizer")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer_config.json", "{}", "holds no tokenizer"),
        ("vocab.json", "{}", "holds no tokenizer"),  # its merges.txt is missing
        ("tokenizer.json", '{"version": "1.0", "mod', "cannot be read"),
    ],
)
def test_half_a_tokenizer_is_none(tmp_path, tiny, file, text, message):
    from suasion.bases import base_folder
    from suasion.errors import UserError
    from suasion.models import load_tokenizer

    for name in ("config.json", "model.safetensors"):
        shutil.copy(base_folder(tiny) / name, tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tiny.model_copy(update={"base": str(tmp_path)}))


def test_sqlites_full_disk_is_one():
    import sqlite3

    from suasion.cli import _is_full_disk

    full = sqlite3.connect(":memory:")
    full.execute("create table t (x)")
    full.execute("pragma max_page_count = 3")
    with pytest.raises(sqlite3.OperationalError) as caught:
        full.execute("insert into t values (zeroblob(100000))")
    assert _is_full_disk(caught.value)


def test_pickled_weights_are_refused(recipe_file, tmp_path, tiny):
    from suasion.bases import base_folder

    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(base_folder(tiny) / "config.json", model)
    (model / "pytorch_model.bin").write_bytes(b"x")
    fails(recipe_file(lambda d: d["model"].update(base=str(model))), tmp_path, "Pickled weights are refused")


def test_a_full_disk_is_a_message(monkeypatch, capsys):
    import errno

    from suasion import cli

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/responses.jsonl")

    monkeypatch.setattr(cli, "app", full)
    assert cli._run() == 1
    out = " ".join(capsys.readouterr().err.split())
    assert "no space left" in out
    assert "it resumes" in out


def test_verify_finds_a_fault_and_exits_with_4(recipe_file, tmp_path):
    runs = tmp_path / "runs"
    assert suasion("run", recipe_file(lambda d: None), "--runs", str(runs), "--until", "pools").returncode == 0
    done = suasion("verify", str(runs / "tiny"))
    assert done.returncode == 4
    assert "sft is not finished" in flat(done)
    assert "corpus complete" in flat(suasion("status", str(runs / "tiny")))
    assert json.loads((runs / "tiny" / "01-corpus" / "manifest.json").read_text())["stage"] == "corpus"


def test_missing_human_labels_exit_with_3(recipe_file, tmp_path):
    def change(data):
        data["human_labels"] = {"source": {"kind": "file", "path": str(tmp_path / "none.jsonl")}}

    done = suasion("run", recipe_file(change), "--runs", str(tmp_path / "runs"))
    assert done.returncode == 3, flat(done)
    assert "waiting for people" in flat(done)
    assert (tmp_path / "runs" / "tiny" / "10-report" / "index.html").is_file()
