"""How the two memories of a call become one: a constant, or the gate behind the relevance head, turned by the dial."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imsm.errors import InputError
from imsm.gates import Dial, Mix, interweave
from imsm.relevance import RelevanceHead

#: One tensor of the frozen stream, one of the tuned; None for a stream that was not run.
Pair = tuple[Tensor | None, Tensor | None]


class Recall(NamedTuple):
    """What a call says about the mix.

    force: a constant in place of the learned mix; None has it learned.
    dial: turns the learned mix; None leaves it as it is.
    """

    force: float | None = None
    dial: Dial | None = None

    def at(self, where: Tensor) -> Recall:
        """The same for the positions of `where` (B, T) alone, row by row."""
        if self.dial is None or all(part.dim() == 0 for part in self.dial):
            return self
        rows = (part if part.dim() == 0 else part.expand(*where.shape, 1)[where] for part in self.dial)
        return Recall(self.force, Dial(*rows))


def recall_of(
    force_gate: float | None,
    recall: float | Tensor | None,
    floor: float | Tensor | None,
    ceiling: float | Tensor | None,
    rows: int,
    device: torch.device,
) -> Recall:
    """The settings of a call as tensors on `device`; without a dial where it would change nothing.

    Raises:
        InputError: a value that is no number or out of range, or a tensor that has not one value a row.
    """
    if all(
        value is None or (not isinstance(value, Tensor) and value == plain)
        for value, plain in ((recall, 0), (floor, 0), (ceiling, 1))
    ):
        return Recall(force_gate)
    if force_gate is not None:
        raise InputError(
            "force_gate leaves recall, recall_floor and recall_ceiling nothing to turn; give one or the others"
        )
    force = forced(force_gate, recall, floor, ceiling)
    if force is not None:
        return Recall(force)
    dial = Dial(
        *(
            _part(name, plain if value is None else value, rows, device)
            for name, value, plain in (
                ("recall", recall, 0),
                ("recall_floor", floor, 0),
                ("recall_ceiling", ceiling, 1),
            )
        )
    )
    # Numbers are weighed as such: on a GPU, to look at a tensor is to wait for it, at every token.
    given = [plain if value is None else value for value, plain in ((floor, 0), (ceiling, 1))]
    low, high = given if all(isinstance(x, (int, float)) for x in given) else (dial.floor, dial.ceiling)
    if _any(low < 0) or _any(high > 1) or _any(low > high):
        raise InputError(
            f"recall_floor and recall_ceiling must be 0 ≤ floor ≤ ceiling ≤ 1, got {_shown(floor, 0)} and "
            f"{_shown(ceiling, 1)}"
        )
    return Recall(None, dial)


def forced(
    force_gate: float | None,
    recall: float | Tensor | None = None,
    floor: float | Tensor | None = None,
    ceiling: float | Tensor | None = None,
) -> float | None:
    """The constant that a call puts in place of the mix: `force_gate`, or an end of the dial."""
    bounded = any(
        isinstance(x, Tensor) or x != plain
        for x, plain in ((0 if floor is None else floor, 0), (1 if ceiling is None else ceiling, 1))
    )
    if isinstance(recall, (int, float)) and math.isinf(recall) and not bounded:
        return 1.0 if recall > 0 else 0.0
    return force_gate


def _shown(value: float | Tensor | None, plain: float) -> object:
    return plain if value is None else value.tolist() if isinstance(value, Tensor) else value


def _any(found: bool | Tensor) -> bool:
    return bool(found.any()) if isinstance(found, Tensor) else found


def _part(name: str, value: float | Tensor, rows: int, device: torch.device) -> Tensor:
    try:
        part = torch.as_tensor(value, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a number, or a tensor of one a row, got {value!r}") from error
    if math.isnan(value) if isinstance(value, (int, float)) else bool(part.isnan().any()):
        raise InputError(f"{name} must be a number, got {value!r}")
    if part.dim() == 0:
        return part
    if part.shape != (rows,):
        raise InputError(f"{name} must be a number, or one for each of {rows} rows, got the shape {tuple(part.shape)}")
    return part[:, None, None]


def mix(gate: nn.Module, relevance: RelevanceHead | None, memories: Pair, query: Pair, recall: Recall) -> Mix:
    """The interwoven memory of both streams, or the memory of the one that was run.

    Args:
        gate: a gate of `imsm.GATES`.
        relevance: the head in front of it, if there is one.
        memories: h and h', (..., d).
        query: pooled queries q̄ and q̄', which broadcast to them; behind q̄ what the head reads besides.
        recall: what the call says.
    """
    base, tuned = memories
    wide = query[0]
    if wide is not None and base is not None:
        query = (wide[..., : base.shape[-1]], query[1])
    if recall.force is not None:
        memory = base if tuned is None else tuned if base is None else interweave(base, tuned, recall.force)
        assert memory is not None
        return Mix(memory, torch.full_like(memory, recall.force, dtype=torch.float32))
    assert base is not None and tuned is not None
    dial = recall.dial
    found: Mix = gate(base, tuned, *query, dial) if dial is not None else gate(base, tuned, *query)
    if relevance is None:
        return found
    assert wide is not None
    other = is_other(relevance, wide, dial)
    most = found.gate.new_tensor(1.0) if dial is None else dial.ceiling
    return Mix(torch.where(other, interweave(base, tuned, most), found.memory), torch.where(other, most, found.gate))


def is_other(relevance: RelevanceHead, query: Tensor, dial: Dial | None) -> Tensor:
    """Whether queries are not the task's, (..., 1) bool.

    Args:
        relevance: the head, which reads F values.
        query: (..., F), or with others before these.
        dial: shifts its logits.
    """
    logit = relevance(query[..., -relevance.weight.numel() :])
    return (logit if dial is None else logit + dial.shift) > 0


def sole_stream(gate: nn.Module, relevance: RelevanceHead | None, query: Tensor | None, recall: Recall) -> float | None:
    """The constant that the mix of a whole batch is, by its queries alone: 1 for the frozen stream, 0 for the tuned one.

    None if there is no such constant. Exact: the head is sharp.

    Args:
        query: (B, 1, F), what the head reads of the frozen pooled queries, or with others before these.
    """
    if recall.force is not None:
        return recall.force if recall.force in (0, 1) else None
    assert relevance is not None and query is not None
    other = is_other(relevance, query, recall.dial)
    if bool(other.all()):
        return 1.0 if recall.dial is None or bool((recall.dial.ceiling == 1).all()) else None
    return 0.0 if not bool(other.any()) and adapter_alone(gate, recall.dial) else None


def adapter_alone(gate: nn.Module, dial: Dial | None) -> bool:
    """Whether the mix of queries that are the task's is the tuned memory alone."""
    if not getattr(gate, "tuned_alone", False):
        return False
    return dial is None or bool(((dial.floor == 0) & (dial.shift != math.inf)).all())


