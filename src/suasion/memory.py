"""Memory of the machine and of its accelerator: what is free, what was taken at most, and whether an error means that there was too little."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from suasion.errors import UserError

OUT_OF_MEMORY = (MemoryError, RuntimeError)  # the errors to ask; torch.OutOfMemoryError is a RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory did not suffice. torch's CPU allocator has no type of its own: it raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def memory_advice(what: Callable[[], str]) -> Iterator[None]:
    """Turn a lack of memory into a UserError. what: at what it happened, and what to change, after the words "out of memory"."""
    try:
        yield
    except OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {what()}") from error


def free_memory(device: str) -> int:
    """Bytes that may still be taken, what torch holds in reserve included."""
    if device == "cuda":
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + reserved
    return int(psutil.virtual_memory().available)


def total_memory(device: str) -> int:
    """Bytes that the device has."""
    return int(torch.cuda.get_device_properties(0).total_memory if device == "cuda" else psutil.virtual_memory().total)


def forget_peak(device: str) -> None:
    """Let `peak_memory_mb` begin anew; outside of Linux a process's own peak cannot."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: str) -> float:
    """Peak of the device's memory so far, in MB; on a CPU the peak of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
