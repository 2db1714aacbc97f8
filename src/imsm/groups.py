"""Rows of a batch that go to different tasks: taken apart, run as batches of their own, and put together in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: What has no rows, whatever its shape.
ROWLESS = ("logits_to_keep", "num_items_in_batch", "generation_config")


def grouped(names: Sequence[str | None]) -> dict[str | None, list[int]]:
    """The rows of each task, in the order of the tasks' first rows."""
    found: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    return found


def rows_of(values: Mapping[str, Any], rows: Sequence[int], batch: int) -> dict[str, Any]:
    """Those rows of all tensors (B, ...); all else as it is."""

    def of(name: str, value: Any) -> Any:
        if name in ROWLESS or not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch:
            return value
        return value[torch.tensor(list(rows), device=value.device)]

    return {name: of(name, value) for name, value in values.items()}


def joined(parts: Sequence[tuple[Sequence[int], Tensor | None]]) -> Tensor | None:
    """The rows of several tensors in their places; None if one is missing.

    Args:
        parts: the places of its rows, and the tensor (N, ...), for each group.
    """
    found = [(rows, part) for rows, part in parts if part is not None]
    if len(found) < len(parts):
        return None
    order = torch.tensor([row for rows, _ in found for row in rows])
    every = torch.cat([part.to(found[0][1].device) for _, part in found])
    return every[order.argsort().to(every.device)]


def joined_sequences(parts: Sequence[tuple[Sequence[int], Tensor]], pad: int) -> Tensor:
    """As `joined`, for sequences (N · R, L) of different lengths, R for each place, padded behind."""
    longest = max(part.shape[1] for _, part in parts)
    wide = [(rows, torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=pad)) for rows, part in parts]
    shaped = [(rows, part.view(len(rows), -1, longest)) for rows, part in wide]
    together = joined(shaped)
    assert together is not None
    return together.flatten(0, 1)