def refuse_bank(banked: Pair, more: bool, how: Recall, pools_query: bool, relevance: RelevanceHead | None) -> None:
    """Raises `InputError` if a bank's (memory, query) cannot stand in for the frozen stream.

    Args:
        banked: what is given.
        more: something besides the loss is wanted.
        how: what the call says of the mix.
        pools_query: whether the mix depends on the query.
        relevance: the head, if there is one.
    """
    if more or how != Recall():
        raise InputError(
            "base_memory stands in for the frozen stream where nothing but the loss is wanted: give labels with it, and "
            "leave out use_cache, past_key_values, output_logits, output_gate, output_memories, force_gate and recall"
        )
    if relevance is not None:
        raise InputError("a memory bank has nothing for a relevance head; take it away first: set_relevance(None)")
    if pools_query and banked[1] is None:
        raise InputError("the gate needs base_query beside base_memory")


def recalled(frozen: Pair, tuned: Pair) -> tuple[Pair, Pair]:
    """Memories, and pooled queries, of both streams from (memory, query) of each, the frozen ones as a bank gave them.

    Raises:
        InputError: the frozen ones are not one for each supervised position.
    """
    memory, query = tuned
    assert memory is not None
    for name, given in zip(("base_memory", "base_query"), frozen, strict=True):
        if given is not None and given.shape != memory.shape:
            raise InputError(
                f"{name} must be (supervised positions, hidden size) = {tuple(memory.shape)}, got {tuple(given.shape)}"
            )
    base, base_query = (None if given is None else given.to(memory.device) for given in frozen)
    return (base, memory), (base_query if query is not None else None, query)
