"""The pooled query q̄: which tokens a position's query holds, and their mean memory (paper: "Query-aware gate").

A relevance head reads the last token's memory beside the mean, and where a chat template closes turns that of the last token said.

A position's query is every attended token up to its *boundary*, an index into the whole sequence. Boundaries come from
the labels in training (an answer's query is all that precedes the answer), from the prompt's length in generation, and
are the position itself where neither is known, so that the mean stays causal. Where several examples are packed into a
row, a query starts with its own example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from imsm.errors import InputError
from imsm.turns import closed_turns

IGNORE = -100


def attended_tokens(attention_mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Which of the new tokens (B, T) are not padding, (B, T) bool."""
    batch, length = tokens.shape[:2]
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise InputError(
            f"attention_mask must be (batch, past + new tokens) = ({batch}, ≥ {length}), got {tuple(attention_mask.shape)}"
        )
    return attention_mask[:, -length:].bool().to(tokens.device)


def example_starts(position_ids: Tensor) -> Tensor:
    """First token of the example that each position is in, where positions restart at every example of a packed row.

    Args:
        position_ids: (B, T) int64; an example ends wherever the next position is not one more.

    Returns:
        (B, T) int64.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    restarts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    return torch.where(restarts, index, 0).cummax(dim=1).values


def kept_positions(logits_to_keep: int | Tensor, length: int) -> slice | Tensor:
    """Index of the positions whose logits are wanted: the last so many (0: all), or those of a tensor."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(max(length - logits_to_keep, 0) if logits_to_keep else 0, length)


def answer_boundaries(
    labels: Tensor, attended: Tensor, past_count: Tensor | None = None, first: Tensor | None = None
) -> Tensor:
    """Last query token of every position, from labels in which runs of values other than −100 are answers.

    A position belongs to the answer that it predicts or that comes next (the last answer, if none comes). Where an
    answer has nothing before it, the boundary is the position itself.

    Args:
        labels: (B, T) int64, not shifted.
        attended: (B, T) bool, False on padding.
        past_count: (B, 1), attended tokens before the first one here, if a cache holds some.
        first: (B, T), `example_starts` of packed rows.

    Returns:
        (B, T) int64; −1 for a query that lies wholly in the cache.
    """
    length = labels.shape[1]
    position = torch.arange(length, device=labels.device).expand_as(labels)
    supervised = labels != IGNORE
    before = torch.nn.functional.pad(supervised, (1, 0))[:, :-1]
    starts = supervised & ~before
    run_start = torch.where(starts, position, -1).cummax(dim=1).values
    next_start = torch.where(starts, position, length).flip(1).cummin(dim=1).values.flip(1)
    # Position t predicts token t + 1, so an answer that starts at s is predicted from s − 1 on.
    last = run_start[:, -1:]
    shifted_run = torch.cat([run_start[:, 1:], last], dim=1)
    shifted_next = torch.cat([next_start[:, 1:], torch.full_like(last, length)], dim=1)
    predicts_answer = torch.nn.functional.pad(supervised, (0, 1))[:, 1:]
    start = torch.where(predicts_answer, shifted_run, torch.where(shifted_next < length, shifted_next, last))
    boundary = start - 1
    held = attended.long().cumsum(dim=1).gather(1, boundary.clamp(min=0)) * (boundary >= 0)
    if past_count is not None:
        held = held + past_count
    within = (start >= 0) & (held > 0)
    return torch.where(within if first is None else within & (boundary >= first), boundary, position)


