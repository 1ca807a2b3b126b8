"""The chat page in a real browser: replies that grow, names that come when asked for, stopping, errors, no script, a telephone.

Needs what browsing.py says. SUASION_SCREENSHOTS=FOLDER keeps pictures.
"""

from __future__ import annotations

import contextlib
import re

import pytest
from browsing import NEEDS_CHROMIUM, PATIENCE, PHONE, WIDE, keep, sync_api
from test_talk import HOSTILE, TOKEN, make_run, scripted, serving

pytestmark = NEEDS_CHROMIUM
expect = sync_api.expect


@pytest.fixture
def enter(chromium, tmp_path, tiny):
    """Open the page over a scripted talk: (talk, page). Nothing may be asked of another address, and no script may fail."""
    faults: list[str] = []
    with contextlib.ExitStack() as stack:

        def opened(context: dict | None = None, **settings):
            talk = scripted(make_run(tmp_path / "secret-name", tiny), **settings)
            address = stack.enter_context(serving(talk))
            window = chromium.new_context(viewport=WIDE) if context is None else chromium.new_context(**context)
            stack.callback(window.close)
            window.set_default_timeout(PATIENCE)
            page = window.new_page()
            page.on("request", lambda request: request.url.startswith(address) or faults.append(request.url))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
            page.goto(f"{address}/in/{TOKEN}")
            return talk, page

        yield opened
    assert faults == []


def articles(page) -> list[list[str]]:
    """(label, text, note) of the last round's replies, in one look."""
    return page.eval_on_selector_all(
        "#talk section:last-of-type article", "all => all.map(one => [...one.children].map(part => part.textContent))"
    )


def picture(page, name: str) -> None:
    keep(page, name, full_page=True)


def accessible(page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    assert [(one["id"], one["nodes"][0]["html"]) for one in Axe().run(page).response["violations"]] == []


def test_replies_grow_side_by_side_and_names_come_when_asked_for(enter):
    talk, page = enter(blind=True, pause=0.25)
    accessible(page)
    page.fill("#message", HOSTILE)
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".speaks")).to_have_count(1)
    while (seen := articles(page))[0][1].count(" ") not in (1, 2):  # the first is being written
        assert seen[0][2] != "", "it ended before anybody saw it grow"
    assert [one[2] for one in seen] == ["writes", "waits", "waits"]
    while (seen := articles(page))[1][2] == "waits":
        pass
    assert seen[0][2] == ""  # it does not write any more
    expect(page.locator("#stop")).to_be_hidden()
    assert [one[0] for one in articles(page)] == ["Model A", "Model B", "Model C"]
    assert [one[1:] for one in articles(page)] == [[f"<{talk.finished.index(name)}> heard 1 messages", ""] for name in talk.names]
    assert page.locator(".message").inner_text() == HOSTILE
    assert not re.search(r"\b(?:base|sft|loud)\b", page.inner_html("main"))
    tops = {round(one.bounding_box()["y"]) for one in page.locator("article").all()}
    assert len(tops) == 1  # side by side
    accessible(page)
    picture(page, "chat-blind")
    page.get_by_role("button", name="Show names").click()
    expect(page.locator("#talk h2")).to_have_text(talk.names)
    assert page.locator(".message").inner_text() == HOSTILE
    picture(page, "chat-names")


def test_a_reply_is_stopped_and_the_next_message_reaches_all(enter):
    _, page = enter(pause=0.4)
    page.fill("#message", "A view.")
    page.click("#send")
    expect(page.locator("#talk .text").first).not_to_be_empty()
    page.click("#stop")
    expect(page.locator("#stop")).to_be_hidden()
    first, *others = articles(page)
    assert first[1]
    assert [first[2], *(one[2] for one in others)] == ["stopped", "did not speak", "did not speak"]
    page.fill("#message", "Another.")
    page.keyboard.press("Enter")
    expect(page.locator("#talk section:last-of-type .text")).to_contain_text(["messages"] * 3)


def test_a_message_that_cannot_be_answered_comes_back(enter):
    talk, page = enter()
    page.fill("#message", "word " * 400)
    page.click("#send")
    expect(page.get_by_role("alert")).to_contain_text("Begin a new conversation")
    assert page.input_value("#message") == ("word " * 400).strip()
    assert page.locator("#talk section").count() == 0
    page.click("#setup > summary")
    page.uncheck("input[value=sft]")
    page.get_by_label("Blind").check()
    page.get_by_role("button", name="Begin").click()
    page.wait_for_load_state()
    assert sorted(talk.names) == ["base", "loud"]
    assert talk.blind
    accessible(page)


def test_without_script_and_on_a_telephone_in_the_dark(enter):
    _, page = enter({"viewport": PHONE, "java_script_enabled": False, "color_scheme": "dark"})
    page.fill("#message", "A view.")
    page.click("#send")
    expect(page.locator("main .text")).to_have_text([f"<{place}> heard 1 messages" for place in range(3)])
    for one in page.locator("article, #say, header").all():
        box = one.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
    picture(page, "chat-phone")
