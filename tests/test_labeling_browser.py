"""The labelling page in a real browser: what annotators and researchers see, press and hear, and what hostile texts cannot do.

Needs what browsing.py says. SUASION_SCREENSHOTS=FOLDER keeps a picture of every page that a person should look at.
"""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
from browsing import NEEDS_CHROMIUM, PATIENCE, PHONE, WIDE, keep, sync_api
from label_run import GOOD, THREAD, Server, make_run, sampled_pairs

from suasion.labeling.store import Store

pytestmark = NEEDS_CHROMIUM

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> [click](javascript:document.title='owned') "
    "![pic](http://127.0.0.1:9/x.png)\n\n</article></main><form action=http://127.0.0.1:9/steal><button>Save</button></form>\n\n"
    "<iframe src=http://127.0.0.1:9/></iframe> <style>body{display:none}</style> {{ 7 * 7 }} <svg onload=document.title='owned'>"
)
LONG = "\n\n".join(f"Paragraph {n}: " + GOOD.split("\n")[0] for n in range(14))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Enough ordinary tasks for everybody here."""
    running = Server(make_run(tmp_path_factory.mktemp("browser"), sampled_pairs(90), attention=1))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Tasks that are too long to be seen at once, or hostile."""
    pairs = sampled_pairs(16, (HOSTILE, GOOD), (("user", HOSTILE), *THREAD[1:]))
    pairs[:8] = sampled_pairs(8, (LONG, GOOD))
    running = Server(make_run(tmp_path_factory.mktemp("odd"), pairs, overlap=0))
    yield running
    running.stop()


def expect(locator):
    """An expectation with patience."""
    return sync_api.expect(locator)


