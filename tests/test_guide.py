"""docs/EXECUTION_GUIDE.md: every file and test that it names exists, every command and option is one of this program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from suasion.cli import app

REPOSITORY = Path(__file__).parents[1]
GUIDE = (REPOSITORY / "docs" / "EXECUTION_GUIDE.md").read_text(encoding="utf-8")


def test_files_exist() -> None:
    names = re.findall(r"`((?:src|docs|scripts|skypilot|recipes|notebooks|tests)/[\w./-]*)`", GUIDE)
    table = GUIDE[GUIDE.index("## What was asked for") : GUIDE.index("## The walk")]
    names += [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", table)]
    assert len(names) > 40
    assert [name for name in names if not (REPOSITORY / name).exists()] == []


def test_every_item_of_the_original_list_has_its_row() -> None:
    table = GUIDE[GUIDE.index("## What was asked for") : GUIDE.index("## The walk")]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| item")]
    assert len(rows) == 25
    for row in rows:
        assert "tests/" in row or ".ci/run" in row, row


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^suasion [^#\n]+", GUIDE, re.MULTILINE))))
def test_commands_and_options_exist(line) -> None:
    words = line.split("&&")[0].split()[1:]
    command = get_command(app)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands"):  # `launch RECIPE` is its hidden first command
        command = command.commands["start"]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, line
