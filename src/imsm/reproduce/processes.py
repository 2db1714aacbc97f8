"""Sharing runs among the processes of `accelerate launch` or torchrun, one device each.

A run is not distributed: each process hands its runs, one by one, to a child of its own that knows of no other process
and sees one device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
from accelerate import PartialState

#: How long processes wait for the slowest one's runs.
PATIENCE = timedelta(days=60)
#: Names, or beginnings of names, by which a process learns that it is one of several.
DISTRIBUTED = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_"),
)


def join() -> PartialState:
    """This process among the others, or alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return PartialState(cpu=True, timeout=PATIENCE)  # only its children use the devices
    return PartialState(cpu=not torch.accelerator.is_available())


def lone_environment(environment: Mapping[str, str], local_process: int) -> dict[str, str]:
    """The environment of a process that is alone and sees the device of `local_process` as its only one."""
    lone = {name: value for name, value in environment.items() if not name.startswith(DISTRIBUTED)}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else []
    lone["CUDA_VISIBLE_DEVICES"] = devices[local_process] if local_process < len(devices) else str(local_process)
    return lone


def run_alone(arguments: Sequence[str], local_process: int) -> int:
    """Runs an `imsm` command in a child process that is alone; returns its exit status."""
    command = [sys.executable, "-m", "imsm_cli", *arguments]
    return subprocess.run(command, env=lone_environment(os.environ, local_process), check=False).returncode
