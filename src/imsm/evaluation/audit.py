"""An audit: any number of checkpoints held against their base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from imsm.evaluation.balance import Balance, balance
from imsm.evaluation.comparison import Change, Comparison, Move, TaskComparison, compare
from imsm.evaluation.figures import labels
from imsm.evaluation.results import Estimate, Result

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One checkpoint of an audit.

    label: its short name, no other's.
    result: where its result lies.
    targets: names of the tasks that it was trained for.
    """

    label: str
    result: str
    comparison: Comparison
    balance: Balance
    targets: tuple[str, ...]

    def moved(self, direction: str) -> tuple[int, int] | None:
        """Records lost or gained on the tasks that are no targets, and of how many that were right or wrong before.

        None where no task counts records. Kept answers do not count here, they are no records of knowledge.
        """
        tasks = [t for name, t in self.comparison.tasks.items() if name not in self.targets and t.kind != "kept"]
        counted = [task for task in tasks if task.right is not None]
        if not counted:
            return None
        moves = sum(len(getattr(task, direction) or ()) for task in counted)
        right = sum(task.right or 0 for task in counted)
        return moves, right if direction == "lost" else sum(task.records for task in counted) - right


@dataclass(frozen=True)
class Audit:
    """Checkpoints against their base.

    base: the base as it was given.
    result: where its result lies.
    entries: one a checkpoint, in the order given.
    tasks, targets: names; the targets are among the tasks.
    """

    base: str
    result: str
    entries: list[Entry]
    tasks: list[str]
    targets: list[str]

    def task(self, name: str) -> TaskComparison:
        """A task as any checkpoint has it, for what is alike in all: title, kind, number of records, score before."""
        return self.entries[0].comparison.tasks[name]

    def facts(self) -> dict[str, Any]:
        """All figures as JSON values; records lost and gained by their index in the results."""
        return {
            "format": FORMAT,
            "base": self.base,
            "result": self.result,
            "targets": self.targets,
            "checkpoints": [
                {
                    "label": entry.label,
                    "checkpoint": entry.comparison.checkpoint,
                    "kind": entry.comparison.kind,
                    "result": entry.result,
                    "balance": asdict(entry.balance),
                    "tasks": {name: _facts(task) for name, task in entry.comparison.tasks.items()},
                }
                for entry in self.entries
            ],
            "matrix": {
                name: {
                    "before": self.task(name).score.before.value,
                    "after": {entry.label: entry.comparison.tasks[name].score.after.value for entry in self.entries},
                }
                for name in self.tasks
            },
        }


def audit(
    before: Result, afters: Sequence[Result], tasks: Sequence[str], targets: Sequence[str], results: Sequence[str]
) -> Audit:
    """Compares every checkpoint with the base.

    Args:
        before: of the base model.
        afters: one a checkpoint.
        tasks: names of the tasks to compare; kept answers need not be in `before`.
        targets: which of the tasks the checkpoints were trained for.
        results: where the results lie, of the base and of every checkpoint.

    Raises:
        InputError: see `compare` and `balance`.
    """
    names = labels([after.checkpoint for after in afters])
    entries = []
    for label, after, path in zip(names, afters, results[1:], strict=True):
        comparison = compare(before, after, tasks)
        entries.append(Entry(label, path, comparison, balance(comparison, targets), tuple(targets)))
    return Audit(before.checkpoint, results[0], entries, list(tasks), list(targets))


def _facts(task: TaskComparison) -> dict[str, Any]:
    return {
        "title": task.title,
        "kind": task.kind,
        "records": task.records,
        "chance": task.chance,
        "score": task.score.metric,
        "metrics": {change.metric: _change(change) for change in (task.score, *task.others)},
        "right_before": task.right,
        "lost": _indices(task.lost),
        "gained": _indices(task.gained),
        "beyond_chance": None if task.adjusted is None else asdict(task.adjusted),
    }


def _change(change: Change) -> dict[str, Any]:
    estimates: dict[str, Estimate] = {"before": change.before, "after": change.after, "change": change.change}
    return {
        **{name: asdict(estimate) for name, estimate in estimates.items()},
        "higher_is_better": change.higher_is_better,
        "test": change.test.name,
        "p": change.test.p,
    }


def _indices(moves: list[Move] | None) -> list[int] | None:
    return None if moves is None else [move.index for move in moves]
