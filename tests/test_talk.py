"""`suasion chat`: who hears what, what is known of whom, and the page over HTTP against a real server on loopback."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import threading
import time

import httpx
import pytest
import torch
import uvicorn
from rich.console import Console
from rich.text import Text

from suasion.errors import UsageError, UserError
from suasion.labeling.guard import BODY_LIMIT
from suasion.models import Lineage, load_policy, save_adapter
from suasion.recipe import dump_recipe, validate_recipe
from suasion.records import Turn, write_json
from suasion.sampling.draws import Drawn
from suasion.talking import talk as talking
from suasion.talking.app import STREAM, make_app
from suasion.talking.talk import Talk
from suasion.talking.terminal import Tail, chat

TOKEN = "let-me-in"
HOSTILE = "</template><script>document.title='owned'</script> {{ 7 * 7 }} <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    return make_run(tmp_path_factory.mktemp("talk") / "secret-name", tiny)


def make_run(folder, tiny):
    """A run of the tiny model whose sft changed nothing and whose arm `loud` changed much; `later` is not trained yet."""
    arm = {"labels": "ai", "pool": "rlaif"}
    recipe = validate_recipe(
        {
            "name": "secret-name",
            "model": {"base": tiny.base, "max_length": 300},
            "corpus": {"sources": [{"kind": "cmv"}], "reply_tokens": [4, 12], "context_tokens": 128},
            "sample": {"max_new_tokens": 12, "temperature": 0.05, "top_p": 1.0},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [{"name": "loud", **arm}, {"name": "later", "start": "loud", **arm}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        },
        "test",
    )
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    lineage = Lineage(recipe.model)
    for stage, scale in (("03-sft", 0.0), ("08-dpo-loud", 20.0)):
        policy = load_policy(lineage, recipe.sft.lora, 0)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, scale) if scale else None
        save_adapter(policy, folder / stage / "adapter", recipe.model)
        write_json(folder / stage / "manifest.json", {})
        lineage = lineage.extended(folder / stage / "adapter")
    return folder


class Scripted:
    """Says `<name> heard <n> messages`, word by word, and remembers what it read."""

    def __init__(self, name, renderer, pause=0.0):
        self.name, self.renderer, self.pause, self.read = name, renderer, pause, []

    def speak(self, draw, hear):
        self.read.append(self.renderer.tokenizer.decode(draw.prompt))
        said = ""
        for word in (self.name, "heard", str(len(self.read)), "messages"):
            said = f"{said} {word}".strip()
            time.sleep(self.pause)
            hear(said)
        return Drawn(draw, None, "stop", None, draw.prompt[0], said)


def scripted(run, *names, blind=False, pause=0.0):
    talk = Talk(run, names, blind)
    talk._samplers = {name: Scripted(f"<{i}>", talk.renderer, pause) for i, name in enumerate(talk.finished)}
    return talk


@contextlib.contextmanager
def serving(talk):
    """The talk's page on loopback: its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(talk, TOKEN, {"127.0.0.1"}), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def test_only_finished_models_can_be_talked_to(run):
    assert Talk(run).names == ["base", "sft", "loud"]
    assert Talk(run, ["loud", "base"]).names == ["base", "loud"]  # in the order of the tables
    with pytest.raises(UsageError, match=r"later, nobody: not a finished model of this run. It has base, sft, loud"):
        Talk(run, ["later", "sft", "nobody"])


def test_models_draw_with_the_same_numbers_and_differ_by_weights_alone(run):
    talk = Talk(run)
    talk.number = "a fixed one"  # drawn anew for every conversation: a test must not depend on it
    grown = {}
    this = talk.say("Cycle lanes are a waste.", lambda place, text: grown.setdefault(place, []).append(text))
    base, sft, loud = (this.replies[place].text for place in range(3))
    assert base == sft  # its adapter changed nothing
    assert loud != base
    for place, reply in this.replies.items():
        assert 1 <= len(grown[place]) <= 12  # token by token
        assert reply.text.startswith(grown[place][0].strip())
        assert grown[place][-1] == reply.text.rstrip("\ufffd")  # cut off within a letter: not shown


def test_models_make_room_for_each_other_where_memory_is_short(run, monkeypatch):
    said = []
    for free in (10**12, 0):
        monkeypatch.setattr(talking, "free_memory", lambda device, free=free: free)
        talk = Talk(run)
        talk.number = "a fixed one"
        rounds = [talk.say(message, lambda *_: None) for message in ("Cycle lanes are a waste.", "Every one of them.")]
        said.append([reply.text for this in rounds for _, reply in sorted(this.replies.items())])
        in_memory = [name for name in talk.names if talk._samplers[name].model is not None]
        assert in_memory == (talk.names if free else talk.names[-1:])
    assert said[0] == said[1]


