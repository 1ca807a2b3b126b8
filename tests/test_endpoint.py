"""The endpoint engine against a real server on loopback that misbehaves on purpose: nothing lost, nothing duplicated, clear messages."""

import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from suasion.errors import UsageError, UserError
from suasion.models import Compute, Lineage, load_merged
from suasion.pipeline import recipe_slice
from suasion.recipe import validate_recipe
from suasion.records import Prompt, Turn
from suasion.sampling.draws import Draw
from suasion.sampling.endpoint import EndpointSampler, read_answer, request_body
from suasion.sampling.respond import Journal, respond
from suasion.sections.sampling import EndpointEngine, SampleSection
from suasion.servers import Fault, retry_after
from suasion.training.losses import logprob_tolerance

CPU = Compute("cpu", "float32", 2)
PROMPTS = [
    Prompt(id=f"p{i}", corpus="c", conversation_id=f"c{i}", author="a", turns=(Turn(role="user", text=f"View number {i}."),))
    for i in range(12)
]


class FakeServer(ThreadingHTTPServer):
    """Answers `text of <prompt> seed <seed>`; `faults` maps the number of a request (from 0) to a way of failing."""

    daemon_threads = True

    def __init__(self, faults=None, answer=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.faults, self.answer = faults or {}, answer
        self.requests, self.answered, self.times = [], [], []
        self.active = self.most = 0
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that hung up is no news here."""

    def stop(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            server.times.append(time.monotonic())
            server.active += 1
            server.most = max(server.most, server.active)
        try:
            fault = server.faults(number) if callable(server.faults) else server.faults.get(number)
            self.respond(fault, body)
        finally:
            with server.lock:
                server.active -= 1

    def respond(self, fault, body):
        answer = (self.server.answer or plain)(body)
        data = json.dumps(answer).encode()
        status, headers = 200, {}
        if isinstance(fault, int):
            status, data = fault, b'{"error": "not now"}'
        elif isinstance(fault, tuple):
            status, data, headers = fault[0], b"slow down", {"Retry-After": fault[1]}
        elif fault == "garbage":
            data = b"\x00\xff<html>proxy error</html>"
        elif fault == "empty":
            data = b""
        elif fault == "no choice":
            data = b'{"choices": []}'
        elif fault == "unfinished":
            data = json.dumps({"choices": [{"text": "x", "finish_reason": None}]}).encode()
        elif fault == "close":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        elif fault == "hang":
            time.sleep(1.0)
            self.close_connection = True
            return
        elif fault == "slow":
            time.sleep(0.05)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "half":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(data)
        if status == 200 and fault in (None, "slow"):
            with self.server.lock:
                self.server.answered.append((str(body["prompt"]), body["seed"]))


def plain(body):
    return {"choices": [{"text": f" answer with seed {body['seed']}", "finish_reason": "stop"}]}


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setattr("suasion.servers.PAUSE_SECONDS", 0.01)
    servers = []

    def make(*args, **kwargs):
        servers.append(FakeServer(*args, **kwargs))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def settings_for(*urls, sample=None, **engine):
    given = {"kind": "endpoint", "server": "openai", "urls": urls, "parity_prompts": 0, "concurrency": 4, "timeout": 5.0}
    return SampleSection(engine=EndpointEngine(**{**given, **engine}), resample=0, **(sample or {}))


def ask(settings, tiny, renderer, tmp_path, prompts=PROMPTS, each=2, name="sft"):
    journal = Journal(tmp_path / "journal.jsonl")
    return respond(name, Lineage(tiny), prompts, each, settings, tiny, renderer, CPU, 3, journal, "sample")


def assert_whole(rows, prompts=PROMPTS, each=2):
    assert [(row.prompt_id, row.n) for row in rows] == [(prompt.id, n) for prompt in prompts for n in range(each)]
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.text == f"answer with seed {row.seed}" for row in rows)


FAULTS = [500, 502, 429, (429, "0.05"), (503, "0"), "half", "garbage", "empty", "no choice", "unfinished", "close"]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_after_any_fault_every_row_is_there_once(fault, start, tiny, renderer, tmp_path):
    server = start(dict.fromkeys((0, 1, 5, 6, 20), fault))
    assert_whole(ask(settings_for(server.url), tiny, renderer, tmp_path).rows)
    assert set(Counter(server.answered).values()) == {1}  # what was answered is not asked for again
    assert len(server.answered) == 24
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 24
    assert len({json.loads(line)["batch"] for line in lines}) == 24


def test_all_faults_mixed(start, tiny, renderer, tmp_path):
    server = start(lambda number: FAULTS[number % 40] if number % 40 < len(FAULTS) else None)
    assert_whole(ask(settings_for(server.url), tiny, renderer, tmp_path).rows)


def test_a_hanging_request_is_given_up_and_repeated(start, tiny, renderer, tmp_path):
    server = start({2: "hang"})
    assert_whole(ask(settings_for(server.url, timeout=0.4), tiny, renderer, tmp_path).rows)


def test_retry_after_is_honoured(start, tiny, renderer, tmp_path):
    server = start({0: (429, "0.6")})
    ask(settings_for(server.url, concurrency=1), tiny, renderer, tmp_path, PROMPTS[:2], 1)
    assert server.times[1] - server.times[0] >= 0.6
    assert server.times[2] - server.times[1] < 0.5


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("0.5", 0.5), (None, 0), ("", 0), ("soon", 0), ("-3", 0), ("nan", 0), ("inf", 0), ("99999", 600),
     ("Wed, 21 Oct 2015 07:28:10 GMT", 10), ("Wed, 21 Oct 2015 07:27:00 GMT", 0)],
)  # fmt: skip
def test_retry_after_values(value, seconds):
    assert retry_after(value, 1445412480.0) == seconds


def test_one_of_two_servers_dies_midway(start, tiny, renderer, tmp_path):
    steady = start(lambda _: "slow")
    dying = start(lambda number: "slow" if number < 3 else "close")
    assert_whole(ask(settings_for(dying.url, steady.url, concurrency=2), tiny, renderer, tmp_path).rows)
    assert len(dying.answered) == 3
    assert len(steady.answered) == 21
    assert steady.most <= 2
    assert len(dying.requests) <= 12  # it rests longer and longer


def test_requests_at_once_are_bounded(start, tiny, renderer, tmp_path):
    server = start(lambda _: "slow")
    ask(settings_for(server.url, concurrency=3), tiny, renderer, tmp_path)
    assert server.most == 3


def test_dead_servers_are_named_and_the_next_run_asks_only_for_what_is_missing(start, tiny, renderer, tmp_path):
    server = start(lambda number: None if number < 9 else 500)
    with pytest.raises(
        UserError, match=r"15 of 24 responses of 'sft'.*tried 3 times.*status 500.*9 came and are on disk.*same command"
    ):
        ask(settings_for(server.url, retries=2), tiny, renderer, tmp_path)
    well = start()
    assert_whole(ask(settings_for(well.url), tiny, renderer, tmp_path).rows)
    assert len(well.requests) == 15
    assert not set(well.answered) & set(server.answered)


def test_nobody_listens(start, tiny, renderer, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=r"24 of 24 responses.*no connection.*0 came"):
        ask(settings_for(url, retries=1), tiny, renderer, tmp_path)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_stops_at_once_and_says_what_to_check(status, start, tiny, renderer, tmp_path):
    server = start(lambda _: status)
    with pytest.raises(UserError, match=rf"refuses a request \(status {status}: .*not now.*models \('my-lora'"):
        ask(settings_for(server.url, models={"sft": "my-lora"}), tiny, renderer, tmp_path)
    assert len(server.requests) <= 4


def test_the_key_comes_from_the_environment_and_is_never_shown(start, tiny, renderer, tmp_path, monkeypatch):
    server = start()
    monkeypatch.setenv("MY_SERVER_KEY", "sk-very-secret")
    ask(settings_for(server.url, key_env="MY_SERVER_KEY"), tiny, renderer, tmp_path, PROMPTS[:1], 1)
    assert server.requests[0][1]["authorization"] == "Bearer sk-very-secret"
    assert "secret" not in (tmp_path / "journal.jsonl").read_text()
    monkeypatch.delenv("MY_SERVER_KEY")
    with pytest.raises(UserError, match="MY_SERVER_KEY, but this variable is not set"):
        ask(settings_for(server.url, key_env="MY_SERVER_KEY"), tiny, renderer, tmp_path)


def test_a_server_that_repeats_the_key_does_not_get_it_printed(start, tiny, renderer, tmp_path, monkeypatch):
    server = start(lambda _: 401)
    monkeypatch.setenv("MY_SERVER_KEY", "now")  # the fake server says: not now
    with pytest.raises(UserError, match=r"not \(the key\)"):
        ask(settings_for(server.url, key_env="MY_SERVER_KEY"), tiny, renderer, tmp_path)


def test_every_response_has_its_own_seed_and_the_same_one_again(start, tiny, renderer, tmp_path):
    one, other = start(), start()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first = ask(settings_for(one.url), tiny, renderer, tmp_path / "a").rows
    second = ask(settings_for(other.url, concurrency=1), tiny, renderer, tmp_path / "b").rows
    assert first == second
    assert len({row.seed for row in first}) == 24
    assert all(0 <= row.seed < 2**31 for row in first)


def test_one_response_for_a_listener(start, tiny, renderer):
    """Live chat through a server: the same request, the text at once."""
    server = start({0: 500})
    sampler = EndpointSampler(settings_for(server.url).engine, settings_for(server.url), "sft", renderer, 3, lambda: None)
    heard = []
    drawn = sampler.speak(Draw("p", renderer.render(PROMPTS[0].turns).ids, 0), heard.append)
    assert heard == [f"answer with seed {drawn.seed}"]
    assert len(server.answered) == 1


def test_unknown_tokens_stay_unknown(start, tiny, renderer, tmp_path):
    rows = ask(settings_for(start().url), tiny, renderer, tmp_path).rows
    assert all(row.tokens is None and row.logprob is None and row.finish == "stop" for row in rows)


def test_faulty_responses_are_drawn_again_as_with_the_local_engine(start, tiny, renderer, tmp_path):
    seen = Counter()

    def answer(body):
        seen[body["prompt"]] += 1
        cut = seen[body["prompt"]] == 1
        return {"choices": [{"text": f"text {body['seed']}", "finish_reason": "length" if cut else "stop"}]}

    settings = settings_for(start({}, answer).url).model_copy(update={"resample": 2})
    made = ask(settings, tiny, renderer, tmp_path, PROMPTS, 1)
    assert made.drawn_again == {"cut-off": 12}
    assert all(row.finish == "stop" and row.flags == () for row in made.rows)


def test_requests_carry_every_sampling_field_in_each_dialect(renderer):
    prompt = renderer.render((Turn(role="user", text="No."),)).ids
    settings = SampleSection(temperature=0.8, top_p=0.9, top_k=40, min_p=0.05, max_new_tokens=64)
    bodies = {
        kind: request_body(kind, "m", prompt, settings, 7, renderer) for kind in ("vllm", "sglang", "llama.cpp", "transformers")
    }
    for kind in ("vllm", "sglang", "llama.cpp"):
        body = bodies[kind]
        assert tuple(body["prompt"]) == prompt
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["max_tokens"], body["seed"]) == (
            0.8,
            0.9,
            40,
            0.05,
            64,
            7,
        )
    assert bodies["vllm"]["stop_token_ids"] == [renderer.stop_id]
    assert bodies["vllm"]["repetition_penalty"] == 1.0  # or the model's generation_config decides
    assert bodies["llama.cpp"]["samplers"] == ["top_k", "temperature", "top_p", "min_p"]
    config = json.loads(bodies["transformers"]["generation_config"])
    assert config == {
        "do_sample": True, "max_new_tokens": 64, "eos_token_id": renderer.stop_id, "pad_token_id": renderer.tokenizer.pad_token_id,
        "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.05,
    }  # fmt: skip
    assert bodies["transformers"]["prompt"] == renderer.prompt_text((Turn(role="user", text="No."),))
    off = request_body("vllm", "m", prompt, SampleSection(temperature=0), 7, renderer)
    assert (off["top_k"], off["min_p"], off["top_p"]) == (-1, 0.0, 1.0)


class BosTokenizer:
    """A tokenizer that adds a token of its own to every text, as many do."""

    def decode(self, ids, **_):
        return "x" * len(ids)

    def __call__(self, text):
        return {"input_ids": [1] * (len(text) + 1)}


class BosRenderer:
    tokenizer = BosTokenizer()
    stop_id = 2


def test_a_prompt_that_text_would_change_is_refused():
    with pytest.raises(UserError, match="reads the rendered text as other tokens"):
        request_body("openai", "m", (1, 1), SampleSection(), 0, BosRenderer())


def choice(**fields):
    return {"choices": [{"text": "a b", "finish_reason": "stop", **fields}]}


def test_reading_tokens_and_logprobs(renderer):
    draw, stop = Draw("p", (1, 2), 0), renderer.stop_id
    whole = read_answer(
        choice(token_ids=[50, 60, stop], logprobs={"token_logprobs": [-1.0, -2.0, -0.5]}), draw, 1, 8, renderer, "vllm"
    )
    assert (whole.tokens, whole.logprob, whole.finish) == ((50, 60, stop), -3.5, "stop")
    unlisted = read_answer(choice(token_ids=[50, 60], logprobs={"token_logprobs": [-1.0, -2.0]}), draw, 1, 8, renderer, "vllm")
    assert (unlisted.tokens, unlisted.logprob) == ((50, 60, stop), None)  # the stop token's own is not known
    llama = {"content": [{"id": 50, "logprob": -1.0}, {"id": stop, "logprob": -0.25}]}
    assert read_answer(choice(logprobs=llama), draw, 1, 8, renderer, "llama.cpp").logprob == -1.25
    # SGLang's log-probabilities are those of the tempered distribution: not ours.
    assert (
        read_answer(choice(token_ids=[50, stop], logprobs={"token_logprobs": [-1, -1]}), draw, 1, 8, renderer, "sglang").logprob
        is None
    )
    cut = read_answer(choice(finish_reason="length", token_ids=[50, 60]), draw, 1, 2, renderer, "vllm")
    assert (cut.tokens, cut.finish, cut.logprob) == ((50, 60), "length", None)
    foreign = next(token for token in renderer.tokenizer.all_special_ids if token != stop)
    assert read_answer(choice(token_ids=[50, foreign]), draw, 1, 8, renderer, "vllm").tokens is None
    for nan in (float("nan"), float("-inf"), "x", None, 3.0):
        broken = read_answer(choice(token_ids=[50, stop], logprobs={"token_logprobs": [-1.0, nan]}), draw, 1, 8, renderer, "vllm")
        assert broken.logprob is None


@pytest.mark.parametrize(
    "answer",
    [
        None, [], 3, {}, {"choices": None}, {"choices": [1]}, {"choices": [{}, {}]}, {"choices": [{"text": 5, "finish_reason": "stop"}]},
        choice(finish_reason="abort"), choice(token_ids=[10**9]), choice(token_ids=[-1]), choice(token_ids=list(range(20, 40))),
    ],
)  # fmt: skip
def test_nonsense_is_a_fault(answer, renderer):
    with pytest.raises(Fault):
        read_answer(answer, Draw("p", (1,), 0), 1, 8, renderer, "vllm")


def test_tokens_after_the_stop_token_are_a_fault(renderer):
    with pytest.raises(Fault, match="goes on"):
        read_answer(choice(token_ids=[renderer.stop_id, 50]), Draw("p", (1,), 0), 1, 8, renderer, "vllm")


def model_answer(model, renderer, tell, shift=0.0):
    """Answers as vLLM does, from the tiny model itself; `tell`: whether it lists tokens and log-probabilities."""
    lock = threading.Lock()

    def answer(body):
        ids = body["prompt"] if isinstance(body["prompt"], list) else renderer.encode(body["prompt"])
        with lock, torch.no_grad():
            said, logprobs = [], []
            for _ in range(body["max_tokens"]):
                scores = model(torch.tensor([[*ids, *said]])).logits[0, -1].log_softmax(-1)
                said.append(int(scores.argmax()) if not shift else int(scores.topk(40).indices[-1]))
                logprobs.append(float(scores[said[-1]]))
                if said[-1] == renderer.stop_id:
                    break
        finish = "stop" if said[-1] == renderer.stop_id else "length"
        told = {"token_ids": said, "logprobs": {"token_logprobs": [value - shift for value in logprobs]}} if tell else {}
        return {"choices": [{"text": renderer.tokenizer.decode(said, skip_special_tokens=True), "finish_reason": finish, **told}]}

    return answer


@pytest.mark.parametrize(("server_kind", "tell", "how"), [("vllm", True, "log-probabilities"), ("openai", False, "greedy texts")])
def test_parity_with_the_local_model_is_checked_before_the_first_response(
    server_kind, tell, how, start, tiny, renderer, tmp_path
):
    model = load_merged(Lineage(tiny))
    sample = {"max_new_tokens": 8}
    right = start({}, model_answer(model, renderer, tell))
    settings = settings_for(right.url, sample=sample, server=server_kind, parity_prompts=2)
    made = ask(settings, tiny, renderer, tmp_path, PROMPTS[:3], 1)
    assert made.checked["compared"] == how
    assert made.checked["prompts"] == 2
    # re-tokenised text of a random model need not give its tokens back, so that only the exact comparison is exact
    assert made.checked["nats_a_token"] <= (1e-3 if tell else 0.1)
    assert right.requests[0][2]["temperature"] == 0
    wrong = start({}, model_answer(model, renderer, tell, shift=0.3))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match=rf"{wrong.url} does not speak as the local model does: 'sft' there differs by .* nats"):
        ask(
            settings_for(right.url, wrong.url, sample=sample, server=server_kind, parity_prompts=2),
            tiny,
            renderer,
            other,
            PROMPTS[:3],
            1,
        )
    assert not (other / "journal.jsonl").exists()  # no response was asked for
    again = len(right.requests)
    assert ask(settings, tiny, renderer, tmp_path, PROMPTS[:3], 1).checked == made.checked  # a finished journal asks nothing
    assert len(right.requests) == again


def test_servers_that_join_a_run_are_compared_too(start, tiny, renderer, tmp_path):
    """Addresses may change between the start of a stage and its end; one that serves other weights must not pass by what was compared before."""
    model = load_merged(Lineage(tiny))

    def gone_after_one(number):
        return 401 if number > 2 else None  # two prompts compared, and one response

    first = start(gone_after_one, model_answer(model, renderer, True))
    common = {"sample": {"max_new_tokens": 8}, "server": "vllm", "parity_prompts": 2, "concurrency": 1}
    with pytest.raises(UserError, match="refuses a request"):
        ask(settings_for(first.url, **common), tiny, renderer, tmp_path, PROMPTS[:3], 1)
    wrong = start({}, model_answer(model, renderer, True, shift=0.3))
    with pytest.raises(UserError, match=rf"{wrong.url} does not speak as the local model does"):
        ask(settings_for(wrong.url, **common), tiny, renderer, tmp_path, PROMPTS[:3], 1)
    right = start({}, model_answer(model, renderer, True))
    made = ask(settings_for(right.url, **common), tiny, renderer, tmp_path, PROMPTS[:3], 1)
    assert [body["temperature"] for _, _, body in right.requests] == [
        0,
        0,
        SampleSection().temperature,
        SampleSection().temperature,
    ]
    assert made.checked["compared"] == "log-probabilities"
    assert not {"addresses", "urls"} & made.checked.keys()  # they stand in no manifest


def test_local_and_endpoint_rows_of_one_model_are_the_same(start, tiny, renderer, tmp_path):
    model = load_merged(Lineage(tiny))
    sample = {"max_new_tokens": 8, "temperature": 0.0}
    server = start({}, model_answer(model, renderer, True))
    (tmp_path / "local").mkdir()
    journal = Journal(tmp_path / "local" / "journal.jsonl")
    local = respond(
        "sft", Lineage(tiny), PROMPTS, 1, SampleSection(resample=0, **sample), tiny, renderer, CPU, 3, journal, "sample"
    ).rows
    served = ask(settings_for(server.url, sample=sample, server="vllm"), tiny, renderer, tmp_path, PROMPTS, 1).rows
    for ours, theirs in zip(local, served, strict=True):
        assert ours.model_dump(exclude={"seed", "logprob"}) == theirs.model_dump(exclude={"seed", "logprob"})
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def minimal(sample):
    grader = {"kind": "ngram", "train": {"kind": "grader_pairs"}}
    judge = {"kind": "embedding", "train": {"kind": "judge_pairs"}}
    return {
        "name": "x", "corpus": {"sources": [{"kind": "cmv"}]}, "ai_labels": {"grader": grader}, "evaluate": {"grader": judge},
        "human_labels": {"source": {"kind": "simulated"}}, "dpo": [{"name": "rlaif", "labels": "ai", "pool": "rlaif"}], "sample": sample,
    }  # fmt: skip


def test_the_recipe_slice_names_no_server_and_moving_one_changes_nothing():
    engine = {"kind": "endpoint", "server": "vllm", "urls": ["http://gpu1:8000/v1"], "models": {"sft": "lora-sft"}}
    here = validate_recipe(minimal({"engine": engine}), "test")
    there = validate_recipe(minimal({"engine": {**engine, "urls": ["http://gpu2:9/v1"], "concurrency": 8, "retries": 1}}), "test")
    part = recipe_slice(here, ("sample", "seed"))
    assert part == recipe_slice(there, ("sample", "seed"))
    assert part["sample"]["engine"] == {"kind": "endpoint", "server": "vllm", "models": {"sft": "lora-sft"}}
    assert here.sample.engine.urls == ("http://gpu1:8000/v1",)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"engine": {"kind": "remote"}}, "local"),
        ({"engine": {"kind": "endpoint", "server": "vllm"}}, "urls"),
        ({"engine": {"kind": "endpoint", "server": "vllm", "urls": []}}, "urls"),
        ({"engine": {"kind": "endpoint", "server": "vllm", "urls": ["gpu1:8000"]}}, "is no address"),
        ({"engine": {"kind": "endpoint", "server": "vllm", "urls": ["http://me:key@gpu1/v1"]}}, "holds no key"),
        ({"engine": {"kind": "endpoint", "server": "vllm", "urls": ["http://a/v1", "http://a/v1"]}}, "twice"),
        (
            {"engine": {"kind": "endpoint", "server": "vllm", "urls": ["http://a/v1"], "concurency": 3}},
            "did you mean 'concurrency'",
        ),
        ({"engine": {"kind": "endpoint", "server": "vllm", "urls": ["http://a/v1"], "key_env": "sk-123"}}, "key_env"),
        ({"engine": {"kind": "endpoint", "server": "vllm", "urls": ["http://a/v1"], "models": {"rlhf": "x"}}}, "names rlhf"),
        ({"engine": {"kind": "endpoint", "server": "openai", "urls": ["http://a/v1"]}, "top_k": 5}, "neither"),
        (
            {"engine": {"kind": "endpoint", "server": "vllm", "urls": ["http://a/v1"]}, "repetition_penalty": 1.1},
            "only engine local",
        ),
        ({"min_p": 1.0}, "min_p"),
        ({"resample_for": ["boring"]}, "resample_for"),
    ],
)
def test_wrong_recipes_are_refused(sample, message):
    with pytest.raises(UsageError, match=message):
        validate_recipe(minimal(sample), "test")


def test_tolerance_of_stored_logprobs_follows_the_engine():
    assert logprob_tolerance(100, "float32", SampleSection()) == pytest.approx(0.1)
    assert logprob_tolerance(100, "float32", settings_for("http://a/v1", parity_tolerance=0.2)) == pytest.approx(20)
    few, many = (logprob_tolerance(tokens, "bfloat16", SampleSection()) for tokens in (6, 100))
    assert few == pytest.approx(5 * 0.04 * 6**0.5)  # six tokens: .32 nats were measured where .3 would be .05 a token
    assert many == pytest.approx(5)


def test_a_failing_disk_is_not_dressed_up_as_a_server_fault(start, tiny, renderer):
    settings = settings_for(start().url)
    sampler = EndpointSampler(settings.engine, settings, "sft", renderer, 0, lambda: None)

    def deliver(key, drawn):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        sampler.run([("k", [Draw("p", renderer.render(PROMPTS[0].turns).ids, 0)])], deliver)
