"""The report in a real browser: what axe-core finds, in both colours and on a telephone, what filters show, and what a printer gets.

Needs what browsing.py says. SUASION_SCREENSHOTS=FOLDER keeps pictures and the PDF.
"""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

import pytest
from browsing import NEEDS_CHROMIUM, PHONE, WIDE, keep
from test_final import asked, people_of
from test_report import make_run

from suasion.evaluation.summary import ModelVerdict, with_people
from suasion.labeling import final
from suasion.records import Example, read_json, read_rows, write_json
from suasion.reporting.stage import run_stage

pytestmark = NEEDS_CHROMIUM
A4 = {"width": 680, "height": 1010}  # what 210 x 297 mm leave within margins of 15 mm, in CSS pixels


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report of six models on 115 prompts, 60 of which people judged too."""
    stage = make_run(tmp_path_factory.mktemp("browser"), 115)
    evaluate = stage.folder.parent / "09-evaluate"
    prompts = list(read_rows(stage.folder.parent / "02-pools" / "eval.jsonl", Example))
    verdicts = list(read_rows(evaluate / "verdicts.jsonl", ModelVerdict))
    people = people_of(verdicts, set(final.drawn([one.prompt().id for one in prompts], 60, 3)), 0.75)
    summary = with_people(
        read_json(evaluate / "summary.json"), stage.recipe, prompts, verdicts, people, asked(60, 115, skipped=2), None
    )
    write_json(evaluate / "summary.json", summary)
    run_stage(stage)
    return stage.folder / "index.html"


def opened(chromium, page: Path, **context):
    """The report in a window of its own, and every request that it makes besides itself."""
    window = chromium.new_context(**context)
    shown = window.new_page()
    requests: list[str] = []
    shown.on("request", lambda request: requests.append(request.url))
    shown.goto(page.as_uri())
    assert [url for url in requests if url != page.as_uri() and not url.startswith("data:")] == []
    return shown


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("report-light", {"viewport": WIDE}),
        ("report-dark", {"viewport": WIDE, "color_scheme": "dark"}),
        ("report-phone", {"viewport": PHONE}),
        ("report-phone-dark", {"viewport": PHONE, "color_scheme": "dark"}),
        ("report-narrowest", {"viewport": {"width": 320, "height": 256}}),  # 1280 at 400%: WCAG 1.4.10
    ],
)
def test_axe_finds_nothing_and_nothing_scrolls_sideways(chromium, page, name, context):
    from axe_playwright_python.sync_playwright import Axe

    shown = opened(chromium, page, **context)
    keep(shown, name)
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    for folded in shown.locator("details").all():
        folded.evaluate("one => one.open = true")  # what is folded must be accessible too
    found = Axe().run(shown)
    bad = [
        (one["id"], one["impact"], one["nodes"][0]["html"], one["nodes"][0]["failureSummary"])
        for one in found.response["violations"]
    ]
    assert bad == [], bad
    shown.context.close()


def test_filters_show_and_hide_without_script(chromium, page):
    shown = opened(chromium, page, viewport=WIDE, java_script_enabled=False)
    examples = shown.locator(".example:visible")
    every = examples.count()
    shown.locator("#set-worst").check()
    assert 0 < examples.count() < every
    shown.locator("#set-all").check()
    cards = shown.locator(".example[open] .card:visible")
    before = cards.count()
    shown.get_by_label("base", exact=True).uncheck()
    assert cards.count() == before - 1
    shown.context.close()


def test_a_printer_gets_everything(chromium, page):
    """On paper nothing can be scrolled or unfolded: no table is cut at the margin, no context in the middle, and ink is dark."""
    shown = opened(chromium, page, viewport=A4, color_scheme="dark")
    shown.emulate_media(media="print")
    cut = shown.evaluate(
        "[...document.querySelectorAll('.scroll, .context, pre, figure')].filter(one => one.offsetParent && one.scrollWidth > one.clientWidth + 1)"
        ".map(one => [one.getAttribute('aria-label') || one.className, one.scrollWidth, one.clientWidth])"
    )
    assert cut == []
    assert shown.evaluate("[...document.querySelectorAll('.context')].every(one => one.scrollHeight <= one.clientHeight + 1)")
    assert shown.locator("nav:visible, .filters:visible").count() == 0
    assert shown.evaluate("getComputedStyle(document.body).color") == "rgb(31, 35, 40)"  # dark ink, whatever the screen shows
    shown.emulate_media(media="screen")
    folder = os.environ.get("SUASION_SCREENSHOTS")
    margin = dict.fromkeys(("top", "bottom", "left", "right"), "15mm")
    written = shown.pdf(format="A4", margin=margin, path=f"{folder}/report.pdf" if folder else None)
    assert written.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", written))
    assert 5 <= pages <= 60
    assert any(b"Tj" in zlib.decompress(raw) for raw in streams(written))  # text, not pictures of it
    shown.context.close()


def streams(document: bytes):
    """The deflated streams of a PDF."""
    for found in re.finditer(rb"/FlateDecode.*?stream\r?\n(.*?)endstream", document, re.DOTALL):
        try:
            zlib.decompress(found[1])
        except zlib.error:
            continue
        yield found[1]
