"""`limit`: what this machine's memory allows at batch 1, and the share of it that each system reaches.

A step reads every weight once, so tokens per second ≤ read bandwidth / bytes of weights read in a step. The embedding
is looked up, not read, unless it is also the head. Reading is measured on a matrix much larger than the caches, by its
product with a vector and by its sum, copying by a copy (its bytes are those read and written); the best pass counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import measure
from benchmarks.measure import Round, timed
from benchmarks.memory import weight_bytes
from benchmarks.run import Cell, Options
from benchmarks.systems import SYSTEMS

NAMES = tuple(name for name, system in SYSTEMS.items() if system.query is None)
PASSES = 5


def settings(options: Options) -> dict[str, Any]:
    """What all cells have in common."""
    quick = options.quick
    return {
        "new_tokens": options.new_tokens or (4 if quick else 33),
        "batch": 1,
        "prompt": (options.lengths or [16 if quick else 64])[0],
        "buffer_bytes": 2**24 if quick else 2**30,
    }


def cells(options: Options) -> list[Cell]:
    """One a number format."""
    return [Cell(dtype, {"dtype": dtype}) for dtype in options.dtypes]


def rounds(cell: Cell, options: Options, folder: str, missing: int) -> Iterator[dict[str, Any]]:
    """As `decode.rounds`; the bandwidths are measured anew in every round."""
    task = {**cell.setting, **settings(options), "folder": folder, "systems": options.systems or list(NAMES)}
    return measure.in_child("limit", {**task, "rounds": missing})


def child(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Bandwidths and a short decode, in turn."""
    from benchmarks.decode import decoder
    from benchmarks.systems import load_all

    models = load_all(task["systems"], task["folder"], task["dtype"])
    read = {name: bytes_a_step(models[name], SYSTEMS[name].passes == "two") for name in task["systems"]}
    decode = decoder(task, models)
    bandwidths = Bandwidth(task["buffer_bytes"])
    bandwidths()
    for name in task["systems"]:
        decode(name)
    yield {"facts": {"bytes_a_step": read}}
    for _ in range(task["rounds"]):
        found: Round = {"memory": bandwidths()}
        for name in task["systems"]:
            rate = decode(name)[0]["tokens_per_second"]
            allowed = found["memory"]["read_bytes_per_second"] / read[name]
            found[name] = {"tokens_per_second": rate, "allowed_per_second": allowed, "share": rate / allowed}
        yield {"round": found}


class Bandwidth:
    """Measures how fast `size` bytes are read and copied."""

    def __init__(self, size: int) -> None:
        import torch

        from benchmarks.measure import device

        columns = 1024
        self.matrix = torch.ones(size // (4 * columns), columns, device=device())
        self.vector = torch.ones(columns, device=device())
        self.copy = torch.empty_like(self.matrix)

    def __call__(self) -> dict[str, float]:
        """Bytes a second."""
        size = self.matrix.numel() * self.matrix.element_size()
        ways = (lambda: self.matrix @ self.vector, self.matrix.sum)
        read = min(timed(way)[0] for way in ways for _ in range(PASSES))
        copied = min(timed(lambda: self.copy.copy_(self.matrix))[0] for _ in range(PASSES))
        return {"read_bytes_per_second": size / read, "copied_bytes_per_second": 2 * size / copied}


def bytes_a_step(model: Any, twice: bool) -> int:
    """Bytes of the weights that one step reads: with two passes all but head and adapter twice.

    An embedding that is not tied to the head counts as nothing.
    """
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tied = head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()
    once = weight_bytes(model) - (0 if tied else embedding.untyped_storage().nbytes())
    if not twice:
        return once
    learned = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.requires_grad)
    return 2 * once - head.untyped_storage().nbytes() - learned
