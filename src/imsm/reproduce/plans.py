"""What each of the paper's tables needs: runs, and on which tasks each is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from imsm.errors import InputError
from imsm.evaluation.tasks import TASKS
from imsm.reproduce.paper import TARGET, Column, PaperTable, paper_tables
from imsm.settings import nearest

ORIGINAL = "original"


@dataclass(frozen=True)
class Run:
    """A training run; or, if its method is `ORIGINAL`, the base model as it is.

    method: a recipe's name for the adapter.
    siamese: whether IMSM is put on it.
    gate, gate_rank: of IMSM.
    trained_on: the task.
    """

    method: str
    siamese: bool = False
    gate: str = "query_aware"
    gate_rank: int = 8
    trained_on: str | None = None

    @property
    def name(self) -> str:
        """Its folder, such as gsm8k/imsm-lora-rank4."""
        if self.method == ORIGINAL:
            return ORIGINAL
        gate = "" if self.gate == "query_aware" else f"-{self.gate}"
        rank = "" if self.gate_rank == 8 else f"-rank{self.gate_rank}"
        return f"{self.trained_on}/{'imsm-' if self.siamese else ''}{self.method}{gate}{rank}"

    def on(self, task: str | None) -> Run:
        """The same, trained on `task`."""
        return self if self.method == ORIGINAL else replace(self, trained_on=task)

    @property
    def plain(self) -> Run:
        """The same adapter without IMSM."""
        return Run(self.method, trained_on=self.trained_on)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    label: its name in `paper.json`.
    run: not yet trained on a task.
    baseline: label of the row that it is held against.
    """

    label: str
    run: Run
    baseline: str | None = None


@dataclass
class Job:
    """A run and what is measured on it.

    tasks: it is evaluated on.
    speed: whether its decoding is timed, against its adapter alone.
    """

    run: Run
    tasks: list[str] = field(default_factory=list)
    speed: bool = False


def _pair(method: str) -> list[Row]:
    return [Row(method, Run(method)), Row(f"imsm-{method}", Run(method, siamese=True), method)]


def _ablated(method: str) -> list[Row]:
    variants = [
        Row(f"imsm-{method}-{gate}", Run(method, siamese=True, gate=gate), method) for gate in ("token", "average")
    ]
    return _pair(method) + variants


def _ranks(method: str) -> list[Row]:
    return [Row(f"imsm-{method}-rank{rank}", Run(method, siamese=True, gate_rank=rank)) for rank in (4, 8, 16)]


_ORIGINAL = Row(ORIGINAL, Run(ORIGINAL))
_METHODS = ("lora", "ia3", "adalora")
_PAIRS = [row for method in _METHODS for row in _pair(method)]

#: The rows of each table.
ROWS: dict[str, list[Row]] = {
    "table1": [_ORIGINAL, *_PAIRS],
    "table2": [_ORIGINAL, *_PAIRS],
    "table3": [_ORIGINAL, *_pair("dora")],
    "table4": [row for method in _METHODS for row in _ablated(method)],
    "table5": _PAIRS,
    "table6": [row for method in _METHODS for row in _ranks(method)],
    "figure3": [Row("loramoe", Run("loramoe")), Row("imsm-lora", Run("lora", siamese=True), "loramoe")],
    "figure4": _PAIRS,
}

#: The methods that the paper has.
PAPER_METHODS = {row.run.method for rows in ROWS.values() for row in rows}


def _beside_loramoe(method: str) -> list[Row]:
    return [Row(f"imsm-{method}", Run(method, siamese=True), "loramoe")]


#: The rows of a method that the paper does not have, where they are not the adapter and IMSM on it.
ADDED: dict[str, Callable[[str], list[Row]]] = {"table4": _ablated, "table6": _ranks, "figure3": _beside_loramoe}


@dataclass(frozen=True)
class Plan:
    """A table to be remade.

    table: the paper's.
    trained_on: by part, the task; None where each column's own task is trained on.
    added: methods of a recipe that the paper does not have.
    """

    table: PaperTable
    trained_on: tuple[str | None, ...]
    added: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """Of every part."""
        own = ADDED.get(self.table.name, _pair)
        return [*ROWS[self.table.name], *(row for method in self.added for row in own(method))]

    def task(self, part: int, column: Column) -> str | None:
        """The task that a score is of."""
        return self.trained_on[part] if column.task == TARGET else column.task

    def run(self, part: int, row: Row, column: Column) -> Run:
        """The run that a cell is about."""
        first = next((column.task for column in self.table.columns if column.kind == "score"), None)
        return row.run.on(self.trained_on[part] or column.task or first)

    def jobs(self) -> list[Job]:
        """Every run that the table needs, each once."""
        jobs: dict[Run, Job] = {}
        for part in range(len(self.trained_on)):
            for row in self.rows:
                for column in self.table.columns:
                    run = self.run(part, row, column)
                    if run.method == ORIGINAL and column.kind != "score":
                        continue
                    job = jobs.setdefault(run, Job(run))
                    task = self.task(part, column) if column.kind == "score" else None
                    if task is not None and task not in job.tasks:
                        job.tasks.append(task)
                    job.speed |= column.kind == "speed" and run.siamese
        return list(jobs.values())


def make_plan(name: str, trained_on: str | None = None, methods: Iterable[str] = ()) -> Plan:
    """The plan of a table, on request with another task in place of the one that the paper trained on.

    Args:
        name: of the table.
        trained_on: the other task.
        methods: of the recipe; those that the paper does not have get rows below its own.

    Raises:
        InputError: there is no such table or task, or the table trains on each of its columns' tasks.
    """
    tables = paper_tables()
    if name not in tables:
        raise InputError(
            f"there is no {name!r} to reproduce; there are {', '.join(tables)}, or all{nearest(name, tables)}"
        )
    table = tables[name]
    added = tuple(method for method in methods if method not in PAPER_METHODS)
    tasks = tuple(part.trained_on for part in table.parts)
    if trained_on is None:
        return Plan(table, tasks, added)
    if trained_on not in TASKS or TASKS[trained_on].kind != "answer":
        answered = [task for task in TASKS if TASKS[task].kind == "answer"]
        raise InputError(f"--trained-on must be one of {', '.join(answered)}, got {trained_on!r}")
    if None in tasks:
        raise InputError(f"{name} trains on each of its columns' tasks; leave --trained-on out, or choose with --only")
    return Plan(replace(table, parts=table.parts[:1]), (trained_on,), added)


def merged(plans: list[Plan]) -> list[Job]:
    """The jobs of several tables, each run once."""
    jobs: dict[Run, Job] = {}
    for plan in plans:
        for job in plan.jobs():
            known = jobs.setdefault(job.run, Job(job.run))
            known.tasks += [task for task in job.tasks if task not in known.tasks]
            known.speed |= job.speed
    return list(jobs.values())


def chosen(jobs: list[Job], patterns: list[str] | None) -> list[Job]:
    """The jobs whose run's name fits one of the patterns (`*` and `?` stand for anything); all, without patterns.

    Raises:
        InputError: a pattern fits none.
    """
    for pattern in patterns or []:
        if not any(fnmatchcase(job.run.name, pattern) for job in jobs):
            raise InputError(f"--only {pattern} fits no run; there are {', '.join(job.run.name for job in jobs)}")
    return [job for job in jobs if not patterns or any(fnmatchcase(job.run.name, pattern) for pattern in patterns)]


def share(jobs: list[Job], process: int, processes: int) -> list[Job]:
    """The jobs of one of several processes: every n-th one."""
    return jobs[process::processes]
