"""The siamese model: frozen and tuned stream, a gate over their memories, the shared output head."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from imsm import checkpoint
from imsm.building import attach_adapter, base_shape, enable_checkpointing, load_base
from imsm.cache import TwinCache
from imsm.config import DEFAULT_TASK, SiameseConfig
from imsm.decoding import TwinGenerationMixin, twin_cache
from imsm.dispatch import TaskCalls, by_task
from imsm.errors import InputError
from imsm.gates import Mix, build_gate
from imsm.lock import CallLock
from imsm.loss import answer_loss
from imsm.mixing import Pair, Recall, mix, recall_of, recalled, refuse_bank, sole_stream
from imsm.query import IGNORE, Queries, attended_tokens, example_starts, kept_positions, kept_queries, pooled
from imsm.relevance import build_head
from imsm.streams import Streams, nothing, on_device_of
from imsm.turns import last_turns


@dataclass
class SiameseOutput(ModelOutput):
    """What `SiameseForCausalLM.forward` returns.

    loss: () float32, mean cross-entropy over the supervised positions; with labels only.
    logits: (B, K, V), K the positions that `logits_to_keep` keeps; with labels only if `output_logits`.
    past_key_values: the two streams' caches.
    gate: (B, K, d) float32, weight of the frozen memory; on request.
    base_memory, tuned_memory: (B, K, d), the two memories; on request.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: TwinCache | None = None
    gate: Tensor | None = None
    base_memory: Tensor | None = None
    tuned_memory: Tensor | None = None


