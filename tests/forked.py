"""`suasion` in a process of its own that is forked from a server which has imported everything already.

Importing torch, transformers and TRL takes longer than the tiny recipe; a test that starts the run fifteen times pays for it once.
The process is as mortal as any other: `kill` is SIGKILL.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from suasion.pipeline import stages
from suasion.recipe import load_recipe

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "suasion.cli",
        "trl",
        "peft",
        "sentence_transformers",
        "suasion.models",
        *(stage.module for stage in stages(load_recipe(TINY))),
    ]
)


class Forked:
    """A command of suasion; what it prints goes to a file."""

    def __init__(self, arguments: list[str], log: Path, threads: int = 1):
        self.log = log
        self._process = _context.Process(target=_main, args=(arguments, str(log), threads))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def interrupt(self) -> None:
        """SIGINT, as Ctrl-C sends it."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(self._process.pid, signal.SIGINT)

    def wait(self, timeout: float) -> str:
        """All that it printed. Raises TimeoutError where it still runs after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(self.log.read_text())
        return self.log.read_text()


def _main(arguments: list[str], log: str, threads: int) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, which is inherited
    import torch

    from suasion.cli import main

    torch.set_num_threads(threads)
    sys.argv = ["suasion", *arguments]
    main()
