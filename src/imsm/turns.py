"""The last turn of a conversation alone: what a relevance head judges, so that each turn is decided anew.

Neither the mean over a whole conversation nor that over its last turn's tokens tells that it has left the task: what is read
in the task's context looks like the task.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def last_turn(ids: Sequence[int], opener: Sequence[int]) -> list[int]:
    """Tokens of a prompt without the turns between: what stands before the first turn of the user, and the last one.

    Args:
        ids: of the prompt.
        opener: tokens that open a turn of the user; with none, or fewer than two turns, the prompt stays as it is.
    """
    size = len(opener)
    found = [i for i in range(len(ids) - size + 1) if list(ids[i : i + size]) == list(opener)] if size else []
    return list(ids) if len(found) < 2 else [*ids[: found[0]], *ids[found[-1] :]]


def last_turns(ids: Tensor, inside: Tensor, opener: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """`last_turn` of every row, or None if that changes nothing.

    Args:
        ids: (B, T) int64.
        inside: (B, T) bool, the tokens of the prompts.
        opener: see `last_turn`.

    Returns:
        ids (B, T') int64 and mask (B, T'), padded on the right with token 0.
    """
    size = len(opener)
    if size == 0 or ids.shape[1] < size:
        return None
    opens = _begins(ids, opener)
    if not bool(((opens & inside[:, : opens.shape[1]]).sum(dim=1) > 1).any()):
        return None
    return sole_turns(ids, inside, opener)


def closed_turns(ids: Tensor, attended: Tensor, closer: Sequence[int]) -> Tensor:
    """Where the tokens that close a user's turn end.

    Args:
        ids: (B, T) int64.
        attended: (B, T) bool, False on padding.
        closer: these tokens, one or more.

    Returns:
        (B, T) bool.
    """
    size = len(closer)
    if ids.shape[1] < size:
        return torch.zeros_like(attended)
    whole = attended.unfold(1, size, 1).all(dim=-1)
    return torch.nn.functional.pad(_begins(ids, closer) & whole, (size - 1, 0))


def _begins(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Where `tokens` begin in ids (B, T), which are no fewer, (B, T − their number + 1) bool."""
    return (ids.unfold(1, len(tokens), 1) == torch.tensor(list(tokens), device=ids.device)).all(dim=-1)


def sole_turns(ids: Tensor, inside: Tensor, opener: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`last_turn` of every row, whether that changes anything or not. Arguments and result as of `last_turns`."""
    rows = [last_turn(row[kept].tolist(), opener) for row, kept in zip(ids, inside, strict=True)]
    width = max(map(len, rows))
    cut, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for place, row in enumerate(rows):
        cut[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
    return cut.to(ids.device), mask.to(ids.device)
