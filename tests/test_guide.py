"""docs/EXECUTION_GUIDE.md and scale.md: every file and test that is named exists, every command and option is one of this program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from suasion.cli import app

REPOSITORY = Path(__file__).parents[1]
GUIDE = (REPOSITORY / "docs" / "EXECUTION_GUIDE.md").read_text(encoding="utf-8")
SCALE = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")


def joined(block: str) -> list[str]:
    """Lines of a shell block, those that end in a backslash made one with the next."""
    return block.replace("\\\n", " ").split("\n")


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


BLOCKS = re.findall(r"^```sh\n(.*?)^```", GUIDE + SCALE, re.MULTILINE | re.DOTALL)
COMMANDS = {
    part.strip() for block in BLOCKS for line in joined(block) for part in line.split("&&") if part.strip().startswith("suasion ")
}
NAMED = set(re.findall(r"`(suasion [^`]+)`", GUIDE + SCALE))  # in running text: options must exist, arguments may be left out


@pytest.mark.parametrize("line", sorted(COMMANDS | NAMED))
def test_commands_and_options_exist(line) -> None:
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    command = get_command(app)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands") and (line in COMMANDS or words):
        command = command.commands["start"]  # `launch RECIPE` is its hidden first command
    known = {name: parameter for parameter in command.params for name in parameter.opts}
    given, values = [], 0
    for word in words:
        if word == "--help":
            continue
        if word.startswith("--"):
            assert word in known, line
            values = 0 if known[word].is_flag else 1
        elif values:
            values = 0
        else:
            given.append(word)
    if line in COMMANDS:
        needed = [parameter for parameter in command.params if parameter.param_type_name == "argument" and parameter.required]
        assert len(given) == len(needed), line
        missing = {
            name for name, parameter in known.items() if parameter.required and parameter.param_type_name == "option"
        } - set(words)
        assert missing == set(), line
