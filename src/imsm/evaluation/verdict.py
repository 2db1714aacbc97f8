"""An audit in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from imsm.evaluation.audit import Audit, Entry
from imsm.evaluation.comparison import TaskComparison
from imsm.evaluation.figures import before_after, percent


def verdict(audit: Audit) -> str:
    """The headline: one sentence about the only checkpoint, or about the best of several."""
    entries = audit.entries
    if len(entries) == 1:
        return sentence(entries[0])
    judged = [entry for entry in entries if entry.balance.harmonic is not None]
    if not judged:
        return f"{len(entries)} checkpoints are compared, but no task can tell what they kept or learned."
    best = max(judged, key=lambda entry: entry.balance.harmonic or 0.0)
    if not best.balance.harmonic:
        return f"None of the {len(entries)} checkpoints both learned and kept anything."
    return (
        f"Of {len(entries)} checkpoints, {best.label} balances learning and keeping best "
        f"({percent(best.balance.harmonic)}): it {_learned(best)}, and {_share(best)}."
    )


def sentence(entry: Entry) -> str:
    """One sentence about one checkpoint."""
    return f"{entry.label} {_learned(entry)}, and {_kept(entry)}."


def _learned(entry: Entry) -> str:
    tasks = [entry.comparison.tasks[name] for name in entry.targets]
    better = [task for task in tasks if task.score.direction == "better"]
    worse = [task for task in tasks if task.score.direction == "worse"]
    same = [task for task in tasks if task.score.direction == "same"]
    told = [
        *([f"learned {_list(better)}"] if better else []),
        *([f"did not measurably change {_list(same)}"] if same else []),
        *([f"got worse at {_list(worse)}"] if worse else []),
    ]
    return " but ".join(told)


def _share(entry: Entry) -> str:
    balance = entry.balance
    if len(entry.comparison.tasks) == len(entry.targets):
        return "what it kept of other skills was not measured"
    if balance.retention is None:
        return "no other task can tell what it kept"
    number = len(balance.kept)
    return f"kept {percent(balance.retention)} of the base's score on {number} other task{'s' * (number != 1)}"


def _kept(entry: Entry) -> str:
    others = [task for name, task in entry.comparison.tasks.items() if name not in entry.targets]
    if worse := [task for task in others if task.score.direction == "worse"]:
        return f"{_share(entry)}; measurably worse: {_list(worse)}"
    return _share(entry) if entry.balance.retention is None else f"{_share(entry)}, where nothing fell measurably"


def _list(tasks: Sequence[TaskComparison]) -> str:
    return ", ".join(f"{task.title} ({before_after(task.score)})" for task in tasks)
