"""The relevance head: is a query the adapter's business, or the base model's?

A linear map of the mean, over the query, of the frozen memory and of the frozen stream's hidden states at some depths. It
stands in front of the gate, and its answer is sharp: a query that is not the task's gets the base model's memories alone,
bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imsm.errors import InputError

#: Share of dreams that may lie on the task's side of the point that the border is drawn from.
STRAY_DREAMS = 0.05
#: Steps of the optimizer of the fit; it converges in some dozens.
FIT_STEPS = 200


class RelevanceHead(nn.Module):
    """logit = q̄ · w + b of a frozen pooled query; above 0 the base model answers.

    Args:
        width: F of a query: that of a memory and, for each depth, that of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # At the start every query is the task's.
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float32), requires_grad=False)

    def forward(self, query: Tensor) -> Tensor:
        """Logits (..., 1) float32 of queries (..., width)."""
        return (query.float() * self.weight.float()).sum(dim=-1, keepdim=True) + self.bias.float()


def usual_depths(layers: int) -> tuple[int, ...]:
    """The layers, from 0, behind which a head reads besides the memory: a third and two thirds of the way up."""
    return tuple(sorted({max(round(layers / 3), 1) - 1, max(round(2 * layers / 3), 1) - 1}))


def fit_relevance(
    task: Tensor,
    other: Tensor,
    held_out: Tensor | None = None,
    *,
    penalty: float = 0.03,
    false_recall: float = 0.01,
    border: float = 0.25,
) -> RelevanceHead:
    """The head that tells the task's queries from others.

    Logistic regression on standardised features, both classes of the same weight. The border is then moved to where
    queries that the fit has not seen lie: `border` of the way from the task's logits, all but `false_recall` of which are
    below that point, to those of the others. Where the two overlap it is the first of these points.

    Args:
        task: (N, F), frozen pooled queries of the task.
        other: (M, F), of what is not the task.
        held_out: (K, F), of the task, not in `task`; without them the border is drawn from `task`.
        penalty: of the squared weights.
        false_recall: share of the task's queries that may be left to the base model.
        border: from 0, at the task's queries, to 1, at the others.

    Raises:
        InputError: there are none of either kind, or a number out of range.
    """
    if not len(task) or not len(other):
        raise InputError(f"a relevance head is fitted to queries of both kinds, got {len(task)} and {len(other)}")
    for name, value in (("false_recall", false_recall), ("border", border)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} must be a number from 0 to 1, got {value!r}")
    both = torch.cat([task, other]).double()
    mean, scale = both.mean(dim=0), both.std(dim=0, correction=0).clamp(min=1e-6)
    inputs = (both - mean) / scale
    wanted = torch.cat([torch.zeros(len(task)), torch.ones(len(other))]).double().to(inputs.device)
    share = torch.where(wanted == 1, 0.5 / len(other), 0.5 / len(task))
    weight = torch.zeros(inputs.shape[1], dtype=torch.float64, device=inputs.device, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = nn.functional.binary_cross_entropy_with_logits(inputs @ weight + bias, wanted, reduction="none")
        loss = (share * losses).sum() + penalty * weight.square().sum()
        loss.backward()
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    w = (weight / scale).detach()
    b = (bias - (weight * mean / scale).sum()).detach()
    own = (task if held_out is None or not len(held_out) else held_out).double() @ w + b
    least = own.quantile(1 - false_recall)
    most = (other.double() @ w + b).quantile(STRAY_DREAMS)
    point = least + border * (most - least).clamp(min=0)
    head = RelevanceHead(task.shape[1])
    with torch.no_grad():
        # Of any length before: the nearest of the two points is one nat away, so that the dial has a natural unit.
        unit = ((most - least) * min(border, 1 - border)).clamp(min=1e-3) if most > least else torch.ones(())
        head.weight.copy_(w / unit)
        head.bias.copy_((b - point) / unit)
    return head
