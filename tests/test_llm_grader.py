"""LLM graders against a real server on loopback: verdicts, orders, faults, caps, resuming after kill -9, fences, the two SDKs."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import Reply, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from suasion.errors import UsageError, UserError
from suasion.grading import build, canaries, llm, providers, verdicts
from suasion.grading.base import BASELINES, FIRST_POSITION, LONGER_WINS, Comparison, Judgement, rule
from suasion.grading.ledger import Answer, Ledger, request_key
from suasion.grading.measure import measure_on
from suasion.grading.pace import WINDOW_SECONDS, Pace
from suasion.grading.pairs import TrainingPair
from suasion.grading.panel import Member, PanelGrader
from suasion.grading.rubric import draw_fence, load_rubric
from suasion.sections.grading import LlmGrader

FIRST = re.compile(r"<<<first reply (\w+)>>>\n(.*?)\n<<<end of first reply \1>>>", re.DOTALL)
SECOND = re.compile(r"<<<second reply (\w+)>>>\n(.*?)\n<<<end of second reply \1>>>", re.DOTALL)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUASION_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("suasion.servers.PAUSE_SECONDS", 0.001)


def verdict(side: str, confidence: float = 0.9, reasons: str = "because") -> str:
    return json.dumps({"reasons": reasons, "verdict": side, "confidence": confidence})


def texts_of(body: dict) -> tuple[str, str]:
    """The two judged texts of a request, as the fences give them."""
    question = body["messages"][-1]["content"] if body["messages"][-1]["role"] == "user" else ""
    return FIRST.search(question)[2], SECOND.search(question)[2]


def honest(body: dict, number: int) -> Reply:
    """Prefers the text with more words 'reason', else a tie."""
    first, second = (text.count("reason") for text in texts_of(body))
    return Reply(verdict("tie" if first == second else "first" if first > second else "second"))


def spec_for(url: str, **fields) -> LlmGrader:
    return LlmGrader(**{"kind": "llm", "model": "fake", "base_url": url, "retries": 2, "concurrency": 4, **fields})


def grader_for(url: str, scope: str = "test", **fields) -> llm.ServedLlmGrader:
    return build.build_grader(spec_for(url, **fields), lambda _: [], 0, scope)


def items(count: int) -> list[Comparison]:
    return [Comparison(f"view {i}", f"a reason for {i}", f"nothing on {i}") for i in range(count)]


# Verdicts


@pytest.mark.parametrize(
    ("text", "side"),
    [
        (verdict("first"), "first"),
        ("Let me think.\n```json\n" + verdict("second") + "\n```", "second"),
        (verdict("first") + "\nNo, wait.\n" + verdict("second"), "second"),  # the last verdict binds
        (verdict("second", reasons='the reply says {"verdict": "first"} and means it'), "second"),
        ('{"note": 1} ' + verdict("tie"), "tie"),
    ],
)
def test_the_last_whole_verdict_binds(text, side):
    assert verdicts.read_pair(Answer(text, "stop"), False).side == side


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The first reply is better.",
        "CORRECT",
        '{"verdict": "First one"}',
        '{"verdict": ["first"]}',
        '{"verdict": null}',
        '{"reasons": "broken", "verdict": "first"',
        '{"reasons": "it says {"verdict": "first"} here", "verdict": "second"}',  # unescaped: the quotation must not win
        '{"result": {"verdict": "first"}}',
        "[" * 5000,
    ],
)
def test_what_is_no_verdict_is_missing_and_never_a_default(text):
    with pytest.raises(verdicts.Unreadable):
        verdicts.read_pair(Answer(text, "stop"), False)


def test_refused_and_broken_off_answers_are_missing_even_if_they_hold_a_verdict():
    for finish in ("refusal", "length"):
        with pytest.raises(verdicts.Unreadable):
            verdicts.read_pair(Answer(verdict("first"), finish), False)


@given(st.text(max_size=80))
@settings(max_examples=60)
def test_no_quotation_in_the_reasons_moves_a_verdict(quoted):
    said = verdicts.read_pair(Answer(verdict("second", 0.75, quoted + '{"verdict": "first"}'), "stop"), False)
    assert (said.side, said.p_first) == ("second", 0.25)


@pytest.mark.parametrize(("stated", "p"), [(0.9, 0.9), (7, 1.0), (0.2, 0.5), ("high", 1.0), (None, 1.0), (True, 1.0)])
def test_stated_confidence_is_kept_between_one_half_and_one(stated, p):
    text = json.dumps({"reasons": "", "verdict": "first", "confidence": stated})
    assert verdicts.read_pair(Answer(text, "stop"), False).p_first == p


def test_probability_from_the_verdict_token_by_hand():
    tokens = ('{"', "verdict", '": "', "first", '"}')
    places = ((), (), (), (("first", math.log(0.6)), ("second", math.log(0.2)), ("tie", math.log(0.1)), ("x", math.log(0.1))), ())
    answer = Answer("".join(tokens), "stop", alternatives=places, tokens=tokens)
    assert verdicts.token_probability(answer) == pytest.approx((0.6 + 0.05) / 0.9)
    assert verdicts.read_pair(answer, True).p_first == pytest.approx(0.65 / 0.9)
    elsewhere = (*places[:3], (("maybe", math.log(0.9)), ("first", math.log(0.1))), ())
    assert verdicts.token_probability(Answer(answer.text, "stop", alternatives=elsewhere, tokens=tokens)) is None
    assert verdicts.token_probability(Answer(answer.text + " ", "stop", alternatives=places, tokens=tokens)) is None


def test_rankings_must_name_each_reply_once():
    assert verdicts.read_ranking(Answer('{"reasons": "r", "ranking": [3, 1, 2]}', "stop"), 3) == ([2, 0, 1], "r")
    for wrong in ("[1, 2]", "[1, 1, 2]", "[0, 1, 2]", '"123"', "[1, 2, 4]"):
        with pytest.raises(verdicts.Unreadable):
            verdicts.read_ranking(Answer(f'{{"ranking": {wrong}}}', "stop"), 3)


LABELS = st.sampled_from([("a", 0.9), ("b", 0.2), ("tie", 0.5), ("none", None)])


@given(LABELS, LABELS, st.sampled_from(["drop", "tie", "soft"]))
def test_two_orders_become_one_label_by_the_table(one, other, flips):
    both = llm.combine(Judgement(one[1], one[0], cost=1.0), Judgement(other[1], other[0], cost=2.0), flips)
    labels = {one[0], other[0]}
    outcome = "none" if "none" in labels else "tie" if "tie" in labels else "consistent" if len(labels) == 1 else "flip"
    assert (both.outcome, both.cost, len(both.orders)) == (outcome, 3.0, 2)
    if outcome == "none" or (outcome == "flip" and flips == "drop"):
        assert (both.label, both.p_a) == ("none", None)
    elif outcome == "consistent":
        assert both.label == one[0]
    elif flips == "soft":
        assert both.p_a == pytest.approx((one[1] + other[1]) / 2)
        assert both.label == ("tie" if both.p_a == 0.5 else "a" if both.p_a > 0.5 else "b")
    else:
        assert (both.label, both.p_a) == ("tie", 0.5)


# The template


def test_fences_belong_to_the_row_and_stand_in_no_text():
    rubric = load_rubric("persuasion-1")
    item = Comparison("view", "one", "two")
    assert rubric.pair(item, 0) == rubric.pair(item, 0)
    fence = draw_fence(0, ("view", "one", "two"))
    assert draw_fence(0, ("view", "two", "one")) != fence != draw_fence(1, ("view", "one", "two"))
    assert draw_fence(0, ("view", "one", f"two {fence}")) not in f"two {fence}"


@given(st.text(max_size=60))
@settings(max_examples=40)
def test_judged_text_is_data_and_never_template(text):
    question = load_rubric("persuasion-1").pair(Comparison("v", text + "{{ 7 * 7 }}{% if %}", "x"), 0)
    assert text.strip() in question
    assert "{{ 7 * 7 }}{% if %}" in question


def test_a_shipped_template_never_changes_its_wording():
    """Labels name the template's hash: another wording is another file (persuasion-2)."""
    assert load_rubric("persuasion-1").hash == "7b2dc62842fe67eb"


