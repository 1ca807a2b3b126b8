"""Finished stages come from the rented machine one by one, each checked against its own manifest before it takes its place in the run.

A stage that is here already is not fetched again, but for a provisional one (made while people still labelled) that the machine has made
anew. Several commands may fetch at once: each has its own folder for what is on the way, and a stage takes its place by a rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from suasion.errors import UserError
from suasion.launch.say import say
from suasion.launch.ssh import Host
from suasion.records import read_json, sha256_file
from suasion.rundir import MANIFEST, TIMINGS, Manifest, RunDir

NOT_FETCHED = {"labels.db"}  # people may have labelled here meanwhile
NOT_UPLOADED = {"launch", "attic", "logs", "recipe.yaml", ".lock"}


@contextmanager
def arriving(run: Path) -> Iterator[Path]:
    """An empty folder of this process for what comes, until it is whole; gone afterwards."""
    folder = run / "launch" / f"incoming-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_here(run: Path, name: str) -> bool:
    """Whether a stage is finished in the run."""
    return (run / name / MANIFEST).is_file()


def is_provisional(run: Path, name: str) -> bool:
    """Whether the finished stage that is here was made while people still labelled: it is made again once they are done."""
    return is_here(run, name) and bool(read_json(run / name / MANIFEST)["facts"].get("waiting"))


def is_final(run: Path, name: str) -> bool:
    """Whether the finished stage that is here stays."""
    return is_here(run, name) and not is_provisional(run, name)


def is_wanted(run: Path, name: str, sha256: str) -> bool:
    """Whether a finished stage is to come, by the hash of its manifest there: none is here, or a provisional one that is another."""
    return not is_here(run, name) or (is_provisional(run, name) and sha256 not in ("", sha256_file(run / name / MANIFEST)))


def put_in_place(came: Path, target: Path) -> None:
    """Move what came into the run by renames alone. A finished stage that stood there, a provisional one, moves to attic/; an attempt that
    the machine has finished goes with the rest of the incoming folder."""
    if is_here(target.parent, target.name):
        RunDir(target.parent, {target.name: target.name}).move_to_attic([target.name])
    elif target.is_dir():
        target.replace(came.with_name(f"{came.name}.before"))
    came.replace(target)


def fetch_stages(host: Host, folder_there: str, run: Path, names: Sequence[str]) -> list[str]:
    """Fetch finished stages that are not here yet, or only provisionally, each checked against the hashes of its own manifest before it counts.

    Returns the names of those that came. Raises Unreachable where the connection ends, UserError where a file is not what the manifest says.
    """
    there = f"{folder_there}/runs/{run.name}"
    hashes = _hashes(host, there, [name for name in names if is_provisional(run, name)])
    fetched = []
    for name in names:
        if not is_wanted(run, name, hashes.get(name, "")):
            continue
        with arriving(run) as folder:
            host.pull([name], there, folder)
            if is_here(run, name) and not is_wanted(run, name, sha256_file(folder / name / MANIFEST)):
                continue  # another command was faster
            check_stage(folder / name)
            put_in_place(folder / name, run / name)
        fetched.append(name)
        say(f"fetched {name}", "green")
    return fetched


def _hashes(host: Host, there: str, names: Sequence[str]) -> dict[str, str]:
    """Stage -> sha256 of its manifest on the machine: the one that was sent, or the one of a stage that was made again."""
    if not names:
        return {}
    files = " ".join(f"{name}/{MANIFEST}" for name in names)
    lines = host.run(f"cd {there} && sha256sum {files} 2> /dev/null || true").decode().splitlines()
    return {path.removesuffix(f"/{MANIFEST}"): sha256 for sha256, _, path in (line.partition("  ") for line in lines)}


def check_stage(folder: Path) -> None:
    """Raises UserError where a fetched stage differs from its manifest."""
    manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    for name, output in manifest.outputs.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != output.sha256:
            raise UserError(
                f"{folder.name}/{name} did not arrive as it was written. Fetch it again with: suasion launch fetch NAME"
            )


def fetch_rest(host: Host, folder_there: str, run: Path, finished: Sequence[str], salvage: bool) -> None:
    """Times, and of a run that did not finish the unfinished stage with its checkpoints and journals, so that another machine goes on.

    finished: stages there. What is provisional here and no longer finished there was being made again.
    """
    there = f"{folder_there}/runs/{run.name}"
    listed = host.run(f"ls {there} 2> /dev/null || true").decode().split()
    kept = {name for name in listed if is_final(run, name) or (is_here(run, name) and name in finished)}
    names = [name for name in listed if name not in NOT_UPLOADED | NOT_FETCHED | kept and (salvage or name == TIMINGS)]
    if not names:
        return  # the set-up failed, so that there is no run
    with arriving(run) as folder:
        host.pull(names, there, folder)
        for path in sorted(folder.iterdir()):
            if not is_final(run, path.name):
                put_in_place(path, run / path.name)
