"""Token sequences of different lengths, and batches of them padded on either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from zoo import VOCAB

LENGTHS = (6, 3, 9)


class Batch(NamedTuple):
    """ids, mask and positions, each (B, T); positions count attended tokens, as `generate` does."""

    ids: Tensor
    mask: Tensor
    positions: Tensor

    def rows(self, values: Tensor) -> list[Tensor]:
        """The attended part of every row of `values` (B, T, ...)."""
        return [value[keep.bool()] for value, keep in zip(values, self.mask, strict=True)]


def random_prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths; token 0 is padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def padded(prompts: Sequence[Sequence[int]], side: str = "left") -> Batch:
    """A batch as wide as its longest prompt."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return Batch(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0))
