"""Several servers of one judge on loopback, as one pool: the work is shared, one may die, all may die, nothing is asked twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat_server import Reply, Served, serving
from pydantic import ValidationError
from test_llm_grader import grader_for, honest, items, own_cache, spec_for  # noqa: F401

from suasion.errors import UserError
from suasion.pipeline import recipe_slice
from suasion.recipe import load_recipe
from suasion.sections.grading import settings_of

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
SECONDS = 0.01  # of one answer: long enough that both servers are busy at once


def slowly(body: dict, number: int) -> Reply:
    return Reply(honest(body, number).text, seconds=SECONDS)


def asked(*servers: Served) -> Counter:
    return Counter(json.dumps(body, sort_keys=True) for served in servers for body in served.bodies)


@contextmanager
def dying_after(answers: int) -> Iterator[Served]:
    """Answers so many requests; while the next one is under way the server is gone."""

    def answer(body: dict, number: int) -> Reply:
        if number == answers:
            served.die()
        return slowly(body, number) if number < answers else Reply(body=b"", cut=True)

    with serving(answer) as served:
        yield served


def test_the_work_is_shared_and_concurrency_holds_for_each():
    with serving(slowly) as one, serving(slowly) as other:
        judged = grader_for([one.url, other.url], concurrency=3).grade(items(30))
        assert [item.label for item in judged] == ["a"] * 30
        assert set(asked(one, other).values()) == {1}
        assert len(one.bodies) + len(other.bodies) == 60
        assert min(len(one.bodies), len(other.bodies)) >= 15
        assert max(one.most_active, other.most_active) <= 3


def test_one_server_dies_midway_and_the_other_takes_its_work():
    with dying_after(7) as dying, serving(slowly) as lasting:
        judged = grader_for([dying.url, lasting.url], retries=6).grade(items(30))
        assert [item.label for item in judged] == ["a"] * 30
        assert 7 < len(dying.bodies) <= 7 + 4  # what was under way there when it died
        assert asked(lasting).most_common(1)[0][1] == 1
        assert len(lasting.bodies) == 60 - 7


def test_where_all_are_gone_the_run_stops_and_the_next_asks_only_for_the_rest():
    with dying_after(5) as one, dying_after(9) as other, serving(slowly) as new:
        with pytest.raises(UserError, match=r"cannot be reached .*see to the servers, then run the same command again"):
            grader_for([one.url, other.url], concurrency=1).grade(items(30))
        judged = grader_for([new.url, other.url], retries=6).grade(
            items(30)
        )  # one of the old ones is still named, and still gone
        assert [item.label for item in judged] == ["a"] * 30
        assert len(new.bodies) == 60 - 5 - 9


def test_an_answer_is_found_again_by_whichever_server_of_the_pool_is_left():
    with serving(slowly) as one, serving(slowly) as other:
        judged = grader_for([one.url, other.url]).grade(items(10))
        for urls in ([other.url, one.url], [other.url], one.url):
            assert grader_for(urls).grade(items(10)) == judged
        assert len(one.bodies) + len(other.bodies) == 20
        with serving(slowly) as stranger:  # it may serve another model of that name
            grader_for(stranger.url).grade(items(10))
            assert len(stranger.bodies) == 20


def test_the_cap_holds_for_the_pool_as_a_whole():
    with serving(slowly) as one, serving(slowly) as other:
        grader = grader_for(
            [one.url, other.url], orders="given", max_cost=22.0, max_tokens=10, price_in=10_000.0, price_out=10_000.0
        )  # a cent a token: 100 in and 10 out cost 1.10
        with pytest.raises(UserError, match=r"cap of \$22\.00"):
            grader.grade(items(60))
        assert grader.asker.ledger.spent() == pytest.approx(1.1 * (len(one.bodies) + len(other.bodies)))
        assert grader.asker.ledger.spent() <= 22


def test_a_server_that_refuses_is_named():
    with (
        serving(slowly) as good,
        serving(lambda body, number: Reply(status=404, body=b"no such model")) as wrong,
        pytest.raises(UserError, match=f"^{wrong.url} refuses requests to 'fake'"),
    ):
        grader_for([good.url, wrong.url]).grade(items(30))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"base_url": ["http://a/v1", "http://a/v1/"]}, "stands there twice"),
        ({"base_url": ["http://a/v1", "a:8000"]}, "is no address"),
        ({"base_url": "http://me:secret@a/v1"}, "holds no key"),
        ({"base_url": []}, "the list is empty"),
        ({"base_url": ["http://a/v1", "http://b/v1"], "batch": True}, "a batch lives on one server"),
    ],
)
def test_addresses_that_cannot_be_are_refused(fields, what):
    with pytest.raises(ValidationError, match=what):
        spec_for("http://a/v1", **fields)


def test_where_a_judge_is_asked_is_no_part_of_what_it_says():
    one, two = spec_for("http://a/v1"), spec_for(["http://b/v1", "http://c/v1"])
    assert settings_of(one) == settings_of(two)
    sections = [
        recipe_slice(load_recipe(TINY, (f"ai_labels.grader={{kind: llm, model: m, base_url: {urls}}}",)), ("ai_labels",))
        for urls in ("'http://a/v1'", "['http://b/v1', 'http://c/v1']")
    ]
    assert sections[0] == sections[1]
