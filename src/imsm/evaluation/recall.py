"""Where the recall dial stands best: the task's score against the base model's own answers kept, along the dial.

    mean(r) = harmonic mean of  target(r) / max over the dial of target  and  retained(r)

Answers are what takes the time. A prompt that the relevance head leaves to the base model has the base's answer wherever
the dial stands beyond that point, and one that it does not, before a gate without weights, the adapter's; so each prompt
is answered once by each mind that it meets on the dial, not once for each value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from imsm.errors import InputError
from imsm.evaluation.answering import asked, refuse_long, tokens
from imsm.evaluation.bootstrap import bootstrap
from imsm.evaluation.candidates import longest_input
from imsm.evaluation.metrics import METRICS
from imsm.evaluation.passes import Pass
from imsm.evaluation.progress import RecordBar
from imsm.evaluation.results import Estimate, RecordResult
from imsm.evaluation.task import Task, TaskRecord
from imsm.generation import Answer
from imsm.model import SiameseForCausalLM
from imsm.training.border import frozen_queries
from imsm.turns import last_turn

#: Values of the dial that are tried.
RECALLS = (-math.inf, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, math.inf)
#: How an answer is made: an argument of `generate`, and its value.
Mind = tuple[str, float]
BASE: Mind = ("force_gate", 1.0)
TUNED: Mind = ("force_gate", 0.0)


@dataclass(frozen=True)
class Stand:
    """What a stand of the dial gives.

    recall: the value.
    target: the score on the task.
    kept: by task, the share of the base model's answers that are the same token by token.
    retained: their mean.
    relative: the target's score as a share of the best on the dial.
    mean: harmonic mean of `relative` and `retained`.
    left: share of the target's prompts that the base model alone answers.
    """

    recall: float
    target: Estimate
    kept: dict[str, Estimate]
    retained: float
    relative: float
    mean: float
    left: float

    def facts(self) -> dict[str, Any]:
        """As JSON values; an infinite recall is a text."""
        return {**asdict(self), "recall": self.recall if math.isfinite(self.recall) else str(self.recall)}


@dataclass(frozen=True)
class Dialled:
    """A checkpoint along the dial.

    metric: what the target is scored by.
    stands: by rising recall.
    pick: the best of them: the highest mean, and of equal ones the nearest to 0.
    answers: how many were decoded.
    """

    metric: str
    stands: list[Stand]
    pick: Stand
    answers: int


def along_the_dial(
    model: SiameseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    target: tuple[Task, Sequence[TaskRecord]],
    retained: Sequence[tuple[Task, Sequence[TaskRecord]]],
    recalls: Sequence[float] = RECALLS,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Dialled:
    """Evaluates a siamese model at each value of the dial.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        target: a task of kind `answer` and its records.
        retained: tasks of kind `kept` and theirs.
        recalls: values of the dial, −∞ and ∞ among them if wanted.
        batch_size: prompts decoded together.
        seed: of the intervals.
        progress: show it on standard error.

    Raises:
        InputError: there are no records or values, a value is no number, the target is never met, or the model has several
            tasks.
    """
    if len(model.tasks) > 1:
        raise InputError(
            f"the dial is tuned for one task, the model has {', '.join(model.tasks)}; imsm task export one of them first"
        )
    if not recalls or any(math.isnan(recall) for recall in recalls):
        raise InputError(f"the dial needs at least one value, each a number, inf or -inf, got {list(recalls)}")
    if not retained or not all(len(records) for _, records in (target, *retained)):
        raise InputError(
            "the dial is weighed by records of the task and by prompts whose answers are to be kept; give both"
        )
    recalls = sorted(set(recalls))
    said = [_said(model, tokenizer, *part, recalls, batch_size, progress) for part in (target, *retained)]
    own, others = said[0], dict(zip([task.name for task, _ in retained], said[1:], strict=True))
    metric, records = METRICS[target[0].metrics[0]], target[1]
    scores, kept = [], []
    for recall in recalls:
        results = [
            RecordResult(index, record.prompt, list(record.references), own.at(recall, index).text)
            for index, record in enumerate(records)
        ]
        columns = np.array([metric.columns(result) for result in results], dtype=float)
        scores.append(bootstrap(metric, columns, seed=seed))
        kept.append({name: other.kept(recall, seed) for name, other in others.items()})
    best = max(score.value for score in scores)
    if best <= 0:
        raise InputError(
            f"no answer along the dial scores above 0 by {metric.name} on the {len(records)} records; give more records, another "
            "metric, or the data that the adapter was trained for"
        )
    stands = []
    for recall, score, estimates in zip(recalls, scores, kept, strict=True):
        held = sum(estimate.value for estimate in estimates.values()) / len(estimates)
        relative = max(score.value, 0.0) / best
        mean = 2 * relative * held / (relative + held) if relative + held else 0.0
        left = sum(mind == BASE for mind in own.minds[recall]) / len(records)
        stands.append(Stand(recall, score, estimates, held, relative, mean, left))
    return Dialled(metric.name, stands, picked(stands), sum(len(answers.found) for answers in said))


def picked(stands: Sequence[Stand]) -> Stand:
    """The stand with the highest mean; of equal ones the nearest to 0, and the lower of two as near."""
    return max(stands, key=lambda stand: (round(stand.mean, 9), -abs(stand.recall), -stand.recall))


def minds(model: SiameseForCausalLM, queries: torch.Tensor | None, recall: float, count: int) -> list[Mind]:
    """Who answers each of `count` prompts where the dial stands at `recall`.

    Args:
        queries: the prompts' frozen pooled queries, (count, d), for a relevance head if there is one.
    """
    if math.isinf(recall):
        return [BASE if recall > 0 else TUNED] * count
    within = TUNED if getattr(model.gate, "tuned_alone", False) else ("recall", recall)
    if model.relevance is None:
        return [within] * count
    assert queries is not None
    with torch.no_grad():
        other = model.relevance(queries.to(model.relevance.weight.device))[:, 0] + recall > 0
    return [BASE if left else within for left in other.tolist()]


@dataclass(frozen=True)
class _Said:
    """Answers to a task's prompts.

    minds: by value of the dial, who answers each prompt.
    found: by prompt and mind, the answer.
    """

    minds: dict[float, list[Mind]]
    found: dict[tuple[int, Mind], Answer]

    def at(self, recall: float, index: int) -> Answer:
        return self.found[index, self.minds[recall][index]]

    def kept(self, recall: float, seed: int) -> Estimate:
        """The share of prompts whose answer is the base model's."""
        same = [self.at(recall, i).token_ids == self.found[i, BASE].token_ids for i in range(len(self.minds[recall]))]
        return bootstrap(METRICS["identical"], np.array(same, dtype=float)[:, None], seed=seed)


