"""Which of several tasks a query goes to: the tasks whose heads claim it compete, and a linear classifier picks one.

What is kept of a task for that is a store of its frozen pooled queries: a few hundred vectors, no text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imsm.errors import InputError

#: Most queries that are kept of a task.
STORED = 256
#: Steps of the optimizer of the fit; it converges in some dozens.
FIT_STEPS = 200


class Router(nn.Module):
    """logits = q̄ · W + b over K tasks, of a frozen pooled query.

    Args:
        width: F of a query.
        tasks: K.
    """

    def __init__(self, width: int, tasks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tasks, width, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(tasks, dtype=torch.float32), requires_grad=False)

    def forward(self, query: Tensor) -> Tensor:
        """Logits (..., K) float32 of queries (..., F)."""
        return nn.functional.linear(query.float(), self.weight.float(), self.bias.float())


def store(queries: Tensor, most: int = STORED) -> Tensor:
    """What is kept of a task's queries (N, F): at most so many of them, evenly chosen, float16 on the CPU."""
    if len(queries) > most:
        queries = queries[torch.linspace(0, len(queries) - 1, most).round().long()]
    limit = torch.finfo(torch.float16).max
    return queries.detach().float().clamp(-limit, limit).half().cpu()


def negatives(stores: Sequence[Tensor], most: int) -> Tensor | None:
    """Stored queries of other tasks as a new head is to tell apart from its own: alike from each, at most so many.

    Returns:
        (M, F) float32, or None if there are none.
    """
    if not stores or most < 1:
        return None
    share = max(most // len(stores), 1)
    return torch.cat([store(part, share).float() for part in stores])


def fit_router(stores: Sequence[Tensor], penalty: float = 0.03) -> Router:
    """The classifier of tasks by their stored queries: multinomial logistic regression on standardised features.

    Args:
        stores: (N, F) of each of K tasks; each task has the same weight, however many there are.
        penalty: of the squared weights.

    Raises:
        InputError: there are fewer than two tasks, or one without queries.
    """
    if len(stores) < 2 or not all(len(part) for part in stores):
        raise InputError(
            "a router is fitted to the stored queries of two tasks or more, none of them empty, got "
            f"{[len(part) for part in stores]}; train or adopt the tasks with dreams on"
        )
    every = torch.cat(list(stores)).double()
    labels = torch.cat([torch.full((len(part),), place) for place, part in enumerate(stores)])
    share = torch.cat([torch.full((len(part),), 1 / (len(stores) * len(part)), dtype=torch.double) for part in stores])
    mean, scale = every.mean(dim=0), every.std(dim=0, correction=0).clamp(min=1e-6)
    inputs = (every - mean) / scale
    weight = torch.zeros(len(stores), every.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(stores), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(inputs @ weight.t() + bias, labels, reduction="none")
        loss = (share * losses).sum() + penalty * weight.square().sum()
        loss.backward()
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    router = Router(every.shape[1], len(stores))
    with torch.no_grad():
        router.weight.copy_(weight / scale)
        router.bias.copy_(bias - (weight / scale) @ mean)
    return router


def pick(claims: Tensor, logits: Tensor | None) -> list[int]:
    """The task of each query, −1 for the base model.

    Args:
        claims: (B, K) bool, which tasks' heads claim it.
        logits: (B, K), the router's; may be None where no query has two claims.
    """
    scores = claims.float() if logits is None else logits.masked_fill(~claims, -torch.inf)
    chosen = scores.argmax(dim=1)
    return torch.where(claims.any(dim=1), chosen, -1).tolist()  # type: ignore[no-any-return]
