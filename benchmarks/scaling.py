"""`scaling`: what the siamese model costs against length, share of adapted layers, and rank of the gate.

Adapted layers are the upper k (`layers_to_transform`); peft's model has the same adapter. Decoding is that of `decode`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.decode import child as decode_child
from benchmarks.run import Cell, Options

NAMES: tuple[str, ...] = ("base", "peft", "two", "shared")
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
SHARES: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
RANKS: tuple[int, ...] = (1, 8, 64, 256)


def settings(options: Options) -> dict[str, Any]:
    """What all cells have in common."""
    return {"new_tokens": options.new_tokens or (4 if options.quick else 17), "batch": 1}


def cells(options: Options) -> list[Cell]:
    """The middle of each sweep is the plain setting: all layers, rank 8, a prompt of 512 tokens."""
    lengths, ranks, shares, middle = list(LENGTHS), RANKS, SHARES, 512
    if options.quick:
        lengths, ranks, shares, middle = [8, 16], RANKS[:2], (0.5, 1.0), 16
    lengths = options.lengths or lengths
    plain = {"dtype": options.dtypes[0], "prompt": middle, "share": 1.0, "gate_rank": 8}
    found = [Cell(f"upper {share:.0%} of layers", {**plain, "sweep": "share", "share": share}) for share in shares]
    found += [Cell(f"gate rank {rank}", {**plain, "sweep": "gate_rank", "gate_rank": rank}) for rank in ranks]
    found += [Cell(f"prompt {length}", {**plain, "sweep": "prompt", "prompt": length}) for length in lengths]
    return found


def rounds(cell: Cell, options: Options, folder: str, missing: int) -> Iterator[dict[str, Any]]:
    """As `decode.rounds`."""
    task = {**cell.setting, **settings(options), "folder": folder, "systems": options.systems or list(NAMES)}
    return measure.in_child("scaling", {**task, "rounds": missing})


def child(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One cell in a process of its own."""
    count = json.loads((Path(task["folder"]) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    adapted = max(round(count * task["share"]), 1)
    layers = None if adapted == count else list(range(count - adapted, count))
    return decode_child({**task, "load": {"layers": layers, "gate_rank": task["gate_rank"]}})
