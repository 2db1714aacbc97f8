"""Several tasks on one base: an adapter, a gate, a head and a store of queries for each; a query goes to one of them.

One task is active at a time: its gate and head are the model's, the others' are parked. The heads, sharp as they are, rule
tasks out before any adapter is run; where several claim a query, the router picks. So a query costs what it costs with one
task, and what a task answers is what it would answer alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from imsm.building import add_adapter
from imsm.errors import InputError
from imsm.gates import build_gate
from imsm.lock import in_turn
from imsm.mixing import Recall, is_other
from imsm.relevance import RelevanceHead, check_head
from imsm.routing import Router, fit_router, pick, store
from imsm.streams import Streams

#: Settings of the model that are a task's own.
OWN = ("gate", "gate_rank", "gate_dropout", "relevance", "training")


class Task(nn.Module):
    """What a task has beside its adapter.

    Args:
        gate: its gate.
        relevance: its head; None while it is being learnt.
        queries: its stored queries, (N, F) float16 on the CPU.
        settings: those of `OWN`.
    """

    def __init__(
        self, gate: nn.Module, relevance: RelevanceHead | None, queries: Tensor | None, settings: dict[str, Any]
    ) -> None:
        super().__init__()
        self.gate = gate
        self.relevance = relevance
        self.queries = queries
        self.settings = settings

    @property
    def whole(self) -> bool:
        """Whether it can be told from others."""
        return self.relevance is not None and self.queries is not None


class Tasks:
    """The tasks of a siamese model, and which of them queries go to."""

    streams: Streams
    config: Any
    gate: Any
    relevance: Any
    #: The active task's stored queries, (N, F) float16.
    queries: Tensor | None = None
    parked: nn.ModuleDict
    router: Router | None
    training: bool
    get_output_embeddings: Any
    _chosen: str | None = None

    # -- the list ----------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order in which they were learnt."""
        return list(self.config.tasks)

    @property
    def active(self) -> str:
        """The task whose gate and head are the model's now."""
        return self.tasks[0] if len(self.tasks) == 1 else str(self.streams.peft_model.active_adapters[0])

    @property
    def task(self) -> str | None:
        """The task that every call is for, in training the one that learns; None has queries find theirs. Can be set."""
        return self._chosen

    @task.setter
    @in_turn
    def task(self, name: str | None) -> None:
        if name is not None:
            self.activate(name)
        self._chosen = name

    def part(self, name: str) -> Task:
        """What a task has beside its adapter.

        Raises:
            InputError: there is no such task.
        """
        if name not in self.tasks:
            raise InputError(f"there is no task {name!r}; there are {', '.join(self.tasks)}")
        if name != self.active:
            return self.parked[name]  # type: ignore[return-value]
        settings = {key: getattr(self.config, key) for key in OWN}
        return Task(self.gate, self.relevance, self.queries, settings)

    @in_turn
    def activate(self, name: str) -> None:
        """Makes a task the active one.

        Raises:
            InputError: there is no such task.
        """
        chosen = self.part(name)
        if name == self.active:
            return
        before, parked = self.active, self.part(self.active)
        del self.parked[name]
        self._take(chosen)
        self.streams.choose(name)
        self.parked[before] = parked

    def _take(self, task: Task) -> None:
        self.gate, self.relevance, self.queries = task.gate, task.relevance, task.queries
        for key, value in task.settings.items():
            setattr(self.config, key, value)

    @in_turn
    def add_task(
        self,
        name: str,
        peft_config: PeftConfig | str | os.PathLike[str],
        *,
        gate: str = "query_aware",
        gate_rank: int = 8,
        gate_dropout: float = 0.1,
    ) -> None:
        """Adds a task, which is the active one then and alone learns; `task` is set to it. Those before stay as they are.

        It claims no query before it has a head and stored queries, see `set_relevance` and `set_queries`.

        Args:
            name: letters, digits, - and _; no number, and no part of a path of the model's modules.
            peft_config: as for `from_base`.
            gate, gate_rank, gate_dropout: as for `from_base`.

        Raises:
            InputError: the name or the adapter cannot be used, or a task before has no head or no stored queries.
        """
        for before in self.tasks:
            part = self.part(before)
            if not part.whole:
                lacks = "relevance head" if part.relevance is None else "stored queries"
                raise InputError(
                    f"task {before!r} has no {lacks}, so that another could not be told from it; train it with dreams on, or "
                    "make its checkpoint anew of its adapter: imsm adopt ADAPTER --data FILE --output DIR"
                )
        made = build_gate(gate, self.config.hidden_size, gate_rank, gate_dropout)
        values = {"gate": gate, "gate_rank": gate_rank, "gate_dropout": gate_dropout, "relevance": 0, "training": {}}
        self.place_task(name, peft_config, Task(made, None, None, values))
        self._chosen = name
        self.refit_router()

    @in_turn
    def place_task(
        self, name: str, peft_config: PeftConfig | str | os.PathLike[str], task: Task, *, new: bool = True
    ) -> None:
        """Puts a task behind those that are there, whatever they are, without fitting anything; it is active then.

        `new`: the name is not one of a checkpoint.

        Raises:
            InputError: the name or the adapter cannot be used.
        """
        before, parked = self.active, self.part(self.active)
        add_adapter(self.streams, peft_config, name, new=new)
        task.to(next(self.get_output_embeddings().parameters()).device).train(self.streams.training)
        self.parked[before] = parked.requires_grad_(False)
        self.config.tasks = [*self.tasks, name]
        self._take(task)

    @in_turn
    def remove_task(self, name: str) -> None:
        """Takes a task away, its adapter too.

        Raises:
            InputError: there is no such task, or no other.
        """
        self.part(name)
        left = [other for other in self.tasks if other != name]
        if not left:
            raise InputError(f"{name!r} is the only task; a model keeps at least one")
        if self._chosen == name:
            self._chosen = None
        if name == self.active:
            self.activate(left[0])
        del self.parked[name]
        self.streams.peft_model.delete_adapter(name)
        self.streams.adapters_changed()
        self.config.tasks = left
        self.refit_router()

    # -- telling them apart ------------------------------------------------------------------------------------------

    @in_turn
    def set_relevance(self, head: RelevanceHead | None, opener: Sequence[int] = (), closer: Sequence[int] = ()) -> None:
        """Puts a relevance head in front of the active task's gate; None takes it away.

        Args:
            head: the head.
            opener: tokens that open a user's turn; of several turns it reads the last alone.
            closer: tokens that close one and open the answer; it reads the token before them, too.

        Raises:
            InputError: the head does not fit the model's memories, or other tasks' heads read other turns.
        """
        reads = self.config.relevance_turn, self.config.relevance_close
        if head is None and self.parked:
            opener, closer = reads  # the others' heads still read by them
        if head is not None:
            check_head(head.weight.numel(), self.config.hidden_size, closer)
        if self.parked and (list(opener), list(closer)) != reads:
            raise InputError(
                f"the heads of all tasks read the same: opener and closer must be {reads[0]} and {reads[1]}, got "
                f"{list(opener)} and {list(closer)}"
            )
        self.relevance = None if head is None else head.to(next(self.get_output_embeddings().parameters()).device)
        self.config.relevance = 0 if head is None else head.weight.numel()
        self.config.relevance_turn, self.config.relevance_close = list(opener), list(closer)
        self.refit_router()

    @in_turn
    def set_queries(self, queries: Tensor | None) -> None:
        """Stores some of the active task's frozen pooled queries (N, F), by which it is told from other tasks."""
        self.queries = None if queries is None else store(queries)
        self.refit_router()

    @property
    def others(self) -> list[Tensor]:
        """The stored queries of the tasks that are not active."""
        parts = [self.part(name) for name in self.tasks if name != self.active]
        return [part.queries for part in parts if part.queries is not None]

    @property
    def rivals(self) -> list[str]:
        """The tasks that queries can find."""
        return [name for name in self.tasks if self.part(name).whole]

    def refit_router(self) -> None:
        """Fits the router to the tasks' stored queries, where there are several."""
        stores = [self.part(name).queries for name in self.rivals]
        self.router = None
        if len(stores) > 1:
            router = fit_router([queries for queries in stores if queries is not None])
            self.router = router.to(next(self.get_output_embeddings().parameters()).device)

    @torch.no_grad()
    def choose(self, query: Tensor, how: Recall) -> list[str | None]:
        """The task of each query, None for the base model.

        A constant in place of the mix leaves the heads no say: then all tasks claim every query.

        Args:
            query: (B, 1, F), frozen pooled queries, or with others before these.
            how: what the call says of the mix; the dial shifts all heads alike.
        """
        names = self.rivals
        if not names:
            return [None] * len(query)
        heads = [self.part(name).relevance for name in names]
        if how.force is not None:
            claims = torch.ones(len(query), len(names), dtype=torch.bool, device=query.device)
        else:
            claims = torch.cat([~is_other(head, query, how.dial)[:, 0] for head in heads if head is not None], dim=1)
            if how.dial is not None:
                # Even what is no task's has to be mixed with somebody's memory.
                mixed = (how.dial.ceiling < 1).flatten().expand(len(query))
                claims |= (mixed & ~claims.any(dim=1))[:, None]
        width = max((head.weight.numel() for head in heads if head is not None), default=0)
        logits = None if self.router is None else self.router(query[:, 0, -width:])
        return [None if place < 0 else names[place] for place in pick(claims, logits)]
