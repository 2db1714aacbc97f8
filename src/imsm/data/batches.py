"""Which sequences are read together in a pass without gradients."""

from __future__ import annotations

from collections.abc import Sequence

#: Tokens of a forward pass, padding included.
PASS_TOKENS = 4096


def length_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in ascending order of length, cut where a padded batch would exceed `PASS_TOKENS`; none of no lengths."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > PASS_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches
