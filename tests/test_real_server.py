"""`transformers serve` with the bundled model on loopback against the local engine: the same greedy texts."""

import os
import socket
import subprocess
import sys
import time

import httpx2
import pytest

from suasion.bases import BUNDLED, base_folder
from suasion.chat import Renderer
from suasion.grading.base import Comparison
from suasion.grading.build import build_grader
from suasion.models import Compute, Lineage, load_tokenizer
from suasion.records import Prompt, Turn
from suasion.sampling.respond import Journal, respond
from suasion.sections.grading import LlmGrader
from suasion.sections.sampling import EndpointEngine, SampleSection
from suasion.sections.training import ModelSection

pytestmark = pytest.mark.slow  # two copies of the bundled model start and decode: half a minute on two cores

MODEL = ModelSection(base=BUNDLED, dtype="float32", device="cpu")
TEXTS = ["Nobody should give to charity.", "Cats are better than dogs, and I will not be moved.", "Homework is useless."]
PROMPTS = [
    Prompt(id=f"p{i}", corpus="c", conversation_id=f"c{i}", author="a", turns=(Turn(role="user", text=text),))
    for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install -e '.[test]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    options = [
        "serve",
        str(base_folder(MODEL)),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", command, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.2)
        else:
            pytest.fail(f"the server did not start:\n{log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def test_a_real_server_says_what_the_local_engine_says(address, tmp_path):
    renderer = Renderer(load_tokenizer(MODEL), MODEL.system_prompt)
    engine = EndpointEngine(
        kind="endpoint", server="transformers", urls=(address,), models={"base": str(base_folder(MODEL))}, concurrency=2, parity_prompts=1
    )  # fmt: skip
    greedy = SampleSection(temperature=0, max_new_tokens=20, resample=0)
    rows = {}
    for name, settings in (("local", greedy), ("served", greedy.model_copy(update={"engine": engine}))):
        journal = Journal(tmp_path / f"{name}.jsonl")
        rows[name] = respond(
            "base", Lineage(MODEL), PROMPTS, 1, settings, MODEL, renderer, Compute("cpu", "float32", 2), 0, journal, "sample"
        )
    assert [row.text for row in rows["served"].rows] == [row.text for row in rows["local"].rows]
    assert [row.finish for row in rows["served"].rows] == [row.finish for row in rows["local"].rows]
    assert rows["served"].checked["nats_a_token"] < 0.01
    assert rows["served"].checked["compared"] == "greedy texts"


def test_a_language_model_judges_behind_a_real_server(address, tmp_path, monkeypatch):
    """The bundled model is no judge; what counts is that the server takes the request and that its answer is read as what it is."""
    name = str(base_folder(MODEL))  # before the cache moves: the model lies in it
    monkeypatch.setenv("SUASION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    spec = LlmGrader(kind="llm", model=name, base_url=address, structured="none", max_tokens=16, repairs=0, concurrency=2)
    grader = build_grader(spec, lambda _: [], 0, "real")
    judged = grader.grade([Comparison("Homework is useless.", "It trains memory, studies say.", "No it is not.")])[0]
    assert len(judged.orders) == 2
    assert all(one.raw for one in judged.orders)  # the model said something in both orders
    assert not any("declined" in one.reason or "no answer" in one.reason for one in judged.orders)
    assert judged.label == "none" or judged.p_a is not None
