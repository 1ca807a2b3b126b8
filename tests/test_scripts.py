"""The plain-shell way, run on this machine's CPU with the tiny recipe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from suasion.recipe import load_recipe

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what the scripts need, so that nothing is written into the repository."""
    for name in ("scripts", "recipes", "graders"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def call(tree: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {"SUASION_ENV": sys.prefix, "SUASION_FOREGROUND": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    return subprocess.run(
        words, cwd=tree, env={**os.environ, **known, **environment}, capture_output=True, text=True, check=False, timeout=500
    )


def test_an_environment_that_is_there_is_checked_and_linked(tree) -> None:
    done = call(tree, "scripts/setup_env.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ready: torch ")
    assert (tree / ".venv").resolve() == Path(sys.prefix).resolve()


def test_what_is_wrong_is_said_before_anything_is_installed(tree, tmp_path) -> None:
    done = call(tree, "scripts/setup_env.sh", SUASION_ENV=str(tmp_path / "recipes"))
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path / 'recipes'} is no environment: it has no bin/python.\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "df").write_text("#!/bin/sh\necho header\necho x 1 1 1048576 1% /\n")
    (tools / "df").chmod(0o755)
    done = call(tree, "scripts/setup_env.sh", SUASION_ENV="", PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "error: 1 GB free in" in done.stderr
    assert not (tree / ".venv").exists()
    done = call(tree, "scripts/run_sft_aws.sh", "recipes/none.yaml")
    assert done.returncode == 1
    assert "no recipe at recipes/none.yaml" in done.stderr
    done = call(
        tree, "scripts/run_sft_aws.sh", "recipes/tiny.yaml", "--set", "sft.report_to=wandb", WANDB_API_KEY="", WANDB_MODE=""
    )
    assert done.returncode == 1
    assert "needs WANDB_API_KEY" in done.stderr
    assert "== set-up" not in done.stdout


def test_a_run_beside_servers_serves_every_model_that_exists_and_ends_with_its_own_code(tree, tmp_path) -> None:
    """The arms that wait for people are not there to be served, and waiting for people is no failure."""
    bin_, tools, log = tree / ".venv" / "bin", tmp_path / "tools", tmp_path / "log"
    bin_.mkdir(parents=True)
    tools.mkdir()
    os.symlink(sys.executable, bin_ / "python")
    suasion = """
echo "suasion $*" >> LOG
case "$*" in
  export*) mkdir -p "${@: -1}" ;;
  *--until*dpo*) mkdir -p runs/tiny/08-dpo-rlaif && touch runs/tiny/08-dpo-rlaif/manifest.json; exit 3 ;;
  *--until*) ;;
  *) exit 3 ;;
esac"""
    for path, body in (
        (bin_ / "suasion", suasion),
        (tools / "ssh", 'echo "ssh $*" >> LOG; case "$*" in *pwd) echo /srv/them ;; esac'),
        (tools / "scp", 'echo "scp $*" >> LOG'),
        (tools / "curl", 'echo "curl $*" >> LOG; case "$*" in *unload*) exit 22 ;; esac'),
    ):
        path.write_text("#!/bin/bash\n" + body.replace("LOG", str(log)) + "\n")
        path.chmod(0o755)
    with_tools = {"PATH": f"{tools}:{os.environ['PATH']}", "SERVER": "10.0.0.2", "GPUS": "2", "SSH_KEY": "/keys/one"}
    for _ in range(2):  # and again, with the exports of before there
        done = call(tree, "scripts/run_with_servers.sh", "recipes/tiny.yaml", **with_tools)
        assert done.returncode == 3, done.stderr
    said = log.read_text()
    assert {line.split()[3] for line in said.splitlines() if line.startswith("suasion export")} == {"sft", "rlaif"}
    assert (
        said.count(
            'load_lora_adapter -H Content-Type: application/json -d {"lora_name": "rlaif", "lora_path": "/srv/them/served/rlaif"}'
        )
        == 4
    )
    assert "-i /keys/one" in said
    runs = [line for line in said.splitlines() if line.startswith("suasion run")]
    assert len(runs) == 6
    assert all(
        "processes.count=2" in line and 'urls=["http://10.0.0.2:8000/v1","http://10.0.0.2:8001/v1"]' in line for line in runs
    )


def test_skypilot_tasks_name_options_that_exist() -> None:
    """SkyPilot cannot know it; a wrong option would be found out on a machine that is paid for."""
    found = 0
    for path in sorted((REPOSITORY / "skypilot").glob("*.yaml")):
        task = yaml.safe_load(path.read_text())
        for command in re.findall(r"suasion run .*", task["run"]):
            options = re.findall(r"--set (\S+)", command)
            load_recipe(REPOSITORY / task["envs"]["RECIPE"], tuple(options))
            found += len(options)
    assert found == 2


@pytest.mark.slow
def test_the_whole_way_on_a_cpu(tree) -> None:
    done = call(tree, "scripts/run_sft_aws.sh", "recipes/tiny.yaml", "--until", "sft")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== set-up" in done.stdout
    assert (tree / "runs" / "tiny" / "03-sft" / "manifest.json").is_file()
    assert "sft" in (tree / "logs" / "tiny.log").read_text()
    again = call(tree, "scripts/run_sft_aws.sh", "recipes/tiny.yaml", "--until", "sft")
    assert "sft: done before, skipped" in again.stdout


@pytest.mark.slow
def test_the_environment_from_nothing(tree) -> None:
    for name in ("README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree / name)
    shutil.copytree(REPOSITORY / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    done = call(tree, "scripts/setup_env.sh", SUASION_ENV="", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert (tree / ".venv" / "bin" / "suasion").is_file()


@pytest.mark.slow
def test_skypilot_tasks_are_valid(tmp_path) -> None:
    done = subprocess.run(
        ["scripts/check_skypilot.sh", str(tmp_path / "sky")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()[-3:]] == [
        "skypilot/one-a10g.yaml", "skypilot/one-h100.yaml", "skypilot/two-nodes.yaml"
    ]  # fmt: skip
