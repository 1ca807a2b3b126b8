"""LLM graders through batch interfaces, both providers' SDKs against loopback: answers, faults, the cap, and a run that goes on."""

from __future__ import annotations

import json

import pytest
from batch_server import NEVER, Batches, serving_batches
from pydantic import ValidationError
from test_llm_grader import items, own_cache, texts_of, verdict  # noqa: F401

from suasion.errors import UserError
from suasion.grading import batches, build
from suasion.sections.grading import LlmGrader

PRICED = {"price_in": 10_000.0, "price_out": 10_000.0, "max_tokens": 10}  # a cent a token: 100 in and 10 out cost 1.10
PROVIDERS = ("openai", "anthropic")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(batches, "POLL_SECONDS", 0.001)
    monkeypatch.setenv("SOME_KEY", "key-4711")


def grader_at(served: Batches, provider: str = "openai", **fields):
    if provider == "anthropic":
        pytest.importorskip("anthropic")
    url = served.url.removesuffix("/v1") if provider == "anthropic" else served.url
    spec = LlmGrader(
        **{
            "kind": "llm",
            "provider": provider,
            "model": "m",
            "base_url": url,
            "key_env": "SOME_KEY",
            "batch": True,
            "retries": 2,
            **fields,
        }
    )
    return build.build_grader(spec, lambda _: [], 0, "test")


def said(body: dict, text: str, usage: bool = True) -> dict:
    """A provider's answer to one request, in the form that its own interface gives."""
    if "system" in body:
        tokens = {"input_tokens": 100, "output_tokens": 10}
        return {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "content": [{"type": "text", "text": text}],
            "usage": tokens,
        }
    counted = {"usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}} if usage else {}
    message = {"role": "assistant", "content": text}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        **counted,
    }


def honest(body: dict) -> tuple[int, dict]:
    first, second = (text.count("reason") for text in texts_of(body))
    return 200, said(body, verdict("first" if first > second else "second"))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_batch_is_one_request_and_its_answers_find_their_pairs_in_any_order(provider, capsys):
    with serving_batches(honest, looks=3) as served:
        grader = grader_at(served, provider, **PRICED)
        turned = [item if i % 2 else item.swapped() for i, item in enumerate(items(6))]
        judged = grader.grade(turned)
        assert [one.label for one in judged] == ["b", "a"] * 3
        assert {one.outcome for one in judged} == {"consistent"}
        assert len(served.batches) == 1
        assert len(served.requests()) == 12
        assert sum(call.startswith("POST") for call in served.calls) == (2 if provider == "openai" else 1)
        assert sum(one.cost for one in judged) == pytest.approx(12 * 1.1)
        assert grader.asker.ledger.spent() == pytest.approx(12 * 1.1)
        assert grader.asker.ledger.batches(grader.asker.provider.address) == []
        assert grader.grade(turned) == judged
        assert len(served.batches) == 1
    assert "batch batch-0: 12 requests" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_a_batch_did_not_answer_goes_into_the_next_and_what_is_declined_is_missing(provider):
    turns: dict[str, int] = {}

    def answer(body):
        text = json.dumps(body)
        view = next(i for i in range(4) if f"view {i}" in text)
        turns[text] = turns.get(text, 0) + 1
        if view == 0:
            return 400, "no"
        if view == 1 and turns[text] <= 2:  # OpenAI's two result files ask twice a batch, Anthropic's one once
            return 500, "busy"
        if view == 2:
            return 0, None
        return honest(body)

    with serving_batches(answer, looks=0) as served:
        judged = grader_at(served, provider, orders="given", **PRICED).grade(items(4))
    assert "declined" in judged[0].reason
    assert judged[1].label == judged[3].label == "a"
    assert (judged[2].label, "no answer in 3 batches" in judged[2].reason) == ("none", True)
    assert len(served.batches["batch-0"]) == 4
    assert len(served.batches) == 3


def test_answers_that_cannot_be_read_are_asked_for_again_in_a_batch_of_their_own():
    def answer(body):
        return honest(body) if len(body["messages"]) == 2 and "view 0" not in json.dumps(body) else (200, said(body, "hm"))

    with serving_batches(answer) as served:
        judged = grader_at(served, orders="given", repairs=1).grade(items(3))
        assert [one.label for one in judged] == ["none", "a", "a"]
        assert [len(rows) for rows in served.batches.values()] == [3, 1]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_run_that_is_stopped_waits_for_its_batch_instead_of_paying_for_another(provider, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*rest):
        raise Stopped

    with serving_batches(honest, looks=NEVER) as served:
        grader = grader_at(served, provider, **PRICED)
        real = batches.asyncio.sleep
        monkeypatch.setattr(batches.asyncio, "sleep", stop)
        with pytest.raises(Stopped):
            grader.grade(items(3))
        monkeypatch.setattr(batches.asyncio, "sleep", real)
        assert grader.asker.ledger.spent() > 6 * 1.1  # under way: on the bill at the highest price
        served.looks = 2
        again = grader_at(served, provider, **PRICED)
        judged = again.grade(items(4))
        assert [one.label for one in judged] == ["a"] * 4
        assert [len(rows) for rows in served.batches.values()] == [6, 2]
        assert again.asker.ledger.spent() == pytest.approx(8 * 1.1)


