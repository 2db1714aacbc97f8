"""How things are measured: in seconds that the device really took, in peak bytes, and in processes of their own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from imsm.errors import InputError

Result = TypeVar("Result")
#: What a round measured: by system, by metric.
Round = dict[str, dict[str, float]]


def device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that `call` took on the device (CUDA events on a GPU), and what it returned."""
    import torch

    if not torch.cuda.is_available():
        began = time.perf_counter()
        result = call()
        return time.perf_counter() - began, result
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    result = call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000, result


def reset_peak() -> None:
    """Peak memory counts from here on, where the system can do that (CUDA, Linux)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_bytes() -> int:
    """Most memory held: allocated on the GPU, or else resident in this process.

    On Linux not `ru_maxrss`, which a process inherits from the one that started it.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def medians(rounds: list[Round]) -> Round:
    """The median over the rounds, of every metric of every system."""
    return {
        system: {metric: median(found[system][metric] for found in rounds) for metric in rounds[0][system]}
        for system in (rounds[0] if rounds else {})
    }


def in_child(module: str, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `benchmarks.MODULE.child(task)` yields in a fresh process, as it comes. Closing the iterator ends the process.

    Raises:
        InputError: the process found something that the user can mend.
        RuntimeError: it failed.
    """
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.child", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(task))
        process.stdin.close()
        for line in process.stdout:
            found = json.loads(line)
            if "input_error" in found:
                raise InputError(found["input_error"])
            yield found
        if process.wait():
            raise RuntimeError(f"benchmarks.{module} ended with status {process.returncode} on {json.dumps(task)}")
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
        process.stdout.close()


def answer(module: str, task: dict[str, Any]) -> dict[str, Any]:
    """The one thing that `benchmarks.MODULE.child(task)` yields. Errors as for `in_child`."""
    (found,) = in_child(module, task)
    return found
