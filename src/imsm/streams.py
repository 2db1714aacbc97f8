"""The two streams: one set of base weights, read with the adapter off (frozen), with it on (tuned), or as both at once.

A stream's memory is whatever reaches the base model's output head. A pre-hook on the head reads it and puts another
tensor in its place, so that everything the model does between head and logits (bias, scaling, softcapping) is done to
the interwoven memory, without a branch on any architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.cache_utils import Cache

from imsm.errors import InputError
from imsm.query import Queries
from imsm.shared import double, frozen_view, layers_below, shared_view
from imsm.views import PatchedForwardError

Replace = Callable[[Tensor], Tensor]


def nothing(memory: Tensor) -> Tensor:
    """No rows at all for the head: its logits are not wanted."""
    return memory[:, :0]


def on_device_of(module: nn.Module, value: Tensor) -> Tensor:
    """A tensor on the device of a module's weight, or where it is if that is loaded when it is needed."""
    weight = getattr(module, "weight", None)
    return value if weight is None or weight.device.type == "meta" else value.to(weight.device)


class HeadTap:
    """Reads what reaches the output head, and replaces it."""

    def __init__(self, head: nn.Module) -> None:
        self.memory: Tensor | None = None
        self._replace: Replace | None = None
        self._handle = head.register_forward_pre_hook(self._on_head)

    def remove(self) -> None:
        """Take the hook off the head."""
        self._handle.remove()

    def _on_head(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._replace is None:
            return None
        # With layers on several devices: where the gate is, and where the head brings it by itself later.
        self.memory = on_device_of(module, args[0])
        return (self._replace(self.memory), *args[1:])

    @contextmanager
    def replacing(self, replace: Replace) -> Iterator[None]:
        """Within: the head sees `replace(memory)`; afterwards `memory` holds what reached it."""
        self.memory, self._replace = None, replace
        try:
            yield
        finally:
            self._replace = None


def output_head(base: nn.Module) -> nn.Module:
    """The module that turns memories into logits.

    Raises:
        InputError: the model has none, or is not a causal language model with a decoder alone.
    """
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_output_embeddings"):
        raise InputError(f"base must be a transformers causal language model, got {type(base).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(base).__name__} is an encoder-decoder model; a causal (decoder-only) model is needed")
    head = base.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise InputError(
            f"{type(base).__name__} has no output head (get_output_embeddings() is None); load the model with "
            "AutoModelForCausalLM"
        )
    return head


def head_shape(base: nn.Module) -> tuple[int, int]:
    """Width of the output head's input, which some models project to another than that of their layers, and its rows."""
    head: Any = output_head(base)
    hidden = int(getattr(head, "in_features", None) or head.weight.shape[1])
    return hidden, int(getattr(head, "out_features", None) or head.weight.shape[0])


class Streams(nn.Module):
    """Runs a base model with a peft adapter in it as one of the two streams, or as both at once.

    Args:
        peft_model: the base model with its adapter, unmerged.

    Attributes:
        once: lowest layers that a pass of both streams computes once for both; None if there can be no such pass.
        why_two: why there can be none.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        super().__init__()
        self.peft_model = peft_model
        self.tap = HeadTap(output_head(self.base))
        self.adapters_changed()
        parameters = inspect.signature(self.base.forward).parameters
        self._accepts_positions = "position_ids" in parameters
        #: Pure state-space models name their cache otherwise.
        self.cache_name = "past_key_values" if "past_key_values" in parameters else "cache_params"
        self.once: int | None = None
        self.why_two = "it was not tried"
        #: Views, the shared ones by adapter, and the state that they were made for; in a dict, so that they are no submodules.
        self._views: dict[Any, Any] = {}

    def adapters_changed(self) -> None:
        """To be called when adapters were added or taken away, which may put modules where there were none."""
        self._switches = [
            module
            for module in self.peft_model.modules()
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]

    @property
    def base(self) -> Any:
        """The base model; the adapter's layers, if any, sit inside it."""
        return self.peft_model.get_base_model()

    @property
    def prefix_length(self) -> int:
        """Entries that the adapter puts before the sequence in the tuned stream's cache (prefix tuning)."""
        config = self.peft_model.active_peft_config
        return int(config.num_virtual_tokens) if config.is_prompt_learning else 0

    @torch.no_grad()
    def frozen_query(self, ids: Tensor, mask: Tensor, closer: Sequence[int] = ()) -> Tensor:
        """The pooled query of whole prompts (B, T) as a relevance head reads it, (B, 1, F) float32.

        `closer`: tokens that close a user's turn, if the head reads what was said before them.
        """
        self.frozen({"input_ids": ids, "attention_mask": mask, "use_cache": False}, None)
        memory, self.tap.memory = self.tap.memory, None
        assert memory is not None
        last = torch.full((len(ids), 1), ids.shape[1] - 1, device=memory.device)
        attended = mask.bool().to(memory.device)
        return Queries(attended, last).closed_by(closer, (ids.to(memory.device), attended)).read(memory)

    def _view(self, name: str) -> Any:
        """The frozen or the shared view, made anew when adapters were added or switched off."""
        switch = self._switches[0] if self._switches else None
        if getattr(switch, "merged", False):
            raise InputError(
                "the adapter is merged into the base weights, so the frozen stream is gone; call "
                "peft_model.unmerge_adapter() first"
            )
        state = (
            tuple(self.peft_model.peft_config),
            getattr(switch, "_disable_adapters", False),
            self.base.config._attn_implementation,
            self.once or 0,
        )
        if self._views.get("state") != state:
            self._views = {"state": state}
            if self.once:
                # An adapter added since the proof may reach further down.
                self.once = min(self.once, layers_below(self.base))
        key = name if name == "frozen" else (name, *self.peft_model.active_adapters)
        if key not in self._views:
            base = self.base
            self._views[key] = frozen_view(base) if name == "frozen" else shared_view(base, self.once or 0)
        return self._views[key]

    def choose(self, name: str) -> None:
        """From now on the tuned stream has the adapter of that name.

        Unlike peft's `set_adapter` it leaves alone what learns, and does not walk over the modules, which takes as long as a
        token.
        """
        for switch in self._switches:
            held = not isinstance(switch, AuxiliaryTrainingWrapper) or name in switch._adapters
            switch._active_adapter = [name] if held else []
        for model in (self.peft_model, self.peft_model.base_model):
            setattr(model, "active_adapter", name)  # noqa: B010 (peft's own types do not know it)

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        """Adapter and dropout off. Unlike peft's `disable_adapter` it leaves `requires_grad` alone."""
        training = [module for module in self.peft_model.modules() if module.training] if self.training else []
        off = [bool(switch._disable_adapters) for switch in self._switches]
        for switch in self._switches:
            switch._disable_adapters = True
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for switch, was_off in zip(self._switches, off, strict=True):
                switch._disable_adapters = was_off
            for module in training:
                module.training = True

    def frozen(self, inputs: dict[str, Any], cache: Cache | None, replace: Replace = nothing) -> Any:
        """The base model's own output, with `replace(memory)` given to its head. Memory: `tap.memory`, (B, T, d).

        Without dropout and gradients, whatever mode the model is in.
        """
        with torch.no_grad(), self.tap.replacing(replace):
            try:
                model = self._view("frozen")
            except PatchedForwardError:
                # A library (accelerate, with layers on several devices) put its own forward on the modules.
                with self._adapter_off():
                    return self.base(**self._inputs(inputs, cache))
            return model(**self._inputs(inputs, cache))

    def tuned(self, inputs: dict[str, Any], cache: Cache | None, replace: Replace = nothing) -> Any:
        """The output with the adapter on, with `replace(memory)` given to the head. Memory: `tap.memory`, (B, T, d)."""
        with self.tap.replacing(replace):
            if self.prefix_length and cache is not None and cache.get_seq_length() > 0:
                return self.base(**self._after_prefix(self._inputs(inputs, cache)))
            if self.prefix_length:
                return self.peft_model(**self._inputs(inputs, None))
            return self.peft_model(**self._inputs(inputs, cache))

    def both(self, inputs: dict[str, Any], cache: Cache | None, replace: Replace = nothing) -> Any:
        """Both streams in one pass over a batch of B rows, as if in eval mode.

        `replace` maps the memories (2B, T, d), the frozen stream's first, to what the head is given.
        """
        model, inputs = self.prepared("shared", inputs, cache)
        with self.tap.replacing(replace):
            return model(**inputs)

    def prepared(self, kind: str, inputs: dict[str, Any], cache: Cache | None) -> tuple[Any, dict[str, Any]]:
        """The module that runs the "shared", "frozen" or "tuned" pass, and what it is called with."""
        if kind != "shared":
            return self._view("frozen") if kind == "frozen" else self.base, self._inputs(inputs, cache)
        batch = next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs).shape[0]
        inputs = {name: double(value, batch) for name, value in inputs.items()}
        return self._view("shared"), self._inputs(inputs, cache)

    def _inputs(self, inputs: dict[str, Any], cache: Cache | None) -> dict[str, Any]:
        inputs = dict(inputs)
        if not self._accepts_positions:
            inputs.pop("position_ids", None)
        if cache is not None:
            inputs[self.cache_name] = cache
        return inputs

    def _after_prefix(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What peft does to its inputs for a prefix, for the steps whose cache holds the prefix already."""
        if (mask := inputs.get("attention_mask")) is not None:
            inputs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.prefix_length), mask], dim=1)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + self.prefix_length
        return inputs

    def cache_of(self, output: Any) -> Cache | None:
        """The cache that a stream's output carries."""
        return getattr(output, self.cache_name, None)
