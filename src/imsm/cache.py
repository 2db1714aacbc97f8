"""The KV cache of a siamese model: one cache for each stream, and what pooling the query needs."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from imsm.errors import InputError
from imsm.query import RunningQuery, behind


class TwinCache(Cache):
    """Both streams' caches, which move together: one cache of 2B rows if the streams share their passes, else two.

    Attributes:
        base: the frozen stream's cache.
        tuned: the tuned stream's cache; longer than `base` by the adapter's prefix, if it has one.
        shared: in place of these two, the cache of both: B rows of the frozen stream, then B of the tuned one.
        once: lowest layers of `shared` that hold B rows, those of both streams.
        seen: tokens of the sequence held so far (padding counted, a prefix not).
        running: sums of the memories of all tokens seen; None before the first and after a crop that cannot be undone.
        prompt_length: tokens that come before the answer being generated; None outside an answer.
        query: pooled query (q̄, q̄') of that answer, each (B, 1, d), once its prompt has been read.
        settles: a stream that an answer does not need may be left out of it; nothing follows the answer.
        sole: the constant that the mix of that answer is, 1 or 0, if it is one.
        task: whose adapter filled it, in a model of several tasks.
    """

    #: Set by `generate` on a cache that it was given.
    _is_user_defined = False

    def __init__(self, base: Cache | None = None, tuned: Cache | None = None) -> None:
        self.base = base
        self.tuned = tuned
        self.shared: Cache | None = None
        self.once = 0
        self.seen = 0
        self.running: RunningQuery | None = None
        self.prompt_length: int | None = None
        self.query: tuple[Tensor | None, Tensor | None] | None = None
        self.settles = False
        self.sole: float | None = None
        self.task: str | None = None
        self._last: tuple[Tensor | None, Tensor | None, Tensor] | None = None
        #: `RunningQuery.recent` as it was before `_last`.
        self._before: Tensor | None = None
        self._rows: int | None = None
        #: Ids and mask, each (B, seen), of the tokens held; None without a head, or where they are not all known.
        self._said: tuple[Tensor, Tensor] | None = None

    @property
    def parts(self) -> list[Cache]:
        """The caches in use: the shared one, both, or one if a stream is not run."""
        return [part for part in (self.shared, self.base, self.tuned) if part is not None]

    def __repr__(self) -> str:
        held = f"shared={self.shared}" if self.shared is not None else f"base={self.base}, tuned={self.tuned}"
        return f"TwinCache(seen={self.seen}, {held})"

    def __len__(self) -> int:
        return max((len(part) for part in self.parts), default=0)

    # -- the query ---------------------------------------------------------------------------------------------------

    def require(self, base: bool, tuned: bool) -> None:
        """Make sure that the streams about to run have been run on all tokens held.

        Raises:
            InputError: an earlier step left out a stream that is needed now.
        """
        if self.seen == 0:
            return
        if self.shared is not None:
            if not (base and tuned):
                self.split(base, tuned)
            return
        if (base and self.base is None) or (tuned and self.tuned is None):
            if self.settles:
                raise InputError(
                    "this cache holds one stream alone, since the answer that `generate` filled it for needed no other; "
                    "start the next turn from a fresh cache, or give `generate` one of your own (imsm.TwinCache())"
                )
            raise InputError(
                "this cache was filled with force_gate and lacks a stream; continue with the same force_gate, or start "
                "from a fresh cache"
            )

    def split(self, base: bool, tuned: bool) -> None:
        """Take the wanted streams' rows out of the shared cache, so that one can go on alone.

        Raises:
            InputError: a layer of the cache cannot give away rows.
        """
        assert self.shared is not None

        def half(first: int) -> Cache:
            rows = torch.arange(first, first + self.batch_size)
            made = copy.copy(self.shared)
            assert made is not None
            made.layers = [copy.copy(layer) for layer in made.layers]
            for layer in made.layers[self.once :]:
                select_rows(layer, rows)
            return made

        self.base = half(0) if base else None
        self.tuned = half(self.batch_size) if tuned else None
        self.shared = None

    def drop(self, sole: float | None) -> None:
        """Go on with the frozen stream (1) or the tuned one (0) alone, where a shared cache's layers allow it."""
        if sole is not None and self.shared is not None and all(map(selectable, self.shared.layers)):
            self.split(base=sole == 1, tuned=sole == 0)
            self.sole = sole

    def join(self, once: int) -> None:
        """Make one shared cache of both streams' caches, which are `joinable`.

        Args:
            once: lowest layers that are the same in both streams.
        """
        assert self.base is not None and self.tuned is not None
        pairs: list[tuple[Any, Any]] = list(zip(self.base.layers, self.tuned.layers, strict=True))
        for layer, other in pairs[once:]:
            layer.keys = torch.cat([layer.keys, other.keys])
            layer.values = torch.cat([layer.values, other.values])
        self.shared, self.once, self.base, self.tuned = self.base, once, None, None

    def begin_answer(self, prompt_length: int | None) -> None:
        """Forget the last answer's query: the next one is pooled over the sequence's first `prompt_length` tokens."""
        self.prompt_length, self.query, self.sole = prompt_length, None, None

    def conversation(self, ids: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens held and `ids` (B, T) behind them, and which of all of these are a prompt's, given `inside` (B, T)."""
        if self._said is None:
            return ids, inside
        return torch.cat([self._said[0], ids], dim=1), torch.cat([self._said[1], inside], dim=1)

    def record(
        self,
        base: Tensor | None,
        tuned: Tensor | None,
        attended: Tensor,
        ids: Tensor | None = None,
        *,
        recent: int = 0,
    ) -> None:
        """Add the memories (B, T, d) of new tokens, of which `attended` (B, T) are not padding.

        `recent`: of how many tokens a relevance head may read the memory; 0 without one, which alone reads the `ids` (B, T), too.
        """
        self._rows = attended.shape[0]
        known = recent > 0 and ids is not None and (self.seen == 0 or self._said is not None)
        self._said = self.conversation(ids.to(attended.device), attended) if known and ids is not None else None
        if self.seen > 0 and self.running is None:
            # A crop undid more than the last step: the mean over the whole sequence is no longer known.
            self.seen += attended.shape[1]
            return
        base = base.detach() if base is not None else None
        tuned = tuned.detach() if tuned is not None else None
        weights = attended.float()[:, None, :]

        def add(total: Tensor | None, memory: Tensor | None) -> Tensor | None:
            if memory is None:
                return None
            # Of one token, as in decoding, a product: a batch of tiny matrix products costs a CPU a hundred times as much.
            new = memory.float() * weights if weights.shape[2] == 1 else torch.bmm(weights, memory.float())
            return new.squeeze(1) if total is None else total + new.squeeze(1)

        past = self.running
        self._before = past.recent if past else None
        count = attended.float().sum(dim=1, keepdim=True)
        self.running = RunningQuery(
            add(past.base if past else None, base),
            add(past.tuned if past else None, tuned),
            count if past is None else past.count + count,
            newest(base, attended, self._before, recent) if recent else None,
        )
        self._last = (base, tuned, attended)
        self.seen += attended.shape[1]

    def past_sums(self, for_head: bool = False) -> RunningQuery | None:
        """The sums over the tokens held, or None if the cache is empty.

        Args:
            for_head: a relevance head reads them.

        Raises:
            InputError: the cache was cropped by more than its last step, so that the sums are lost; or it was filled
                without a head.
        """
        if self.seen == 0:
            return self.running
        if self.running is None:
            raise InputError(
                "this cache was cropped by more tokens than its last forward pass added, so the mean of its query is no "
                "longer known; start from a fresh cache, or crop before the tokens are added"
            )
        if for_head and self.running.recent is None:
            raise InputError(
                "this cache was filled by a model without a relevance head, which reads the last tokens of what is held; "
                "start from a fresh cache"
            )
        return self.running

    # -- cache protocol ----------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        """The layers of all parts, the frozen stream's first."""
        return [layer for part in self.parts for layer in part.layers]

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError("a TwinCache belongs to a siamese model; give a plain model a cache of its own")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return max(part.get_max_length(layer_idx) for part in self.parts)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.parts[0].get_mask_sizes(query_length, layer_idx)

    def reset(self) -> None:
        for part in self.parts:
            part.reset()
        self.seen, self.running, self._last, self._before, self._rows, self._said = 0, None, None, None, None, None
        self.task = None
        self.begin_answer(None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each_layer("reorder_cache", beam_idx)
        self._select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        for part in self.parts:
            part.crop(tokens_to_remove)
        removed = abs(tokens_to_remove)
        self.seen -= removed
        if self._said is not None:
            self._said = (self._said[0][:, : self.seen], self._said[1][:, : self.seen])
        if self.prompt_length is not None and self.seen < self.prompt_length:
            self.begin_answer(None)
        if removed == 0 or self.running is None:
            return
        if self._last is None or removed > self._last[2].shape[1]:
            self.running = None
            return
        base, tuned, attended = self._last
        kept = attended.shape[1] - removed
        weights = attended[:, kept:].float()[:, None, :]

        def subtract(total: Tensor | None, memory: Tensor | None) -> Tensor | None:
            if total is None or memory is None:
                return total
            return total - torch.bmm(weights, memory[:, kept:].float()).squeeze(1)

        self.running = RunningQuery(
            subtract(self.running.base, base),
            subtract(self.running.tuned, tuned),
            self.running.count - weights.sum(dim=-1),
            None
            if self.running.recent is None
            else newest(
                None if base is None else base[:, :kept], attended[:, :kept], self._before, self.running.recent.shape[1]
            ),
        )
        self._last = (
            None if base is None else base[:, :kept],
            None if tuned is None else tuned[:, :kept],
            attended[:, :kept],
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        for part in self.parts:
            part.batch_repeat_interleave(repeats)
        if self._rows is not None:
            self._select(torch.arange(self._rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_layer("batch_select_indices", indices)
        self._select(indices)

    def activate_past_recording(self) -> None:
        for part in self.parts:
            part.activate_past_recording()

    def _each_layer(self, operation: str, rows: Tensor) -> None:
        """Do `operation` with `rows` to every layer, and with those rows of both streams to layers that hold both."""
        for part in self.parts:
            both = torch.cat([rows, rows + self.batch_size]) if part is self.shared else rows
            for index, layer in enumerate(part.layers):
                getattr(layer, operation)(rows if part is self.shared and index < self.once else both)

    def _select(self, rows: Tensor) -> None:
        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, rows.to(x.device))

        self._rows = len(rows)
        if self.running is not None:
            self.running = self.running.select(rows)
        if self.query is not None:
            self.query = (pick(self.query[0]), pick(self.query[1]))
        if self._last is not None:
            base, tuned, attended = self._last
            self._last = (pick(base), pick(tuned), attended.index_select(0, rows.to(attended.device)))
        self._before = pick(self._before)
        if self._said is not None:
            ids, mask = self._said
            self._said = (ids.index_select(0, rows.to(ids.device)), mask.index_select(0, rows.to(mask.device)))

    @property
    def is_compileable(self) -> bool:
        # `generate` would otherwise build the attention masks from this model's config instead of the base model's.
        return False

    @property
    def is_croppable(self) -> bool:
        return all(part.is_croppable for part in self.parts)

    @property
    def is_initialized(self) -> bool:
        return all(part.is_initialized for part in self.parts)

    @property
    def batch_size(self) -> int:
        return self._rows if self._rows is not None else self.parts[0].batch_size


def newest(memory: Tensor | None, attended: Tensor, before: Tensor | None, count: int) -> Tensor | None:
    """The memories of the last `count` attended tokens of each row, (B, count, d) float32; 0 where there are fewer.

    Args:
        memory: (B, T, d), of the new tokens; None if the stream was not run.
        attended: (B, T) bool.
        before: (B, count, d), of the last tokens before them.
        count: at least 1.
    """
    if memory is None or not memory.shape[1]:
        return before
    if before is None:
        before = memory.new_zeros(len(memory), count, memory.shape[2], dtype=torch.float32)
    states, there = behind(before, memory.float(), attended)
    place = torch.arange(states.shape[1], device=states.device)
    last = torch.where(there, place, -1).sort(dim=1).values[:, -count:]
    return states.gather(1, last[..., None].expand(-1, -1, states.shape[2]))


def joinable(cache: Cache) -> bool:
    """Whether two such caches can be made one that has the rows of both."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def selectable(layer: Any) -> bool:
    """Whether rows can be taken out of a layer."""
    return hasattr(layer, "batch_select_indices") or type(layer) in (StaticLayer, StaticSlidingWindowLayer)


def select_rows(layer: Any, rows: Tensor) -> None:
    """Keep only those rows of a cache's layer.

    Raises:
        InputError: the layer is of a kind that cannot give away rows.
    """
    if not selectable(layer):
        raise InputError(
            f"force_gate cannot be set on a cache of both streams with layers of kind {type(layer).__name__}; "
            "set it from the first token on, or start from a fresh cache"
        )
    if hasattr(layer, "batch_select_indices"):
        layer.batch_select_indices(rows)
        return
    layer.cumulative_length = layer.cumulative_length.clone()  # the other rows' goes on by itself
    layer.batch_size = len(rows)
    for name in ("keys", "values"):
        setattr(layer, name, getattr(layer, name).index_select(0, rows.to(layer.device)))
    for tensor in (layer.keys, layer.values, layer.cumulative_length):
        torch._dynamo.mark_static_address(tensor)