@dataclass(frozen=True)
class Queries:
    """The queries of the positions that a call keeps.

    attended: (B, T) bool, the tokens that may be in one.
    boundary: last token of each, counted from the first new token: (B, K), or (B, 1) where all are one; (B, T) with
        `within`. −1: it lies wholly in the cache.
    first: (B, T), first token of each, where examples are packed.
    kept: which of T positions are wanted, with `within`.
    within: every position has a boundary, few of which differ.
    whole: the query stays as it is for the rest of the answer.
    prompts: (B,) bool, the rows that have one alone, a prompt whose end is known; None: none has.
    closer: how many tokens close a user's turn, for a head that reads what was said before them; 0: none does.
    closed: (B, 1 + T) bool, where they end, the last token that a cache holds first; None: nowhere.
    """

    attended: Tensor
    boundary: Tensor
    first: Tensor | None = None
    kept: slice | Tensor = field(default_factory=lambda: slice(None))
    within: bool = False
    whole: bool = False
    prompts: Tensor | None = None
    closer: int = 0
    closed: Tensor | None = None

    @property
    def inside(self) -> Tensor:
        """(B, T) bool: the tokens up to the last boundary."""
        place = torch.arange(self.attended.shape[1], device=self.attended.device)
        return self.attended & (place <= self.boundary.max(dim=1, keepdim=True).values)

    def mean(self, memory: Tensor, past: RunningQuery | None = None, past_sum: Tensor | None = None) -> Tensor:
        """Mean memory of each query, (B, K or 1, d) float32.

        Args:
            memory: (B, T, d), of one stream.
            past: what a cache knows of the tokens before.
            past_sum: (B, d), that stream's sum in it.
        """
        if self.within:
            return pool_within(memory, self.attended, self.boundary, self.first)[:, self.kept]
        return pool(memory, self.attended, self.boundary, past_sum, None if past is None else past.count)

    def read(self, memory: Tensor, past: RunningQuery | None = None) -> Tensor:
        """What a relevance head reads of each query, (B, K or 1, F) float32: the mean, behind it the last token's memory, and
        with a `closer` that of the last token said, which is the last one where no turn is closed.

        Args:
            memory: (B, T, d), of the frozen stream.
            past: what a cache knows of the tokens before.
        """
        boundary, first = self.boundary, self.first
        if self.within:
            boundary, first = boundary[:, self.kept], None if first is None else first[:, self.kept]
        recent = None if past is None else past.recent
        found = [
            self.mean(memory, past, None if past is None else past.base),
            ends(memory, self.attended, boundary, first, recent),
        ]
        if self.closer:
            if self.closed is not None:
                boundary = torch.nn.functional.pad(held(self.attended), (1, 0), value=-1).gather(1, boundary + 1)
                boundary = boundary - self.closer * self.closed.gather(1, boundary + 1)
            found.append(ends(memory, self.attended, boundary, first, recent))
        return torch.cat(found, dim=-1)

    def closed_by(self, closer: Sequence[int], said: tuple[Tensor, Tensor] | None) -> Queries:
        """These queries for a head that reads the last token before a `closer`, if there is one.

        Args:
            closer: tokens that close a user's turn.
            said: ids and mask, each (B, S + T), of the tokens that a cache holds and of the new ones; None if they are not
                known.
        """
        if not len(closer) or said is None:
            return replace(self, closer=len(closer))
        closed = torch.nn.functional.pad(closed_turns(*said, closer), (1, 0))
        return replace(self, closer=len(closer), closed=closed[:, -self.attended.shape[1] - 1 :])

    def judged_by(self, turn: Tensor, query: Tensor, width: int) -> Tensor:
        """Queries such that a relevance head judges the rows of one prompt by the prompt's last turn.

        Args:
            turn: (B, 1, F), what the head reads of it.
            query: (B, K or 1, F), what it reads of the whole query.
            width: d, of what a gate reads of the query.

        Returns:
            (B, K or 1, d + F): the gate reads the first values, the head the last.
        """
        assert self.prompts is not None
        read = torch.where(self.prompts[:, None, None], turn, query)
        return torch.cat([query[..., :width], read], dim=-1)