def _said(
    model: SiameseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    records: Sequence[TaskRecord],
    recalls: Sequence[float],
    batch_size: int,
    progress: bool,
) -> _Said:
    """The answers that a task needs, each made once."""
    prompts = [asked(task, record, tokenizer) for record in records]
    asked_ids = tokens(tokenizer, task, records)
    refuse_long(task, [len(ids) for ids in asked_ids], longest_input(model))
    opener = model.config.relevance_turn
    queries = None
    if model.relevance is not None:
        queries = frozen_queries(model, [last_turn(ids, opener) for ids in asked_ids], model.config.relevance_close)
    who = {recall: minds(model, queries, recall, len(prompts)) for recall in recalls}
    wanted = _wanted(who.values(), len(prompts) if task.kind == "kept" else 0)
    found: dict[tuple[int, Mind], Answer] = {}
    with RecordBar(task.title, sum(map(len, wanted.values())), 0, progress) as bar:
        for mind, indices in wanted.items():
            order = sorted(indices, key=lambda index: -len(asked_ids[index]))
            answering = Pass(model, tokenizer, dict([mind]))
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                answers = answering.answers([prompts[index] for index in chosen], task.max_new_tokens)
                found.update({(index, mind): answer for index, answer in zip(chosen, answers, strict=True)})
                bar.advance(len(chosen))
    return _Said(who, found)


def _wanted(who: Iterable[Sequence[Mind]], compared: int) -> Mapping[Mind, list[int]]:
    """By mind, the prompts that it is to answer; the first `compared` in any case by the base model."""
    wanted: dict[Mind, set[int]] = {BASE: set(range(compared))} if compared else {}
    for at_a_value in who:
        for index, mind in enumerate(at_a_value):
            wanted.setdefault(mind, set()).add(index)
    return {mind: sorted(indices) for mind, indices in wanted.items()}
