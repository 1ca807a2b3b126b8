"""The plain-shell way, run on this machine's CPU with the tiny recipe."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from standing_machine import script
from test_launch_machine import stage as made

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


def test_the_environment_that_is_named_is_the_one_that_is_checked(tree, tmp_path) -> None:
    """Whatever stands in .venv: a link gives way, an environment of its own is not thrown away."""
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (other / "bin" / "python").chmod(0o755)
    (tree / ".venv").symlink_to(other)
    assert call(tree, "scripts/setup_env.sh").returncode == 0
    assert (tree / ".venv").resolve() == Path(sys.prefix).resolve()
    again = call(tree, "scripts/setup_env.sh", "--env", ".venv")  # itself
    assert again.returncode == 0, again.stderr
    (tree / ".venv").unlink()
    shutil.copytree(other, tree / ".venv")
    done = call(tree, "scripts/setup_env.sh")
    assert done.returncode == 1
    assert f".venv is there and is not {Path(sys.prefix).resolve()}. Remove it" in done.stderr
    assert (tree / ".venv" / "bin" / "python").is_file()


def test_the_packages_that_a_recipe_needs_are_asked_of_the_recipe(tree, tmp_path) -> None:
    """Installed where the environment is made here, missed where it was named."""
    module = tmp_path / "modules" / "bitsandbytes"
    there = {"PYTHONPATH": f"{module.parent}:{REPOSITORY / 'src'}"}
    words = ("scripts/run_sft_aws.sh", "recipes/tiny.yaml", "--until", "corpus", "--set", "model.quantization=nf4")
    if importlib.util.find_spec("bitsandbytes") is None:
        done = call(tree, *words, **there)
        assert (done.returncode, "== checks" in done.stdout) == (1, False)
        assert "bitsandbytes, of the extra 'qlora', is not in this environment" in done.stderr
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    (tree / ".venv").unlink(missing_ok=True)
    script(
        tree / ".venv" / "bin" / "python", f'[ "$1 $2" = "-m pip" ] && echo "$*" >> {tmp_path}/pip || exec {sys.executable} "$@"'
    )
    words = ("scripts/setup_env.sh", "--recipe", "recipes/tiny.yaml", "--extras", "aws", "--set", "model.quantization=nf4")
    done = call(tree, *words, SUASION_ENV="", **there)
    assert done.returncode == 0, done.stderr
    installed = (tmp_path / "pip").read_text().splitlines()
    assert [line.split()[-1] for line in installed[-2:]] == [".[aws]", ".[aws,qlora]"]
    shutil.rmtree(tree / ".venv")
    done = call(tree, "scripts/setup_env.sh", "--recipe", "recipes/tiny.yaml", "--set", "model.quantisation=nf4", **there)
    assert done.returncode == 1
    assert "mean 'quantization'" in done.stderr
    for path in sorted((REPOSITORY / "skypilot").glob("*.yaml")):
        assert 'scripts/setup_env.sh --recipe "$RECIPE"' in yaml.safe_load(path.read_text())["setup"]


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


SUASION = """
echo "suasion $*" >> LOG
case "$*" in
  export*) mkdir -p "${@: -1}" ;;
  *--until*dpo*) mkdir -p runs/tiny/08-dpo-rlaif && touch runs/tiny/08-dpo-rlaif/manifest.json; exit 3 ;;
  *--until*) ;;
  *) exit 3 ;;
esac"""


@pytest.fixture
def servers(tree, tmp_path):
    """(log, environment): the tools that reach another machine write what they are asked into the log; `suasion` is what the test says."""
    tools, log = tmp_path / "tools", tmp_path / "log"
    (tree / ".venv" / "bin").mkdir(parents=True)
    os.symlink(sys.executable, tree / ".venv" / "bin" / "python")

    def set_up(suasion: str):
        for path, body in (
            (tree / ".venv" / "bin" / "suasion", suasion),
            (tools / "ssh", 'echo "ssh $*" >> LOG; case "$*" in *pwd) echo /srv/them ;; *finished) touch ~/finished ;; esac'),
            (tools / "scp", 'echo "scp $*" >> LOG'),
            (tools / "curl", 'echo "curl $*" >> LOG; case "$*" in *unload*) exit 22 ;; esac'),
        ):
            script(path, body.replace("LOG", str(log)))
        known = {"SERVER": "10.0.0.2", "GPUS": "2", "SSH_KEY": "/keys/one", "HOME": str(tmp_path)}
        return log, {"PATH": f"{tools}:{os.environ['PATH']}", **known}

    return set_up


def test_a_run_beside_servers_serves_every_model_that_exists_and_ends_with_its_own_code(tree, servers) -> None:
    """The arms that wait for people are not there to be served, and waiting for people is no failure."""
    log, with_tools = servers(SUASION)
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


def two_nodes(tree: Path, rank: int, copies: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What skypilot/two-nodes.yaml runs on one of its nodes, with its bucket at `copies`."""
    task = yaml.safe_load((REPOSITORY / "skypilot" / "two-nodes.yaml").read_text())
    known = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    known |= {**task["envs"], "RECIPE": "recipes/tiny.yaml", "COPY_SECONDS": "0.1"}
    return call(tree, "bash", "-c", task["run"].replace("/copies", str(copies)), **{**known, **environment})