def test_each_model_sees_the_messages_and_its_own_replies_only(run):
    talk = scripted(run)
    talk.say("One.", lambda *_: None)
    talk.say("Two.", lambda *_: None)
    for place, name in enumerate(talk.names):
        first, second = talk._samplers[name].read
        assert "One." in first
        assert "Two." not in first
        assert all(part in second for part in ("One.", "Two.", f"<{place}> heard 1 messages"))
        assert not any(f"<{other}> heard" in second for other in range(3) if other != place)
        turns = (
            Turn(role="user", text="One."),
            Turn(role="assistant", text=f"<{place}> heard 1 messages"),
            Turn(role="user", text="Two."),
        )
        assert second == talk.renderer.prompt_text(turns)  # as the models were trained


def test_a_stopped_reply_keeps_what_was_said_and_ends_the_round(run):
    talk = scripted(run)
    this = talk.say("One.", lambda place, text: talk.stop() if place == 1 and text.endswith("heard") else None)
    assert {place: (reply.text, reply.finish) for place, reply in this.replies.items()} == {
        0: ("<0> heard 1 messages", "stop"),
        1: ("<1> heard", "stopped"),
    }
    assert len(talk.say("Two.", lambda *_: None).replies) == 3  # the next message reaches all
    assert "assistant" not in talk._samplers["loud"].read[-1].split("One.")[1].split("Two.")[0]  # it said nothing to the first


@pytest.mark.parametrize(("message", "said"), [(" \n", "no message"), ("x" * 9000, "9000 characters"), ("word " * 400, "tokens")])
def test_a_message_that_cannot_be_answered_changes_nothing(message, said, run):
    talk = scripted(run)
    with pytest.raises(UserError, match=said):
        talk.say(message, lambda *_: None)
    assert talk.rounds == []


def test_blind_order_is_drawn_anew_and_names_come_when_asked_for(run):
    talk = scripted(run, blind=True)
    orders = set()
    for _ in range(60):
        talk.begin(talk.finished, True)
        orders.add(tuple(talk.names))
        assert [talk.label(place) for place in range(3)] == ["Model A", "Model B", "Model C"]
    assert len(orders) == 6  # all of them: missing one has probability 1e-4
    talk.reveal()
    assert [talk.label(place) for place in range(3)] == talk.names


def test_in_a_terminal(run):
    output = io.StringIO()
    lines = iter(["/help", "A view.", "/names", "", "\u001b[2Jsteer", "/new", "Again.", "/quit"])
    talk = scripted(run, "sft", "loud", blind=True)
    chat(talk, Console(file=output, width=200), lambda _: next(lines))
    said = output.getvalue()
    before, after = said.split("\nA: ", 1)
    assert "Model A: <" in before
    assert not re.search("sft|loud", before.replace("secret-name", ""))
    assert {"sft", "loud"} <= set(re.findall(r"\b(?:sft|loud)\b", after))
    assert "\u001b" not in said
    assert len(talk.rounds) == 1  # after /new


def test_a_wide_terminal_shows_replies_side_by_side_and_ctrl_c_stops_one(run):
    output = io.StringIO()
    talk = scripted(run, "base", "sft")
    script = talk._samplers["sft"].speak

    def interrupted(draw, hear):
        def twice(text):
            hear(text)
            if text.endswith("heard"):
                raise KeyboardInterrupt

        return script(draw, twice)

    talk._samplers["sft"].speak = interrupted
    lines = iter(["A view.", "/quit"])
    chat(talk, Console(file=output, width=100, force_terminal=True, color_system=None), lambda _: next(lines))
    last = [line for line in output.getvalue().splitlines() if "\u2500" in line or "\u2502" in line][-3:]
    assert "base" in last[0]
    assert "sft" in last[0]
    assert "<0> heard 1 messages" in last[1]
    assert "<1> heard " in last[1]
    assert "stopped" in last[2]
    assert talk.rounds[0].replies[1].finish == "stopped"


def test_a_reply_longer_than_the_window_shows_its_end_and_is_printed_once(run):
    output = io.StringIO()
    console = Console(file=output, width=60, height=8, force_terminal=True, color_system=None)
    long = "\n".join(f"line {number}." for number in range(30))
    shown = ["".join(segment.text for segment in line).strip() for line in console.render_lines(Tail(Text(long)))]
    assert shown == [f"line {number}." for number in range(23, 30)]
    talk = scripted(run, "base", "sft")
    for name in talk.names:
        talk._samplers[name].speak = lambda draw, hear: hear(long) or Drawn(draw, None, "stop", None, 0, long)
    lines = iter(["A view.", "/quit"])
    chat(talk, console, lambda _: next(lines))
    assert output.getvalue().count("line 0.") == 2  # one for each model, after they have ended
    assert output.getvalue().count("line 29.") > 2


