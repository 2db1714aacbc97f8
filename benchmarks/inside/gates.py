"""Gates behind decoder layers, each with its own weights; what they mix is what the tuned stream's next layer reads.

Behind layer l, with h and h' (B, T, d) its hidden states in the frozen and the tuned stream, and n(x) = x / rms(x):

    q̄_t, q̄'_t = mean of n(h), n(h') over the query's tokens up to t
    gate      = sigmoid( [q̄ ; n(h) ; n(h') ; q̄'] · W_A · W_B )      W_A: (4d, r), W_B: (r, d), no bias
    h'        ← gate ∘ h + (1 − gate) ∘ h'

That is the paper's gate (paper: "Query-aware gate", open end in its outlook) with two differences. The scale of hidden
states grows with the layers, and a few tokens and dimensions are hundreds of times as large as the rest; so the gate reads
them with a root mean square of 1, as the final gate reads states behind the model's last norm, and mixes them as they are.
And an answer's token sees the mean over the whole query, but a token of the query only over what has been read up to it:
its mixed state is read by the layers above, so anything later in its mean would come back by attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from imsm.errors import InputError
from imsm.gates import QueryAwareGate, interweave
from imsm.query import RunningQuery, pool
from imsm.shared import decoder_layers, layers_below


def rms_normalised(x: Tensor) -> Tensor:
    """x / rms(x) over the last axis, float32."""
    return nn.functional.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


class LayerGate(QueryAwareGate):
    """The paper's gate on normalised hidden states; the pooled queries given are means of such states."""

    def weight(self, *features: Tensor) -> Tensor:
        base_query, base, tuned, tuned_query = features
        return super().weight(base_query, rms_normalised(base), rms_normalised(tuned), tuned_query)


def refuse_layers(layers: Sequence[int], count: int, below: int = 0) -> None:
    """Raises `InputError` unless `layers` are some of a model's `count` layers, each once, and not `below` the adapter."""
    if not layers or sorted(set(layers)) != sorted(layers) or not all(0 <= layer < count for layer in layers):
        raise InputError(
            f"layers must be different numbers from 0 to {count - 1}, as the base model has {count} layers; got "
            f"{', '.join(map(str, layers)) or 'none'}"
        )
    if same := [layer for layer in layers if layer < below]:
        raise InputError(
            f"both streams are the same behind layer {same[0]}, as the adapter begins in layer {below}; give layers from "
            f"{below} on"
        )


@dataclass
class Call:
    """What the gates need to know of a call under way.

    query: (B, T) bool, the new tokens that are the query's.
    held: by layer the sums of normalised states over the query's tokens that a cache holds, of both streams; None without
        a cache.
    forced: a constant in place of the learned gates.
    frozen: states of the frozen stream whose counterparts are still to come, by layer.
    """

    query: Tensor
    held: dict[str, RunningQuery] | None
    forced: float | None
    frozen: dict[str, Tensor] = field(default_factory=dict)


class LayerGates(nn.Module):
    """The gates behind some of a base model's decoder layers.

    A hook on each layer serves every view of the base model. Where both streams share a pass, it is given the states of
    both; where they take two, the frozen one comes first, and its states wait for the tuned one's.

    Args:
        base: the base model with the adapter in it.
        layers: numbers from 0.
        rank, dropout: of each gate.

    Attributes:
        gates: by layer.

    Raises:
        InputError: there is no such layer, or the streams are the same behind it.
    """

    def __init__(self, base: Any, layers: Sequence[int], rank: int, dropout: float) -> None:
        super().__init__()
        found = decoder_layers(base)
        refuse_layers(layers, len(found), layers_below(base))
        width = int(base.config.get_text_config(decoder=True).hidden_size)
        self.gates = nn.ModuleDict({str(layer): LayerGate(width, rank, dropout) for layer in layers})
        self._call: Call | None = None
        for layer in layers:
            found[layer].register_forward_hook(self._behind(str(layer)))

    @contextmanager
    def mixing(
        self, query: Tensor, held: dict[str, RunningQuery] | None = None, forced: float | None = None
    ) -> Iterator[None]:
        """Within, for one call of the streams: the tuned one is mixed. Arguments as the fields of `Call`."""
        self._call = Call(query, held, forced)
        try:
            yield
        finally:
            self._call = None

    def _behind(self, layer: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            call = self._call
            if call is None:
                return None
            states = output[0] if isinstance(output, tuple) else output
            if states.shape[0] == 2 * call.query.shape[0]:
                base, tuned = states.chunk(2)
                states = torch.cat([base, self._mixed(call, layer, base, tuned)])
            elif layer not in call.frozen:
                # A stream that is run alone comes to here, too, and stays as it is.
                call.frozen[layer] = states
                return None
            else:
                states = self._mixed(call, layer, call.frozen.pop(layer), states)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    def _mixed(self, call: Call, layer: str, base: Tensor, tuned: Tensor) -> Tensor:
        """What layer and frozen stream make of the tuned states: all (B, T, d)."""
        states = rms_normalised(base), rms_normalised(tuned)
        past = None if call.held is None else call.held.get(layer)
        if call.held is not None:
            call.held[layer] = added(past, *states, call.query)
        if call.forced is not None:
            return interweave(base, tuned, call.forced)
        place = torch.arange(call.query.shape[1], device=call.query.device).expand_as(call.query)
        sums, count = ((None, None), None) if past is None else ((past.base, past.tuned), past.count)
        means = [pool(state, call.query, place, total, count) for state, total in zip(states, sums, strict=True)]
        mixed: Tensor = self.gates[layer](base, tuned, *means).memory
        return mixed


def added(past: RunningQuery | None, base: Tensor, tuned: Tensor, query: Tensor) -> RunningQuery:
    """The sums with those of new states (B, T, d) at the tokens of `query` (B, T)."""
    weights = query.float()
    new, new_tuned = (torch.bmm(weights[:, None], state.detach()).squeeze(1) for state in (base, tuned))
    count = weights.sum(dim=1, keepdim=True)
    if past is None:
        return RunningQuery(new, new_tuned, count)
    assert past.base is not None and past.tuned is not None
    return RunningQuery(past.base + new, past.tuned + new_tuned, past.count + count)
