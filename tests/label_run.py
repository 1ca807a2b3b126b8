"""A run directory with responses to label, made in milliseconds, and a real `suasion label serve` on it in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from suasion.grading.pairs import SampledPair
from suasion.recipe import dump_recipe, validate_recipe
from suasion.records import Pair, Prompt, Response, Turn, write_json, write_rows

THREAD = (
    ("user", "I think our town should stop building cycle lanes. Hardly anybody uses them in winter, and the main street has become a queue of "
     "delivery vans since it lost a lane.\n\nI used to cycle to school myself, so this is *not* about hating bikes. It is about spending where people are."),
    ("assistant", "What would you count as enough people? The school survey had one in five."),
    ("user", "One in five in **May**. Ask again in January, and ask the bus drivers too."),
)  # fmt: skip
GOOD = (
    "You are right that January looks different, and a lane that stands empty five months a year should have to justify itself. But the queue you "
    "describe began the week the bypass closed, two months before the lane was painted; the vans had nowhere else to go.\n\nSo I would ask the council "
    "for two things before anything is torn up:\n\n1. count the vans again now that the bypass is open,\n2. count the bicycles in January, as you "
    "say.\n\nIf the queue is still there, you have a case that nobody can wave away. If it is gone, a safe way to school would be lost for nothing."
)
BAD = (
    "Cycle lanes are good for the environment, good for health and good for shops. Everybody knows that cars are the problem, and people who are "
    "against cycle lanes usually just do not want to change.\n\nTowns all over the world are building them, and so should we. See "
    "[the overview](http://127.0.0.1:9/lanes) for the numbers."
)  # fmt: skip


def sampled_pairs(
    count: int, texts: tuple[str, str] = (GOOD, BAD), thread: tuple[tuple[str, str], ...] = THREAD
) -> list[SampledPair]:
    """Pairs of an invented discussion; each one's opening turn ends with its number."""
    found = []
    for i in range(count):
        turns = tuple(Turn(role=role, text=text + (f" ({i})" if n == 0 else "")) for n, (role, text) in enumerate(thread))
        prompt = Prompt(id=f"q{i}", corpus="cmv", conversation_id=f"t{i}", author="x", turns=turns)
        responses = [
            Response(
                id=f"q{i}-{n}",
                prompt_id=prompt.id,
                n=n,
                text=text,
                finish="stop",
                tokens=(1,),
                logprob=-1.0,
                lineage="sft-secret-model",
                seed=0,
            )
            for n, text in enumerate(texts)
        ]
        found.append(
            SampledPair(
                Pair(id=f"p{i}", prompt_id=prompt.id, pool="rlhf", a=responses[0].id, b=responses[1].id), prompt, *responses
            )
        )
    return found


def make_run(folder: Path, pairs: list[SampledPair], **page: object) -> Path:
    """A run whose sample stage is finished and whose recipe asks people."""
    run = folder / "tram"
    for name in ("02-pools", "04-sample"):
        (run / name).mkdir(parents=True)
    settings = validate_recipe(
        {
            "name": "tram",
            "corpus": {"sources": [{"kind": "cmv"}]},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": {"kind": "page", **page}},
            "dpo": [{"name": "rlhf", "labels": "human", "pool": "rlhf"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        },
        "test",
    )
    (run / "recipe.yaml").write_text(dump_recipe(settings))
    write_rows(run / "02-pools" / "rlhf.jsonl", [item.prompt for item in pairs])
    write_rows(run / "04-sample" / "pairs.jsonl", [item.pair for item in pairs])
    write_rows(run / "04-sample" / "responses.jsonl", [response for item in pairs for response in (item.a, item.b)])
    write_json(run / "04-sample" / "manifest.json", {})
    return run


class Server:
    """`suasion label serve RUN` in a process group of its own."""

    def __init__(self, run: Path, port: int = 0, *options: str):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "suasion", "label", "serve", str(run), "--port", str(port), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        self.printed = ""
        assert self.process.stdout is not None
        while "Ctrl-C" not in self.printed:
            line = self.process.stdout.readline()
            assert line, f"the server ended: {self.printed}"
            self.printed += line
        found = re.search(r"(http://[^/\s]+)/r/\S+", self.printed)
        assert found
        self.researcher, self.url = found.group(0), found.group(1)
        self.port = int(self.url.rsplit(":", 1)[1])
        self.wait()

    def wait(self) -> None:
        import httpx

        for _ in range(100):
            try:
                httpx.get(self.url + "/static/page.css")
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        """As hard as it gets."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ctrl-C."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