def test_two_nodes_go_on_from_their_bucket(tree, servers, tmp_path) -> None:
    """A machine lost in the middle of a training, then people who are waited for, then their labels: nothing is made twice."""
    copies, sft = tmp_path / "copies", "runs/tiny/03-sft"
    log, with_tools = servers(
        f"""mkdir -p {sft}/checkpoints; echo half > {sft}/checkpoints/state; echo old > runs/tiny/labels.db; echo 1 > {sft}/attempt.json
for _ in {{1..600}}; do [ -f {copies}/tiny/03-sft/attempt.json ] && break; sleep 0.05; done
kill -9 $PPID; rm -r runs"""
    )
    assert two_nodes(tree, 0, copies, **with_tools).returncode == 137
    assert (copies / "tiny" / "03-sft" / "checkpoints" / "state").is_file()
    (copies / "tiny" / "labels.db").write_text("what people said\n")
    servers(SUASION.replace("*--until*)", f"*--until*) cat {sft}/checkpoints/state runs/tiny/labels.db >> LOG"))
    done = two_nodes(tree, 0, copies, **with_tools)
    assert done.returncode == 0, done.stderr
    assert "label the run in the bucket, then launch this again" in done.stdout
    assert "half\nwhat people said\n" in log.read_text()
    assert (copies / "tiny" / "08-dpo-rlaif" / "manifest.json").is_file()
    assert (tmp_path / "finished").is_file()


def test_servers_outlive_the_end_of_an_earlier_job(tree, servers, tmp_path) -> None:
    log, with_tools = servers(":")
    script(tmp_path / "vllm" / "bin" / "vllm", f'echo "vllm $*" >> {log}; (sleep 0.5; touch ~/finished) & sleep 60')
    script(tmp_path / "tools" / "sleep", 'exec /bin/sleep "$([ "$1" = 10 ] && echo 0.1 || echo "$1")"')
    (tmp_path / "finished").touch()
    began = time.monotonic()
    two_nodes(tree, 1, tmp_path / "copies", **with_tools)
    assert time.monotonic() - began > 0.5
    assert "vllm serve Qwen/Qwen2.5-0.5B-Instruct" in log.read_text()


def copies(tree: Path, *words: str) -> str:
    done = call(tree, "scripts/copies.sh", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_copies_are_whole_stages_of_one_attempt(tree, servers) -> None:
    servers(":")
    run, kept = tree / "runs" / "tiny", tree / "kept"
    made(run / "01-corpus", "one\n")
    made(run / "02-pools", "two\n")
    for name, text in (("attempt.json", "old"), ("checkpoints/c30/complete", "")):
        (run / "03-sft" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "03-sft" / name).write_text(text)
    copies(tree, "keep", "runs/tiny", "kept")
    assert sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()) == [
        "01-corpus/manifest.json", "01-corpus/rows.jsonl", "02-pools/manifest.json", "02-pools/rows.jsonl", "03-sft/attempt.json",
        "03-sft/checkpoints/c30/complete",
    ]  # fmt: skip
    shutil.rmtree(run / "03-sft" / "checkpoints")
    (run / "03-sft" / "attempt.json").write_text("new")
    copies(tree, "keep", "runs/tiny", "kept")
    assert [path.name for path in (kept / "03-sft").rglob("*")] == ["attempt.json"]
    (kept / "02-pools" / "rows.jsonl").unlink()  # a bucket takes files in an order of its own
    shutil.rmtree(run)
    made(run / "01-corpus", "other\n")
    assert "02-pools in kept is not whole: it is made again" in copies(tree, "take", "kept", "runs/tiny")
    assert sorted(path.name for path in run.iterdir()) == ["01-corpus", "03-sft"]
    assert (run / "01-corpus" / "rows.jsonl").read_text() == "other\n"
    (tree / "runs" / "begun").mkdir()
    (tree / "runs" / "begun" / ".lock").touch()
    copies(tree, "keep", "runs/begun", "kept")  # nothing to copy is no error


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
