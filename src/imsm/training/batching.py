"""The order of records in training: batches of similar length, drawn anew in each epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

#: Batches among which records are sorted: the fewer, the more chance in who shares a batch, and the more padding.
POOL = 16


class LengthSampler(Sampler[int]):
    """Gives records so that each run of `batch_size` is of similar length, and those runs in no order of length.

    An epoch's order depends on lengths, seed and epoch alone, so that a resumed run finds it again.

    Args:
        lengths: of the records, in tokens.
        batch_size: records of an optimizer step.
        seed: of the order.
        epoch: gives the epoch that begins.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # Far apart, or the epochs of one seed would be those of the next.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) - len(order) % self.batch_size
        pool = POOL * self.batch_size
        ranked: list[int] = []
        for start in range(0, whole, pool):
            ranked += sorted(order[start : min(start + pool, whole)], key=self.lengths.__getitem__)
        for batch in torch.randperm(whole // self.batch_size, generator=generator).tolist():
            yield from ranked[batch * self.batch_size : (batch + 1) * self.batch_size]
        yield from order[whole:]
