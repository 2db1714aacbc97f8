"""Where a measurement was made: commit, versions, processor, memory, GPU. Nothing that names the machine itself."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("imsm", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")
#: Instruction sets that decide how fast matrices are multiplied on a CPU.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")


def commit() -> str:
    """The commit of the code, with `+` behind it if the code differs from it; "unknown" outside a clone."""
    try:
        head = git("rev-parse", "HEAD")
        changed = git(
            "status",
            "--porcelain",
            "--",
            "src",
            "benchmarks",
            "examples",
            ":!benchmarks/results",
            ":!benchmarks/continual/results",
            ":!benchmarks/forgetting/results",
            ":!benchmarks/inside/results",
            ":!benchmarks/relevance/results",
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def git(*arguments: str) -> str:
    """What a git command prints."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that matter and are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, threads in use, memory in bytes, GPU if there is one."""
    import psutil
    import torch

    name, flags = processor()
    found: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": name,
        "flags": flags,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
        found["cuda"] = torch.version.cuda
    return found


def processor() -> tuple[str, list[str]]:
    """The processor's name and those of its `FLAGS` that the system tells."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return name, [flag for flag in FLAGS if flag in flags]


def device(where: dict[str, Any]) -> str:
    """A machine's GPU, or its processor and what that can do."""
    return where.get("gpu") or f"{where['processor']} ({', '.join(where['flags']) or where['architecture']})"


def sentence(made: dict[str, Any]) -> str:
    """A record's machine, versions and commit in one sentence."""
    where, used = made["machine"], made["versions"]
    packages = ", ".join(f"{name} {used[name]}" for name in used if name != "imsm")
    return (
        f"Measured on {device(where)}, {where['cores']} cores, {where['threads']} thread{'s' if where['threads'] > 1 else ''}, {where['memory_bytes'] / 2**30:.0f} GiB, "
        f"with {packages}, at commit {made['commit'][:12]}{'+' if made['commit'].endswith('+') else ''}."
    )
