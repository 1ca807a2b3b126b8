"""Makes the pictures of docs/labeling.md: the labelling page with texts of the bundled corpus, in Chromium.

    python scripts/labeling_pictures.py docs/images

The two responses to a post are two replies that the bundled corpus has to it; the answers of the two annotators behind the dashboard
are drawn, so its numbers mean nothing. Needs Chromium and the extra `test`.
"""

from __future__ import annotations

import html
import json
import shutil
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY / "tests")]

from label_run import Server, make_run, sampled_pairs  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from suasion.grading.pairs import SampledPair  # noqa: E402
from suasion.labeling.desk import CHOICES, Desk  # noqa: E402
from suasion.labeling.server import open_desk  # noqa: E402
from suasion.records import read_json_lines  # noqa: E402
from suasion.seeding import uniforms  # noqa: E402

CORPUS = REPOSITORY / "src" / "suasion" / "corpora" / "miniature" / "changemyview"
WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


def pairs() -> list[SampledPair]:
    """Posts of the bundled corpus, each with two of its replies."""
    rows = [row for _, row in read_json_lines(CORPUS / "utterances.jsonl")]
    titles = {
        key: value["meta"].get("op-title", "") for key, value in json.loads((CORPUS / "conversations.json").read_text()).items()
    }
    found = []
    for post in (row for row in rows if row["reply_to"] is None and row["text"]):
        replies = [html.unescape(row["text"]) for row in rows if row["reply_to"] == post["id"] and row["text"]]
        if len(replies) > 1:
            thread = (("user", f"**{titles[post['id']]}**\n\n{html.unescape(post['text'])}"),)
            found.append(sampled_pairs(len(found) + 1, (replies[0], replies[1]), thread)[-1])
            prompt = found[-1].prompt
            turns = (prompt.turns[0].model_copy(update={"text": thread[0][1]}),)  # without the number that the helper adds
            found[-1] = SampledPair(found[-1].pair, prompt.model_copy(update={"turns": turns}), found[-1].a, found[-1].b)
    return found


def main() -> int:
    """Write one PNG a view into the folder given."""
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = make_run(Path(folder), pairs()[:40], attention=3)
        desk = open_desk(run)
        people = [desk.store.add_annotator(name) for name in ("Ann", "Bo")]
        for who in people:
            desk.store.new_token(who, "session")
        now = 0.0
        desk = Desk(desk.store, desk.work, lambda: now)
        for n in range(52):
            who = people[n % 2]
            shown = desk.next(who)
            if shown is None:
                break
            better = max(
                ("left", "right"), key=lambda side: len(getattr(shown, side)) % 97
            )  # something both agree on more often than not
            if shown.task.expected:
                better = "left" if (shown.task.expected == "a") == (shown.order == "ab") else "right"
            keep, other, took = map(float, uniforms(3, 0, "picture", shown.task.id, who))
            now += 25 + 40 * took
            choice = better if keep < 0.7 or shown.task.expected else CHOICES[int(other * 4)]
            desk.answer(who, shown.task.id, choice, 1 + n % 3, 25 + 40 * took, str(n))
        desk.store.close()
        server = Server(run)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        boss = browser.new_context(viewport=WIDE)
        page = boss.new_page()
        page.goto(server.researcher)
        page.screenshot(path=out / "labeling-dashboard.png", full_page=True)
        page.get_by_role("link", name="to adjudicate").click()
        page.screenshot(path=out / "labeling-adjudicate.png", full_page=True)
        page.goto(server.url + "/dashboard")
        page.get_by_role("button", name="Label here myself").click()
        page.get_by_role("button", name="I have read this").click()
        page.locator("html.script").wait_for()
        page.keyboard.press("b")
        page.wait_for_timeout(400)
        page.screenshot(path=out / "labeling-task.png")
        session = boss.storage_state()
        for name, context in (
            ("dark", {"viewport": WIDE, "color_scheme": "dark"}),
            ("phone", {"viewport": PHONE, "is_mobile": True, "has_touch": True}),
        ):
            page = browser.new_context(storage_state=session, **context).new_page()
            page.goto(server.url + "/task")
            page.locator("html.script").wait_for()
            page.wait_for_timeout(400)
            page.screenshot(path=out / f"labeling-{name}.png", full_page=name == "phone")
        browser.close()
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
