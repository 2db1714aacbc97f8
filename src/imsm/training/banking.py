"""Whether a run uses a memory bank, and where it lies."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from imsm.data import AnswerCollator, Example
from imsm.errors import InputError
from imsm.memory_bank import MemoryBank, bank_bytes, default_folder
from imsm.model import SiameseForCausalLM
from imsm.settings import TrainConfig

#: `auto` takes no more than this share of what is free on the disk.
SHARE = 0.5


def passes(config: TrainConfig, examples: int, processes: int) -> float:
    """How often the run reads each example."""
    if config.max_steps <= 0:
        return config.epochs
    return config.max_steps * config.batch_size * config.gradient_accumulation * processes / examples


def bank_dtype(config: TrainConfig, model: SiameseForCausalLM) -> torch.dtype:
    """What memories are kept in: `memory_bank_dtype`, or without loss what they are computed in."""
    if config.memory_bank_dtype == "auto":
        computed = torch.bfloat16 if config.bf16 else model.base.dtype
        return torch.bfloat16 if computed == torch.bfloat16 else torch.float32
    return torch.bfloat16 if config.memory_bank_dtype == "bfloat16" else torch.float32


def plan_bank(
    config: TrainConfig,
    model: SiameseForCausalLM,
    examples: Sequence[Example],
    collator: AnswerCollator,
    processes: int = 1,
) -> tuple[MemoryBank | None, str]:
    """The bank that the run builds or finds, if it uses one, and a line that says so or why not.

    Raises:
        InputError: `memory_bank: on`, and it does not fit on the disk.
    """
    if config.method != "imsm" or config.memory_bank == "off":
        return None, "memory bank: off"
    if config.two_phases:
        return None, "memory bank: off (it has no use: the frozen stream is not run while the adapter learns)"
    dtype = bank_dtype(config, model)
    size = bank_bytes(examples, model.config.hidden_size, dtype)
    kept = f"{shown(size)} for {len(examples)} examples in {str(dtype).removeprefix('torch.')}"
    if config.memory_bank == "auto" and passes(config, len(examples), processes) <= 1:
        return None, f"memory bank: off ({kept}; it would not pay, as no example is read twice)"
    folder = default_folder() if config.memory_bank_dir is None else Path(config.memory_bank_dir).expanduser()
    bank = MemoryBank(model, examples, collator, folder, dtype, config.bf16)
    free, needed = free_bytes(folder), max(size - bank.built_bytes, 0)
    if needed > free * (SHARE if config.memory_bank == "auto" else 1):
        if config.memory_bank == "on":
            raise InputError(
                f"memory_bank is on, but the bank takes {kept}, and {folder} has {shown(free)} free: make room, give another "
                "memory_bank_dir, or set memory_bank: off"
            )
        return None, f"memory bank: off ({kept}; {folder} has {shown(free)} free, of which it may take {SHARE:.0%})"
    return bank, f"memory bank: on ({kept}, in {bank.folder})"


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def shown(size: float) -> str:
    """A size in bytes, for the eye."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
