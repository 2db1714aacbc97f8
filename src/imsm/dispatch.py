"""Calls of a model with several tasks: every row is run by the task that its query goes to, over what one task does.

Where a prompt is read whole by the first pass of `generate`, the frozen stream's pass over it is also the one that tells
its task, so that a query costs no more than with one task; rows that go to different tasks are read once more, by group.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from imsm.cache import TwinCache
from imsm.errors import InputError
from imsm.groups import grouped, joined, joined_sequences, rows_of
from imsm.lock import in_turn
from imsm.mixing import Recall, adapter_alone, forced, recall_of
from imsm.query import IGNORE, attended_tokens, example_starts
from imsm.tasks import Tasks
from imsm.turns import sole_turns

#: The dial, as arguments.
DIAL = ("recall", "recall_floor", "recall_ceiling")
#: Ways of `generate` that read a prompt otherwise than whole and at once, so that it must be looked at before.
PIECEWISE = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit")
#: By which arguments that are given by their places get their names.
GENERATE = inspect.signature(GenerationMixin.generate)


class DividedError(InputError):
    """The rows of a batch go to different tasks, and were to be run as one.

    Attributes:
        names: the task of each row, None for the base model.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        super().__init__(
            "the rows of this batch go to different tasks, and a cache belongs to one: give rows of one task, or use_cache="
            "False, or task='NAME'; generate takes them all"
        )
        self.names = list(names)


