"""How far an evaluation is: a bar on a terminal, elsewhere a line now and then, on standard error."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

#: Seconds between lines where the output is no terminal.
LINE_EVERY = 15.0


class RecordBar:
    """Counts the records of a task; a context.

    Args:
        label: what is evaluated, in front of the bar.
        total: records of the task.
        done: those that an earlier run finished.
        shown: False for silence.
    """

    def __init__(self, label: str, total: int, done: int, shown: bool = True) -> None:
        self.label, self.total, self.done, self.first, self.shown = label, total, done, done, shown
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.started = self.printed = time.monotonic()

    def __enter__(self) -> RecordBar:
        if self.shown and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f} ·"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.add_task(self.label, total=self.total, completed=self.done)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, count: int) -> None:
        """`count` more records are finished."""
        self.done += count
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
            return
        now = time.monotonic()
        if not self.shown or (now - self.printed < LINE_EVERY and self.done < self.total):
            return
        self.printed = now
        left = (now - self.started) / max(self.done - self.first, 1) * (self.total - self.done)
        self.console.print(
            f"{self.label}: {self.done}/{self.total} records · {left:.0f} s left",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
