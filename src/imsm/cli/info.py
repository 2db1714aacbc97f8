"""`imsm info`: what a checkpoint is, read from its files alone (the base model is not loaded)."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from imsm.building import ADAPTER, read_adapter_config
from imsm.checkpoint import GATE, TASKS, read_config


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(prog="imsm info", description="Say what a siamese checkpoint is.")
    parser.add_argument("checkpoint", help="folder or Hub name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    facts = describe(args.checkpoint)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = "\n".join(f"{k}: {v}" for k, v in value.items())
        table.add_row(key, str(value))
    Console().print(table, markup=False, highlight=False)
    return 0


def describe(name: str) -> dict[str, Any]:
    """The facts of a checkpoint folder: base, method, gate, parameters, how and where it was trained.

    Raises:
        InputError: the folder is no complete siamese checkpoint.
    """
    folder, config = read_config(name, {})
    adapter = read_adapter_config(folder)
    return {
        "checkpoint": str(folder),
        "base model": config.base_model or "not named (give it with --base)",
        "revision": config.base_revision or "not recorded",
        "architecture": f"{config.base_model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"vocabulary {config.vocab_size}",
        "method": str(getattr(adapter.peft_type, "value", adapter.peft_type)),
        "gate": f"{config.gate}, rank {config.gate_rank}, dropout {config.gate_dropout}",
        "relevance head": "in front of the gate" if config.relevance else "none",
        **({"tasks": ", ".join(config.tasks)} if len(config.tasks) > 1 else {}),
        "recall dial": f"{config.recall:g}",
        "parameters": {
            "adapter": f"{parameters(folder, ADAPTER):,}",
            "gate": f"{parameters(folder, GATE):,}",
        },
        "size": f"{sum(f.stat().st_size for f in files(folder)) / 1e6:.1f} MB without the base",
        "format": config.format_version,
        **{f"trained: {key}": value for key, value in config.training.items()},
    }


def files(folder: Path) -> list[Path]:
    """The files of a checkpoint, without those of subfolders that are no tasks."""
    return [path for path in (*folder.iterdir(), *folder.glob(f"{TASKS}/*/*")) if path.is_file()]


def parameters(folder: Path, name: str) -> int:
    """Number of values in the safetensors files of that name, of all tasks, from their headers."""
    total = 0
    for path in (folder / name, *folder.glob(f"{TASKS}/*/{name}")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (not a dict)
    return total
