"""What a checkpoint learned against what it kept.

    plasticity = mean over targets of (after − before) / (best − before), at least 0
    retention  = mean over the other tasks of after / before, at most 1
    harmonic   = 2 · plasticity · retention / (plasticity + retention)

`best` is the score without fault: 1, or 0 where less is better. Plasticity is the share of the room for improvement
that was used, so that it lies in 0..1 as retention does: a checkpoint that learned nothing has 0, whatever the base's
score was. `before / after` stands in the place of `after / before` where less is better. Each task's ratio is cut at 1
before the mean, so that a gain on one task does not hide a loss on another. A task where the base does no better than
chance (or than 0 where guessing has no chance) has nothing to keep and is left out, and so is a target on which the
base is without fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imsm.errors import InputError
from imsm.evaluation.comparison import Change, Comparison, TaskComparison


@dataclass(frozen=True)
class Balance:
    """One checkpoint's balance.

    gain: mean over targets of the change, positive where the target got better.
    plasticity, retention, harmonic: see the module; None where no task can measure it.
    learned: each target's share of the room used.
    kept: each other task's share of the base's score kept.
    left_out: tasks that cannot measure, and why.
    """

    gain: float
    plasticity: float | None
    retention: float | None
    harmonic: float | None
    learned: dict[str, float]
    kept: dict[str, float]
    left_out: dict[str, str]


def balance(comparison: Comparison, targets: Sequence[str]) -> Balance:
    """Weighs the targets against the other tasks.

    Raises:
        InputError: a target is not among the tasks, or is a task of kept answers; there are no targets.
    """
    check_targets(comparison, targets)
    learned: dict[str, float] = {}
    kept: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, task in comparison.tasks.items():
        if name in targets:
            room = _room(task.score)
            if room <= 0:
                left_out[name] = "the base is already without fault"
            else:
                learned[name] = min(max(0.0, _gain(task.score) / room), 1.0)
        elif (reason := _unfit(task)) is not None:
            left_out[name] = reason
        else:
            kept[name] = _kept(task.score)
    plasticity = _mean(list(learned.values()))
    retention = _mean(list(kept.values()))
    gain = sum(_gain(comparison.tasks[name].score) for name in targets) / len(targets)
    return Balance(gain, plasticity, retention, _harmonic(plasticity, retention), learned, kept, left_out)


def check_targets(comparison: Comparison, targets: Sequence[str]) -> None:
    """Refuses targets that the comparison cannot judge."""
    if not targets:
        raise InputError("no target given; name with --targets the tasks that the checkpoints were trained for")
    for name in targets:
        if name not in comparison.tasks:
            raise InputError(f"the target {name!r} is not among the tasks; there are {', '.join(comparison.tasks)}")
        if comparison.tasks[name].kind == "kept":
            raise InputError(f"{name!r} measures what was kept and cannot be a target")


def _gain(score: Change) -> float:
    return score.change.value if score.higher_is_better else -score.change.value


def _room(score: Change) -> float:
    return 1 - score.before.value if score.higher_is_better else score.before.value


def _kept(score: Change) -> float:
    before, after = score.before.value, score.after.value
    if not score.higher_is_better:
        before, after = after, before
    return 1.0 if after >= before else max(0.0, after / before)


def _unfit(task: TaskComparison) -> str | None:
    before = task.score.before.value
    if not task.score.higher_is_better:
        return None if before > 0 else "the base's value is 0, of which there is no share"
    if before > (task.chance or 0.0):
        return None
    return "the base scores 0" if task.chance is None else "the base is no better than chance"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _harmonic(plasticity: float | None, retention: float | None) -> float | None:
    if plasticity is None or retention is None:
        return None
    return 2 * plasticity * retention / (plasticity + retention) if plasticity + retention else 0.0
