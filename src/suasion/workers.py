"""Rows that do not depend on one another, made in several local processes, one a GPU; `accelerate launch` starts them.

`spread` runs in the process of `suasion run`: it writes what is to be made into a file, starts the workers, and hands over each piece as its
line appears in a worker's own file. `main` is a worker. A piece is made as one process would make it, and random numbers belong to rows, so
that who makes it changes nothing but floating-point sums. Workers do not talk to one another; one that dies ends the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from suasion.errors import UserError
from suasion.records import read_json, write_json

JOB, FAILURE, SAID = "job.json", "failure.json", "said"
PARENT = "SUASION_PARENT"  # environment variable with the process that workers end with
POLL_SECONDS = 0.2
SHOWN = 1_500  # characters of what a worker said before it died


def launcher(count: int, device: str, machines: int = 1) -> list[str]:
    """`accelerate launch` for so many processes a machine, up to the options that say how they share a model.

    Mixed precision is the caller's own business and not named here.
    """
    threads = max(1, torch.get_num_threads() // (count if device == "cpu" else 1))
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count * machines), "--num_machines", str(machines),
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(threads),
    ]  # fmt: skip


def environment(device: str) -> dict[str, str]:
    """What workers are started with, besides what is set already."""
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": "true" if device == "cpu" else "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        PARENT: str(os.getpid()),
    }


def require_gpus(count: int) -> None:
    """Raises UserError where this machine has fewer GPUs than processes."""
    if torch.cuda.device_count() < count:
        raise UserError(
            f"processes.count is {count}, this machine has {torch.cuda.device_count()} GPUs. Use --set processes.count={torch.cuda.device_count()}."
        )


def leave_with_parent() -> None:
    """End this process soon after the `suasion run` that started it: one that was killed must not leave writers behind."""
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while True:
            time.sleep(1.0)
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def spread(
    maker: str,
    setup: dict[str, Any],
    work: Sequence[tuple[str, Any]],
    deliver: Callable[[str, Any], None],
    count: int,
    device: str,
) -> None:
    """Make every (key, piece of work) in `count` processes and hand (key, what was made) to `deliver` as it comes, in any order.

    maker: 'module:function', which a worker calls with `setup` and whose answer it calls with each piece; all of it JSON. Raises UserError
    with a worker's own message where it gave one, and otherwise with its last words; what was delivered before stays.
    """
    if device == "cuda":
        require_gpus(count)
    with tempfile.TemporaryDirectory(prefix="suasion-") as name:
        folder = Path(name)
        write_json(folder / JOB, {"maker": maker, "setup": setup, "work": [list(one) for one in work], "device": device})
        command = [*launcher(count, device), "--main_process_port", "0", "--multi_gpu", "-m", "suasion.workers", name]
        delivered = 0
        read = [0] * count
        with (folder / SAID).open("wb") as said:
            workers = subprocess.Popen(command, env=environment(device), stderr=said)
            try:
                running = True
                while running:
                    time.sleep(POLL_SECONDS)
                    running = workers.poll() is None
                    for rank in range(count):
                        for line in _new_lines(folder / f"{rank}.jsonl", read, rank):
                            row = json.loads(line)
                            deliver(row["key"], row["made"])
                            delivered += 1
            except BaseException:
                workers.terminate()
                workers.wait()
                raise
        if (folder / FAILURE).is_file():
            raise UserError(read_json(folder / FAILURE)["message"])
        if workers.returncode or delivered < len(work):
            last = (folder / SAID).read_text(encoding="utf-8", errors="replace")[-SHOWN:].strip()
            raise UserError(
                f"one of {count} processes died (exit code {workers.returncode}); the others were ended. {delivered} of {len(work)} pieces are kept: run "
                f"again, and only the others are made. Its last words:\n{last}"
            )


def _new_lines(path: Path, read: list[int], rank: int) -> list[bytes]:
    """Whole lines that were added since the last look; `read` counts their bytes by rank."""
    if not path.is_file():
        return []
    with path.open("rb") as handle:
        handle.seek(read[rank])
        whole, newline, _ = handle.read().rpartition(b"\n")
    read[rank] += len(whole) + len(newline)
    return whole.split(b"\n") if newline else []


def main(folder: Path) -> int:
    """A worker: its share of the job, piece by piece."""
    from suasion.progress import console

    leave_with_parent()
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    console.quiet = rank > 0
    job = read_json(folder / JOB)
    if job["device"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    module, _, function = job["maker"].partition(":")
    try:
        make = getattr(import_module(module), function)(job["setup"])
        with (folder / f"{rank}.jsonl").open("a", encoding="utf-8") as made:
            for key, piece in job["work"][rank::count]:
                made.write(json.dumps({"key": key, "made": make(piece)}) + "\n")
                made.flush()
    except UserError as error:
        write_json(folder / FAILURE, {"message": str(error)})
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
