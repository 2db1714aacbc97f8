"""Compiled decoding: one step of a static cache, as a single graph from token to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from imsm.streams import Streams

Query = tuple[Tensor | None, Tensor | None]
#: From both memories, the pooled query and a constant in place of the gate to what the head is given.
Weave = Callable[["tuple[Tensor, Tensor]", Query, "float | None"], Tensor]


class CompiledStep:
    """`torch.compile` of the shared, the frozen or the tuned pass over one token a row.

    Args:
        streams: whose pass it is.
        weave: how two memories (B, 1, d) become one.
        config: how to compile.
    """

    def __init__(self, streams: Streams, weave: Weave, config: CompileConfig) -> None:
        self.streams = streams
        self.weave = weave
        self.config = config
        self._step = torch.compile(self._traced, **config.to_dict())

    def __call__(
        self, kind: str, inputs: dict[str, Any], cache: Cache, query: Query, force_gate: float | None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, 1, V) and memories (B or 2B, 1, d) of the step.

        Args:
            kind: "shared", "frozen" or "tuned".
            inputs: of the model, for B rows.
            cache: static, of the rows that the pass has.
            query: pooled query (q̄, q̄') that the gate needs.
            force_gate: constant in its place.
        """
        model, inputs = self.streams.prepared(kind, self._with_mask(inputs, cache), cache)
        logits, memory = self._step(kind, model, inputs, query, force_gate)
        # A captured graph (CUDA) writes into the same place again at the next step.
        return logits, memory.clone()

    def _traced(
        self, kind: str, model: Any, inputs: dict[str, Any], query: Query, force_gate: float | None
    ) -> tuple[Tensor, Tensor]:
        memories: list[Tensor] = []

        def weave(memory: Tensor) -> Tensor:
            memories.append(memory)
            if kind != "shared":
                return memory
            base, tuned = memory.chunk(2)
            return self.weave((base, tuned), query, force_gate)

        with self.streams.tap.replacing(weave):
            logits = model(**inputs).logits
        return logits, memories[0]

    def _with_mask(self, inputs: dict[str, Any], cache: Cache) -> dict[str, Any]:
        """The mask as wide as the cache, so that shapes are the same at every step."""
        base, tokens = self.streams.base, inputs["input_ids"]
        make = getattr(base, "create_masks_for_generate", create_masks_for_generate)
        mask = make(
            config=base.config,
            inputs_embeds=torch.empty((*tokens.shape, 0), dtype=base.dtype, device=tokens.device),
            attention_mask=inputs.get("attention_mask"),
            past_key_values=cache,
            position_ids=inputs.get("position_ids"),
        )
        return {**inputs, "attention_mask": mask}