def test_a_batch_that_the_provider_has_forgotten_is_asked_again_and_stays_on_the_bill():
    with serving_batches(honest) as served:
        grader = grader_at(served, orders="given", **PRICED)
        ledger, runner = grader.asker.ledger, grader.asker
        bodies = [grader._body(grader._pair(item), []) for item in items(2)]
        from suasion.grading.ledger import request_key

        sent = {key: ledger.reserve(key, 50.0, None) for key in (request_key(runner.provider.address, body) for body in bodies)}
        ledger.open_batch("batch-gone", runner.provider.address, sent)
        assert [one.label for one in grader.grade(items(2))] == ["a", "a"]
        assert ledger.spent() == pytest.approx(100 + 2 * 1.1)


def test_the_cap_holds_over_batches():
    with serving_batches(honest) as served:
        grader = grader_at(served, orders="given", max_cost=100.0, **PRICED)
        with pytest.raises(UserError, match=r"cap of \$100\.00"):
            grader.grade(items(90))
        paid = len(served.requests())
        assert 0 < paid < 90
        assert grader.asker.ledger.spent() == pytest.approx(1.1 * paid)
        assert grader.asker.ledger.spent() <= 100
        assert all(one.label == "a" for one in grader_at(served, orders="given", max_cost=1000.0, **PRICED).grade(items(90)))
        assert len(served.requests()) == 90


def test_large_jobs_are_cut(monkeypatch):
    monkeypatch.setattr(batches, "MOST_REQUESTS", 4)
    with serving_batches(honest, looks=0) as served:
        assert all(one.label == "a" for one in grader_at(served, orders="given").grade(items(10)))
        assert [len(rows) for rows in served.batches.values()] == [4, 4, 2]
    monkeypatch.setattr(batches, "MOST_BYTES", 1)
    with serving_batches(honest, looks=0) as served:
        assert all(one.label == "a" for one in grader_at(served, orders="given").grade(items(2)))
        assert [len(rows) for rows in served.batches.values()] == [1, 1]


def test_faults_of_the_server_cost_nothing_and_looks_are_repeated(capsys):
    with serving_batches(honest, faults=[0, 0, 503, 429]) as served:  # file and batch are taken, two looks fail
        assert [one.label for one in grader_at(served, orders="given").grade(items(2))] == ["a", "a"]
    spent = 0.0
    for faults, told in (
        ([503], "status 503"),
        ([401], "key_env"),
        ([404], "batch: false"),
        ([0, 0, 503, 503, 503], "status 503"),
    ):
        with serving_batches(honest, faults=faults) as served:
            grader, before = grader_at(served, orders="given", **PRICED), spent
            with pytest.raises(UserError, match=told):
                grader.grade(items(2))
            spent = grader.asker.ledger.spent()
            assert (spent > before) == bool(served.batches)  # a batch that was taken stays on the bill
            assert grader.grade(items(2))[0].label == "a"
            assert len(served.batches) == 1
            spent = grader.asker.ledger.spent()
    failed = serving_batches(honest, failed="line 3: key-4711 is no JSON")
    with failed as served, pytest.raises(UserError, match=r"did not take batch.*\(the key\) is no JSON"):
        grader_at(served, orders="given").grade(items(2))
    declining = serving_batches(lambda body: (400, "response_format?"))
    with declining as served, pytest.raises(UserError, match="structured to none"):
        grader_at(served, orders="given").grade(items(3))


def test_an_answer_without_a_message_and_one_without_a_count():
    def answer(body):
        return (200, {"choices": []}) if "view 0" in json.dumps(body) else (200, said(body, verdict("first"), usage=False))

    with serving_batches(answer) as served:
        grader = grader_at(served, orders="given", retries=0, **PRICED)
        judged = grader.grade(items(2))
        assert [one.label for one in judged] == ["none", "a"]
        assert judged[1].cost == pytest.approx(grader.asker.worst(served.requests()[1]))
        assert grader.asker.ledger.spent() == pytest.approx(sum(grader.asker.worst(body) for body in served.requests()))


def test_a_model_in_this_process_has_no_batches():
    with pytest.raises(ValidationError, match="no batch interface"):
        LlmGrader(kind="llm", provider="local", model="random:tiny", batch=True)
