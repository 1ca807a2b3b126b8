"""Rows made in several processes: the same texts and verdicts, a process that dies, a run that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_local_sampling import CPU, draws

from suasion import workers
from suasion.errors import UserError
from suasion.grading import local_llm
from suasion.grading.base import Comparison
from suasion.grading.rubric import load_rubric
from suasion.models import Lineage, load_policy, save_adapter
from suasion.sampling.respond import sampler_for
from suasion.sampling.spread import SpreadSampler
from suasion.sections.grading import LlmGrader
from suasion.sections.sampling import SampleSection
from suasion.sections.training import LoraSection, ModelSection
from suasion.workers import spread

MAKERS = """
import os, signal, sys, time
from suasion.errors import UserError

def steady(setup):
    return lambda piece: piece + setup["add"]

def fatal(setup):
    def make(piece):
        if piece == setup["at"]:
            time.sleep(1)  # until what was made before is written
            os.kill(os.getpid(), signal.SIGKILL)
        return piece
    return make

def unhappy(setup):
    def make(piece):
        raise UserError("the corpus is empty. Fill it.")
    return make

def endless(setup):
    return lambda piece: time.sleep(600)
"""


@pytest.fixture
def makers(tmp_path, monkeypatch) -> Path:
    (tmp_path / "makers.py").write_text(MAKERS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


def test_every_piece_is_made_once(makers) -> None:
    made = []
    spread("makers:steady", {"add": 100}, [(str(n), n) for n in range(7)], lambda *one: made.append(one), 3, "cpu")
    assert sorted(made) == [(str(n), n + 100) for n in range(7)]


def test_a_process_that_dies_ends_the_others_and_what_came_before_is_kept(makers) -> None:
    made = {}
    with pytest.raises(UserError, match=r"one of 2 processes died[\s\S]*pieces are kept: run again"):
        spread("makers:fatal", {"at": 3}, [(str(n), n) for n in range(4)], made.__setitem__, 2, "cpu")
    assert made["1"] == 1  # of the one that died at its second piece
    assert "3" not in made


def test_a_workers_own_message_is_the_message(makers) -> None:
    with pytest.raises(UserError, match=r"^the corpus is empty\. Fill it\.$"):
        spread("makers:unhappy", {}, [("0", 0), ("1", 1)], lambda *one: None, 2, "cpu")


def test_a_run_that_is_killed_leaves_no_worker(makers, monkeypatch) -> None:
    """kill -9 tells nobody; the workers look for their run themselves."""
    code = "from suasion.workers import spread; spread('makers:endless', {}, [('0', 0), ('1', 1)], print, 2, 'cpu')"
    run = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(makers)}, stderr=subprocess.DEVNULL)

    def found() -> list[str]:
        listed = subprocess.run(["pgrep", "-f", f"suasion.workers {makers}"], capture_output=True, text=True, check=False)
        return listed.stdout.split()

    end = time.monotonic() + 60
    while len(found()) < 3 and time.monotonic() < end:  # the launcher and two workers
        time.sleep(0.2)
    assert len(found()) >= 3
    time.sleep(3)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    end = time.monotonic() + 60
    while found() and time.monotonic() < end:
        time.sleep(0.2)
    assert found() == []


def test_fewer_gpus_than_processes_is_said(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"processes\.count is 4, this machine has 1 GPUs\. Use --set processes\.count=1"):
        spread("makers:steady", {}, [("0", 0)], lambda *one: None, 4, "cuda")


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_sample_what_one_does(count, tiny, renderer, tmp_path) -> None:
    """With an adapter that changes something: the same tokens, stops and seeds, and log-probabilities up to rounding."""
    policy = load_policy(Lineage(tiny), LoraSection(), 0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(policy, tmp_path / "adapter", tiny)
    lineage = Lineage(tiny, (tmp_path / "adapter",))
    settings = SampleSection(temperature=0.9, max_new_tokens=8, batch_size=4)
    found = []
    for processes in (1, count):
        sampler = sampler_for("sft", lineage, settings, renderer, CPU, 7, processes)
        assert isinstance(sampler, SpreadSampler) == (processes > 1)
        made = {}
        work = [(str(number), batch) for number, batch in enumerate(sampler.batches(draws(6, 2)))]
        assert len(work) == 3
        sampler.run(work, made.__setitem__)
        found.append([one for key in sorted(made) for one in made[key]])
    one, several = found
    assert [(d.draw, d.tokens, d.finish, d.seed) for d in one] == [(d.draw, d.tokens, d.finish, d.seed) for d in several]
    assert [d.logprob for d in one] == pytest.approx([d.logprob for d in several], abs=1e-4)


def test_several_processes_judge_as_one_does(tiny, monkeypatch) -> None:
    monkeypatch.setattr(local_llm, "BATCH_TOKENS", 1200)
    spec = LlmGrader(kind="llm", provider="local", model=tiny.base, flips="soft")
    rubric = load_rubric(spec.template)
    items = [Comparison(f"Topic {n} matters.", f"Because of {n} reasons.", "It " + "really " * n + "does not.") for n in range(6)]
    one, two = (local_llm.LocalLlmGrader(spec, rubric, 0, processes).grade(items) for processes in (1, 2))
    single = [[order.p_a for judged in both for order in judged.orders] for both in (one, two)]
    assert single[0] == pytest.approx(single[1], abs=1e-4)
    assert len(set(single[0])) > len(items)  # they differ: a share that went to the wrong row would show
    assert [judged.p_a for judged in one] == pytest.approx([judged.p_a for judged in two], abs=1e-4)


def test_prompts_that_do_not_fit_are_missing_and_the_others_are_read(monkeypatch) -> None:
    section = ModelSection(base="random:tiny")
    spec = LlmGrader(kind="llm", provider="local", model=section.base, flips="soft")
    grader = local_llm.LocalLlmGrader(spec, load_rubric(spec.template), 0)
    long, short = Comparison("x", "word " * 9_000, "no"), Comparison("x", "yes, it is", "no")
    judged = grader.grade([long, short])
    assert judged[0].label == "none"
    assert "do not fit" in judged[0].orders[0].reason
    assert judged[1].p_a is not None


def test_a_launcher_shares_processors_among_processes_and_leaves_gpus_alone() -> None:
    threads = torch.get_num_threads()
    cpu, gpu = workers.launcher(2, "cpu"), workers.launcher(2, "cuda", 3)
    assert cpu[cpu.index("--num_cpu_threads_per_process") + 1] == str(max(1, threads // 2))
    assert gpu[gpu.index("--num_cpu_threads_per_process") + 1] == str(threads)
    assert (gpu[gpu.index("--num_processes") + 1], gpu[gpu.index("--num_machines") + 1]) == ("6", "3")