def pooled(
    queries: Queries | None, base: Tensor | None, tuned: Tensor | None, cache: Any, for_head: bool = False
) -> tuple[Any, Any]:
    """q̄ and q̄' of the kept positions, each (B, K or 1, d) float32, None for a stream that was not run.

    Args:
        queries: None if the cache has them.
        base, tuned: memories (B, T, d).
        cache: the streams', or None.
        for_head: a relevance head reads the first, which then is (B, K or 1, F), see `Queries.read`.
    """
    if queries is None:
        return cache.query  # type: ignore[no-any-return]
    past = cache.past_sums() if cache is not None else None
    base_sum, tuned_sum = (None, None) if past is None else (past.base, past.tuned)
    own = None
    if base is not None:
        own = queries.read(base, past) if for_head else queries.mean(base, past, base_sum)
    return own, None if tuned is None else queries.mean(tuned, past, tuned_sum)


def kept_queries(
    attended: Tensor,
    kept: slice | Tensor,
    *,
    labels: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    prompt_length: int | None = None,
    first: Tensor | None = None,
    seen: int = 0,
    past_count: Tensor | None = None,
) -> Queries:
    """Which tokens the query of each kept position holds.

    Args:
        attended: (B, T) bool, the new tokens that are not padding.
        kept: which of T positions are wanted.
        labels, prompt_mask, prompt_length: see `SiameseForCausalLM.forward`; `labels` on the tokens' device.
        first: `example_starts` of packed rows.
        seen: tokens in the cache.
        past_count: (B, 1), how many of them are not padding.

    Raises:
        InputError: a `prompt_mask` that does not fit the tokens.
    """
    batch, length = attended.shape
    last = None
    if prompt_mask is not None:
        if first is not None:
            raise InputError("prompt_mask cannot be given with packed examples; give labels, or one example a row")
        if seen > 0 or prompt_mask.shape[1] > length:
            raise InputError(
                f"prompt_mask must come with the sequence's first tokens and cover no more than them, got "
                f"{prompt_mask.shape[1]} columns for {length} tokens after {seen} cached ones; leave it out, and "
                "the query is all that precedes the answer"
            )
        prompt_mask = prompt_mask.to(attended.device).bool()
        attended = attended & torch.nn.functional.pad(prompt_mask, (0, length - prompt_mask.shape[1]))
        last = length - 1
    elif prompt_length is not None and prompt_length <= seen + length:
        last = max(prompt_length - 1 - seen, 0)
    if last is not None:
        boundary = torch.full((batch, 1), last, device=attended.device)
        return Queries(attended, boundary, whole=True, prompts=torch.ones_like(boundary[:, 0], dtype=torch.bool))
    if labels is not None:
        boundary = answer_boundaries(labels, attended, past_count, first)
        single = None if first is not None else (boundary == boundary[:, :1]).all(dim=1)
        if single is not None and bool(single.all()):
            return Queries(attended, boundary[:, :1], prompts=single)
        if single is not None and not bool(single.any()):
            single = None
        return Queries(attended, boundary, first, within=past_count is None, prompts=single)
    boundary = torch.arange(length, device=attended.device).expand(batch, -1)
    if first is not None:
        return Queries(attended, boundary, first, kept, within=True)
    return Queries(attended, boundary[:, kept])