class Person:
    """A browser window of one person. Notes requests that leave the server, errors of scripts, and what the policy blocks."""

    def __init__(self, chromium, server, **context):
        self.server = server
        self.scripted = context.get("java_script_enabled", True)
        self.context = (
            chromium.new_context(viewport=WIDE, **context) if "viewport" not in context else chromium.new_context(**context)
        )
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.context.on(
            "request", lambda request: request.url.startswith((server.url, "data:")) or self.faults.append(request.url)
        )
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda line: self.faults.append(f"{line.text} {line.location}") if line.type == "error" else None)

    def invited(self) -> Person:
        """Come in by a link of one's own and agree."""
        store = Store(self.store_path)
        self.who = store.add_annotator("")
        link = f"{self.server.url}/i/{store.new_token(self.who, 'invitation')}"
        store.close()
        self.page.goto(link)
        self.page.get_by_role("button", name="I have read this").click()
        return self.ready()

    def ready(self, before: str = "") -> Person:
        """Wait until a page stands that is not the task `before`, and its script listens."""
        script = "" if self.scripted else ", *"
        old = f":not(:has(input[name=task][value='{before}']))" if before else ""
        expect(self.page.locator(f"html:has(h1):is(.script, :not(:has(#answer)){script}){old}")).to_have_count(1)
        return self

    @property
    def store_path(self) -> Path:
        return Path(re.search(r"\((/\S+labels\.db)\)", self.server.printed)[1])

    @property
    def task(self) -> str:
        return self.page.locator("input[name=task]").input_value()

    def labels(self) -> list[tuple[str, str]]:
        """(task, label) of this person that are stored, in order; label none is a skip."""
        db = sqlite3.connect(self.store_path)
        rows = db.execute(
            "select json_extract(body, '$.task'), json_extract(body, '$.label') from events where annotator = ? and kind in ('label', 'skip') order by n",
            (self.who,),
        ).fetchall()
        db.close()
        return rows

    def reasons(self) -> list[str]:
        """Why this person skipped, in order."""
        db = sqlite3.connect(self.store_path)
        query = "select json_extract(body, '$.reason') from events where annotator = ? and kind = 'skip' order by n"
        found = [reason for (reason,) in db.execute(query, (self.who,))]
        db.close()
        return found

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def picture(self, name: str, **options) -> None:
        keep(self.page, name, **options)

    def accessible(self) -> None:
        """axe-core finds nothing serious or critical."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page)
        bad = [
            (one["id"], one["nodes"][0]["html"], one["nodes"][0]["failureSummary"])
            for one in found.response["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        assert bad == [], bad

    def done(self) -> None:
        self.context.close()
        assert self.faults == []


@pytest.fixture
def person(chromium, server):
    people: list[Person] = []

    def make(on: Server = server, **context) -> Person:
        people.append(Person(chromium, on, **context))
        return people[-1]

    yield make
    for one in people:
        one.done()


# Annotators


def test_keys_do_everything_and_undo_goes_back_one_after_another(person):
    one = person().invited()
    page, tasks = one.page, []
    for keys in (("a", "3"), ("2", "b"), ("t", "1"), ("x", "2")):
        tasks.append(one.task)
        one.press(*keys)
        one.ready(tasks[-1])
    assert [task for task, _ in one.labels()] == tasks
    assert [label for _, label in one.labels()][2:] == ["tie", "tie"]
    expect(page.get_by_role("status")).to_have_text("Saved.")
    for task in reversed(tasks[1:]):
        before = one.task
        one.press("u")
        one.ready(before)
        assert one.task == task
    expect(page.get_by_role("status")).to_have_text("Taken back. Answer it again.")
    expect(page.locator("#count")).to_contain_text("Task 2 of")
    one.press("b")
    expect(page.get_by_role("status")).to_have_text("How clear was it? Press 1, 2 or 3.")
    one.press("Enter")
    assert one.task == tasks[1]  # half an answer is none
    one.press("3")
    one.ready(tasks[1])
    one.press("g")
    expect(page.get_by_role("dialog")).to_contain_text("Judge persuasion, not your own opinion")
    one.press("a", "1")  # a key in a dialogue answers nothing
    one.press("Escape", "?")
    expect(page.get_by_role("dialog")).to_contain_text("undo, again and again")
    page.get_by_label("Single keys are on").uncheck()
    one.press("Escape", "a", "2")
    assert page.locator("input:checked[name=choice]").count() == 0
    page.reload()
    one.ready()
    one.press("a", "2")
    assert page.locator("input:checked[name=choice]").count() == 0  # the setting stays
    assert len(one.labels()) == 5


def test_a_skip_wants_a_reason_and_pointers_work_too(person):
    one = person().invited()
    page, first = one.page, one.task
    one.press("s")
    expect(page.get_by_role("button", name="It upsets me")).to_be_visible()
    one.picture("skip")
    page.get_by_role("button", name="It upsets me").click()
    one.ready(first)
    assert one.labels() == [(first, "none")]
    second = one.task
    page.get_by_role("radio", name="Response B").check(force=True)
    page.get_by_role("radio", name="Very clear").click(force=True)  # the second answer of the two saves
    one.ready(second)
    assert len(one.labels()) == 2
    third = one.task
    one.press("b", "s", "Escape")  # a way back, which leaves the choice alone
    expect(page.get_by_role("button", name="It upsets me")).to_be_hidden()
    one.press("s", "2")  # while reasons are shown, a number is a reason and no clarity
    one.ready(third)
    assert one.labels()[-1] == (third, "none")
    assert one.reasons()[-1] == "I know this thread"
    third = one.task
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status")).to_have_text("Choose A, B, tie or both bad first.")
    assert one.task == third


def test_keyboard_alone_in_a_sensible_order(person):
    """Tab and arrows, without single keys: what somebody with a screen reader or a switch does."""
    one = person().invited()
    page, task = one.page, one.task
    page.evaluate("localStorage.setItem('suasion-keys', 'off')")
    page.reload()
    one.ready()
    seen: list[str] = []
    for _ in range(12):
        one.press("Tab")
        seen.append(page.evaluate("document.activeElement.name || document.activeElement.textContent.trim()"))
        if seen[-1] == "choice":
            break
    assert seen[-1] == "choice"
    one.press("Space", "ArrowRight", "Tab")
    assert page.evaluate("document.activeElement.name") == "clarity"
    one.press("Space")
    assert one.task == task  # moving through the options never saves
    assert page.locator("input[name=choice]:checked").input_value() == "right"
    one.press("Enter")
    one.ready(task)
    assert one.labels()[0][0] == task
    outline = page.evaluate(
        "(() => { document.querySelector('nav button:not(:disabled)').focus(); return getComputedStyle(document.activeElement).outlineStyle })()"
    )
    assert outline == "solid"


def test_closing_the_browser_loses_nothing(person):
    one = person().invited()
    first = one.task
    one.press("a", "2")
    one.ready(first)
    task = one.task
    one.press("b")  # chosen, not saved: the draft is there too when the browser comes back
    expect(one.page.locator("input[name=choice]:checked")).to_have_value("right")
    kept = one.context.storage_state()
    one.context.close()
    again = person(storage_state=kept)
    again.page.goto(again.server.url)
    assert again.task == task
    expect(again.page.locator("input[name=choice]:checked")).to_have_value("right")
    expect(again.page.locator("#count")).to_contain_text("Task 2 of")


def test_the_back_button_answers_nothing_twice(person):
    one = person().invited()
    first = one.task
    one.press("a", "2")
    one.ready(first)
    second = one.task
    one.page.go_back()
    one.page.goto(one.server.url + "/task")
    assert one.task == second
    assert len(one.labels()) == 1


def find(one: Person, text: str) -> None:
    """Skip until a task whose text holds this."""
    for _ in range(60):
        if one.page.get_by_text(text).count():
            return
        task = one.task
        one.press("s")
        one.page.get_by_role("button", name="Something is broken").click()
        one.ready(task)
    raise AssertionError(f"nobody is asked about {text}")


def test_long_texts_are_folded_and_must_be_opened_before_a_choice(person, odd):
    one = person(odd).invited()
    page = one.page
    find(one, "Paragraph 13")
    task = one.task
    expect(page.locator("#unfold")).to_be_visible()
    one.picture("folded", full_page=True)
    assert page.locator(".folded").count() == 2  # both responses alike: folding must not tell them apart
    one.press("a", "3")
    expect(page.get_by_role("status")).to_have_text("Show everything in full first: press R.")
    for part in ("#choice input", "#clarity input", "#save"):
        assert page.locator(part).first.is_disabled()
    assert one.task == task
    one.press("r")
    expect(page.locator(".folded")).to_have_count(0)
    expect(page.get_by_role("status")).to_have_text("Everything is shown in full.")
    page.get_by_text("Paragraph 13").scroll_into_view_if_needed()
    one.press("a", "3")
    one.ready(task)
    assert one.labels()[-1][0] == task


def test_hostile_texts_do_nothing(person, odd):
    one = person(odd).invited()
    page = one.page
    find(one, "document.title='owned'")
    assert page.title().startswith("Task ")
    assert (
        page.locator(
            "main article script, main article img, main article iframe, main article form, main article svg, main article a"
        ).count()
        == 0
    )
    assert page.get_by_role("button", name="Save").count() == 1
    expect(page.get_by_text("{{ 7 * 7 }}").first).to_be_visible()
    page.get_by_text("click", exact=True).first.click()
    assert page.url.endswith("/task")
    one.picture("hostile", full_page=True)
    one.accessible()
    task = one.task
    one.press("r", "a", "1")
    one.ready(task)
    assert page.title().startswith(("Task ", "Thank"))


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("light", {"viewport": WIDE}),
        ("dark", {"viewport": WIDE, "color_scheme": "dark"}),
        ("phone", {"viewport": PHONE, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}),
        ("phone-dark", {"viewport": PHONE, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}),
        ("zoom", {"viewport": {"width": 640, "height": 400}, "device_scale_factor": 2}),  # 1280 x 800 at 200%
        ("narrowest", {"viewport": {"width": 320, "height": 256}}),  # 1280 at 400%: WCAG 1.4.10
    ],
)
def test_every_width_and_colour(person, name, context):
    one = person(**context)
    if name in ("light", "phone"):
        store = Store(one.store_path)
        who = store.add_annotator("")
        one.page.goto(f"{one.server.url}/i/{store.new_token(who, 'invitation')}")
        store.close()
        one.picture(f"consent-{name}", full_page=True)
        one.accessible()
    one.invited()
    page = one.page
    one.picture(f"task-{name}")
    one.picture(f"task-{name}-whole", full_page=True)
    one.accessible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    left, right = (page.locator("section.responses article").nth(n).bounding_box() for n in (0, 1))
    assert left["width"] == pytest.approx(right["width"], abs=1)
    assert (left["y"] == right["y"]) == (name in ("light", "dark"))
    for label in page.locator("form#answer label, form#answer button:visible, form#answer summary").all():
        assert label.bounding_box()["height"] >= 44  # a finger's width
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 23, 27)" if "dark" in name else "rgb(251, 250, 247)"
    )
    assert page.locator("#answer kbd:visible").count() == (0 if name.startswith("phone") or name == "narrowest" else 9)
    page.locator("#skip summary").click()
    if name != "narrowest":  # 256 pixels hold no four buttons
        expect(page.get_by_role("button", name="Something is broken")).to_be_in_viewport(ratio=0.9)
    page.locator("#skip summary").click()
    page.get_by_role("link", name="Guidelines").click()
    assert page.evaluate("document.querySelector('dialog[open]').scrollTop") == 0  # read from the top, wherever its button is
    page.keyboard.press("Escape")
    task = one.task
    for words in ("Response A", "Fairly clear"):
        page.get_by_role("radio", name=words).click(force=True)
    one.ready(task)
    one.picture(f"saved-{name}")
    page.goto(one.server.url + "/guidelines")
    one.accessible()


def test_without_script_everything_still_works(person):
    one = person(java_script_enabled=False).invited()
    page, task = one.page, one.task
    page.get_by_role("radio", name="Response A").check(force=True)
    page.get_by_role("radio", name="Very clear").check(force=True)
    page.get_by_role("button", name="Save").click()
    one.ready(task)
    page.get_by_role("link", name="Guidelines").click()
    expect(page.get_by_role("heading", name="Guidelines")).to_be_visible()
    page.get_by_role("link", name="Back to the tasks").click()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(f"input[name=task][value='{task}']")).to_have_count(1)


# Researchers


def test_the_researchers_journey(chromium, tmp_path):
    """Invite, watch two people finish, adjudicate, look at one, exclude, include, erase: to the end of a small labelling."""
    running = Server(make_run(tmp_path, sampled_pairs(4), overlap=1.0))
    boss, ann, bob = (Person(chromium, running, **context) for context in ({}, {}, {"color_scheme": "dark"}))
    try:
        page = boss.page
        page.goto(running.researcher)
        expect(page.get_by_text("Nobody is invited yet")).to_be_visible()
        boss.picture("dashboard-empty")
        boss.accessible()
        links = []
        for name in ("Ann <b>", "Bob"):
            page.get_by_label("Name or note").fill(name)
            page.get_by_role("button", name="Invite an annotator").click()
            links.append(page.get_by_label("Invitation link").input_value())
        boss.picture("invitation")
        boss.accessible()
        for one, link, key, number in ((ann, links[0], "a", 1), (bob, links[1], "a", 2)):
            one.who = f"annotator-{number}"
            one.page.goto(link)
            one.page.get_by_role("button", name="I have read this").click()
            one.ready()
            while one.page.locator("input[name=task]").count():
                task = one.task
                one.press(key, "2")
                one.ready(task)
        ann.picture("done")
        ann.accessible()
        expect(bob.page.get_by_role("heading", name="Thank you")).to_be_visible()
        bob.picture("done-dark")
        bob.press("u")  # even the last answer can be taken back, by key as well
        expect(bob.page.locator("input[name=task]")).to_have_count(1)
        bob.ready()
        bob.press("t", "1")
        expect(bob.page.get_by_role("heading", name="Everything is labelled")).to_be_visible()
        expect(page.locator("#live")).to_contain_text("complete", timeout=PATIENCE)  # by itself, without loading the page
        page.reload()
        boss.picture("dashboard", full_page=True)
        boss.accessible()
        expect(page.locator("#live")).to_contain_text("4 pairs labelled by two people")
        expect(page.get_by_role("cell", name="Ann").or_(page.get_by_role("rowheader", name="Ann <b>"))).to_be_visible()
        page.get_by_role("link", name="to adjudicate").click()
        boss.picture("adjudicate", full_page=True)
        boss.accessible()
        pairs = 0
        while page.get_by_role("button", name="The first is better").count():
            pairs += 1
            page.get_by_label("Note").fill("read twice")
            page.get_by_role("button", name="The first is better").click()
        assert pairs >= 1
        expect(page.get_by_role("heading", name="Nothing to adjudicate")).to_be_visible()
        page.get_by_role("link", name="Back to the dashboard").click()
        page.get_by_role("link", name="annotator-2").click()
        expect(page.get_by_text("What excluding them would change")).to_be_visible()
        boss.picture("annotator", full_page=True)
        boss.accessible()
        page.get_by_label("Reason").fill("asked to")
        page.get_by_role("button", name="Exclude").click()
        expect(page.get_by_text("What including them again would change")).to_be_visible()
        bob.page.reload()
        expect(bob.page.get_by_role("heading", name="Your part is closed")).to_be_visible()
        page.get_by_role("button", name="Include again").click()
        page.get_by_label("Type annotator-2 to confirm").fill("annotator-2")
        page.get_by_role("button", name="Erase everything").click()
        expect(page.locator("#live")).to_contain_text("1 annotator erased")
        expect(page.get_by_role("link", name="annotator-2")).to_have_count(0)
        bob.faults.clear()
        bob.page.goto(running.url + "/task")
        expect(bob.page.get_by_role("heading", name="Please open your invitation link")).to_be_visible()
        bob.accessible()
        assert [fault for fault in bob.faults if "403" not in fault] == []
        bob.faults.clear()
        boss.page.set_viewport_size(PHONE)
        page.goto(running.url + "/dashboard")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        boss.picture("dashboard-phone", full_page=True)
    finally:
        for one in (boss, ann, bob):
            one.context.close()
        running.stop()
    assert boss.faults == ann.faults == bob.faults == []


def test_a_researcher_labels_too_and_comes_back(person):
    one = person()
    page = one.page
    page.goto(one.server.researcher)
    page.get_by_role("button", name="Label here myself").click()
    page.get_by_role("button", name="I have read this").click()
    assert one.task
    page.goto(one.server.url + "/dashboard")
    expect(page.get_by_role("heading", name="human labels")).to_be_visible()