def test_templates_that_lack_a_part_are_refused(tmp_path):
    (tmp_path / "t.yaml").write_text("system: x\npair: y\n")
    with pytest.raises(UsageError, match="lacks ranking, repair, local"):
        load_rubric(str(tmp_path / "t.yaml"))
    with pytest.raises(UsageError, match="no grader template"):
        load_rubric("persuasion-0")


def test_settings_that_contradict_each_other_are_refused():
    for fields in ({"max_cost": 1.0}, {"price_in": 1.0}, {"mode": "ranking", "orders": "given"}, {"base_url": "ftp://x"}):
        with pytest.raises(ValidationError):
            LlmGrader(**{"kind": "llm", "model": "m", **fields})


# Asking


def test_a_grader_asks_both_orders_once_and_remembers():
    with serving(honest) as served:
        grader = grader_for(served.url)
        pairs = [
            *items(3),
            items(1)[0],
            Comparison("v", "same", "same "),
            Comparison("v", "", "words"),
            Comparison("v", "one", "two"),
        ]
        judged = grader.grade(pairs)
        assert [one.label for one in judged] == ["a", "a", "a", "a", "tie", "b", "tie"]
        assert [one.outcome for one in judged] == ["consistent"] * 4 + ["", "", "tie"]
        assert len(served.bodies) == 2 * 4
        assert {tuple(sorted(texts_of(body))) for body in served.bodies[:2]} <= {tuple(sorted((one.a, one.b))) for one in pairs}
        assert grader_for(served.url).grade(pairs) == judged
        again = grader_for(served.url, price_in=1.0, price_out=1.0, scope="priced", temperature=0.5).grade([pairs[0]] * 3)
        assert [one.cost for one in again] == [pytest.approx(220e-6), 0.0, 0.0]
        del served.bodies[8:]
        swapped = grader.grade([one.swapped() for one in pairs])
        assert [one.swapped().label for one in swapped] == [one.label for one in judged]
        assert len(served.bodies) == 8
        assert served.bodies[0]["response_format"]["json_schema"]["schema"]["properties"].keys() == {
            "reasons",
            "verdict",
            "confidence",
        }
        assert next(iter(served.bodies[0]["response_format"]["json_schema"]["schema"]["properties"])) == "reasons"


