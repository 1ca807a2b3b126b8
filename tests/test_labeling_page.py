"""The labelling page over HTTP, against a real server in a process of its own: what is on the wire, who gets in, what survives a kill."""

from __future__ import annotations

import html
import re
import sqlite3
import threading
import time
from collections import Counter
from html.parser import HTMLParser

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_run import BAD, GOOD, Server, make_run, sampled_pairs
from test_benchmarks import script

from suasion.labeling.guard import BODY_LIMIT, Attempts
from suasion.labeling.server import open_desk
from suasion.labeling.text import ALLOWED, to_html

load = script("labeling").load
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=alert(1)> [click](javascript:alert(1)) ![pic](http://127.0.0.1:9/x.png)\n\n"
    "# A heading </article></main>\n\n<iframe src=//evil></iframe> <http://evil.example> {{ 7 * 7 }} `code <b>` \u202eabc"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(make_run(tmp_path_factory.mktemp("page"), sampled_pairs(12)))
    yield running
    running.stop()


def client(server: Server, **more) -> httpx.Client:
    return httpx.Client(base_url=server.url, follow_redirects=True, **more)


def field(page: str, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found, f"no field {name}"
    return html.unescape(found[1])


def researcher(server: Server) -> tuple[httpx.Client, str]:
    who = client(server)
    return who, field(who.get(server.researcher).text, "csrf")


def invited(server: Server) -> str:
    boss, csrf = researcher(server)
    page = boss.post("/invite", data={"csrf": csrf, "name": "Ann"}).text
    boss.close()
    return re.search(r'value="(http[^"]+/i/[^"]+)"', page)[1]


def annotator(server: Server) -> tuple[httpx.Client, str]:
    who = client(server)
    page = who.post(invited(server), data={"agree": "yes"})
    assert page.url.path == "/task"
    return who, page.text


def answer(page: str, **fields: str) -> dict[str, str]:
    return {
        **{name: field(page, name) for name in ("csrf", "once", "task")}, "choice": "left", "clarity": "2", "seconds": "3.5", **fields,
    }  # fmt: skip


def test_an_annotator_labels_undoes_and_resumes(server):
    who, page = annotator(server)
    first = field(page, "task")
    page = who.post("/answer", data=answer(page)).text
    assert field(page, "task") != first
    assert "Task <b>2</b>" in page
    page = who.post("/undo", data={"csrf": field(page, "csrf"), "once": field(page, "once")}).text
    assert field(page, "task") == first
    page = who.post("/answer", data={**answer(page), "choice": "", "skip": "I know this thread"}).text
    second = field(page, "task")
    again = client(server, cookies=dict(who.cookies))
    assert field(again.get("/").text, "task") == second
    assert 'data-did="incomplete"' in who.post("/answer", data={**answer(page), "clarity": ""}).text
    assert field(who.get("/task").text, "task") == second


def test_only_ids_are_on_the_wire(server):
    who, page = annotator(server)
    for secret in ("sft-secret-model", "p0", "q0", "lineage", "tokens", "logprob", "ab", "ba"):
        assert f'"{secret}"' not in page
    assert "sft-secret-model" not in page
    forged = answer(page, left="forged text", label="a", pair_id="p3", annotator="annotator-9", order="ab")
    assert who.post("/answer", data=forged).status_code == 200
    assert who.post("/answer", data=answer(who.get("/task").text, task="0123456789abcdef")).status_code == 400
    assert who.post("/answer", data=answer(who.get("/task").text, choice="model")).status_code == 400
    assert who.post("/answer", data=answer(who.get("/task").text, seconds="soon")).status_code == 400
    assert who.post("/answer", data=answer(who.get("/task").text, skip="<b>")).status_code == 400


def test_headers_allow_nothing_from_outside(server):
    who, page = annotator(server)
    headers = who.get("/task").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["cache-control"] == "no-store"
    assert headers["x-frame-options"] == "DENY"
    assert not re.search(r"(?:src|href|action)=\"(?:https?:)?//", page)
    assert not re.search(r"<[^>]+ (?:on\w+|style)=", page)
    cookies = who.post(invited(server), data={"agree": "yes"}, follow_redirects=False).headers["set-cookie"].lower()
    assert "httponly" in cookies
    assert "samesite=strict" in cookies


def test_forms_of_others_are_refused(server):
    who, page = annotator(server)
    good = answer(page)
    assert who.post("/answer", data={**good, "csrf": "0" * 64}).status_code == 403
    assert who.post("/answer", data={key: value for key, value in good.items() if key != "csrf"}).status_code == 403
    assert who.post("/answer", data=good, headers={"Origin": "http://evil.example"}).status_code == 403
    assert who.post("/answer", data=good, headers={"Origin": "null"}).status_code == 403
    assert who.post("/answer", data=good, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert who.get("/task", headers={"Host": "evil.example"}).status_code == 421
    assert who.get("/task", headers={"Host": f"localhost:{server.port}"}).status_code == 200
    assert who.put("/answer").status_code == 405
    _, other = annotator(server)
    assert who.post("/answer", data={**good, "csrf": field(other, "csrf")}).status_code == 403
    assert who.post("/answer", data={**good, "choice": "x" * (BODY_LIMIT + 1)}).status_code == 413
    assert field(who.get("/task").text, "task") == good["task"]  # nothing of it was stored


def test_a_body_without_a_length_is_bounded_too(server):
    with client(server) as who:
        answered = who.post("/answer", content=(b"x" * 1000 for _ in range(40)))
        assert answered.request.headers["transfer-encoding"] == "chunked"
        assert answered.status_code == 413


def test_strangers_see_nothing(server):
    with client(server) as who:
        for path in ("/", "/task", "/guidelines", "/dashboard", "/dashboard/live", "/annotator/annotator-1", "/adjudicate"):
            assert who.get(path).status_code == 403, path
        for path in ("/answer", "/undo", "/invite", "/label-myself", "/adjudicate", "/annotator/annotator-1"):
            assert who.post(path, data={"csrf": "x"}).status_code == 403, path
        assert who.get("/static/../app.py").status_code == 404
        assert who.get("/static/base.html").status_code == 404
        assert who.get("/docs").status_code == 404
    someone, _ = annotator(server)
    assert someone.get("/dashboard").status_code == 403  # an annotator is no researcher


def test_guessing_tokens_is_slowed_down(tmp_path):
    running = Server(make_run(tmp_path, sampled_pairs(2)))
    try:
        link = invited(running)
        with client(running) as who:
            statuses = [who.get(f"/i/guess{n}").status_code for n in range(12)]
            assert statuses == [403] * 10 + [429] * 2
            assert who.get(link).status_code == 429
    finally:
        running.stop()
    now = [0.0]
    attempts = Attempts(2, 60, lambda: now[0])
    for _ in range(2):
        attempts.fail("x")
    assert attempts.blocked("x")
    assert not attempts.blocked("y")
    now[0] = 61
    assert not attempts.blocked("x")


def test_consent_comes_first_and_a_look_at_the_link_stores_nothing(server):
    link = invited(server)
    with client(server) as who:
        page = who.get(link)
        assert "Before you begin" in page.text
        assert who.get("/task").status_code == 403
        assert who.post(link, data={}).status_code == 400
        assert who.post(link, data={"agree": "yes"}).url.path == "/task"
        assert "Welcome back" in who.get(link).text


def test_the_researcher_excludes_includes_and_erases(server):
    who, page = annotator(server)
    for _ in range(3):
        page = who.post("/answer", data=answer(page)).text
    boss, csrf = researcher(server)
    name = re.findall(r"annotator-\d+", boss.get("/dashboard").text)[-1]
    before = boss.get(f"/annotator/{name}").text
    assert "What excluding them would change" in before
    page = boss.post(f"/annotator/{name}", data={"csrf": csrf, "action": "exclude", "reason": "test <b>"}).text
    assert "Excluded: test &lt;b&gt;" in page
    assert "closed" in who.get("/task").text
    boss.post(f"/annotator/{name}", data={"csrf": csrf, "action": "include"})
    assert 'name="choice"' in who.get("/task").text
    assert boss.post(f"/annotator/{name}", data={"csrf": csrf, "action": "erase", "confirm": "yes"}).status_code == 400
    assert boss.post(f"/annotator/{name}", data={"csrf": csrf, "action": "erase", "confirm": name}).url.path == "/dashboard"
    assert who.get("/task").status_code == 403
    assert boss.get(f"/annotator/{name}").status_code == 404


def test_the_adjudicator_sees_neither_who_nor_whose(tmp_path):
    """Which response stands first is drawn for each pair, and a ruling goes to the text, not to its place."""
    run = make_run(tmp_path, sampled_pairs(8), overlap=1.0)
    desk = open_desk(run)
    for text in (GOOD, BAD):  # two people who never agree
        who = desk.store.add_annotator("")
        desk.store.new_token(who, "session")
        for _ in range(8):  # once each pair: one more question would be held for them
            shown = desk.next(who)
            desk.answer(who, shown.task.id, "left" if shown.left == text else "right", 2, 9.0, shown.task.id)
    desk.store.close()
    running = Server(run)
    try:
        boss, csrf = researcher(running)
        firsts, settled = [], []
        while 'name="pair"' in (page := boss.get("/adjudicate").text):
            assert not re.search(r"annotator-\d|secret", page)
            good, bad = page.index("January looks different"), page.index("good for the environment")
            firsts.append(good < bad)
            labels = re.findall(r'name="label" value="(\w+)">The (first|second) is better', page)
            assert [word for _, word in labels] == ["first", "second"]
            settled.append(field(page, "pair"))
            boss.post("/adjudicate", data={"csrf": csrf, "pair": settled[-1], "label": labels[0 if good < bad else 1][0]})
        boss.close()
    finally:
        running.stop()
    assert len(settled) == len(set(settled)) == 8
    assert set(firsts) == {True, False}
    desk = open_desk(run)
    assert {label for label, _ in desk.refresh().adjudicated.values()} == {"a"}  # GOOD is each pair's first
    desk.store.close()


def test_killed_in_the_middle_every_acknowledged_label_is_there(tmp_path):
    """Several sessions label as fast as they can; kill -9; what was acknowledged is stored, once, and everybody goes on."""
    run = make_run(tmp_path, sampled_pairs(200), overlap=0)
    running = Server(run)
    people = [annotator(running) for _ in range(4)]
    acknowledged: list[str] = []

    def work(who: httpx.Client, page: str) -> None:
        try:
            while True:
                task = field(page, "task")
                reply = who.post("/answer", data=answer(page), follow_redirects=False)
                if reply.status_code == 303:
                    acknowledged.append(task)
                page = who.get("/task").text
        except (httpx.TransportError, AssertionError):
            return

    threads = [threading.Thread(target=work, args=person) for person in people]
    for thread in threads:
        thread.start()
    while len(acknowledged) < 40:
        time.sleep(0.01)
    running.kill()
    for thread in threads:
        thread.join()
    db = sqlite3.connect(run / "labels.db")
    stored = Counter(row[0] for row in db.execute("select json_extract(body, '$.task') from events where kind = 'label'"))
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    db.close()
    assert set(acknowledged) <= set(stored)
    assert set(stored.values()) == {1}
    assert len(stored) - len(set(acknowledged)) <= 4  # at most one answer a session was stored and not yet acknowledged
    again = Server(run, running.port)
    try:
        for who, _ in people:
            page = who.get("/task").text
            assert field(page, "task") not in stored
            assert who.post("/answer", data=answer(page)).status_code == 200
    finally:
        again.stop()


def test_load_in_short(tmp_path):
    given, stored, _ = load(tmp_path, 20, 3)
    assert len(given) == len(set(given)) == 60
    assert sorted(stored) == sorted(given)


@pytest.mark.slow
def test_fifty_sessions_at_one_label_a_second_for_a_minute(tmp_path):
    """No label is lost or doubled; how long requests take is for benchmarks/labeling.py."""
    given, stored, _ = load(tmp_path, 50, 60)
    assert len(given) == len(set(given)) == 3000
    assert sorted(stored) == sorted(given)


# Texts


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, tuple]] = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, tuple(attributes)))

    def handle_comment(self, data):
        self.seen.append(("comment", ()))


