"""What a rented machine is told: when it must end, what to install, what to run. The scripts stand in `remote/`, to be read as such.

User data can be read by anybody who may describe the instance, so it holds the end and nothing else. Packages, recipe, corpora and tokens
go over ssh; tokens into memory only.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from suasion.errors import UserError
from suasion.launch.session import Session
from suasion.recipe import Recipe
from suasion.sections.base import FILE_KEYS
from suasion.sections.grading import AnyGrader, LlmGrader, members_of, models_of
from suasion.sections.sampling import EndpointEngine

UNCLAIMED_MINUTES = 45  # boot, ssh and the upload take a few; a machine without a caller must not live longer
LINGER_MINUTES = 60  # after the run has ended, for a caller that was away
LOOPBACK = ("localhost", "::1", "0.0.0.0")
SCRIPTS = ("install.sh", "run.sh", "notice.sh", "poll.sh", "suasion-run.service", "suasion-notice.service")
MOVED = (*FILE_KEYS, "base", "template")  # keys of the recipe whose values may be files or folders of the caller
SOURCE = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "scripts/setup_env.sh")


@dataclass(frozen=True)
class Upload:
    """A file or folder of the caller and its name on the machine, below the session's folder."""

    path: Path
    name: str


def user_data(hours: float, now: datetime | None = None) -> str:
    """The first-boot script of a machine that must end after so many hours, counted from now: call it where the machine is asked for.

    The bill begins after that, once the machine runs, so that the seconds of switching off are paid for by those of starting.
    """
    text = (files("suasion.launch") / "remote" / "first-boot.sh").read_text(encoding="utf-8")
    end = (now or datetime.now(UTC)) + timedelta(hours=hours)
    minutes = max(1, int(hours * 60))
    given = {
        "END": f"{end:%Y-%m-%d %H:%M:%S} UTC",
        "SECONDS": str(int(end.timestamp())),
        "MINUTES": str(minutes),
        "UNCLAIMED": str(min(minutes, UNCLAIMED_MINUTES)),
    }
    for name, value in given.items():
        text = text.replace(f"@{name}@", value)
    return text


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
            # A model on a server is a name there, whatever it looks like; one that is read in the run's own process is a folder.
            local = value.get("provider") == "local"
            return {name: walk(item, "base" if name == "model" and local else name) for name, item in value.items()}
        if isinstance(value, list):
            return [walk(item, key) for item in value]
        return moved(value) if isinstance(value, str) and key in MOVED and value.startswith("/") else value

    data = walk(recipe.model_dump(mode="json"))
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True)), uploads


@dataclass(frozen=True)
class Needs:
    """What a recipe asks of its machine beyond the base packages: extras of this package, and environment variables with keys."""

    extras: tuple[str, ...]
    variables: tuple[str, ...]


def needs_of(recipe: Recipe) -> Needs:
    """Known before anything is rented, so that no machine computes for hours to find that a key or a package is missing.

    Raises UserError for a server that only this machine can reach, and for a training on several machines: one is rented.
    """
    if recipe.processes.machines > 1:
        raise UserError("processes.machines is above 1: launch rents one machine. skypilot/two-nodes.yaml takes several.")
    graders = _graders(recipe)
    addresses = [address for grader in graders if isinstance(grader, LlmGrader) for address in grader.addresses]
    variables = [_key_of(grader) for grader in graders]
    if isinstance(recipe.sample.engine, EndpointEngine):
        addresses += recipe.sample.engine.urls
        variables.append(recipe.sample.engine.key_env or "")
    for address in addresses:
        host = urlsplit(address).hostname or ""
        if host in LOOPBACK or host.startswith("127."):
            raise UserError(f"the recipe asks {address}, which the rented machine cannot reach. Nothing was rented.")
    return Needs(extras_of(recipe), tuple(dict.fromkeys(filter(None, variables))))


def extras_of(recipe: Recipe) -> tuple[str, ...]:
    """The extras of this package without which a recipe cannot run, sorted; scripts/setup_env.sh --recipe installs them."""
    graders = _graders(recipe)
    extras = {str(section.report_to) for section in (recipe.sft, *recipe.dpo)} - {"none"}
    if any(isinstance(grader, LlmGrader) and grader.provider == "anthropic" for grader in graders):
        extras.add("anthropic")
    if any(model.quantization for model in (recipe.model, *(model for grader in graders for model in models_of(grader)))):
        extras.add("qlora")
    return tuple(sorted(extras))


def _graders(recipe: Recipe) -> list[AnyGrader]:
    """Both graders; of a panel its members."""
    return [grader for named in (recipe.ai_labels.grader, recipe.evaluate.grader) for grader in members_of(named)]


def _key_of(grader: AnyGrader) -> str:
    """The variable that holds a grader's key; '' where it wants none."""
    if not isinstance(grader, LlmGrader) or grader.provider == "local":
        return ""
    if grader.key_env is not None:
        return grader.key_env
    default = "ANTHROPIC_API_KEY" if grader.provider == "anthropic" else "OPENAI_API_KEY"
    return "" if grader.addresses else default


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


def settings(session: Session, extras: Sequence[str] = ()) -> str:
    """The file that the machine's scripts read. Names are checked where they come from; quotes are for paths."""
    return f"NAME='{session.name}'\nS3='{session.s3}'\nEXTRAS='{','.join(extras)}'\nLINGER_MINUTES={LINGER_MINUTES}\n"