@pytest.fixture
def serve(run):
    with contextlib.ExitStack() as servers:

        def start(**settings):
            talk = scripted(run, **settings)
            address = servers.enter_context(serving(talk))
            return talk, httpx.Client(base_url=address, follow_redirects=True, trust_env=False)

        yield start


def entered(client):
    page = client.get(f"/in/{TOKEN}")
    assert page.status_code == 200
    return re.search(r'name="csrf" value="([^"]+)"', page.text)[1]


def test_page_streams_and_also_works_without_script(serve):
    talk, client = serve()
    csrf = entered(client)
    with client.stream("POST", "/say", data={"csrf": csrf, "message": "A view."}, headers={"accept": STREAM}) as answer:
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert [line["text"] for line in lines if line["place"] == 1] == [
        "<1>", "<1> heard", "<1> heard 1", "<1> heard 1 messages", "<1> heard 1 messages",
    ]  # fmt: skip
    assert [line["place"] for line in lines if "finish" in line] == [0, 1, 2]
    assert [line["place"] for line in lines] == [0] * 5 + [1] * 5 + [2] * 5  # each ends before the next begins
    page = client.post("/say", data={"csrf": csrf, "message": HOSTILE}).text
    assert "&lt;2&gt; heard 2 messages" in page
    assert "<script>document" not in page
    assert "<img" not in page
    assert "{{ 7 * 7 }}" in page
    answer = client.post("/say", data={"csrf": csrf, "message": "word " * 400})
    assert answer.status_code == 400
    assert "Begin a new conversation" in answer.text
    assert len(talk.rounds) == 2


def test_names_are_not_on_the_wire_before_they_are_asked_for(serve):
    talk, client = serve(blind=True)
    csrf = entered(client)
    page = client.post("/say", data={"csrf": csrf, "message": "A view."}).text
    replies = page[page.index("<main") :]
    assert re.findall("<h2>(.*?)</h2>", replies) == ["Model A", "Model B", "Model C"] * 2  # the round, and the script's template
    assert not re.search(r"\b(?:base|sft|loud)\b", replies)
    checked = re.findall(r'value="(\w+)"( checked)?', page[: page.index("<main")])
    assert [name for name, _ in checked if name in talk.finished] == talk.finished  # the list to choose from says no order
    after = client.post("/reveal", data={"csrf": csrf}).text
    assert re.findall("<h2>(.*?)</h2>", after)[:3] == talk.names


def test_a_new_conversation_has_the_chosen_models(serve):
    talk, client = serve()
    csrf = entered(client)
    client.post("/say", data={"csrf": csrf, "message": "A view."})
    page = client.post("/new", data={"csrf": csrf, "model": ["loud", "base"], "blind": "yes"}).text
    assert "A view." not in page
    assert sorted(talk.names) == ["base", "loud"]
    assert talk.blind
    assert client.post("/new", data={"csrf": csrf}).status_code == 400
    assert client.post("/new", data={"csrf": csrf, "model": "../../etc"}).status_code == 400


def test_a_reply_can_be_stopped_and_ends_when_the_browser_goes(serve):
    talk, client = serve(pause=0.15)
    csrf = entered(client)
    with client.stream("POST", "/say", data={"csrf": csrf, "message": "A view."}, headers={"accept": STREAM}) as answer:
        lines = answer.iter_lines()
        next(lines)
        client.post("/stop", data={"csrf": csrf})
        rest = [json.loads(line) for line in lines]
    assert rest[-1]["finish"] == "stopped"
    assert len(talk.rounds[0].replies) == 1
    with client.stream("POST", "/say", data={"csrf": csrf, "message": "Another."}, headers={"accept": STREAM}) as answer:
        next(answer.iter_lines())
    for _ in range(200):
        if len(talk.rounds) == 2 and talk.rounds[1].replies and not talk._lock.locked():
            break
        time.sleep(0.05)
    assert talk.rounds[1].replies[max(talk.rounds[1].replies)].finish == "stopped"


def test_nobody_else_gets_in(serve):
    talk, client = serve()
    stranger = httpx.Client(base_url=client.base_url, trust_env=False)
    for path in ("/", "/in/wrong"):
        assert stranger.get(path).status_code == 403
    for path in ("/say", "/new", "/reveal", "/stop"):
        assert stranger.post(path, data={"message": "x"}).status_code == 403
    csrf = entered(client)
    assert client.post("/say", data={"csrf": "0" * 64, "message": "x"}).status_code == 403
    assert client.post("/say", data={"csrf": csrf, "message": "x"}, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
    assert client.post("/say", data={"csrf": csrf, "message": "x" * BODY_LIMIT}).status_code == 413
    assert client.get("/static/../app.py").status_code == 404
    assert talk.rounds == []
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    cookie = stranger.get(f"/in/{TOKEN}").headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    for _ in range(12):
        last = stranger.get("/in/wrong").status_code
    assert last == 429
