"""Before held against after: two results on the same records, task by task and record by record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from imsm.errors import InputError
from imsm.evaluation.bootstrap import paired_bootstrap
from imsm.evaluation.chance import Adjusted, adjust
from imsm.evaluation.metrics import METRICS, Metric
from imsm.evaluation.results import Estimate, RecordResult, Result, TaskResult
from imsm.evaluation.significance import Test, mcnemar, paired_t
from imsm.evaluation.task import Kind

#: Metrics over yes and no whose score of guessing is not the rate at which a guess is right.
GUESS_RATES = {"f1": 0.5, "matthews": 0.5}


@dataclass(frozen=True)
class Change:
    """One metric before and after.

    change: after − before, with its 95 % interval (paired bootstrap over records).
    test: of the records' own scores.
    """

    metric: str
    title: str
    higher_is_better: bool
    before: Estimate
    after: Estimate
    change: Estimate
    test: Test

    @property
    def direction(self) -> Literal["better", "worse", "same"]:
        """Where it went; "same" where the interval of the change holds 0."""
        if self.change.low <= 0 <= self.change.high:
            return "same"
        return "better" if (self.change.low > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Move:
    """A record that went from right to wrong or back: its place, the record, and both answers."""

    index: int
    prompt: str
    references: list[str]
    before: str
    after: str


@dataclass(frozen=True)
class TaskComparison:
    """One task before and after.

    records: how many.
    score, others: the task's score, and its other metrics.
    right: records that were right before; None where records are not right or wrong.
    lost, gained: records right before and wrong after, and the reverse; None likewise.
    adjusted: the same beyond chance; None where guessing has no known rate.
    """

    task: str
    title: str
    kind: Kind
    chance: float | None
    records: int
    score: Change
    others: list[Change]
    right: int | None
    lost: list[Move] | None
    gained: list[Move] | None
    adjusted: Adjusted | None


@dataclass(frozen=True)
class Comparison:
    """One checkpoint against the base: what it is, and every task."""

    checkpoint: str
    kind: str
    tasks: dict[str, TaskComparison]


def compare(before: Result, after: Result, tasks: Sequence[str]) -> Comparison:
    """Compares the tasks named.

    Kept answers are the base's own, so before training all of them are kept, whether or not `before` has that task.

    Raises:
        InputError: a task is missing, was run on other records or scored by another metric; or the bases differ.
    """
    same_base(before, after)
    return Comparison(after.checkpoint, after.kind, {name: _task(before, after, name) for name in tasks})


def common_tasks(before: Result, afters: Sequence[Result]) -> list[str]:
    """The tasks that can be compared for all, in the order of the first checkpoint.

    Raises:
        InputError: there are none.
    """
    first, *others = afters
    names = [
        name
        for name, task in first.tasks.items()
        if (task.kind == "kept" or name in before.tasks) and all(name in other.tasks for other in others)
    ]
    if not names:
        had = "; ".join(f"{result.checkpoint}: {_names(result)}" for result in (before, *afters))
        raise InputError(f"the results have no task in common ({had}); evaluate all of them with the same --tasks")
    return names


def same_base(before: Any, after: Any) -> None:
    """Refuses what belongs to another base.

    Args:
        before, after: results or candidates, for their `base` and `kind`.

    Raises:
        InputError: the base models differ in shape or in name.
    """
    ours, theirs = before.base, after.base
    differing = [
        f"{key} {ours[key]} and {theirs[key]}" for key in ours if key != "name" and theirs.get(key) != ours[key]
    ]
    if differing:
        raise InputError(
            f"{_label(after)} does not belong to the base {_label(before)}: they differ in {', '.join(differing)}; "
            "give checkpoints of one base model"
        )
    # A plain model that was evaluated alone counts as its own base.
    if after.kind != "base" and _place(ours.get("name")) != _place(theirs.get("name")):
        raise InputError(
            f"{_label(after)} was trained on {theirs.get('name')}, but the base is {ours.get('name')}; give checkpoints "
            "of one base model, or if both are the same under two names, evaluate with --base"
        )


def _label(candidate: Any) -> str:
    return str(getattr(candidate, "checkpoint", None) or getattr(candidate, "spec", candidate))


def _place(name: Any) -> str:
    """A base's name; a folder's full path, however it was written."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else str(name)


