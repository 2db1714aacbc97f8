"""`decode`: seconds to read a prompt and tokens per second after it, all systems by the same `generate()` call.

Prefill is the call for one token, the call for all tokens less the prefill is the rest of them:
tokens per second = batch · (new − 1) / (seconds of all − seconds of one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import measure
from benchmarks.measure import Round, timed
from benchmarks.run import Cell, Options
from benchmarks.systems import SYSTEMS, agreement, generate, load_all

NAMES = tuple(name for name, system in SYSTEMS.items() if system.query is None)


def settings(options: Options) -> dict[str, Any]:
    """What all cells have in common."""
    return {"new_tokens": options.new_tokens or (8 if options.quick else 128)}


def cells(options: Options) -> list[Cell]:
    """Batch, prompt and number format; those that matter most first, since the last take longest by far."""
    batches, lengths = options.batches or [1, 8, 32], options.lengths or [64, 512]
    if options.quick:
        batches, lengths = options.batches or [1, 2], options.lengths or [16]
    shapes = sorted(((batch, length) for batch in batches for length in lengths), key=lambda shape: shape[0] * shape[1])
    first = [shape for shape in shapes if shape[0] <= 8 and shape[1] <= 64]
    rest = [shape for shape in shapes if shape not in first]
    ordered = [(shape, dtype) for group in (first, rest) for dtype in options.dtypes for shape in group]
    return [
        Cell(f"batch {batch}, prompt {length}, {dtype}", {"batch": batch, "prompt": length, "dtype": dtype})
        for (batch, length), dtype in ordered
    ]


def rounds(cell: Cell, options: Options, folder: str, missing: int) -> Iterator[dict[str, Any]]:
    """First `facts` (seconds of the first call, graphs compiled, agreement of tokens), then a `round` at a time."""
    task = {**cell.setting, **settings(options), "folder": folder, "systems": options.systems or list(NAMES)}
    return measure.in_child("decode", {**task, "rounds": missing})


def decoder(task: dict[str, Any], models: dict[str, Any]) -> Callable[[str], tuple[dict[str, float], Any]]:
    """What measures one system: its numbers, and the tokens (B, new) that it decoded."""
    from benchmarks.measure import device
    from benchmarks.models import prompts

    ids = prompts(task["folder"], task["batch"], task["prompt"]).to(device())
    new = task["new_tokens"]

    def decode(name: str) -> tuple[dict[str, float], Any]:
        # All tokens first: a compiled model's static cache keeps the size that it had first.
        seconds, tokens = timed(lambda: generate(SYSTEMS[name], models[name], ids, new))
        prefill, _ = timed(lambda: generate(SYSTEMS[name], models[name], ids, 1))
        rate = ids.shape[0] * (new - 1) / max(seconds - prefill, 1e-9)
        return {"prefill_seconds": prefill, "seconds": seconds, "tokens_per_second": rate}, tokens[:, ids.shape[1] :]

    return decode


def compiled_graphs() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def child(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One cell in a process of its own."""
    models = load_all(task["systems"], task["folder"], task["dtype"], **task.get("load", {}))
    decode = decoder(task, models)
    facts: dict[str, Any] = {"first_call_seconds": {}, "graphs": {}}
    tokens = {}
    for name in task["systems"]:
        before = compiled_graphs()
        numbers, tokens[name] = decode(name)
        facts["first_call_seconds"][name] = numbers["seconds"]
        if SYSTEMS[name].compiled:
            # Once more: a compiled step may compile again when it meets its own output.
            tokens[name] = decode(name)[1]
            facts["graphs"][name] = compiled_graphs() - before
    yield {"facts": {**facts, "same_tokens": agreement(tokens)}}
    for _ in range(task["rounds"]):
        found: Round = {name: decode(name)[0] for name in task["systems"]}
        yield {"round": found}
