"""docs/EXECUTION_GUIDE.md and scale.md: every file and test that is named exists, every command and option is one of this program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from suasion.cli import app
from suasion.pipeline import stages
from suasion.recipe import load_recipe

REPOSITORY = Path(__file__).parents[1]
GUIDE = (REPOSITORY / "docs" / "EXECUTION_GUIDE.md").read_text(encoding="utf-8")
SCALE = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")


def joined(block: str) -> list[str]:
    """Lines of a shell block, those that end in a backslash made one with the next."""
    return block.replace("\\\n", " ").split("\n")


def test_files_exist() -> None:
    names = re.findall(r"`((?:src|docs|scripts|skypilot|recipes|notebooks|tests)/[\w./-]*)`", GUIDE)
    assert len(names) > 40
    assert [name for name in names if not (REPOSITORY / name).exists()] == []


TABLE = GUIDE[GUIDE.index("## What was asked for") : GUIDE.index("## The walk")]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith("| item")
]


def paths(cell: str) -> list[Path]:
    """The files that a cell names; a bare name stands beside the one before it."""
    found: list[Path] = []
    for name in re.findall(r"`([^`\s]+)`", cell):
        beside = found[-1].parent / name if found else REPOSITORY / name
        found.append(beside if "/" not in name and beside.exists() else REPOSITORY / name)
    return found


def test_every_item_of_the_original_list_has_its_row() -> None:
    assert len(ROWS) == 25
    assert len({item for item, *_ in ROWS}) == 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_files_and_tests_that_exist_and_belong_together(row) -> None:
    item, command, file, test = row
    files, tests = paths(file), paths(test)
    assert tests
    assert [path for path in files + tests if not path.exists() and "NAME" not in path.parts] == []
    text = "\n".join(path.read_text(encoding="utf-8") for path in tests if path.is_file())
    assert ".ci/run" in test or re.search(r"^ *def test_", text, re.MULTILINE)
    for path in files:  # a module that no test of its row imports has another test, or none
        if path.is_relative_to(REPOSITORY / "src"):
            module = path.relative_to(REPOSITORY / "src").with_suffix("")
            dotted, parent = ".".join(module.parts), ".".join(module.parent.parts)
            assert re.search(rf"\b{dotted}\b|from {parent} import .*\b{module.name}\b", text), f"{item}: {dotted}"
    for name in re.findall(r"`make (\w+)`", command):
        assert re.search(rf"^{name}:", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), name
    for name in re.findall(r"`(?:python )?((?:scripts|notebooks)/[\w.]+)`", command):
        assert (REPOSITORY / name).is_file()


def test_stages_of_commands_are_stages_of_the_full_size_recipe() -> None:
    known = stages(load_recipe(REPOSITORY / "recipes" / "persuasion-rl.yaml"))
    named = re.findall(r"--(?:from|until|redo) ([a-z][\w-]*)", GUIDE + SCALE)
    assert len(named) > 10
    assert set(named) <= {stage.name for stage in known}
    folders = set(re.findall(r"`runs/[\w-]+/(\d\d-[\w-]+)", GUIDE))
    assert folders
    assert folders <= {stage.folder for stage in known}


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
