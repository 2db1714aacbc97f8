"""The relevance head: is a query the adapter's business, or the base model's?

A linear map of the frozen memory: its mean over the query, what it is at the last token, and, where a chat template
closes a user's turn, what it is at the last token that was said. It stands in front of the gate, and its answer is sharp:
a query that is not the task's gets the base model's memories alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imsm.clusters import clusters
from imsm.errors import InputError

#: Share of dreams that may lie on the task's side of the point that the border is drawn from.
STRAY_DREAMS = 0.05
#: Steps of the optimizer of the fit; it converges in some dozens.
FIT_STEPS = 200
#: Groups of alike queries that are judged by heads which have not seen them.
FOLDS = 10
#: How far on the way from the task's queries, 0, to the others, 1, the border lies.
BORDER = 2 / 5
#: How far on the way to the nearest anchor it lies at most.
ANCHORS_LEFT = 9 / 10


class RelevanceHead(nn.Module):
    """logit = q̄ · w + b of a frozen pooled query; above 0 the base model answers.

    Args:
        width: F of a query, see `read_width`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # At the start every query is the task's.
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float32), requires_grad=False)

    def forward(self, query: Tensor) -> Tensor:
        """Logits (..., 1) float32 of queries (..., width)."""
        return (query.float() * self.weight.float()).sum(dim=-1, keepdim=True) + self.bias.float()


def read_width(memory: int, closer: Sequence[int] = ()) -> int:
    """F of what a head reads of memories of width d: 2 d, their mean and the last token's, and d more for that of the last token
    said, where there are tokens that close a user's turn."""
    return (3 if len(closer) else 2) * memory


def check_head(width: int, memory: int, closer: Sequence[int] = ()) -> None:
    """Raises `InputError` if a head of that width does not read memories of that width by `read_width`."""
    if width != (wanted := read_width(memory, closer)):
        raise InputError(
            f"a relevance head reads {wanted // memory} x {memory} values here, the memory's mean and single tokens', and this "
            f"one reads {width}; fit it anew: imsm adopt ADAPTER --data FILE --output DIR"
        )


def build_head(width: int, memory: int, closer: Sequence[int] = ()) -> RelevanceHead | None:
    """The head that a checkpoint's settings name, without its weights; None for 0. Errors as for `check_head`."""
    if not width:
        return None
    check_head(width, memory, closer)
    return RelevanceHead(width)


class Fitted(NamedTuple):
    """A head and what is to be expected of it where queries are of a kind that it has not seen.

    Both shares are those of heads that were fitted without the queries in question and all that are like them.

    head: fitted to all queries.
    false_recall: share of the task's queries that would be left to the base model.
    others_left: share of the others that would be.
    """

    head: RelevanceHead
    false_recall: float
    others_left: float


def fit_relevance(
    task: Tensor,
    other: Tensor,
    alike: Tensor | None = None,
    others_alike: Tensor | None = None,
    anchors: Tensor | None = None,
    *,
    penalty: float = 0.3,
    false_recall: float = 0.01,
    folds: int = FOLDS,
) -> Fitted:
    """The head that tells the task's queries from others.

    Logistic regression on standardised features, both classes of the same weight. The border lies `BORDER` of the way
    from the task's logits, all but `false_recall` of which are below that end, to those of the others. Where the two
    kinds overlap it is the task's end. Anchors draw it nearer: before the first of them, or to the task's end. What is to
    be expected of queries of other kinds is asked of the queries themselves: they are divided into `folds` groups of alike
    ones, each of which is judged by a head fitted to the rest.

    Args:
        task: (N, F), frozen pooled queries of the task.
        other: (M, F), of what is not the task.
        alike, others_alike: (N,) and (M,) int64, the group of each query of either kind; found by `clusters` unless given.
        anchors: (A, F), those of the others that must be left to the base model.
        penalty: of the squared weights.
        false_recall: share of the task's queries that may be left to the base model.
        folds: groups; with fewer than two, what is expected is how the queries lie that the head is fitted to.

    Raises:
        InputError: there are none of either kind, or a number out of range.
    """
    if not len(task) or not len(other):
        raise InputError(f"a relevance head is fitted to queries of both kinds, got {len(task)} and {len(other)}")
    if not 0 <= false_recall <= 1:
        raise InputError(f"false_recall must be a number from 0 to 1, got {false_recall!r}")
    line = _Line(task, other, penalty, false_recall)
    place = BORDER if anchors is None else border_place(line.position(anchors))
    own, others = line.position(task), line.position(other)
    if folds > 1:
        groups = [
            clusters(queries, folds) if given is None else given.cpu()
            for queries, given in ((task, alike), (other, others_alike))
        ]
        unseen = _positions(task, other, (groups[0], groups[1]), penalty, false_recall)
        own, others = (new if len(new) else old for new, old in zip(unseen, (own, others), strict=True))
    head = RelevanceHead(task.shape[1])
    with torch.no_grad():
        # Of any length before: the nearest of the two ends is one nat away, so that the dial has a natural unit.
        unit = (line.gap * BORDER).clamp(min=1e-3) if line.gap > 0 else torch.ones(())
        head.weight.copy_(line.weight / unit)
        head.bias.copy_((line.bias - line.least - place * line.gap.clamp(min=0)) / unit)
    return Fitted(head, float((own > place).double().mean()), float((others > place).double().mean()))


def border_place(anchors: Tensor) -> float:
    """How far on the way from the task's queries the border lies, for anchors that lie there, (A,): `BORDER` at most."""
    return min([BORDER, *(ANCHORS_LEFT * anchors.clamp(min=0)).tolist()])


class _Line:
    """A logistic regression, and the ends between which its border lies: `least`, at the task's, and `gap` above it."""

    def __init__(self, task: Tensor, other: Tensor, penalty: float, false_recall: float) -> None:
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
        self.weight = (weight / scale).detach()
        self.bias = (bias - (weight * mean / scale).sum()).detach()
        self.least = self.logits(task).quantile(1 - false_recall)
        self.gap = self.logits(other).quantile(STRAY_DREAMS) - self.least

    def logits(self, queries: Tensor) -> Tensor:
        """(N,) float64 of queries (N, F)."""
        return queries.double() @ self.weight + self.bias

    def position(self, queries: Tensor) -> Tensor:
        """Where queries (N, F) lie between the ends, 0 and 1; (N,) float64."""
        return (self.logits(queries) - self.least) / self.gap.clamp(min=1e-6)


def _positions(
    task: Tensor, other: Tensor, groups: tuple[Tensor, Tensor], penalty: float, false_recall: float
) -> tuple[Tensor, Tensor]:
    """Where the queries of both kinds lie for heads that have not seen their groups; none if nothing would be left to fit."""
    own: list[Tensor] = []
    others: list[Tensor] = []
    for group in range(int(max(part.max() for part in groups)) + 1):
        out, away = ((part == group).to(task.device) for part in groups)
        if not bool((~out).any()) or not bool((~away).any()):
            continue
        line = _Line(task[~out], other[~away], penalty, false_recall)
        own.append(line.position(task[out]))
        others.append(line.position(other[away]))
    return (torch.cat(own), torch.cat(others)) if own else (torch.zeros(0), torch.zeros(0))
