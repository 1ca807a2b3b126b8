"""The run directory: where stages write, what makes one complete, and how a change is noticed.

A stage writes only into its own folder. `manifest.json` comes last, by rename, and is the only mark of completeness: it holds
the recipe slice, the sha256 of every input and output, and its own digest, and no time, host or absolute path, so that equal
experiments have equal bytes. Times stand in `timings.json` of the run. Nothing is ever deleted: `--redo` moves to `attic/`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from suasion.errors import UsageError, UserError
from suasion.recipe import Recipe, dump_recipe
from suasion.records import canonical_json, json_text, read_json, sha256_file, write_json

MANIFEST = "manifest.json"
ATTEMPT = "attempt.json"  # which recipe slice, inputs and hardware an unfinished folder belongs to
TIMINGS = "timings.json"  # of the run, beside the stages
JOURNAL = "journal.jsonl"  # finished batches of a row-wise stage
CHECKPOINTS = "checkpoints"  # states of a training
WORKING = (ATTEMPT, JOURNAL, CHECKPOINTS)  # what resuming needs; removed once the manifest is in place
PACKAGES = ("suasion", "torch", "transformers", "trl", "peft", "accelerate", "numpy", "scikit-learn", "sentence-transformers")

State = Literal["absent", "unfinished", "complete"]


class OutputFile(BaseModel):
    """One artefact of a stage."""

    model_config = ConfigDict(extra="forbid")

    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What a stage read, made and found out. See the module's docstring for what must not stand in it."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["manifest/1"] = "manifest/1"
    stage: str
    recipe: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, OutputFile]
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    facts: dict[str, Any]
    packages: dict[str, str]
    commit: str
    device: str
    dtype: str
    threads: int
    digest: str = ""

    def inputs_of_run(self) -> dict[str, str]:
        """Inputs that earlier stages wrote."""
        return {name: value for name, value in self.inputs.items() if not name.startswith("external:")}

    def external_inputs(self) -> dict[str, str]:
        """Inputs from outside the run, by their plain names."""
        return {name.removeprefix("external:"): value for name, value in self.inputs.items() if name.startswith("external:")}

    def computed_digest(self) -> str:
        """SHA-256 over everything but the digest itself."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json", exclude={"digest"})).encode()).hexdigest()


@dataclass(frozen=True)
class Input:
    """A file that a stage reads: `file` of an earlier `stage`."""

    stage: str
    file: str


EVAL_POOL = Input("pools", "eval.jsonl")
MAY_READ_EVAL_POOL = ("evaluate", "report")


@dataclass
class StageResult:
    """What a stage's function hands back; it becomes part of the manifest.

    facts: JSON values that later stages, `verify` and the report read (first losses, agreement, notes such as "simulated"). dollars: what
    the answers of paid servers cost that this result stands on, whenever they were paid; it goes to timings.json.
    """

    rows_in: int = 0
    rows_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    dollars: float = 0.0


@dataclass
class StageContext:
    """What a stage's function gets: the recipe, its own folder, and its declared inputs, nothing else.

    facts: stage -> facts of the manifests of finished stages. waiting: what people still have to do, '' when nothing. earlier: this
    stage's finished folder, in the attic, where the only thing that changed since is what people said of its results.
    """

    recipe: Recipe
    stage: str
    folder: Path
    inputs: dict[Input, Path]
    cache: Path
    arm: str = ""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    waiting: str = ""
    earlier: Path | None = None

    def input(self, stage: str, file: str) -> Path:
        """Path of a declared input. Raises KeyError for an undeclared one: that is a defect of the stage."""
        return self.inputs[Input(stage, file)]


