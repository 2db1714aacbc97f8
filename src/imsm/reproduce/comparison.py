"""Our figures beside the paper's: Student's t-test over the records, and what was scaled down."""

from __future__ import annotations

from dataclasses import dataclass

from imsm.errors import InputError
from imsm.evaluation.results import TaskResult
from imsm.evaluation.significance import paired_t
from imsm.reproduce.paper import Column
from imsm.reproduce.plans import ORIGINAL, Plan, Row, Run
from imsm.reproduce.running import Study


@dataclass(frozen=True)
class Cell:
    """One figure.

    ours, paper: None where there is none.
    p: of Student's paired t-test over the records, against the row's baseline.
    """

    ours: float | None = None
    paper: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Line:
    """A row of one part of the table.

    trained_on: the task, if it is the whole row's.
    label: the row's name.
    cells: one a column.
    """

    trained_on: str | None
    label: str
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """A table with our figures and the paper's.

    name, title, columns, note: of the table.
    model: ours.
    paper_model: the one whose figures are the paper's here; None if it has none.
    scaled: what was scaled down, in words; empty if nothing was.
    lines: its rows.
    done, runs: how many of the table's runs are done, and how many there are.
    """

    name: str
    title: str
    columns: list[str]
    note: str
    model: str
    paper_model: str | None
    scaled: str
    lines: list[Line]
    done: int
    runs: int

    @property
    def heading(self) -> str:
        """Table, model, what was scaled down."""
        return f"{self.name}: {self.title}, {self.model}" + (f" (scaled down: {self.scaled})" if self.scaled else "")

    @property
    def legend(self) -> str:
        """What the signs mean."""
        whose = f"in brackets the paper's, of {self.paper_model}" if self.paper_model else "the paper has no figures"
        tested = any(cell.p is not None for line in self.lines for cell in line.cells)
        star = "; * differs from the adapter without IMSM at p < 0.05 (Student's paired t-test over records)"
        if self.name == "figure3":
            star = star.replace("the adapter without IMSM", "LoRAMoE")
        left = f" {self.done} of {self.runs} runs are done." if self.done < self.runs else ""
        return f"Ours, {whose}{star if tested else ''}.{left}{' ' if self.note else ''}{self.note}"


def compare(plan: Plan, study: Study) -> Comparison:
    """The plan's table from what of its runs is done."""
    paper_model = plan.table.model(study.recipe.paper)
    lines = []
    for part, trained_on in enumerate(plan.trained_on):
        averages: dict[str, float | None] = {}
        for row in plan.rows:
            ours = [_figure(plan, study, part, row, column) for column in plan.table.columns]
            scores = [cell.ours for cell, c in zip(ours, plan.table.columns, strict=True) if c.kind == "score"]
            known = [score for score in scores if score is not None]
            averages[row.label] = sum(known) / len(known) if known and len(known) == len(scores) else None
            cells = []
            for place, (cell, column) in enumerate(zip(ours, plan.table.columns, strict=True)):
                value = cell.ours
                if column.kind == "average":
                    value = averages[row.label]
                elif column.kind == "ahead":
                    mine, theirs = averages[row.label], averages.get(row.baseline or "")
                    value = None if mine is None or theirs is None else mine - theirs
                # With another task in place of the paper's, its figures are not about the same.
                same = trained_on == plan.table.parts[part].trained_on
                paper = plan.table.figure(paper_model, part, row.label, place) if same else None
                cells.append(Cell(value, paper, cell.p))
            lines.append(Line(trained_on, row.label, cells))
    jobs = plan.jobs()
    shown = paper_model if any(cell.paper is not None for line in lines for cell in line.cells) else None
    return Comparison(
        plan.table.name,
        plan.table.title,
        [column.title for column in plan.table.columns],
        plan.table.note,
        study.title,
        shown,
        scaled_down(plan, study),
        lines,
        sum(not study.missing(job) for job in jobs),
        len(jobs),
    )


def scaled_down(plan: Plan, study: Study) -> str:
    """What is less than, or other than, in the paper, in words."""
    scale, recipe = study.scale, study.recipe
    said = [recipe.scaled] if recipe.scaled else []
    if scale.records is not None:
        said.append(f"at most {scale.records} training records a task")
    if scale.limit is not None:
        said.append(f"at most {scale.limit} test records a task")
    theirs = recipe.settings.get("epochs")
    if scale.epochs is not None and scale.epochs != theirs:
        said.append(f"epochs {scale.epochs:g}" + (f" instead of {theirs:g}" if theirs else ""))
    tasks = [part.trained_on for part in plan.table.parts]
    if list(plan.trained_on) != tasks:
        said.append(f"trained on {plan.trained_on[0]} instead of {tasks[0]}")
    return "; ".join(said)


def _figure(plan: Plan, study: Study, part: int, row: Row, column: Column) -> Cell:
    """What is ours of a cell, but for what follows from the other cells of its row."""
    run = plan.run(part, row, column)
    if column.kind == "score":
        task = plan.task(part, column)
        assert task is not None
        result = study.result(run, task)
        if result is None:
            return Cell()
        metric = column.metric or result.score
        before = next((other for other in plan.rows if other.label == row.baseline), None)
        baseline = None if before is None else study.result(plan.run(part, before, column), task)
        return Cell(
            100 * result.metrics[metric].value, p=None if baseline is None else t_test(baseline, result, metric)
        )
    if run.method == ORIGINAL:
        return Cell()
    if column.kind == "parameters":
        # The same whatever was trained on.
        tasks = [plan.trained_on[part], *(c.task for c in plan.table.columns if c.kind == "score")]
        found = next((facts for task in tasks if task and (facts := study.measured(run.on(task)))), None)
        return Cell(None if found is None else found["parameters"] / 1e6)
    if column.kind in ("memory", "memory_ratio"):
        mine, plain = _memory(study, run), _memory(study, run.plain)
        if column.kind == "memory":
            return Cell(None if mine is None else mine / 1e9)
        return Cell(mine / plain if row.baseline and mine and plain else None)
    if column.kind in ("speed", "speed_ratio"):
        timed = study.speed(run if run.siamese else Run(run.method, siamese=True, trained_on=run.trained_on))
        if timed is None:
            return Cell()
        if column.kind == "speed":
            return Cell(timed.siamese if run.siamese else timed.plain)
        return Cell(timed.siamese / timed.plain if run.siamese else None)
    return Cell()


def _memory(study: Study, run: Run) -> int | None:
    return (study.measured(run) or {}).get("memory")


def t_test(before: TaskResult, after: TaskResult, metric: str) -> float | None:
    """p of Student's paired t-test over the records' own scores by a metric; None for a single record.

    Raises:
        InputError: they are of different records.
    """
    if before.fingerprint != after.fingerprint:
        raise InputError(f"results on {before.task} are of different records; remove them, and they are made again")
    scores = ([record.scores[metric] for record in result.records] for result in (before, after))
    return paired_t(*scores).p
