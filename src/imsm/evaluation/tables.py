"""An audit on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from imsm.evaluation.audit import Audit, Entry
from imsm.evaluation.comparison import Move, TaskComparison
from imsm.evaluation.figures import count, interval, p_value, percent, score, signed
from imsm.evaluation.verdict import sentence, verdict

KEY = "◎ target · ↓ less is better · lost, gained: records (beyond chance)"


def show(audit: Audit, console: Console) -> None:
    """Prints a table a checkpoint, the matrix where there are several, the balances, and the verdict."""
    for entry in audit.entries:
        console.print(_changes(entry), markup=False)
        console.print("  " + KEY, markup=False, highlight=False, style="dim")
        for name, reason in entry.balance.left_out.items():
            side = "plasticity" if name in audit.targets else "retention"
            title = entry.comparison.tasks[name].title
            console.print(f"  {title} cannot measure {side}: {reason}", markup=False, highlight=False)
    if len(audit.entries) > 1:
        console.print(_matrix(audit), markup=False)
    console.print(_balances(audit), markup=False)
    console.print(verdict(audit), markup=False, highlight=False, style="bold")
    if len(audit.entries) > 1:
        for entry in audit.entries:
            console.print(f"· {sentence(entry)}", markup=False, highlight=False)


def _changes(entry: Entry) -> Table:
    rows = []
    for name, task in entry.comparison.tasks.items():
        change, higher = task.score, task.score.higher_is_better
        rows.append(
            [
                _title(task, name in entry.targets),
                score(change.before.value, higher),
                score(change.after.value, higher),
                signed(change.change.value, higher),
                interval(change.change, higher, change=True),
                p_value(change.test.p),
                _moves(task.lost, None if task.adjusted is None else task.adjusted.lost),
                _moves(task.gained, None if task.adjusted is None else task.adjusted.gained),
            ]
        )
    headings = ("task", "before", "after", "change", "95 %", "p", "lost", "gained")
    return _table(f"{entry.label} ({entry.comparison.kind})", headings, rows)


def _matrix(audit: Audit) -> Table:
    rows = []
    for name in audit.tasks:
        task = audit.task(name)
        higher = task.score.higher_is_better
        after = [score(entry.comparison.tasks[name].score.after.value, higher) for entry in audit.entries]
        rows.append([_title(task, name in audit.targets), score(task.score.before.value, higher), *after])
    return _table("score", ("task", "base", *(entry.label for entry in audit.entries)), rows)


def _balances(audit: Audit) -> Table:
    rows = [
        [entry.label, *map(percent, (entry.balance.plasticity, entry.balance.retention, entry.balance.harmonic))]
        for entry in audit.entries
    ]
    return _table("balance", ("checkpoint", "plasticity", "retention", "harmonic mean"), rows)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column and headings give way where the terminal is narrow, never the figures."""
    # rich reads markup in a plain title.
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for i, heading in enumerate(headings):
        if i == 0:
            table.add_column(heading)
        else:
            table.add_column(heading, justify="right", min_width=max(len(row[i]) for row in rows))
    for row in rows:
        table.add_row(*row)
    return table


def _title(task: TaskComparison, target: bool) -> str:
    return f"{task.title}{' ◎' if target else ''}{'' if task.score.higher_is_better else ' ↓'}"


def _moves(moves: list[Move] | None, adjusted: float | None) -> str:
    """The count, and in parentheses what is left of it beyond chance."""
    if moves is None:
        return "–"
    return count(len(moves)) if adjusted is None else f"{count(len(moves))} ({adjusted:,.0f})"