def cache_dir() -> Path:
    """$SUASION_CACHE, or the user's cache folder. Everything in it can be deleted at any time."""
    base = os.environ.get("SUASION_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "suasion"


class RunDir:
    """`runs/<name>`: its stages, their state and their manifests. `folders` maps stage names to folder names, in order."""

    def __init__(self, path: Path, folders: dict[str, str]):
        self.path = path
        self.folders = folders

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.path / self.folders[stage]

    def state(self, stage: str) -> State:
        """complete: has a manifest; unfinished: has files but no manifest."""
        folder = self.folder(stage)
        if (folder / MANIFEST).is_file():
            return "complete"
        return "unfinished" if folder.is_dir() and any(folder.iterdir()) else "absent"

    def manifest(self, stage: str) -> Manifest:
        """Raises UserError where it is missing, broken or changed."""
        path = self.folder(stage) / MANIFEST
        try:
            manifest = Manifest.model_validate(read_json(path))
        except ValidationError as error:
            raise UserError(f"{path} is not a manifest of this version: {error.errors()[0]['msg']}. {_redo(stage)}") from error
        if manifest.digest != manifest.computed_digest() or path.read_text(encoding="utf-8") != json_text(
            manifest.model_dump(mode="json")
        ):
            raise UserError(f"{path} was changed after it was written. {_redo(stage)}")
        return manifest

    def input_hashes(self, stage: str, inputs: tuple[Input, ...]) -> dict[str, str]:
        """`folder/file` -> sha256 of inputs from earlier stages, as their manifests say.

        Folders are inputs too: their hash is over the hashes of the files below them. Raises UserError where an input is missing,
        ValueError where a stage other than evaluate and report asks for the evaluation pool: it stays sealed until then.
        """
        hashes = {}
        for item in inputs:
            if item == EVAL_POOL and stage not in MAY_READ_EVAL_POOL:
                raise ValueError(f"stage {stage} must not read the evaluation pool")
            outputs = self.manifest(item.stage).outputs
            name = f"{self.folders[item.stage]}/{item.file}"
            if item.file in outputs:
                hashes[name] = outputs[item.file].sha256
                continue
            below = {key: value.sha256 for key, value in outputs.items() if key.startswith(item.file + "/")}
            if not below:
                raise UserError(f"{name} is missing: stage {item.stage} did not write it. {_redo(item.stage)}")
            hashes[name] = hashlib.sha256(canonical_json(below).encode()).hexdigest()
        return hashes

    def complete(
        self,
        stage: str,
        recipe: dict[str, Any],
        inputs: dict[str, str],
        external: dict[str, str],
        result: StageResult,
        hardware: dict[str, Any],
    ) -> Manifest:
        """Hash what the stage wrote and put the manifest in place, last and by rename.

        external: name -> sha256 of inputs from outside the run, under names free of paths.
        """
        folder = self.folder(stage)
        outputs = {
            name: OutputFile(sha256=sha256_file(folder / name), bytes=(folder / name).stat().st_size)
            for name in sorted(relative_files(folder))
        }
        manifest = Manifest(
            stage=stage,
            recipe=recipe,
            inputs={**inputs, **{f"external:{key}": value for key, value in external.items()}},
            outputs=outputs,
            rows_in=result.rows_in,
            rows_out=result.rows_out,
            dropped=result.dropped,
            facts=result.facts,
            packages=package_versions(),
            commit=git_commit(),
            **hardware,
        )
        manifest.digest = manifest.computed_digest()
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
        return manifest

    def clear_working_files(self, stage: str) -> None:
        """Remove what only resuming needs, after the manifest: a process that dies in between has lost nothing."""
        for name in WORKING:
            path = self.folder(stage) / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def go_on(self, *options: str) -> str:
        """The command that goes on with this run, whatever recipe file it was made from: its own copy says the same."""
        elsewhere = [] if self.path.parent == Path("runs") else ["--runs", str(self.path.parent)]
        return shlex.join(["suasion", "run", str(self.path / "recipe.yaml"), *elsewhere, *options])

    def write_recipe(self, recipe: Recipe) -> None:
        """The resolved recipe, beside the stages."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / "recipe.yaml.tmp"
        temporary.write_text(dump_recipe(recipe), encoding="utf-8")
        temporary.replace(self.path / "recipe.yaml")

    def record_time(self, stage: str, seconds: float, **extra: Any) -> None:
        """Add one attempt to `timings.json`."""
        timings = self.timings()
        timings.setdefault(stage, []).append(
            {"seconds": round(seconds, 2), "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **extra}
        )
        write_json(self.path / TIMINGS, timings)

    def timings(self) -> dict[str, list[dict[str, Any]]]:
        """Stage -> attempts, each with seconds."""
        return read_timings(self.path)

    def add_times(self, theirs: dict[str, list[dict[str, Any]]]) -> None:
        """Add attempts of the same run made elsewhere, those that are not known here yet; what ran here stays."""
        known = self.timings()
        added = {
            stage: [attempt for attempt in attempts if attempt not in known.get(stage, [])] for stage, attempts in theirs.items()
        }
        if any(added.values()):
            write_json(self.path / TIMINGS, known | {stage: known.get(stage, []) + attempts for stage, attempts in added.items()})

    def move_to_attic(self, stages: list[str]) -> Path | None:
        """Move the folders of these stages away. Returns where, None when there was nothing to move."""
        present = [stage for stage in stages if self.folder(stage).exists()]
        if not present:
            return None
        number = 1 + sum(1 for _ in (self.path / "attic").glob("*"))
        target = self.path / "attic" / f"{number:03d}-{time.strftime('%Y%m%d-%H%M%S')}"
        target.mkdir(parents=True)
        for stage in reversed(present):  # later stages first: an interruption never leaves a stage without its inputs
            shutil.move(self.folder(stage), target / self.folders[stage])
        return target

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One `run` at a time on one run directory. The lock goes with the process, so that kill -9 releases it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise UserError(f"another suasion run is at work in {self.path}. Wait for it, or stop it first.") from error
            yield


def read_timings(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The times of a run's folder by stage, {} where none are told. No artefact: they are the only thing that two equal runs do not share."""
    path = run / TIMINGS
    return read_json(path) if path.is_file() else {}


def relative_files(folder: Path) -> Iterator[str]:
    """Every artefact below a stage folder, as posix paths: all files but the manifest and the working files."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and name.split("/")[0] not in WORKING:
            yield name


def differences(manifest: Manifest, recipe: dict[str, Any], inputs: dict[str, str], external: dict[str, str]) -> list[str]:
    """What changed since a stage was made, in words; empty when nothing did."""
    changes = [
        f"recipe: {key} was {_short(old)}, is now {_short(new)}"
        for key, (old, new) in sorted(flat_differences(manifest.recipe, recipe).items())
    ]
    for title, before, now in (
        ("input", manifest.inputs_of_run(), inputs),
        ("outside the run", manifest.external_inputs(), external),
    ):
        changes += [
            f"{title}: {name} changed" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
        ]
    return changes


def refuse_stale(stage: str, changes: list[str]) -> UsageError:
    """The error for a finished stage whose recipe or inputs changed."""
    return UsageError(
        f"stage {stage} was made with other settings:\n  "
        + "\n  ".join(changes)
        + f"\nNothing was touched. Either take the change back, or give the recipe another name, or run again with --redo {stage} "
        "(this stage and all after it move to attic/)."
    )


@cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a result; looked up once, as they were imported once."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


@cache
def git_commit() -> str:
    """Commit of the source tree, marked where the package's files differ from it; '' outside one. Asked once a process."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False, timeout=10)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=here, capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if done.returncode != 0:
        return ""
    return done.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def _redo(stage: str) -> str:
    return f"Run again with --redo {stage}."


def _short(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 60 else text[:57] + "..."


def flat_differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every value that differs between two nested dictionaries; None where a key is absent."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in old.keys() | new.keys():
            found.update(flat_differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key))
        return found
    return {} if old == new else {prefix: (old, new)}
