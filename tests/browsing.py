"""What the tests in a real browser share. Importing it skips a test file where Playwright is absent.

They need Chromium (Debian: apt-get install chromium; `.ci/run` installs it) and Playwright's core, which comes with the extra `test` and
downloads nothing. The fixture `chromium` is in conftest.py.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the packages of the extra 'test'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
PATIENCE = 30_000  # milliseconds; a busy machine must not fail a journey
sync_api.expect.set_options(timeout=PATIENCE)
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def keep(page: Any, name: str, **options: Any) -> None:
    """A picture that a person should look at, where SUASION_SCREENSHOTS names a folder."""
    if folder := os.environ.get("SUASION_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", **options)
