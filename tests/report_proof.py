"""What holds for the report of any run: it names no machine, user or secret, and axe-core finds nothing in its page."""

from __future__ import annotations

import getpass
import re
import shutil
import socket
import tempfile
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECRET = re.compile(r"sk-[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY")
TEXTS = (".html", ".md", ".json", ".csv", ".svg")


def names_no_machine(report: Path, *places: Path) -> None:
    """No file of a report holds a path of this machine, its name, its user's home, or what looks like a key.

    places: folders that the run read or wrote, besides the home and temporary folders.
    """
    home, here = Path.home(), socket.gethostname()
    paths = {str(one.resolve()) for one in (home, Path(tempfile.gettempdir()), Path.cwd(), *places)} - {"/", "/root"}
    names = {name for name in (here, getpass.getuser()) if len(name) > 5 and re.search(r"\d", name)}  # not "runner" or "ubuntu"
    for file in sorted(report.rglob("*")):
        if file.suffix not in TEXTS or file.name == "manifest.json":
            continue
        text = file.read_text(encoding="utf-8")
        assert SECRET.search(text) is None, file
        for path in paths:
            assert path not in text, (file, path)
        for name in names:
            assert not re.search(rf"\b{re.escape(name)}\b", text), (file, name)


def axe_finds_nothing(index: Path) -> None:
    """In light and dark, with everything unfolded. Needs Chromium and the extra `test`."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme)
            page.goto(index.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            violations = Axe().run(page).response["violations"]
            assert violations == [], [(one["id"], one["nodes"][0]["html"]) for one in violations]
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
