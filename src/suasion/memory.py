"""Memory of the machine and of its accelerator: what is free, what was taken at most, and whether an error means that there was too little."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator

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


def peak_memory_mb(device: str) -> float:
    """Peak of the device's memory so far, in MB; on a CPU the peak of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