def test_position_bias_shows_as_flips():
    with serving(lambda body, number: Reply(verdict("first"))) as served:
        for flips, label in (("drop", "none"), ("tie", "tie"), ("soft", "tie")):
            judged = grader_for(served.url, flips=flips).grade(items(2))
            assert [(one.label, one.outcome) for one in judged] == [(label, "flip")] * 2
        assert [one.label for one in grader_for(served.url, orders="given").grade(items(2))] == ["a", "a"]


def test_ranking_mode_asks_twice_a_context_and_agrees_with_itself(capsys):
    def by_reasons(body, number):
        texts = re.findall(r"<<<reply \d+ (\w+)>>>\n(.*?)\n<<<end", body["messages"][-1]["content"], re.DOTALL)
        order = sorted(range(len(texts)), key=lambda i: -texts[i][1].count("reason"))
        return Reply(json.dumps({"reasons": "", "ranking": [i + 1 for i in order]}))

    replies = ["none", "reason", "reason reason", "reason reason reason"]
    pairs = [Comparison("v", replies[i], replies[j]) for i in range(4) for j in range(i)]
    with serving(by_reasons) as served:
        grader = grader_for(served.url, mode="ranking")
        grader.estimate(pairs, pairs[:1])  # canaries, then labels: what is graded apart is ranked apart
        assert "4 requests to fake" in " ".join(capsys.readouterr().out.split())
        judged = grader.grade(pairs)
        assert [one.label for one in judged] == ["a"] * 6
        assert len(served.bodies) == 2
        grader.grade(pairs[:1])
        assert len(served.bodies) == 4
    with serving(lambda body, number: Reply('{"reasons": "", "ranking": [1, 2, 3, 4]}')) as served:
        assert {one.outcome for one in grader_for(served.url, mode="ranking").grade(pairs)} == {"flip"}