def _names(result: Result) -> str:
    return ", ".join(result.tasks) or "none"


def _task(before: Result, after: Result, name: str) -> TaskComparison:
    for result in (before, after):
        if name not in result.tasks and not (result is before and name in after.tasks and _kept(after, name)):
            raise InputError(f"the result of {result.checkpoint} has no task {name!r}; it has {_names(result)}")
    theirs = after.tasks[name]
    ours = before.tasks.get(name)
    if ours is not None:
        if ours.fingerprint != theirs.fingerprint or len(ours.records) != len(theirs.records):
            raise InputError(
                f"{before.checkpoint} and {after.checkpoint} were asked different records of {name!r}, or asked "
                "differently; evaluate both with the same data, --limit and --seed"
            )
        if ours.score != theirs.score:
            raise InputError(
                f"{name!r} is scored by {ours.score!r} for {before.checkpoint}, but by {theirs.score!r} for "
                f"{after.checkpoint}; evaluate both with the same task"
            )
    metric = _metric(theirs.score)
    changes = {key: _change(_metric(key), ours, theirs) for key in theirs.metrics if _shared(key, ours, theirs)}
    score = changes.pop(theirs.score)
    return TaskComparison(
        name,
        theirs.title,
        theirs.kind,
        theirs.chance,
        len(theirs.records),
        score,
        list(changes.values()),
        *(_moves(metric, ours, theirs) if metric.binary else (None, None, None, None)),
    )


def _kept(result: Result, name: str) -> bool:
    return result.tasks[name].kind == "kept"


def _shared(key: str, before: TaskResult | None, after: TaskResult) -> bool:
    return after.kind == "kept" or (before is not None and key in before.metrics)


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise InputError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]


def _change(metric: Metric, before: TaskResult | None, after: TaskResult) -> Change:
    end = after.metrics[metric.name]
    scores_after = [metric.record(record) for record in after.records]
    if after.kind == "kept":
        start = 1.0 if metric.higher_is_better else 0.0
        scores_before = [start] * len(after.records)
        estimate = Estimate(start, start, start)
        change = Estimate(end.value - start, end.low - start, end.high - start)
    else:
        assert before is not None
        estimate = before.metrics[metric.name]
        scores_before = [metric.record(record) for record in before.records]
        change = paired_bootstrap(metric, _columns(metric, before.records), _columns(metric, after.records))
    if metric.binary:
        pairs = [(a > 0.5, b > 0.5) for a, b in zip(scores_before, scores_after, strict=True)]
        test = mcnemar(pairs.count((True, False)), pairs.count((False, True)))
    else:
        test = paired_t(scores_before, scores_after)
    return Change(metric.name, metric.title, metric.higher_is_better, estimate, end, change, test)


def _columns(metric: Metric, records: Sequence[RecordResult]) -> np.ndarray:
    return np.array([metric.columns(record) for record in records], dtype=float)


def _moves(
    metric: Metric, before: TaskResult | None, after: TaskResult
) -> tuple[int, list[Move], list[Move], Adjusted | None]:
    lost: list[Move] = []
    gained: list[Move] = []
    kept = wrong = 0
    for i, record in enumerate(after.records):
        old = before.records[i] if before is not None else None
        was = after.kind == "kept" or (old is not None and metric.record(old) > 0.5)
        now = metric.record(record) > 0.5
        said = old.answer if old is not None else next(iter(record.references), "")
        move = Move(record.index, record.prompt, record.references, said, record.answer)
        if was and not now:
            lost.append(move)
        elif now and not was:
            gained.append(move)
        kept += was and now
        wrong += not was and not now
    rate = _guess_rate(metric, after)
    adjusted = None if rate is None else adjust(kept, len(lost), len(gained), wrong, rate)
    return kept + len(lost), lost, gained, adjusted


def _guess_rate(metric: Metric, task: TaskResult) -> float | None:
    """How often a guess is right; None where guessing has no chance."""
    if task.chance is None:
        return None
    return GUESS_RATES.get(metric.name, task.chance)
