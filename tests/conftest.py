"""Shared fixtures: the tiny random model and its renderer, made once; real data located once."""

from __future__ import annotations

import os
from pathlib import Path

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one thread a worker, in what it starts too: OpenMP's threads wait for one another by spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from suasion.sections.training import ModelSection

# A busy machine must not fail a property: deadlines are for benchmarks, and it generates slowly too.
hypothesis.settings.register_profile("suasion", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suasion")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny() -> ModelSection:
    """The random two-layer model."""
    return ModelSection(base="random:tiny", max_length=512)


@pytest.fixture(scope="module")
def chromium():
    """A browser for the tests of one file; no longer, because nothing else can run an event loop beside it."""
    from browsing import CHROMIUM, sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def renderer(tiny):
    """Renders with the bundled tokenizer and its chat template."""
    from suasion.chat import Renderer
    from suasion.models import load_tokenizer

    return Renderer(load_tokenizer(tiny), tiny.system_prompt)