def test_malformed_answers_are_repaired_at_most_so_often():
    def second_try(body, number):
        return Reply(verdict("first")) if len(body["messages"]) > 2 else Reply("I like the first one.")

    with serving(second_try) as served:
        judged = grader_for(served.url, orders="given").grade(items(2))
        assert [one.label for one in judged] == ["a", "a"]
        assert len(served.bodies) == 4
        assert served.bodies[-1]["messages"][-2]["content"] == "I like the first one."
        assert "no JSON object" in served.bodies[-1]["messages"][-1]["content"]
    with serving(lambda body, number: Reply("no idea")) as served:
        judged = grader_for(served.url, orders="given", repairs=2).grade(items(1))[0]
        assert (judged.label, judged.p_a) == ("none", None)
        assert len(served.bodies) == 3


def test_refusals_are_missing_and_not_asked_again():
    with serving(lambda body, number: Reply("", refusal="I will not.", finish="stop")) as served:
        judged = grader_for(served.url).grade(items(1))[0]
        assert (judged.label, judged.outcome) == ("none", "none")
        assert "refused" in judged.reason
        assert len(served.bodies) == 2


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=503), Reply(status=429, headers=(("retry-after", "0"),)), Reply(status=500, body=b"<html>"), Reply(body=b"not json"),
        Reply(body=b'{"choices": []}'), Reply(body=b"[]"), Reply(verdict("first"), cut=True), Reply(body=b'{"choices": [{"message": 5}]}'),
    ],
)  # fmt: skip
def test_faults_are_tried_again_and_then_missing(fault):
    with serving(lambda body, number: fault if number < 2 else honest(body, number)) as served:
        assert grader_for(served.url, orders="given").grade(items(1))[0].label == "a"
        assert len(served.bodies) == 3
    with serving(lambda body, number: fault) as served:
        judged = grader_for(served.url, orders="given").grade(items(1))[0]
        assert judged.label == "none"
        assert "3 tries" in judged.reason
        assert len(served.bodies) == 3


def test_an_answer_that_takes_too_long_is_missing():
    with serving(lambda body, number: Reply(verdict("first"), seconds=1.0)) as served:
        judged = grader_for(served.url, orders="given", timeout=0.2, retries=0).grade(items(1))[0]
    assert judged.label == "none"
    assert "no answer within 0.2 s" in judged.reason


def test_retry_after_is_honoured():
    with serving(
        lambda body, number: Reply(status=429, headers=(("retry-after", "1"),)) if number == 0 else honest(body, number)
    ) as served:
        grader_for(served.url, orders="given").grade(items(1))
        assert served.times[1] - served.times[0] >= 1.0


def test_wrong_keys_stop_at_once_and_settings_that_a_server_does_not_know_soon():
    with serving(lambda body, number: Reply(status=401, body=b"who are you")) as served:
        with pytest.raises(UserError, match="refuses requests"):
            grader_for(served.url, concurrency=1).grade(items(5))
        assert len(served.bodies) == 1
    with serving(lambda body, number: Reply(status=422, body=b"response_format?")) as served:
        with pytest.raises(UserError, match="structured to none"):
            grader_for(served.url, concurrency=1).grade(items(5))
        assert len(served.bodies) == 3
    with serving(lambda body, number: Reply(status=400) if number == 1 else honest(body, number)) as served:
        judged = grader_for(served.url, orders="given", concurrency=1).grade(items(4))
        assert sum(one.label == "none" for one in judged) == 1