class TaskCalls(Tasks):
    """`generate` and `forward` of a siamese model with several tasks; with one, they are what they are without this."""

    training: bool
    generation_config: Any
    #: The task that a call is for.
    _called: str | None = None
    #: Whether a prompt that is read now may still choose its task.
    _open = False

    def settle_task(self, query: Tensor, how: Recall, cache: TwinCache) -> None:
        """Activates the task that the prompts of a batch go to, if that is open still. Arguments as of `choose`.

        Raises:
            DividedError: they go to several.
        """
        if not self._open:
            return
        names = self.choose(query, how)
        if len(set(names)) > 1:
            raise DividedError(names)
        if names[0] is not None:
            self.activate(names[0])
        cache.task = self.active

    @contextmanager
    def _calling(self, name: str | None, is_open: bool = False) -> Iterator[None]:
        """Within: calls are for that task, or a prompt that is read may choose."""
        before = self._called, self._open
        self._called, self._open = name, is_open
        try:
            yield
        finally:
            self._called, self._open = before

    def _recall(self, given: dict[str, Any], rows: int) -> Recall:
        """What a call's arguments say of the mix."""
        force, recall = given.get("force_gate"), given.get("recall")
        if recall is None and force is None:
            recall = self.config.recall
        device: Any = self.get_output_embeddings().weight.device
        return recall_of(force, recall, given.get("recall_floor"), given.get("recall_ceiling"), rows, device)

    def _forced(self, given: dict[str, Any]) -> float | None:
        force, recall = given.get("force_gate"), given.get("recall")
        if recall is None and force is None:
            recall = self.config.recall
        return forced(force, recall, given.get("recall_floor"), given.get("recall_ceiling"))

    @in_turn
    def find_tasks(self, **given: Any) -> list[str | None]:
        """The task that the query of each row goes to, None for the base model: one pass of the frozen stream.

        Args:
            given: `input_ids` (B, T), and of `forward`'s arguments those that say where a query is, or turn the mix.

        Raises:
            InputError: there are no tokens to read, or packed rows.
        """
        ids = given.get("input_ids")
        if ids is None:
            raise InputError("which task inputs_embeds are for cannot be told; give input_ids, or task='NAME'")
        inside = prompt_tokens(given, ids)
        query = self.streams.frozen_query(
            *sole_turns(ids, inside, self.config.relevance_turn), self.config.relevance_close
        )
        return self.choose(query, self._recall(given, len(ids)))

    @in_turn
    def generate(self, inputs: Tensor | None = None, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`. With several tasks every prompt is answered by the one that it goes to.

        Args:
            inputs: (B, T), prompts, padded on the left; or give `input_ids`.
            args, kwargs: see there, and `forward`'s `force_gate`, `recall`, `recall_floor`, `recall_ceiling`.
            task: answer all prompts by this task, whose head still leaves to the base model what is not its own.

        Raises:
            InputError: there is no such task; or prompts of several, and more is asked for than their sequences.
        """
        run: Any = super().generate  # type: ignore[misc]
        if len(self.tasks) == 1 and task is None:
            return run(inputs, *args, **kwargs)
        kwargs = named(GENERATE, self, inputs, *args, **kwargs)
        inputs = kwargs.pop("inputs")
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        name = task or self._called or self.task
        given = kwargs.get("past_key_values")
        if name is None and isinstance(given, TwinCache) and given.seen:
            name = given.task
        if name is not None:
            self.activate(name)
            with self._calling(name):
                return run(inputs, **kwargs)
        if inputs is None:
            raise InputError("generate needs input_ids to tell which task prompts are for; or give task='NAME'")
        if self._forced(kwargs) == 1:
            return run(inputs, **kwargs)
        if self.relevance is None and self.rivals:
            self.activate(self.rivals[0])
        names = None
        if not self._piecewise(kwargs):
            try:
                with self._calling(None, is_open=True):
                    return run(inputs, **kwargs)
            except DividedError as error:
                # Beams and sequences of a prompt are rows of it.
                names = error.names[:: len(error.names) // len(inputs)]
        if names is None:
            names = self.find_tasks(**{**kwargs, "input_ids": inputs})
        return self._by_groups(run, names, inputs, kwargs)

    def _piecewise(self, kwargs: dict[str, Any]) -> bool:
        """Whether a prompt is not read whole by the first forward pass of `generate`, with a cache of its own."""
        if any(kwargs.get(name) is not None for name in ("past_key_values", "assistant_model", "custom_generate")):
            return True

        use_cache = self._setting("use_cache", kwargs)
        return use_cache is False or any(self._setting(name, kwargs) is not None for name in PIECEWISE)

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """What `generate` takes for a setting: an argument, be it None, or else what either configuration says."""
        if name in kwargs:
            return kwargs[name]
        sources = (kwargs.get("generation_config"), self.generation_config)
        return next((value for source in sources if (value := getattr(source, name, None)) is not None), None)

    def _padding(self, kwargs: dict[str, Any]) -> int:
        """The token that `generate` puts behind a row's end: the padding token, or else the first that ends."""
        tokens = (self._setting(name, kwargs) for name in ("pad_token_id", "eos_token_id"))
        found = next((token for token in tokens if token is not None), 0)
        return int(torch.as_tensor(found).flatten()[0])

    def _of_whole_batch(
        self, allowed: Callable[[int, Tensor], list[int]], rows: Sequence[int], kwargs: dict[str, Any]
    ) -> Callable[[int, Tensor], list[int]]:
        """A `prefix_allowed_tokens_fn` of all prompts, for `generate` with those of some rows."""
        # Sequences that are sampled are counted one by one, beams are not.
        beams, sequences = (self._setting(name, kwargs) or 1 for name in ("num_beams", "num_return_sequences"))
        each = 1 if beams > 1 else sequences
        return lambda place, ids: allowed(rows[place // each] * each + place % each, ids)

    def _by_groups(
        self,
        run: Callable[..., Any],
        names: Sequence[str | None],
        inputs: Tensor,
        kwargs: dict[str, Any],
    ) -> Any:
        """What `generate` gives for rows of several tasks, each group by itself."""
        groups, found = grouped(names), []
        if len(groups) > 1 and kwargs.get("past_key_values") is not None:
            raise DividedError(names)
        if len(groups) > 1 and self._setting("return_dict_in_generate", kwargs):
            raise InputError(
                "return_dict_in_generate has no one answer for prompts of several tasks; give prompts of one, or task='NAME'"
            )
        for name, rows in groups.items():
            own = rows_of(kwargs, rows, len(inputs))
            if (allowed := kwargs.get("prefix_allowed_tokens_fn")) is not None:
                own["prefix_allowed_tokens_fn"] = self._of_whole_batch(allowed, rows, kwargs)
            part = inputs[torch.tensor(rows, device=inputs.device)]
            if name is None:
                own = {**without(own, DIAL), "force_gate": 1.0}
            else:
                self.activate(name)
                how = self._recall(own, len(rows))
                # Under a lower ceiling rows are here, too, that no head claims.
                claimed = how.dial is None or bool((how.dial.ceiling == 1).all())
                if how.force is None and claimed and adapter_alone(self.gate, how.dial):
                    own = {**without(own, DIAL), "force_gate": 0.0}
            with self._calling(name):
                found.append((rows, run(part, **own)))
        if len(found) == 1:
            return found[0][1]
        return joined_sequences(found, self._padding(kwargs))

    def _forward_by_task(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        """`forward` for the rows' tasks. `given`: its arguments by name."""
        cache: Any = given.get("past_key_values")
        held = isinstance(cache, TwinCache) and cache.seen > 0
        name = given.pop("task", None) or self._called or self.task
        if held and cache.task is not None:
            if name not in (None, cache.task):
                raise InputError(f"this cache is of task {cache.task!r}, got task {name!r}; start from a fresh cache")
            name = cache.task
        if name is not None:
            self.activate(name)
            return self._remembered(forward(self, **given), name)
        if self.training:
            raise InputError(f"of several tasks one learns: say which by model.task = NAME ({', '.join(self.tasks)})")
        if held or self._forced(given) == 1:
            return forward(self, **given)
        ids = given.get("input_ids")
        reads_whole = isinstance(cache, TwinCache) and ids is not None and cache.prompt_length == ids.shape[1]
        if self._open and reads_whole and cache.settles and cache.base is not None:
            return forward(self, **given)  # which has the frozen memories before it needs an adapter
        names = self.find_tasks(
            **{**given, "prompt_length": given.get("prompt_length") or getattr(cache, "prompt_length", None)}
        )
        groups = grouped(names)
        caching = cache is not None or given.get("use_cache")
        if len(groups) > 1:
            if caching:
                raise DividedError(names)
            return self._joined(forward, given, groups)
        (only,) = groups
        if only is not None:
            self.activate(only)
            return self._remembered(forward(self, **given), only)
        if cache is not None:
            # Its kind and its graph were made for both streams; the active head says that it is not its own.
            return self._remembered(forward(self, **given), self.active)
        output = forward(self, **{**without(given, DIAL), "force_gate": 1.0})
        if isinstance(made := getattr(output, "past_key_values", None), TwinCache):
            made.sole = 1.0
        return output

    def _remembered(self, output: Any, name: str) -> Any:
        """The output; the cache in it, if there is one, knows its task."""
        parts = output.values() if isinstance(output, ModelOutput) else output
        for part in parts:
            if isinstance(part, TwinCache):
                part.task = name
        return output

    def _joined(self, forward: Callable[..., Any], given: dict[str, Any], groups: dict[str | None, list[int]]) -> Any:
        """The output of rows of several tasks, without a cache, each group by itself."""
        given = {**given, "use_cache": False}
        labels, plain = given.get("labels"), given.pop("return_dict", None) is False
        if labels is not None and given.get("num_items_in_batch") is None:
            given["num_items_in_batch"] = (labels[:, 1:] != IGNORE).sum()
        batch, parts = len(given["input_ids"]), []
        for name, rows in groups.items():
            own = rows_of(given, rows, batch)
            if name is None:
                own = {**without(own, DIAL), "force_gate": 1.0}
            else:
                self.activate(name)
            parts.append((rows, forward(self, **own)))
        kinds = ("logits", "gate", "base_memory", "tuned_memory")
        made = {kind: joined([(rows, getattr(part, kind)) for rows, part in parts]) for kind in kinds}
        losses = [part.loss for _, part in parts if part.loss is not None]
        output = type(parts[0][1])(loss=torch.stack(losses).sum() if losses else None, **made)
        return output.to_tuple() if plain else output


def without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values but those of some names."""
    return {name: value for name, value in values.items() if name not in names}


def prompt_tokens(given: dict[str, Any], ids: Tensor) -> Tensor:
    """Which tokens (B, T) bool tell a row's task: its query's, those before its first answer, or all that there are.

    Raises:
        InputError: rows are packed.
    """
    attended = attended_tokens(given.get("attention_mask"), ids)
    positions: Any = given.get("position_ids")
    unmasked = positions is not None and positions.dim() == 2 and given.get("attention_mask") is None
    if unmasked and bool(example_starts(positions).any()):
        raise InputError("packed rows may hold several tasks; give one example a row, or task='NAME'")
    place = torch.arange(ids.shape[1], device=ids.device)
    inside = attended
    if (mask := given.get("prompt_mask")) is not None:
        inside = attended & nn.functional.pad(mask.bool(), (0, ids.shape[1] - mask.shape[1]))
    elif (length := given.get("prompt_length")) is not None:
        inside = attended & (place < length)
    elif (labels := given.get("labels")) is not None:
        answers = (labels != IGNORE).to(ids.device)
        first = torch.where(answers.any(dim=1), answers.int().argmax(dim=1), ids.shape[1])
        inside = attended & (place < first[:, None])
    # Where nothing precedes an answer, there is nothing else to go by.
    return torch.where(inside.any(dim=1, keepdim=True), inside, attended)


def named(signature: inspect.Signature, model: Any, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of one of the model's methods by their names, without the model itself."""
    given = dict(signature.bind(model, *args, **kwargs).arguments)
    del given["self"]
    more = given.pop("kwargs", {})
    return {**given, **more}


def by_task(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `forward`, such that with several tasks every row is run by its own; calls of several threads wait."""
    signature = inspect.signature(forward)

    @in_turn
    @functools.wraps(forward)
    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(self.config.tasks) == 1 and kwargs.get("task") is None:
            return forward(self, *args, **kwargs)
        return self._forward_by_task(forward, named(signature, self, *args, **kwargs))

    return routed
