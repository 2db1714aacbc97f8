"""Gates: how the two memories of a token become one (paper: "Interweaving", equations 3 to 5, and its ablations).

Every gate has the same `forward`; a new variant is one class and one row of `GATES`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from imsm.errors import InputError


class Mix(NamedTuple):
    """What a gate gives back.

    memory: the interwoven memory h*, (..., d), in the dtype of the tuned memory.
    gate: weight of the frozen memory, (..., d), float32.
    """

    memory: Tensor
    gate: Tensor


class Dial(NamedTuple):
    """How far a gate is turned towards the base model, after training.

    shift: added to the gate's logits; () or (B, 1, 1), one for each row. ∞ is the base model, −∞ the adapted one.
    floor, ceiling: least and greatest weight of the frozen memory.
    """

    shift: Tensor
    floor: Tensor
    ceiling: Tensor

    def turn(self, gate: Tensor) -> Tensor:
        """The weight of the frozen memory, (..., d) float32, after the turn of `gate` (..., d)."""
        shift = self.shift
        turned = torch.sigmoid(torch.logit(gate) + torch.where(torch.isinf(shift), 0.0, shift))
        turned = torch.where(torch.isinf(shift), (shift > 0).float(), turned)
        return torch.minimum(torch.maximum(turned, self.floor), self.ceiling)


def interweave(base: Tensor, tuned: Tensor, gate: Tensor | float) -> Tensor:
    """h* = gate ∘ h + (1 − gate) ∘ h', in float32, returned in the dtype of `tuned`.

    `gate` 1 gives `base` exactly, 0 gives `tuned` exactly.
    """
    return (gate * base.float() + (1 - gate) * tuned.float()).to(tuned.dtype)


def low_rank(x: Tensor, down: nn.Linear, up: nn.Linear, dropout: nn.Dropout) -> Tensor:
    """x · W_A · W_B, dropout after each map: (..., in) to (..., out), in float32."""
    # Float32 even if the model was cast as a whole, or runs under autocast.
    with torch.autocast(x.device.type, enabled=False):
        x = dropout(nn.functional.linear(x.float(), down.weight.float()))
        return dropout(nn.functional.linear(x, up.weight.float()))


def dialled(gate: Tensor, dial: Dial | None) -> Tensor:
    """The gate, turned if there is a dial."""
    return gate if dial is None else dial.turn(gate)


class TokenGate(nn.Module):
    """gate = sigmoid([h ; h'] · W_A · W_B), the paper's "w/o query". W_A: (2d, r), W_B: (r, d)."""

    inputs = 2
    uses_query = False

    def __init__(self, hidden_size: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(self.inputs * hidden_size, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, hidden_size, bias=False, dtype=torch.float32)
        self.dropout = nn.Dropout(dropout)
        # At the start the gate is exactly one half: neither memory is preferred.
        nn.init.zeros_(self.up.weight)

    def weight(self, *features: Tensor) -> Tensor:
        """The gate's value, (..., d) float32, from the concatenated features; a query may stand for all positions."""
        x = torch.cat(torch.broadcast_tensors(*(feature.float() for feature in features)), dim=-1)
        return torch.sigmoid(low_rank(x, self.down, self.up, self.dropout))

    def forward(
        self,
        base: Tensor,
        tuned: Tensor,
        base_query: Tensor | None,
        tuned_query: Tensor | None,
        dial: Dial | None = None,
    ) -> Mix:
        """Memories h, h' (..., d) and pooled queries q̄, q̄', which broadcast to them, to the interwoven memory."""
        gate = dialled(self.weight(base, tuned), dial)
        return Mix(interweave(base, tuned, gate), gate)


class QueryAwareGate(TokenGate):
    """gate = sigmoid([q̄ ; h ; h' ; q̄'] · W_A · W_B), the paper's gate. W_A: (4d, r), W_B: (r, d)."""

    inputs = 4
    uses_query = True

    def forward(
        self,
        base: Tensor,
        tuned: Tensor,
        base_query: Tensor | None,
        tuned_query: Tensor | None,
        dial: Dial | None = None,
    ) -> Mix:
        assert base_query is not None and tuned_query is not None
        gate = dialled(self.weight(base_query, base, tuned, tuned_query), dial)
        return Mix(interweave(base, tuned, gate), gate)


class AverageGate(nn.Module):
    """h* = 0.5 h + 0.5 h', the paper's "w/o gate". Nothing to learn."""

    uses_query = False

    def __init__(self, hidden_size: int, rank: int, dropout: float) -> None:
        super().__init__()

    def forward(
        self,
        base: Tensor,
        tuned: Tensor,
        base_query: Tensor | None,
        tuned_query: Tensor | None,
        dial: Dial | None = None,
    ) -> Mix:
        gate = dialled(torch.full_like(base, 0.5, dtype=torch.float32), dial)
        return Mix(interweave(base, tuned, gate), gate)


class TunedGate(nn.Module):
    """h* = h': the adapted model alone. Nothing to learn; behind a relevance head, each query has one mind."""

    #: A finite turn of the dial changes nothing.
    tuned_alone = True

    uses_query = False

    def __init__(self, hidden_size: int, rank: int, dropout: float) -> None:
        super().__init__()

    def forward(
        self,
        base: Tensor,
        tuned: Tensor,
        base_query: Tensor | None,
        tuned_query: Tensor | None,
        dial: Dial | None = None,
    ) -> Mix:
        gate = dialled(torch.zeros_like(tuned, dtype=torch.float32), dial)
        return Mix(tuned if dial is None else interweave(base, tuned, gate), gate)


class ResidualGate(TokenGate):
    """The token mix m, then 0.5 h + 0.5 m: the frozen memory never weighs less than one half."""

    def weight(self, *features: Tensor) -> Tensor:
        return 0.5 + 0.5 * super().weight(*features)


class ProjectedGate(TokenGate):
    """The token mix m, then a low-rank map [h ; m] · W_C · W_D. W_C: (2d, r), W_D: (r, d).

    `Mix.gate` is the token mix's gate.
    """

    def __init__(self, hidden_size: int, rank: int, dropout: float) -> None:
        super().__init__(hidden_size, rank, dropout)
        self.project_down = nn.Linear(2 * hidden_size, rank, bias=False, dtype=torch.float32)
        self.project_up = nn.Linear(rank, hidden_size, bias=False, dtype=torch.float32)

    def forward(
        self,
        base: Tensor,
        tuned: Tensor,
        base_query: Tensor | None,
        tuned_query: Tensor | None,
        dial: Dial | None = None,
    ) -> Mix:
        memory, gate = super().forward(base, tuned.float(), base_query, tuned_query, dial)
        both = torch.cat([base.float(), memory], dim=-1)
        return Mix(low_rank(both, self.project_down, self.project_up, self.dropout).to(tuned.dtype), gate)


class QueryBlendedGate(TokenGate):
    """h ← 0.5 h + 0.5 q̄ and h' ← 0.5 h' + 0.5 q̄', then the token mix."""

    uses_query = True

    def forward(
        self,
        base: Tensor,
        tuned: Tensor,
        base_query: Tensor | None,
        tuned_query: Tensor | None,
        dial: Dial | None = None,
    ) -> Mix:
        assert base_query is not None and tuned_query is not None
        blended, blended_tuned = 0.5 * base.float() + 0.5 * base_query, 0.5 * tuned.float() + 0.5 * tuned_query
        memory, gate = super().forward(blended, blended_tuned, None, None, dial)
        return Mix(memory.to(tuned.dtype), gate)


GATES: dict[str, type[nn.Module]] = {
    "query_aware": QueryAwareGate,
    "token": TokenGate,
    "average": AverageGate,
    "tuned": TunedGate,
    "residual": ResidualGate,
    "projected": ProjectedGate,
    "query_blended": QueryBlendedGate,
}


def build_gate(name: str, hidden_size: int, rank: int, dropout: float) -> nn.Module:
    """The gate `name` for memories of width `hidden_size`.

    Raises:
        InputError: an unknown name, a rank that is not in [1, hidden_size), a dropout outside [0, 1).
    """
    if name not in GATES:
        raise InputError(f"gate must be one of {', '.join(GATES)}, got {name!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < hidden_size:
        raise InputError(f"gate_rank must be a positive integer below the hidden size {hidden_size}, got {rank!r}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise InputError(f"gate_dropout must be a number in [0, 1), got {dropout!r}")
    return GATES[name](hidden_size, rank, dropout)
