"""What a rented machine is told: when it must end, what to install, what to run. The scripts stand in `remote/`, to be read as such.

User data can be read by anybody who may describe the instance, so it holds the end and nothing else. Packages, recipe, corpora and tokens
go over ssh; tokens into memory only.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from suasion.errors import UserError
from suasion.launch.session import Session
from suasion.recipe import Recipe
from suasion.sections.base import FILE_KEYS

UNCLAIMED_MINUTES = 45  # boot, ssh and the upload take a few; a machine without a caller must not live longer
LINGER_MINUTES = 60  # after the run has ended, for a caller that was away
SCRIPTS = ("install.sh", "run.sh", "notice.sh", "poll.sh", "suasion-run.service", "suasion-notice.service")
SOURCE = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "scripts/setup_env.sh")


@dataclass(frozen=True)
class Upload:
    """A file or folder of the caller and its name on the machine, below the session's folder."""

    path: Path
    name: str


def user_data(hours: float) -> str:
    """The first-boot script of a machine that must end after so many hours."""
    text = (files("suasion.launch") / "remote" / "first-boot.sh").read_text(encoding="utf-8")
    return text.replace("@MINUTES@", str(max(1, int(hours * 60)))).replace("@UNCLAIMED@", str(UNCLAIMED_MINUTES))


def moved_inputs(recipe: Recipe, remote_folder: str) -> tuple[str, list[Upload]]:
    """The recipe as the machine will read it, and the caller's files that it names.

    Files keep their names and move into numbered folders: manifests compare names and contents, so that stages made there count here.
    Raises UserError for a file that is missing here.
    """
    uploads: list[Upload] = []

    def moved(value: str) -> str:
        path = Path(value)
        if not path.exists():
            raise UserError(
                f"the recipe names {path}, which is not there. Fetch it first, or change the recipe; nothing was rented."
            )
        known = next((item for item in uploads if item.path == path), None)
        if known is None:
            known = Upload(path, f"inputs/{len(uploads)}/{path.name}")
            uploads.append(known)
        return f"{remote_folder}/{known.name}"

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: walk(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [walk(item, key) for item in value]
        return moved(value) if isinstance(value, str) and key in FILE_KEYS and value.startswith("/") else value

    data = walk(recipe.model_dump(mode="json"))
    if data["model"]["base"].startswith("/"):
        data["model"]["base"] = moved(data["model"]["base"])
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True)), uploads


def source_tree() -> list[Upload]:
    """The files that install this very package, pinned: the source tree that is running here.

    Raises UserError where suasion was installed without one.
    """
    root = Path(__file__).parents[3]
    if not (root / "pyproject.toml").is_file() or not (root / "constraints.txt").is_file():
        raise UserError(
            "launch sends the source tree that it runs from, and this suasion was installed without one. Clone the repository, install it with: "
            "make install"
        )
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    names = (
        listed.stdout.split("\n")
        if listed.returncode == 0
        else [str(p.relative_to(root)) for p in (root / "src").rglob("*") if "__pycache__" not in p.parts]
    )
    return [Upload(root / name, f"source/{name}") for name in (*SOURCE, *names) if name and (root / name).is_file()]


def scripts() -> list[Upload]:
    """The machine's own scripts and units."""
    folder = Path(str(files("suasion.launch") / "remote"))
    return [Upload(folder / name, name) for name in SCRIPTS]


def settings(session: Session) -> str:
    """The file that the machine's scripts read. Names are checked where they come from; quotes are for paths."""
    return f"NAME='{session.name}'\nS3='{session.s3}'\nLINGER_MINUTES={LINGER_MINUTES}\n"
