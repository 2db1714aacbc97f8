"""The highest memory that a stretch of work had in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from imsm.evaluation.candidates import release_memory

#: Linux: what is written into the first starts the peak in the second anew.
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


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
