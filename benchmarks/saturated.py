"""`saturated`: what an answer costs once the relevance head has said whose the query is, against each mind alone.

Decoding is that of `decode`, eager; the adapter's own mind answers the task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import decode, measure
from benchmarks.run import Cell, Options

NAMES: tuple[str, ...] = ("base", "peft", "shared", "off_task", "on_task")


def settings(options: Options) -> dict[str, Any]:
    """What all cells have in common."""
    return {"new_tokens": options.new_tokens or (8 if options.quick else 64)}


def cells(options: Options) -> list[Cell]:
    """Batch, prompt and number format."""
    batches, lengths = options.batches or [1, 8], options.lengths or [64]
    return decode.cells(Options(**{**vars(options), "batches": batches, "lengths": lengths}))


def rounds(cell: Cell, options: Options, folder: str, missing: int) -> Iterator[dict[str, Any]]:
    """As `decode.rounds`."""
    task = {**cell.setting, **settings(options), "folder": folder, "systems": options.systems or list(NAMES)}
    return measure.in_child("saturated", {**task, "rounds": missing})


def child(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One cell in a process of its own."""
    return decode.child(task)
