"""The other machines of a training over several: `suasion join RUN --machine N`, beside `suasion run` on the first.

All machines see one run directory, at one path, on a file system that they share (NFS, FSx, a cluster's own), and have the same environment.
`suasion run` announces in the run's logs that it begins and ends; between the two, every training that it starts leaves its context in the
run directory and touches it every few seconds, and each joining machine starts its own processes of it, through `accelerate launch` as the
first does. Who finds whom, and who ends whom, is torch's business; a machine whose first one went silent ends its processes itself.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from suasion.errors import UserError
from suasion.models import compute
from suasion.progress import console, duration
from suasion.recipe import validate_recipe
from suasion.records import read_json, write_json
from suasion.rundir import CHECKPOINTS
from suasion.training.processes import CONTEXT, FAILURE, RESULT, launch_command
from suasion.workers import environment, require_gpus

ANNOUNCED = "machines.json"  # in the run's logs
LOOK_SECONDS = 1.0
LEAVE_SECONDS = 180.0  # after the training is over, or its first machine silent: NFS may show a sign of life a minute late


@contextmanager
def announced(run: Path) -> Iterator[None]:
    """Tell joining machines that a run on several of them begins, and that it has ended."""
    file = run / "logs" / ANNOUNCED
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"state": "running"})
    try:
        yield
    finally:
        write_json(file, {"state": "ended"})


def join(run: Path, machine: int, patience: float = 900.0) -> int:
    """Take part in every training of the run until it ends. Returns in how many.

    patience: seconds to wait for the run to begin. Raises UserError where it does not, or where this machine cannot take part. A training that
    fails here fails on the first machine too, which says what to do; when it is begun again this machine takes part again.
    """
    _wait_for_the_run(run, patience)
    served: set[str] = set()
    touched: dict[Path, int] = {}
    while _is_running(run):
        time.sleep(LOOK_SECONDS)
        for context in sorted(run.glob(f"*/{CHECKPOINTS}/{CONTEXT}")):
            attempt = _attempt(context)
            when = _touched(context)
            if attempt and attempt not in served and when != touched.setdefault(context, when):
                served.add(attempt)
                _take_part(context, attempt, machine)
    return len(served)


def _take_part(context: Path, attempt: str, machine: int) -> None:
    """Run this machine's processes of one training; they are ended where it is over, or its first machine silent, and they go on."""
    data = read_json(context)
    recipe = validate_recipe(data["recipe"], "the recipe of the run")
    if not 1 <= machine < recipe.processes.machines:
        raise UserError(
            f"--machine {machine}: the run has machines 0 (where `suasion run` is) to {recipe.processes.machines - 1}."
        )
    device = compute(recipe.model).device
    if device == "cuda":
        require_gpus(recipe.processes.count)
    console.print(f"[bold]{data['stage']}[/]: taking part as machine {machine}")
    workers = subprocess.Popen(launch_command(recipe, context, device, machine), env=environment(device))
    alive, when = time.monotonic(), 0
    try:
        while workers.poll() is None:
            time.sleep(LOOK_SECONDS)
            if _attempt(context) == attempt and _touched(context) != when:
                alive, when = time.monotonic(), _touched(context)
            if time.monotonic() - alive > LEAVE_SECONDS:
                workers.terminate()
    except BaseException:
        workers.terminate()
        workers.wait()
        raise
    code = workers.returncode
    console.print(f"  {data['stage']}: {'done' if code == 0 else f'ended with {code}; the first machine says why'}")


def _attempt(context: Path) -> str:
    """Which attempt at a training is under way there; '' for none."""
    if any(context.with_name(name).is_file() for name in (RESULT, FAILURE)):
        return ""
    try:
        return str(read_json(context)["attempt"])
    except UserError:
        return ""  # just removed, or not whole yet on this side of the file system


def _touched(context: Path) -> int:
    """When the first machine last gave a sign of life there, by its own clock."""
    try:
        return context.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _wait_for_the_run(run: Path, patience: float) -> None:
    console.print(f"waiting for `suasion run` with processes.machines to begin in {run}")
    end = time.monotonic() + patience
    while not _is_running(run):
        if time.monotonic() > end:
            raise UserError(
                f"no run on several machines began in {run} within {duration(patience)}. Start it on the first machine with --set processes.machines=..., "
                "and give the same shared folder here."
            )
        time.sleep(LOOK_SECONDS)


def _is_running(run: Path) -> bool:
    """Whether a run was announced and has not said that it ended."""
    try:
        return bool(read_json(run / "logs" / ANNOUNCED)["state"] == "running")
    except UserError:
        return False
