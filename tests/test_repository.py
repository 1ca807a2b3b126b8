"""What must never be committed: paths of a machine, secrets, pickles, heavy files, and corpus text under docs/results."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from suasion.reporting.publish import RUN_WORDS, word_runs

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
SECRET = re.compile(r"sk-[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/[\w.-]+")
INDEX_HOST = re.compile(r"--(?:extra-)?index-url|--find-links|https?://[^\s\"')]*(?:artifactory|nexus|/simple/)")


def tracked() -> list[Path]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return [REPOSITORY / name for name in done.stdout.splitlines() if (REPOSITORY / name).is_file()]


def test_no_secret_machine_path_or_package_index():
    for path in tracked():
        if path.suffix in (".png", ".safetensors") or path.name == Path(__file__).name:
            continue
        text = path.read_text(encoding="utf-8")
        for pattern in (SECRET, MACHINE_PATH, INDEX_HOST):
            found = pattern.search(text)
            assert found is None, f"{path.relative_to(REPOSITORY)}: {found and found.group()}"


def test_no_pickle_and_no_heavy_file():
    for path in tracked():
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin"), path
        assert path.stat().st_size < 3_000_000, path


def test_an_installed_package_holds_every_data_file():
    """`pip install .` copies only what package-data names: whatever else lies beside the modules is there in a checkout and nowhere else."""
    package = REPOSITORY / "src" / "suasion"
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["suasion"]
    named = {path for pattern in patterns for path in package.glob(pattern)}
    beside = {path for path in tracked() if package in path.parents and path.suffix != ".py"}
    assert beside
    assert beside <= named, sorted(path.relative_to(package).as_posix() for path in beside - named)


def corpus_texts():
    for corpus in ("winning-args-corpus", "persuasionforgood-corpus"):
        with (DATA / corpus / "utterances.jsonl").open(encoding="utf-8") as handle:
            for line in handle:
                yield corpus, json.loads(line)["text"] or ""
    for file in (DATA / "ukpconvarg1").rglob("*.csv"):
        yield "ukpconvarg1", file.read_text(encoding="utf-8", errors="replace").replace("\t", "\n")
    with (DATA / "persuasion-rl-labels" / "human_pool_labeled.jsonl").open(encoding="utf-8") as handle:
        for line in handle:
            row = json.loads(line)
            for name in ("prompt", "chosen", "rejected"):
                yield "persuasion-rl-labels", row[name]


def plain(path: Path) -> str:
    """A file's text; of a notebook what its cells say and show, since JSON breaks lines where the text does not."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text

    def strings(value):
        if isinstance(value, dict):
            return [part for key, each in value.items() if not key.startswith("image/") for part in strings(each)]
        if isinstance(value, list):
            return (
                ["".join(value)] if all(isinstance(each, str) for each in value) else [p for each in value for p in strings(each)]
            )
        return [value] if isinstance(value, str) else []

    return "\n\n".join(strings(json.loads(text)))


def test_a_notebook_is_read_as_its_reader_sees_it(tmp_path):
    shown = {"data": {"text/plain": ["seven words that stand\n", "on two lines"], "image/png": "iVBOR"}}
    cells = [{"cell_type": "code", "source": ["a = 1"], "outputs": [shown]}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}, indent=1))
    assert "seven words that stand on two lines" in set(word_runs(plain(tmp_path / "a.ipynb"), 7))
    assert "iVBOR" not in plain(tmp_path / "a.ipynb")


def test_published_results_hold_no_corpus_text():
    """No 12-word run of any corpus stands in what is published, nor anywhere else in the project's texts."""
    if not DATA.is_dir():
        pytest.skip("needs the research corpora in ../shared/data")
    texts = {
        path: plain(path) for path in tracked() if path.suffix in (".md", ".json", ".csv", ".html", ".jsonl", ".ipynb", ".svg")
    }
    ours = {run: path for path, text in texts.items() for run in word_runs(text)}
    assert len(ours) > 1000
    leaks = {(ours[run].relative_to(REPOSITORY), run) for _, text in corpus_texts() for run in word_runs(text) if run in ours}
    assert not leaks, f"{len(leaks)} runs of {RUN_WORDS} corpus words, the first in {sorted(leaks)[0][0]}"


def test_every_test_that_the_table_of_pitfalls_names_exists():
    table = (REPOSITORY / "docs" / "training.md").read_text().split("## Pitfalls")[1]
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", table)
    assert {int(row) for row in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == set(range(1, 20))
    for file, test in named:
        assert f"def {test}(" in (REPOSITORY / "tests" / file).read_text(), f"{file}::{test}"


def test_every_test_that_the_page_on_evaluation_names_exists():
    """It says of each statistic what it is checked against; a test that was renamed must not leave a promise behind."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (REPOSITORY / "docs" / "evaluation.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (REPOSITORY / "tests" / file).read_text(), f"{file}::{test}"
