"""Where the task ends: the relevance head of a finished adapter, fitted to the task's prompts and the base model's dreams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imsm.clusters import clusters
from imsm.data.batches import length_batches
from imsm.model import SiameseForCausalLM
from imsm.relevance import FOLDS, fit_relevance
from imsm.routing import negatives
from imsm.turns import last_turn

Report = Callable[[int, int], None]
#: How much anchors count beside all that is dreamt, at least, however few they are.
ANCHORED = 1 / 2
#: Of what other tasks have stored, the most that a head sees: more of it hardly helps them, and has the head claim what is nobody's.
RIVALS = 60


@dataclass(frozen=True)
class Border:
    """How well a head keeps the two apart.

    false_recall: share of the task's prompts that a head sends to the base model which has not seen any like them.
    dreams_kept: share of the dreams, and of what other tasks have stored, that it does not claim, judged alike.
    others_left: share of the other tasks' stored queries that the head leaves to them; None if there are none.
    """

    false_recall: float
    dreams_kept: float
    others_left: float | None = None


def fit_border(
    model: SiameseForCausalLM,
    prompts: Sequence[Sequence[int]],
    dreams: Sequence[Sequence[int]],
    *,
    origins: Sequence[int] | None = None,
    dream_origins: Sequence[int] | None = None,
    anchors: Sequence[Sequence[int]] = (),
    opener: Sequence[int] = (),
    closer: Sequence[int] = (),
    false_recall: float = 0.01,
    bf16: bool = False,
    report: Report | None = None,
) -> Border:
    """Gives the model's active task a relevance head and a store of its queries.

    What other tasks have stored counts as not this one's, beside the dreams, `RIVALS` queries of it at most; anchors count
    `ANCHORED` as much as the dreams, however few they are.

    Args:
        model: the siamese model; only its frozen stream is run.
        prompts: tokens of the task's prompts.
        dreams: prompts that are not the task's.
        origins: the example that each of `prompts` is a dress of; none is another's unless given.
        dream_origins: likewise, the dream that each of `dreams` is a dress of.
        anchors: further prompts that are not the task's, which must be left to the base model.
        opener: tokens that open a user's turn; of several turns the head reads the last alone.
        closer: tokens that close one and open the answer; the head reads the token before them, too.
        false_recall: share of the task's prompts that may be left to the base model.
        bf16: compute in bfloat16 autocast.
        report: called with the prompts read and those to read.

    Raises:
        InputError: there are no prompts of either kind.
    """
    read = [last_turn(ids, opener) for ids in (*prompts, *dreams, *anchors)]
    counts = [len(prompts), len(dreams), len(anchors)]
    own, other, kept = frozen_queries(model, read, closer, bf16, report).split(counts)
    alike = None if origins is None else _alike(own, origins)
    others_alike = None if dream_origins is None else _alike(other, dream_origins)
    if len(kept):
        times = anchor_times(len(kept), len(other))
        other = torch.cat([other, kept.repeat(times, 1)])
        others_alike = None if others_alike is None else torch.cat([others_alike, clusters(kept, FOLDS).repeat(times)])
    rivals = negatives(model.others, RIVALS)
    if rivals is not None:
        other = torch.cat([other, rivals])
        others_alike = None if others_alike is None else torch.cat([others_alike, clusters(rivals, FOLDS)])
    fitted = fit_relevance(own, other, alike, others_alike, kept, false_recall=false_recall)
    left = None
    if rivals is not None:
        left = float((fitted.head(torch.cat(model.others).float()) > 0).float().mean())
    model.set_relevance(fitted.head, opener, closer)
    model.set_queries(own)
    return Border(fitted.false_recall, fitted.others_left, left)


def anchor_times(anchors: int, others: int) -> int:
    """How often a head sees each of so many anchors beside so many others: until they come to `ANCHORED` of these, or once.

    They are asked for by name, and a few among hundreds would be given up for the task's sake.
    """
    return max(1, round(ANCHORED * others / max(1, anchors)))


def _alike(queries: Tensor, origins: Sequence[int]) -> Tensor:
    """Groups of alike queries (N, F), (N,) int64; all dresses of an example are in the group of its first one."""
    first = {origin: row for row, origin in reversed(list(enumerate(origins)))}
    group = dict(zip(first, clusters(queries[list(first.values())], FOLDS).tolist(), strict=True))
    return torch.tensor([group[origin] for origin in origins])


@torch.no_grad()
def frozen_queries(
    model: SiameseForCausalLM,
    prompts: Sequence[Sequence[int]],
    closer: Sequence[int] = (),
    bf16: bool = False,
    report: Report | None = None,
) -> Tensor:
    """The frozen pooled queries of prompts as a head with that `closer` reads them, (N, F) float32 on the CPU.

    A prompt that is given several times is read once.
    """
    device: Any = model.get_input_embeddings().weight.device
    place: dict[tuple[int, ...], int] = {}
    places = [place.setdefault(tuple(prompt), len(place)) for prompt in prompts]
    distinct = list(place)
    found: dict[int, Tensor] = {}
    read = 0
    for chosen in length_batches([len(prompt) for prompt in distinct]):
        width = max(len(distinct[index]) for index in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        attended = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, : len(distinct[index])] = torch.tensor(distinct[index])
            attended[row, : len(distinct[index])] = 1
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            rows = model.streams.frozen_query(ids.to(device), attended.to(device), closer)[:, 0].cpu()
        found |= zip(chosen, rows, strict=True)
        read += len(chosen)
        if report is not None:
            report(read, len(distinct))
    return torch.stack([found[index] for index in places])