def check_inert(text: str) -> None:
    tags = Tags()
    tags.feed(str(to_html(text)))
    for tag, attributes in tags.seen:
        assert tag in ALLOWED, tag
        assert (
            attributes == ()
            or (tag == "span" and attributes == (("class", "inert-link"),))
            or (tag == "ol" and attributes[0][0] == "start")
        )


@settings(max_examples=300)
@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from([*"<>[]()!`*_#\n \"'&", "a", "javascript:", "http://x", "<script>", "<!--", "```"])).map("".join)
)
def test_no_text_becomes_more_than_text(text):
    check_inert(text)


def test_hostile_text_is_shown_as_it_is():
    page = str(to_html(HOSTILE))
    check_inert(HOSTILE)
    assert "&lt;script&gt;document.title" in page
    assert '<span class="inert-link">click</span>' in page
    assert "[image: pic]" in page
    assert "{{ 7 * 7 }}" in page
    assert "javascript:" not in page
    assert to_html("1. one\n2. two") == "<ol>\n<li>one</li>\n<li>two</li>\n</ol>\n"


@pytest.mark.parametrize("text", [GOOD, BAD])
def test_no_word_of_a_text_is_lost(text):
    shown = re.sub(r"<[^>]+>", " ", html.unescape(str(to_html(text))))
    for word in re.findall(r"[A-Za-z]{3,}", re.sub(r"\]\([^)]*\)", "]", text)):
        assert word in shown