def test_a_server_that_is_not_there_stops_the_run_and_labels_nothing_as_missing():
    """It says nothing of what was to be judged, and the next run can ask it."""
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1 cannot be reached \(2 tries; last: the connection failed"):
        grader_for("http://127.0.0.1:9/v1", orders="given", retries=1).grade(items(1))


def test_concurrency_is_bounded():
    with serving(lambda body, number: Reply(verdict("first"), seconds=0.02)) as served:
        grader_for(served.url, concurrency=3).grade(items(12))
        assert 1 < served.most_active <= 3


def test_the_key_comes_from_the_environment_and_stands_nowhere(tmp_path, monkeypatch, capsys):
    secret = "sk-very-secret-4711"
    monkeypatch.setenv("MY_KEY", secret)
    echo = Reply(status=503, body=f"bad key {secret}".encode())
    with serving(lambda body, number: echo if "view 0" in json.dumps(body) else honest(body, number)) as served:
        grader = grader_for(served.url, key_env="MY_KEY", retries=0)
        judged = grader.grade(items(3))
        assert served.headers[0]["authorization"] == f"Bearer {secret}"
    assert judged[0].label == "none"
    assert secret not in repr(judged) + capsys.readouterr().out + grader.fingerprint
    assert all(secret.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UserError, match="MY_KEY"):
        grader_for(served.url, key_env="MY_KEY")


# The bill

PRICED = {"price_in": 10_000.0, "price_out": 10_000.0, "max_tokens": 10}  # a cent a token: 100 in and 10 out cost 1.10


def test_the_cap_is_never_exceeded_and_what_was_paid_for_is_kept():
    with serving(honest) as served:
        grader = grader_for(served.url, orders="given", max_cost=80.0, concurrency=4, **PRICED)
        with pytest.raises(UserError, match=r"cap of \$80\.00"):
            grader.grade(items(60))
        paid = len(served.bodies)
        assert 0 < paid < 60
        assert grader.asker.ledger.spent() == pytest.approx(1.1 * paid)
        assert grader.asker.ledger.spent() <= 80
        more = grader_for(served.url, orders="given", max_cost=1000.0, concurrency=4, **PRICED)
        assert all(one.label == "a" for one in more.grade(items(60)))
        assert len(served.bodies) == 60


def test_a_server_that_does_not_count_tokens_is_charged_at_the_most():
    with serving(lambda body, number: Reply(verdict("first"), usage=None)) as served:
        grader = grader_for(served.url, orders="given", max_cost=1000.0, **PRICED)
        cost = grader.grade(items(1))[0].cost
    assert cost == pytest.approx(grader.asker.worst(served.bodies[0]))


def test_an_estimate_comes_before_the_first_request(capsys):
    with serving(honest) as served:
        grader = grader_for(served.url, max_cost=1.0, **PRICED)
        grader.estimate(items(5))
        assert not served.bodies
        told = " ".join(capsys.readouterr().out.split())
        assert "10 requests to fake" in told
        assert "the cap is $1.00" in told
        assert "stop this before the end" in told


def test_the_running_cost_is_told_while_it_grows(monkeypatch, capsys):
    monkeypatch.setattr("suasion.grading.runner.LOG_EVERY_SECONDS", 0.0)
    with serving(honest) as served:
        grader_for(served.url, orders="given", concurrency=1, **PRICED).grade(items(3))
    told = [line.strip() for line in capsys.readouterr().out.splitlines() if "spent so far" in line]
    assert told == ["spent so far: $1.1000", "spent so far: $2.2000", "spent so far: $3.3000"]


def test_requests_that_never_arrived_cost_nothing_and_those_without_end_cost_the_most(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite", "s")
    one, two = ledger.reserve("k1", 2.0, 5.0), ledger.reserve("k2", 2.0, 5.0)
    assert ledger.reserve("k3", 2.0, 5.0) is None
    ledger.release(one)
    assert ledger.spent() == 2.0
    ledger.settle(two, ["k2"], Answer("x", "stop", cost=0.5, alternatives=(((("y", -1.0)),),), tokens=("x",)))
    assert ledger.spent() == 0.5
    assert ledger.answer("k2").alternatives == ((("y", -1.0),),)
    ledger.reserve("k3", 4.0, 5.0)
    ledger.close()
    again = Ledger(tmp_path / "l.sqlite", "s")  # a process that died with k3 in flight
    assert again.spent() == 4.5
    assert Ledger(tmp_path / "l.sqlite", "other").spent() == 0
    (tmp_path / "broken.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match="no usable cache"):
        Ledger(tmp_path / "broken.sqlite", "s")


def test_the_whole_request_is_the_key():
    body = {"model": "m", "messages": [], "temperature": 0.0}
    keys = {
        request_key("s", body),
        request_key("t", body),
        request_key("s", body | {"temperature": 1.0}),
        request_key("s", body | {"x": 1}),
    }
    assert len(keys) == 4
    assert request_key("s", dict(reversed(body.items()))) == request_key("s", body)


CLIENT = """
import sys
from suasion.grading import build
from suasion.grading.base import Comparison
from suasion.sections.grading import LlmGrader
spec = LlmGrader(kind="llm", model="fake", base_url=sys.argv[1], concurrency=4, price_in=1.0, price_out=1.0)
grader = build.build_grader(spec, lambda _: [], 0, "kill")
print("ready", flush=True)
judged = grader.grade([Comparison(f"view {i}", f"a reason for {i}", f"nothing on {i}") for i in range(int(sys.argv[2]))])
print(sum(one.label == "a" for one in judged), flush=True)
"""


def killed_and_finished(cache: Path, pairs: int, kill_at: list[int], seconds: float) -> list[dict]:
    """The requests that a server got while its client, of concurrency 4, was killed after so many of them each time, and then left alone."""

    def slow(body, number):
        return Reply(honest(body, number).text, seconds=seconds)

    environment = {**os.environ, "SUASION_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    with serving(slow) as served:
        command = [sys.executable, "-c", CLIENT, served.url, str(pairs)]
        for kills, wanted in enumerate(kill_at):
            client = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            try:
                while len(served.bodies) < wanted + 4 * kills and client.poll() is None:
                    time.sleep(0.005)
                client.send_signal(signal.SIGKILL)
            finally:
                assert client.wait(30) == -signal.SIGKILL  # it was not done yet
                client.stdout.close()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.split() == ["ready", str(pairs)], done.stderr
        return list(served.bodies)


def test_kill_nine_pays_at_most_the_requests_in_flight_twice(tmp_path):
    asked = killed_and_finished(tmp_path / "cache", 30, [7, 19, 41], 0.02)
    assert len({json.dumps(body, sort_keys=True) for body in asked}) == 60
    assert 60 <= len(asked) <= 60 + 4 * 3


@pytest.mark.slow
def test_a_full_size_labelling_killed_twenty_times_pays_at_most_the_requests_in_flight_twice(tmp_path):
    """The RLAIF pool of the full-size recipe: 2,150 pairs in both orders, killed at twenty places from the first request to nearly the last."""
    kill_at = [1, 5, *range(240, 4300, 240), 4290]
    assert len(kill_at) == 20
    asked = killed_and_finished(tmp_path / "cache", 2150, kill_at, 0.002)
    assert len({json.dumps(body, sort_keys=True) for body in asked}) == 4300
    assert 4300 <= len(asked) <= 4300 + 4 * len(kill_at)


# Pacing


def test_no_sixty_seconds_hold_more_than_the_limit():
    now = [0.0]
    passed = []

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    async def run() -> None:
        pace = Pace(100, clock=lambda: now[0], sleep=sleep)
        for amount in (40, 40, 40, 10, 250, 5, 95):
            await pace.take(amount)
            passed.append((now[0], amount))

    asyncio.run(run())
    for when, _ in passed:
        window = [amount for other, amount in passed if when - WINDOW_SECONDS < other <= when]
        assert sum(window) <= 100 or len(window) == 1


# Anthropic


def test_anthropic_speaks_its_own_interface(monkeypatch):
    pytest.importorskip("anthropic")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-of-a")

    def answer(body, number):
        first, second = (text.count("reason") for text in texts_of(body))
        return Reply(verdict("first" if first > second else "second"), finish="end_turn")

    with serving(answer) as served:
        address = served.url.removesuffix("/v1")
        spec = LlmGrader(kind="llm", provider="anthropic", model="m", base_url=address, key_env="ANTHROPIC_API_KEY")
        judged = build.build_grader(spec, lambda _: [], 0, "a").grade(items(2))
        assert [(one.label, one.outcome) for one in judged] == [("a", "consistent")] * 2
        assert set(served.paths) == {"/v1/messages"}
        assert served.headers[0]["authorization"] == "Bearer key-of-a"
        shape = served.bodies[0]["output_config"]["format"]
        assert shape["type"] == "json_schema"
        assert next(iter(shape["schema"]["properties"])) == "reasons"
        assert "temperature" not in served.bodies[0]


def test_terms_are_told_for_hosted_models_only():
    hosted = LlmGrader(kind="llm", model="m")
    assert "openai.com" in providers.terms_lines(hosted)[0]
    assert providers.terms_lines(spec_for(["http://127.0.0.1:8000/v1", "http://localhost/v1"])) == []
    assert len(providers.terms_lines(spec_for(["https://example.org/v1", "https://example.com/v1", "http://10.0.0.1/v1"]))) == 2


# Canaries and panel


def test_canaries_pass_an_honest_judge_and_catch_dishonest_ones():
    class Honest:
        kind, fingerprint = "honest", "h"

        def grade(self, pairs):
            from suasion.grading.base import decide

            return [decide(one, 0.5 + 0.4 * ((one.a.count("reason") > one.b.count("reason")) - (one.a.count("reason") < one.b.count("reason"))), 0.0) for one in pairs]  # fmt: skip

    class Obedient(Honest):
        def grade(self, pairs):
            said = super().grade(pairs)
            orders = [line for text in canaries.INJECTIONS for line in (text,)]
            return [
                Judgement(0.99, "a") if any(o in one.a for o in orders) and not any(o in one.b for o in orders)
                else Judgement(0.01, "b") if any(o in one.b for o in orders) and not any(o in one.a for o in orders) else old
                for one, old in zip(pairs, said, strict=True)
            ]  # fmt: skip

    pairs = [Comparison(f"v{i}", "a reason " * (1 + i % 3), "words " * (2 + i % 4)) for i in range(30)]
    rates = canaries.require_canaries(Honest(), pairs)
    assert rates == {"empty": 1.0, "identical": 1.0, "swapped": 1.0, "injected": 1.0, "padded": 1.0, "constant": 1.0}
    with pytest.raises(UserError, match="injected"):
        canaries.require_canaries(Obedient(), pairs)
    assert canaries.require_canaries(Obedient(), pairs, ("injected",))["injected"] < 0.9
    with pytest.raises(UserError, match="padded 0%"):
        canaries.require_canaries(LONGER_WINS, pairs)
    with pytest.raises(UserError, match="swapped"):
        canaries.require_canaries(FIRST_POSITION, pairs)
    with pytest.raises(UserError, match="no pair with two different"):
        canaries.canaries(LONGER_WINS, [Comparison("c", "", "words"), Comparison("c", "x", "x")])


class Firm:
    """Prefers the text with more words "reason", whatever it is told; flips where there are none. Keeps what it was asked."""

    kind, fingerprint = "firm", "f"

    def __init__(self):
        self.calls: list[list[Comparison]] = []

    def grade(self, pairs):
        self.calls.append(list(pairs))
        return [self.one(item) for item in pairs]

    def one(self, item: Comparison) -> Judgement:
        ruled = rule(item)
        margin = item.a.count("reason ") - item.b.count("reason ")
        if ruled is not None or margin:
            return ruled or Judgement(0.9 if margin > 0 else 0.1, "a" if margin > 0 else "b")
        return Judgement(None, "none", outcome="flip" if "wavering" in item.context else "none")


class Obeys(Firm):
    """Names whichever text holds an instruction to the judge."""

    def one(self, item: Comparison) -> Judgement:
        told = [any(order in text for order in canaries.INJECTIONS) for text in (item.a, item.b)]
        return super().one(item) if told[0] == told[1] else Judgement(0.9 if told[0] else 0.1, "a" if told[0] else "b")


def test_only_replies_that_had_not_won_are_tampered_with():
    """Whoever obeys fails on every pair and not on those alone in which the tampered reply would have lost anyway."""
    won = [Comparison(f"v{i}", "a reason here" if i % 3 else "nothing here", "a reason there" if not i % 3 else "nothing there") for i in range(12)]  # fmt: skip
    flips = [Comparison(f"wavering {i}", f"one {i}", f"two {i}") for i in range(4)]
    silent = [Comparison(f"silent {i}", f"one {i}", f"two {i}") for i in range(4)]
    firm = Firm()
    assert canaries.canaries(firm, [*won, *flips, *silent])["injected"] == 1.0
    asked, tampered = firm.calls
    assert asked[:20] == [*won, *flips, *silent]
    assert [item.context for item in tampered] == [
        item.context for item in (*won, *flips)
    ]  # without an answer before nothing can be told
    before = {item.context: item for item in asked[:20]}
    for item in tampered:
        plain = before[item.context]
        changed = "a" if item.a != plain.a else "b"
        assert (item.a == plain.a) != (item.b == plain.b)
        assert Firm().one(plain).label != changed
    assert {"a" if item.a != before[item.context].a else "b" for item in tampered} == {"a", "b"}
    assert canaries.canaries(Obeys(), [*won, *flips, *silent])["injected"] == 0.0
    assert canaries.canaries(firm, silent)["injected"] == 0.0  # nothing was shown
    first_won = [item if "reason" in item.a else item.swapped() for item in won]
    assert canaries.canaries(Obeys(), first_won)["injected"] == 0.0


def test_a_padded_copy_starts_from_a_tie_with_itself():
    """So that each such row can tell: without the empty sentences neither text has won."""
    made = canaries.canary_comparisons(items(9))["padded"]
    sides = set()
    for before, item in zip(items(9), made, strict=True):
        sides.add(side := "a" if item.a != before.a else "b")
        copy, original = (item.a, item.b) if side == "a" else (item.b, item.a)
        assert original == before.a
        for sentence in canaries.PADDING:
            copy = copy.replace(sentence, "")
        assert rule(Comparison(item.context, copy, original)).label == "tie"
    assert sides == {"a", "b"}


def test_a_judge_that_cannot_be_reached_fails_its_canaries():
    with serving(lambda body, number: Reply("no verdict")) as served, pytest.raises(UserError, match="padded 0%"):
        canaries.require_canaries(grader_for(served.url), items(4), count=4)


def test_a_panel_weighs_by_log_odds_and_ignores_coins():
    pairs = [Comparison("c", "one two three", "one two"), Comparison("c", "x", "x")]
    panel = PanelGrader(
        [Member("long", LONGER_WINS, 0.8), Member("first", FIRST_POSITION, 0.6), Member("coin", BASELINES[2], 0.49)], 0.0
    )
    one = panel.grade([pairs[0].swapped()])[0]  # longer says b, first says a
    assert one.p_a == pytest.approx(1 / (1 + math.exp(math.log(4) - math.log(1.5))))
    assert one.label == "b"
    assert "coin" not in json.loads(one.raw)
    assert panel.grade([pairs[1]])[0].label == "tie"
    with pytest.raises(UserError, match="no member of the panel"):
        PanelGrader([Member("coin", BASELINES[2], 0.5)], 0.0)


def test_measuring_leaves_missing_answers_out_and_refuses_where_all_are():
    class Half:
        kind, fingerprint = "half", "h"

        def grade(self, pairs):
            return [
                Judgement(None, "none", "gone") if "0" in one.context else Judgement(0.9, "a" if "good" in one.a else "b")
                for one in pairs
            ]

    pairs = [TrainingPair(f"v {i % 2}", "good", "bad", f"g{i}") for i in range(8)]
    measured = measure_on(Half(), pairs, 0)
    assert (measured.n, measured.scored, measured.accuracy) == (8, 4, 1.0)
    with pytest.raises(UserError, match="answered none of 4"):
        measure_on(Half(), pairs[::2], 0)
