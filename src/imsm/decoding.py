"""Decoding by `generate`: both streams' caches, and a step as a single compiled graph from token to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, GenerationMixin
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from imsm.cache import TwinCache, joinable
from imsm.errors import InputError
from imsm.gates import Mix
from imsm.mixing import Recall, forced
from imsm.streams import Streams

Query = tuple[Tensor | None, Tensor | None]
#: From both memories, the pooled query and what the call says of the mix to what the head is given.
Weave = Callable[["tuple[Tensor, Tensor]", Query, Recall], Tensor]


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
        self, kind: str, inputs: dict[str, Any], cache: Cache, query: Query, recall: Recall
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits (B, 1, V) and memories of the step, each stream's (B, 1, d).

        Args:
            kind: "shared", "frozen" or "tuned".
            inputs: of the model, for B rows.
            cache: static, of the rows that the pass has.
            query: pooled query (q̄, q̄') that the gate needs.
            recall: what the call says of the mix.
        """
        model, inputs = self.streams.prepared(kind, self._with_mask(inputs, cache), cache)
        logits, *memories = self._step(kind, model, inputs, query, recall)
        # A captured graph (CUDA) writes into the same place again at the next step.
        base, tuned = (None if memory is None else memory.clone() for memory in memories)
        return logits, base, tuned

    def _traced(
        self, kind: str, model: Any, inputs: dict[str, Any], query: Query, recall: Recall
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        memories: list[Tensor | None] = []

        def weave(memory: Tensor) -> Tensor:
            if kind == "tuned":
                memories.extend((None, memory))
                return memory
            if kind == "frozen":
                memories.extend((memory, None))
                return memory
            base, tuned = memory.chunk(2)
            memories.extend((base, tuned))
            return self.weave((base, tuned), query, recall)

        with self.streams.tap.replacing(weave):
            logits = model(**inputs).logits
        return logits, memories[0], memories[1]

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


class TwinGenerationMixin(GenerationMixin):
    """What `generate` needs to know of two streams: their caches, the prompt's end, and how to compile a step."""

    streams: Streams
    base: Any
    config: Any
    gate: Any
    relevance: Any
    passes: Any
    device: Any
    _mix: Callable[..., Mix]
    #: Set while `generate` decodes with a compiled step.
    compiled_step: CompiledStep | None = None
    _compiled: CompiledStep | None = None

    @property
    def recent(self) -> int:
        """Of how many tokens at the end a relevance head may read the memory, each by itself; 0 without one."""
        return 0 if self.relevance is None else 1 + len(self.config.relevance_close)

    @property
    def pools_query(self) -> bool:
        """Whether the mix depends on the pooled query."""
        return self.relevance is not None or bool(self.gate.uses_query)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """One cache for each stream, of the kind the base model would use; the prompt's length fixes the query."""
        mask = model_kwargs.get("attention_mask")
        prompt_length = mask.shape[1] if mask is not None else generation_config._mask_length
        if model_kwargs.get("prompt_mask") is not None:
            prompt_length = None
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is False:
            model_kwargs.setdefault("prompt_length", prompt_length)
            return
        cache = model_kwargs["past_key_values"] = twin_cache(given)
        if given is not None:
            cache._is_user_defined = True
        # A draft goes on within the answer that it was begun for.
        if not (generation_config.is_assistant and cache.seen > 0):
            cache.begin_answer(prompt_length)
        if cache.seen > 0:
            return

        def half() -> Any:
            made: dict[str, Any] = {}
            self.base._prepare_cache_for_generation(generation_config, made, *args, **kwargs)
            return made.get(self.streams.cache_name)

        given_gate, recall = model_kwargs.get("force_gate"), model_kwargs.get("recall")
        if recall is None and given_gate is None:
            recall = self.config.recall
        force_gate = forced(given_gate, recall, model_kwargs.get("recall_floor"), model_kwargs.get("recall_ceiling"))
        # The frozen stream says first whether the other is needed at all.
        whole = generation_config.prefill_chunk_size is None and not generation_config.is_assistant
        cache.settles = given is None and whole and force_gate is None and self.relevance is not None
        if cache.settles and joinable(first := half()):
            cache.base, cache.tuned = first, half()
            return
        if force_gate not in (0, 1) and self.passes == "shared" and generation_config.prefill_chunk_size is None:
            cache.shared, cache.once = half(), self.streams.once or 0
            return
        cache.base = half() if force_gate != 0 else None
        cache.tuned = half() if force_gate != 1 else None

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Whether `generate` decodes compiled: with a static cache, on an accelerator or if a `compile_config` is given."""
        cache, wanted = model_kwargs.get("past_key_values"), generation_config.compile_config is not None
        static = (
            isinstance(cache, TwinCache)
            and len(cache.parts) == 1
            and cache.parts[0].is_compileable
            and type(cache.parts[0]) is not DynamicCache
            and not self.streams.prefix_length
            and len(set((getattr(self.base, "hf_device_map", None) or {}).values())) <= 1
        )
        if wanted and not static:
            raise InputError(
                "compile_config needs cache_implementation='static', streams that share their passes "
                f"(model.passes is {self.passes!r}) and a base model on one device"
            )
        return static and not generation_config.disable_compile and (wanted or self.device.type != "cpu")

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """`forward` with decoding steps compiled; prompts are read uncompiled."""
        config = compile_config or CompileConfig()
        if self._compiled is None or self._compiled.config != config:
            self._compiled = CompiledStep(self.streams, lambda *given: self._mix(*given).memory, config)
        compiled = self._compiled

        def call(**kwargs: Any) -> Any:
            self.compiled_step = compiled
            try:
                return self(**kwargs)  # type: ignore[operator]
            finally:
                self.compiled_step = None

        return call

    def _decode_compiled(
        self, step: CompiledStep, inputs: dict[str, Any], cache: TwinCache, recall: Recall, attended: Tensor
    ) -> Tensor:
        """Logits (B, 1, V) of one compiled step; the cache, and the query in it, are there already."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        kind = "shared" if cache.shared is not None else "frozen" if cache.base is not None else "tuned"
        query: Query = (None, None)
        if recall.force is None and self.pools_query:
            assert cache.query is not None
            query = cache.query
        logits, base, tuned = step(kind, inputs, cache.parts[0], query, recall)
        cache.record(base, tuned, attended, inputs.get("input_ids"), recent=self.recent)
        return logits


def twin_cache(cache: Any) -> TwinCache:
    """The cache given, or an empty one.

    Raises:
        InputError: it is another kind of cache.
    """
    if cache is None:
        return TwinCache()
    if not isinstance(cache, TwinCache):
        raise InputError(
            f"past_key_values must be a TwinCache (imsm.TwinCache() is an empty one), got {type(cache).__name__}"
        )
    return cache
