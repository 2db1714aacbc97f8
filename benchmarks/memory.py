"""`memory`: bytes of the weights, of the KV cache, and the most that a process holds while it decodes.

Every system is measured in a fresh process. Peak memory counts from after loading (on a CPU it is the resident memory
of the whole process, libraries included), so that it shows what decoding needs, not how the file was read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import measure
from benchmarks.measure import Round, peak_bytes, reset_peak
from benchmarks.run import Cell, Options
from benchmarks.systems import SYSTEMS, generate, load

NAMES = tuple(name for name, system in SYSTEMS.items() if system.query is None)


def settings(options: Options) -> dict[str, Any]:
    """What all cells have in common."""
    return {"new_tokens": options.new_tokens or (4 if options.quick else 64)}


def cells(options: Options) -> list[Cell]:
    """Two shapes in each number format."""
    shapes = [(2, 16)] if options.quick else [(1, 64), (8, 512)]
    if options.batches and options.lengths:
        shapes = [(batch, length) for batch in options.batches for length in options.lengths]
    return [
        Cell(f"batch {batch}, prompt {length}, {dtype}", {"batch": batch, "prompt": length, "dtype": dtype})
        for dtype in options.dtypes
        for batch, length in shapes
    ]


def rounds(cell: Cell, options: Options, folder: str, missing: int) -> Iterator[dict[str, Any]]:
    """A `round` at a time, each system in a process of its own."""
    for _ in range(missing):
        found: Round = {}
        for name in options.systems or NAMES:
            found[name] = measure.answer(
                "memory", {**cell.setting, **settings(options), "folder": folder, "system": name}
            )
        yield {"round": found}


def child(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One system's bytes."""
    from benchmarks.measure import device
    from benchmarks.models import prompts

    system = SYSTEMS[task["system"]]
    ids = prompts(task["folder"], task["batch"], task["prompt"]).to(device())
    model = load(system.model, task["folder"], task["dtype"])
    reset_peak()
    output = generate(system, model, ids, task["new_tokens"], return_dict_in_generate=True)
    yield {
        "peak_bytes": peak_bytes(),
        "weight_bytes": weight_bytes(model),
        "cache_bytes": cache_bytes(output.past_key_values),
    }


def weight_bytes(model: Any) -> int:
    """Bytes of all weights, each storage once (a tied head counts with its embedding)."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values held."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