@dataclass
class RunningQuery:
    """Sums of both streams' memories over the attended tokens that a cache holds.

    base, tuned: (B, d) float32; None for a stream that was not run.
    count: (B, 1) float32, attended tokens.
    recent: (B, R, d) float32, the frozen memories of the last R of them; 0 where there are fewer. None without a head.
    """

    base: Tensor | None
    tuned: Tensor | None
    count: Tensor
    recent: Tensor | None = None

    def select(self, rows: Tensor) -> RunningQuery:
        """The sums of the given batch rows, in their order."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, rows.to(x.device))

        count = self.count.index_select(0, rows.to(self.count.device))
        return RunningQuery(pick(self.base), pick(self.tuned), count, pick(self.recent))


def pool(
    memory: Tensor, attended: Tensor, boundary: Tensor, past_sum: Tensor | None, past_count: Tensor | None
) -> Tensor:
    """Mean memory over the attended tokens up to each boundary.

    Args:
        memory: (B, T, d), memories of the new tokens.
        attended: (B, T) bool, the new tokens that are not padding.
        boundary: (B, K) int64, last query token of each position, counted from the first new token; −1: none of them.
        past_sum, past_count: (B, d) and (B, 1) float32, sums over the tokens before the new ones.

    Returns:
        (B, K, d) float32; 0 where a query is empty.
    """
    weights = attended.float()
    if boundary.shape[1] == 1:
        position = torch.arange(memory.shape[1], device=memory.device)
        weights = weights * (position <= boundary)
        total = torch.bmm(weights[:, None, :], memory.float())
        count = weights.sum(dim=1)[:, None, None]
    else:
        index, inside = boundary.clamp(min=0)[..., None], (boundary >= 0)[..., None]
        running = (memory.float() * weights[..., None]).cumsum(dim=1)
        total = running.gather(1, index.expand(-1, -1, memory.shape[-1])) * inside
        count = weights.cumsum(dim=1)[..., None].gather(1, index) * inside
    if past_sum is not None and past_count is not None:
        total = total + past_sum[:, None, :]
        count = count + past_count[:, None, :]
    return total / count.clamp(min=1)


def ends(
    memory: Tensor, attended: Tensor, boundary: Tensor, first: Tensor | None = None, past: Tensor | None = None
) -> Tensor:
    """Memory of the last attended token up to each boundary.

    Args:
        memory: (B, T, d), memories of the new tokens.
        attended: (B, T) bool, the new tokens that are not padding.
        boundary: (B, K) int64, counted from the first new token; below 0: before it.
        first: (B, K) int64, first token of each query; 0 without it.
        past: (B, R, d), those of the last R tokens before the new ones.

    Returns:
        (B, K, d) float32; 0 where there is none.
    """
    if past is not None:
        memory, attended = behind(past, memory, attended)
        boundary = boundary + past.shape[1]
    last = torch.where(boundary >= 0, held(attended).gather(1, boundary.clamp(min=0)), -1)
    there = last >= (0 if first is None else first)
    found = memory.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, memory.shape[-1])).float()
    return torch.where(there[..., None], found, 0.0)


def held(attended: Tensor) -> Tensor:
    """The last attended token up to each, −1 before the first, (B, T) int64; `attended` (B, T) bool."""
    place = torch.arange(attended.shape[1], device=attended.device)
    return torch.where(attended, place, -1).cummax(dim=1).values


def behind(past: Tensor, memory: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Memories (B, R + T, d) and their mask, from those of R tokens before and of T new ones. Arguments as of `ends`."""
    there = torch.ones(past.shape[:2], dtype=torch.bool, device=attended.device)
    return torch.cat([past.to(memory.dtype), memory], dim=1), torch.cat([there, attended], dim=1)


def pool_within(memory: Tensor, attended: Tensor, boundary: Tensor, first: Tensor | None = None) -> Tensor:
    """Mean memory over the attended tokens from `first` up to each boundary: `pool` for few boundaries and many positions.

    Args:
        memory: (B, T, d).
        attended: (B, T) bool, the tokens that are not padding.
        boundary: (B, T) int64, last query token of each position.
        first: (B, T) int64, first query token of each position; 0 without it.

    Returns:
        (B, T, d) float32.
    """
    batch, length = boundary.shape
    first = torch.zeros_like(boundary) if first is None else first
    changes = (boundary.diff(dim=1) != 0) | (first.diff(dim=1) != 0)
    number = torch.nn.functional.pad(changes.cumsum(dim=1), (1, 0))  # which of the row's queries, (B, T)
    queries = int(number.max()) + 1
    last, start = (
        torch.zeros(batch, queries, dtype=x.dtype, device=x.device).scatter_(1, number, x) for x in (boundary, first)
    )
    position = torch.arange(length, device=memory.device)
    inside = (position >= start[..., None]) & (position <= last[..., None]) & attended[:, None]  # (B, Q, T)
    weights = inside.float()
    means = torch.bmm(weights, memory.float()) / weights.sum(dim=2, keepdim=True).clamp(min=1)
    return means.gather(1, number[..., None].expand(-1, -1, memory.shape[-1]))
