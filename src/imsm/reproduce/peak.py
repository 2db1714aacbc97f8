"""The highest memory that a stretch of work had in use."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

#: Linux: what is written into the first starts the peak in the second anew.
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def release_memory() -> None:
    """Gives back what nothing holds any more: to the GPU, and to the system where its C library can (glibc).

    glibc keeps freed blocks for later, gigabytes of them after a training on long records; they would count as the next one's.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Gives a mapping that has `bytes` at the end: of the GPU if there is one, else of the process.

    Stays empty where the system does not tell.
    """
    found: dict[str, int] = {}
    release_memory()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")
    yield found
    if on_gpu:
        found["bytes"] = int(torch.cuda.max_memory_allocated())
    elif STATUS.exists():
        lines = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        if lines:
            found["bytes"] = int(lines[0].split()[1]) * 1024