class SiameseForCausalLM(TaskCalls, PreTrainedModel, TwinGenerationMixin):
    """A causal language model that keeps both minds: the base model's and the adapter's (paper: "Methodology").

    Build it with `from_base`, load it with `from_pretrained`. `peft_model` and `gate` are its two parts;
    `gate.down.weight` is W_A (r, 4d) and `gate.up.weight` W_B (d, r). `relevance`, if there is one, is the head in front
    of the gate that leaves to the base model what is not the task's.
    """

    config_class = SiameseConfig
    base_model_prefix = "streams"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # whatever the base was loaded with is used
    # Of the two bases, PreTrainedModel's would win, which compiles the whole forward for every length of the mask.
    get_compiled_call = TwinGenerationMixin.get_compiled_call  # type: ignore[assignment]
    # The loss below divides by `num_items_in_batch`, so Trainer's accumulation is exact.
    accepts_loss_kwargs = True

    def __init__(self, config: SiameseConfig, streams: Streams | None = None) -> None:
        if streams is None:
            raise InputError(
                "a siamese model is built on a base model: use SiameseForCausalLM.from_base(base, peft_config) or "
                "SiameseForCausalLM.from_pretrained(folder)"
            )
        super().__init__(config)
        self.call_lock = CallLock()
        self.streams = streams
        self._two_passes = False
        head = self.base.get_output_embeddings()
        self.gate: nn.Module = build_gate(config.gate, config.hidden_size, config.gate_rank, config.gate_dropout)
        self.relevance = build_head(config.relevance, config.hidden_size, config.relevance_close)
        self.parked, self.router = nn.ModuleDict(), None
        for part in filter(None, (self.gate, self.relevance)):
            part.to(next(head.parameters()).device)
        self.generation_config = copy.deepcopy(self.base.generation_config)
        self.post_init()

    # -- building, saving, loading -----------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | str | os.PathLike[str],
        peft_config: PeftConfig | str | os.PathLike[str],
        *,
        gate: str = "query_aware",
        gate_rank: int = 8,
        gate_dropout: float = 0.1,
        task: str = DEFAULT_TASK,
        **base_kwargs: Any,
    ) -> SiameseForCausalLM:
        """A siamese model on `base`, whose weights are held once and stay as they are.

        Args:
            base: a loaded causal language model, or its Hub name or folder.
            peft_config: any peft configuration, or the folder or Hub name of an adapter trained with peft.
            gate: a key of `imsm.GATES`.
            gate_rank: rank r of the gate's two maps.
            gate_dropout: dropout after each of them, in training.
            task: the task's name; `add_task` adds others.
            base_kwargs: given to `AutoModelForCausalLM.from_pretrained` when `base` is a name or folder.

        Raises:
            InputError: base or adapter cannot work in a siamese model; the message says why.
        """
        model, revision = load_base(base, base_kwargs)
        config = SiameseConfig(
            **base_shape(model),
            base_model=model.config._name_or_path or None,
            base_revision=revision,
            gate=gate,
            gate_rank=gate_rank,
            gate_dropout=gate_dropout,
            tasks=[task],
        )
        build_gate(gate, config.hidden_size, gate_rank, gate_dropout)  # refuse before the base is touched
        return cls(config, attach_adapter(model, peft_config, task))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        base: PreTrainedModel | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> SiameseForCausalLM:
        """The model saved in a folder (or Hub repository) by `save_pretrained`, in eval mode.

        Args:
            pretrained_model_name_or_path: folder or Hub name.
            base: where the base model comes from instead of the name in the folder's `config.json`.
            kwargs: `revision`, `token`, `cache_dir` and the like for the folder; the rest (`dtype`, `device_map`, …)
                for the base model.

        Raises:
            InputError: the folder is incomplete, of another base model, or from a newer version.
        """
        return checkpoint.load(cls, pretrained_model_name_or_path, base, kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Writes config, adapter (peft's format), gate, relevance head, stored queries and model card, and the further tasks; never
        the base weights.

        `push_to_hub=True` with `repo_id` uploads the folder. Files are written beside and renamed into place.
        """
        checkpoint.save(self, save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Uploads what `save_pretrained` writes, with a model card. Returns the commit's address."""
        return checkpoint.push(self, repo_id, **kwargs)

    def init_weights(self) -> None:
        """Nothing to do: base, adapter and gate arrive initialised, and transformers would draw them anew."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do, see `init_weights`."""

    # -- the two parts -----------------------------------------------------------------------------------------------

    @property
    def peft_model(self) -> PeftModel:
        """The base model with the adapter in it."""
        return self.streams.peft_model

    @property
    def base(self) -> Any:
        """The base model (the adapter's layers, if any, sit inside it)."""
        return self.streams.base

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Trades compute for memory in the tuned stream; the frozen stream keeps no activations anyway."""
        if self.streams.prefix_length:
            raise InputError(
                "gradient checkpointing drops the cache that prefix tuning lives in; switch one of them off"
            )
        settings = kwargs.pop("gradient_checkpointing_kwargs", activation_checkpointing_kwargs)
        enable_checkpointing(self.base, settings, *args, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # type: ignore[assignment]

    def activation_checkpointing_disable(self) -> None:
        base = self.base
        (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()

    gradient_checkpointing_disable = activation_checkpointing_disable

    # -- forward -----------------------------------------------------------------------------------------------------

    @by_task
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        past_key_values: TwinCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_gate: bool = False,
        output_memories: bool = False,
        output_logits: bool = False,
        force_gate: float | None = None,
        recall: float | Tensor | None = None,
        recall_floor: float | Tensor | None = None,
        recall_ceiling: float | Tensor | None = None,
        prompt_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        base_memory: Tensor | None = None,
        base_query: Tensor | None = None,
        task: str | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SiameseOutput | tuple[Any, ...]:
        """Both streams over the same tokens, their memories interwoven, the head on the mix (paper: equations 1 to 6).

        Args:
            input_ids: (B, T) int64, the new tokens (or `inputs_embeds`, (B, T, d)).
            attention_mask: (B, past + T), 0 on padding (either side).
            position_ids: (B, T), for models that take them. Where they restart, with neither mask nor cache, another
                example begins that sees nothing of the one before.
            labels: (B, T), −100 where nothing is scored. Each run of other values is an answer.
            prompt_mask: (B, T), nonzero on the query's tokens. Without it an answer's query is all that precedes it
                according to `labels` or `prompt_length`; without those, each position's is everything up to itself.
            past_key_values: the cache that an earlier call returned.
            use_cache: return a cache (default: yes, except in training or with labels).
            logits_to_keep: give logits of the last so many positions (0: all), or of these indices.
            output_gate, output_memories: also return the gate, the two memories.
            output_logits: with labels, also give logits; otherwise the head runs on supervised positions alone.
            force_gate: use this constant in place of the learned mix: 1 is the base model, 0 the adapted one. The
                stream that has no say is not run.
            recall: the dial: added to the logits of gate and relevance head, one number or one for each row, (B,). 0 is the
                mix as trained, ∞ the base model, −∞ the adapted one. Unless given it is `config.recall`, in training 0.
            recall_floor, recall_ceiling: least and greatest weight of the frozen memory, 0 and 1 unless given.
            prompt_length: leading tokens (padding and cached ones counted) that are the query; set by `generate`.
            num_items_in_batch: divisor of the loss instead of the number of supervised positions.
            base_memory: (N, d), the frozen memories of the supervised positions, row by row; with labels only. The
                frozen stream is not run then.
            base_query: (N, d), their frozen pooled queries, for gates that use the query.
            task: of several tasks the one that is asked. Otherwise each row's query finds its own (without a boundary, all
                of the row is the query for that); a cache that you step by hand is for rows of one task.

        Raises:
            InputError: inputs that contradict each other.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise InputError("forward needs input_ids or inputs_embeds")
        if use_cache is None:
            use_cache = labels is None and not self.training
        use_cache = use_cache or past_key_values is not None
        cache = twin_cache(past_key_values) if use_cache else None
        banked: Pair | None = None if base_memory is None else (base_memory, base_query)
        # With layers on several devices, where the memories are brought to.
        attended = on_device_of(self.get_output_embeddings(), attended_tokens(attention_mask, tokens))
        device = attended.device
        if recall is None and force_gate is None and not self.training:
            recall = self.config.recall
        how = recall_of(force_gate, recall, recall_floor, recall_ceiling, tokens.shape[0], device)
        if cache is not None and cache.sole is not None and how.force is None:
            how = Recall(cache.sole)
        run_base, run_tuned = (output_memories or how.force != 0), (output_memories or how.force != 1)
        if banked is not None:
            run_base = False
            more = labels is None or use_cache or output_logits or output_gate or output_memories
            refuse_bank(banked, more, how, self.pools_query, self.relevance)
        if cache is not None:
            cache.require(base=run_base, tuned=run_tuned)
        length = tokens.shape[1]
        if (
            self.compiled_step is not None
            and cache is not None
            and length == 1
            and not (output_gate or output_memories)
        ):
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
            decoded = self._decode_compiled(self.compiled_step, inputs, cache, how, attended)
            return SiameseOutput(logits=decoded, past_key_values=cache)
        first = None
        if position_ids is not None and position_ids.dim() == 2 and attention_mask is None and not use_cache:
            first = example_starts(position_ids.to(attended.device).expand_as(attended))
            first = first if bool(first.any()) else None  # one example a row: nothing is packed
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            **kwargs,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}

        supervised = targets = None
        if labels is not None:
            # Position t is scored on token t + 1.
            targets = nn.functional.pad(labels.to(device)[:, 1:], (0, 1), value=IGNORE)
            supervised = targets != IGNORE
        answers_only = supervised is not None and not (output_logits or output_gate or output_memories)
        kept = slice(0, length) if supervised is not None else kept_positions(logits_to_keep, length)
        extras: dict[str, Tensor | None] = {}
        queries: Queries | None = None
        if how.force is None and self.pools_query and (cache is None or cache.query is None):
            past = cache.past_sums(self.relevance is not None) if cache is not None else None
            if prompt_length is None and cache is not None:
                prompt_length = cache.prompt_length
            queries = kept_queries(
                attended,
                kept,
                labels=None if labels is None else labels.to(device),
                prompt_mask=prompt_mask,
                prompt_length=prompt_length,
                first=first,
                seen=cache.seen if cache is not None else 0,
                past_count=None if past is None else past.count,
            )
        turn = cut = None
        if self.relevance is not None and queries is not None:
            said = None if input_ids is None else (input_ids.to(device), queries.inside)
            if said is not None and cache is not None:
                said = cache.conversation(*said)
            if said is not None and queries.prompts is not None:
                cut = last_turns(*said, self.config.relevance_turn)
            queries = queries.closed_by(self.config.relevance_close, said)
        if cut is not None:
            turn = self.streams.frozen_query(*cut, self.config.relevance_close)

        def weave(base: Tensor | None, tuned: Tensor | None) -> Tensor:
            """The memories (B, T, d) of the streams that were run, to what the head is given."""
            query: Pair = (None, None)
            if how.force is None and self.pools_query:
                query = pooled(queries, base, tuned, cache, self.relevance is not None)
                if turn is not None and query[0] is not None and queries is not None:
                    query = (queries.judged_by(turn, query[0], self.config.hidden_size), query[1])
            if cache is not None:
                if queries is not None and queries.whole and how.force is None:
                    cache.query = query
                    cache.prompt_length = prompt_mask.shape[1] if prompt_mask is not None else prompt_length
                cache.record(base, tuned, attended, input_ids, recent=self.recent)
            where = supervised if answers_only else (slice(None), kept)
            memories = (None if base is None else base[where], None if tuned is None else tuned[where])
            if answers_only:
                query = (
                    None if query[0] is None else query[0].expand(-1, length, -1)[where],
                    None if query[1] is None else query[1].expand(-1, length, -1)[where],
                )
            if banked is not None:
                memories, query = recalled(banked, (memories[1], query[1]))
            mixed = self._mix(memories, query, how.at(supervised) if answers_only and supervised is not None else how)
            extras.update(gate=mixed.gate, base_memory=memories[0], tuned_memory=memories[1])
            return mixed.memory[None] if answers_only else mixed.memory

        def settle(base: Tensor) -> float | None:
            """What the frozen memories (B, T, d) of the whole prompt make of the mix, if that is one stream alone."""
            nonlocal how
            assert queries is not None and cache is not None
            judged = queries.read(base) if turn is None else turn
            self.settle_task(judged, how, cache)
            cache.sole = sole_stream(self.gate, self.relevance, judged, how)
            if cache.sole is not None:
                how = Recall(cache.sole)
            return cache.sole

        settles = cache is not None and cache.settles and cache.seen == 0 and prompt_mask is None
        settles = settles and queries is not None and queries.whole and not (output_gate or output_memories)
        output = self._run(inputs, cache, run_base, run_tuned, weave, settle if settles else None)
        if (
            settles
            and cache is not None
            and cache.shared is not None
            and cache.sole is None
            and cache.query is not None
        ):
            cache.drop(sole_stream(self.gate, self.relevance, cache.query[0], how))

        logits, loss = output.logits, None
        if supervised is not None and targets is not None:
            scored = logits[0] if answers_only else logits[supervised.to(logits.device)]
            loss = answer_loss(scored, targets[supervised].to(scored.device), num_items_in_batch)
            logits = logits[:, kept_positions(logits_to_keep, length)] if output_logits else None
        result = SiameseOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            gate=extras["gate"] if output_gate else None,
            base_memory=extras["base_memory"] if output_memories else None,
            tuned_memory=extras["tuned_memory"] if output_memories else None,
        )
        return result.to_tuple() if return_dict is False else result

    def _run(
        self,
        inputs: dict[str, Any],
        cache: TwinCache | None,
        run_base: bool,
        run_tuned: bool,
        weave: Callable[[Tensor | None, Tensor | None], Tensor],
        settle: Callable[[Tensor], float | None] | None = None,
    ) -> Any:
        """The streams asked for, in one pass if they can share it; their caches go into `cache`.

        `settle` says after the frozen pass which stream alone is needed from there on, if one is.
        """
        streams = self.streams
        if run_base and run_tuned and self._shares_a_pass(cache):
            output = streams.both(
                inputs, cache.shared if cache is not None else None, lambda memory: weave(*memory.chunk(2))
            )
            if cache is not None:
                cache.shared, cache.once = streams.cache_of(output), streams.once or 0
            streams.tap.memory = None
            return output
        base_cache, tuned_cache = (cache.base, cache.tuned) if cache is not None else (None, None)
        base_memory = sole = None

        def first(memory: Tensor) -> Tensor:
            """The frozen memories to what the head is given in the frozen pass."""
            nonlocal sole
            if run_tuned and settle is not None:
                sole = settle(memory)
            return weave(memory, None) if sole == 1 or not run_tuned else nothing(memory)

        if run_base:
            output = streams.frozen(inputs, base_cache, first)
            base_cache, base_memory = streams.cache_of(output), streams.tap.memory
        if run_tuned and sole != 1:
            base_memory = None if sole == 0 else base_memory
            output = streams.tuned(inputs, tuned_cache, lambda memory: weave(base_memory, memory))
            tuned_cache = streams.cache_of(output)
        if cache is not None:
            # A stream that was left out lacks these tokens for good.
            cache.base = base_cache if run_base and sole != 0 else None
            cache.tuned = tuned_cache if run_tuned and sole != 1 else None
            if settle is not None and sole is None and self.passes == "shared":
                cache.join(streams.once or 0)
        streams.tap.memory = None
        return output

    @property
    def passes(self) -> Literal["shared", "two"]:
        """How both streams are run in inference: in one pass over a doubled batch, or one after the other.

        Shared wherever it was proved to give the same when the model was built. Assign "two" to have the reference
        computation. Training always takes two passes, the frozen one without gradients and dropout.

        Raises:
            InputError: "shared" is assigned, and cannot be for this model and adapter; or another value.
        """
        return "two" if self._two_passes or self.streams.once is None else "shared"

    @passes.setter
    def passes(self, value: str) -> None:
        if value not in ("shared", "two"):
            raise InputError(f"passes must be 'shared' or 'two', got {value!r}")
        if value == "shared" and self.streams.once is None:
            raise InputError(f"the streams of this model cannot share a pass: {self.streams.why_two}")
        self._two_passes = value == "two"

    def _shares_a_pass(self, cache: TwinCache | None) -> bool:
        """Whether both streams are run at once now: in inference, unless a cache was begun otherwise."""
        if cache is not None and cache.parts:
            return cache.shared is not None
        return self.passes == "shared" and not self.training and not torch.is_grad_enabled()

    def _mix(self, memories: Pair, query: Pair, how: Recall) -> Mix:
        return mix(self.gate, self.relevance, memories, query, how)
