"""A siamese model whose streams are mixed behind chosen layers, too."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inside.cache import InsideCache
from benchmarks.inside.gates import LayerGates
from imsm import SiameseForCausalLM
from imsm.checkpoint import load_part, save_part
from imsm.config import SiameseConfig
from imsm.errors import InputError
from imsm.gates import build_gate
from imsm.query import IGNORE, attended_tokens, example_starts
from imsm.streams import Streams

#: The file of the layers' gates in a checkpoint, beside the final one's.
LAYER_GATES = "layer_gates.safetensors"
SIGNATURE = inspect.signature(SiameseForCausalLM.forward)


class InsideForCausalLM(SiameseForCausalLM):
    """A siamese model with gates behind the layers `config.gate_layers`; without any it is a `SiameseForCausalLM`.

    `force_gate` stands in place of all gates: 1 is the base model, 0 the adapter alone. The dial turns the final one.
    """

    def __init__(self, config: SiameseConfig, streams: Streams | None = None) -> None:
        super().__init__(config, streams)
        self.layer_gates: LayerGates | None = None
        if layers := getattr(config, "gate_layers", None):
            self.gate_inside(layers)

    def gate_inside(self, layers: Sequence[int]) -> None:
        """Puts gates behind these layers, from 0, which begin at one half. Can be done once.

        Raises:
            InputError: see `LayerGates`.
        """
        config: Any = self.config
        made = LayerGates(self.base, layers, config.gate_rank, config.gate_dropout)
        self.layer_gates = made.to(next(self.get_output_embeddings().parameters()).device)
        config.gate_layers = list(layers)

    def set_final(self, gate: str) -> None:
        """Puts another gate of `imsm.GATES` over the memories; "tuned" is the tuned stream alone."""
        config: Any = self.config
        self.gate = build_gate(gate, config.hidden_size, config.gate_rank, config.gate_dropout)
        config.gate = gate

    @functools.wraps(SiameseForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `SiameseForCausalLM.forward`, for one answer a row.

        Raises:
            InputError: rows are packed or have several answers, the cache is another kind's, or a memory bank is given.
        """
        given = dict(SIGNATURE.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        given |= given.pop("kwargs", {})
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if self.layer_gates is None or tokens is None:
            return super().forward(**given)
        if given.get("base_memory") is not None:
            raise InputError("a memory bank holds no hidden states for gates behind layers; leave out base_memory")
        use_cache, cache = given.get("use_cache"), given.get("past_key_values")
        if use_cache is None:
            use_cache = given.get("labels") is None and not self.training
        if cache is None and use_cache:
            cache = given["past_key_values"] = InsideCache()
        if cache is not None and not isinstance(cache, InsideCache):
            raise InputError(f"past_key_values must be an InsideCache, got {type(cache).__name__}")
        attended = attended_tokens(given.get("attention_mask"), tokens)
        refuse_packed(given, attended)
        query = query_tokens(attended, given, cache)
        held = None if cache is None else cache.inside
        with self.layer_gates.mixing(query, held, given.get("force_gate")):
            return super().forward(**given)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As the base class, with a cache that the layers' gates can use."""
        with_cache = generation_config.use_cache is not False and self.layer_gates is not None
        if with_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = InsideCache()
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """As the base class, and the layers' gates beside the final one."""
        super().save_pretrained(save_directory, **kwargs)
        if self.layer_gates is not None:
            save_part(self.layer_gates, Path(save_directory) / LAYER_GATES)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> InsideForCausalLM:  # type: ignore[override]
        """The model saved in a folder. Arguments and errors as for the base class."""
        model = super().from_pretrained(folder, *args, **kwargs)
        assert isinstance(model, InsideForCausalLM)
        if model.layer_gates is not None:
            load_part(model.layer_gates, Path(folder) / LAYER_GATES)
        return model


def refuse_packed(given: dict[str, Any], attended: Tensor) -> None:
    """Raises `InputError` for rows of several examples or answers: they have several queries."""
    positions: Any = given.get("position_ids")
    unmasked = positions is not None and positions.dim() == 2 and given.get("attention_mask") is None
    if unmasked and bool(example_starts(positions.to(attended.device).expand_as(attended)).any()):
        raise InputError("gates behind layers take one example a row, got packed rows; set packing: false")
    if (labels := given.get("labels")) is not None:
        answer = labels != IGNORE
        starts = answer & ~nn.functional.pad(answer, (1, 0))[:, :-1]
        if bool((starts.sum(dim=1) > 1).any()):
            raise InputError("gates behind layers take one answer a row, got several; give each a record of its own")


def query_tokens(attended: Tensor, given: dict[str, Any], cache: InsideCache | None) -> Tensor:
    """Which of the new tokens are the query's, (B, T) bool: of `attended` (B, T) those before the answer.

    The prompt is told by `prompt_mask`, `prompt_length` or `labels`, in that order, as in `SiameseForCausalLM.forward`.
    Where nothing tells it, all tokens are the query's, and each sees the mean up to itself.

    Args:
        attended: not padding.
        given: arguments of `forward`.
        cache: is told the prompt's length, if the arguments have it, and tells it afterwards.
    """
    mask, length, labels = (given.get(name) for name in ("prompt_mask", "prompt_length", "labels"))
    seen = 0 if cache is None else cache.seen
    if mask is not None:
        length = mask.shape[1]
        attended = attended & nn.functional.pad(mask.bool(), (0, attended.shape[1] - length)).to(attended.device)
    if cache is not None:
        length = cache.prompt_length = cache.prompt_length if length is None else length
    place = torch.arange(attended.shape[1], device=attended.device)
    if length is not None:
        return attended & (place + seen < length)
    if labels is not None:
        answer = (labels != IGNORE).to(attended.device)
        return attended & (answer.cumsum(dim=1) == 0)
    return attended
