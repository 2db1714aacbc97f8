"""Trains the plan's tasks in a row by every method, and scores all of them after each; what is done is not done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.commands import plan_content
from benchmarks.continual import scores, sets
from benchmarks.models import title
from benchmarks.sitting import EVALUATION_BATCH, Sitting, is_done
from imsm.errors import InputError
from imsm.evaluation.results import read_result
from imsm.folders import write_text

PLAN = Path(__file__).resolve().parent / "plan.yaml"
METHODS = ("imsm", "sequential", "all", "orthogonal", "nearest")
#: A query that is none of the tasks'.
OTHER = (
    "My sister wants to learn to play the violin, and she has asked me how long it takes until one can play a simple song "
    "without a teacher. She is thirty, has never played anything before, and can practise for half an hour in the evening. "
    "What should I tell her?"
)


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    tasks: names in `sets.SETS`, in the order in which they are learnt.
    training_records, test_records: of each.
    train: settings of each training.
    seeds: each is a run of its own.
    methods: title and source by name.
    """

    tasks: list[str]
    training_records: int
    test_records: int
    train: dict[str, Any]
    seeds: list[int]
    methods: dict[str, dict[str, str]]


def read_plan(path: Path = PLAN, records: int | None = None) -> Plan:
    """The plan in a file, with another number of training records if that is given.

    Raises:
        InputError: it cannot be read, or names tasks or methods that there are not.
    """
    plan = Plan(**plan_content(path, {field.name for field in fields(Plan)}))
    for kind, given, known in (("task", plan.tasks, sets.SETS), ("method", plan.methods, METHODS)):
        if unknown := [name for name in given if name not in known]:
            raise InputError(f"{path} names the {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    if len(plan.tasks) < 2:
        raise InputError(f"{path} must name two tasks or more, got {plan.tasks}")
    return plan if records is None else Plan(**{**asdict(plan), "training_records": records})


@dataclass
class Record:
    """What is kept of one method's run.

    model, method, title, source, seed: whose run it is.
    tasks: in the order in which they were learnt.
    base: the base model's score on each.
    matrix: after each task the score on each; of `all` and `base` one row.
    average, backward, forward: see `scores`; the last two are None where there is one row.
    training: metrics of each training.
    cost: see `job.cost`; of `imsm` alone.
    settings: the plan's.
    records: after the last task, every test record's own score, by task.
    commit, versions, machine: where it was made.
    """

    model: str
    method: str
    title: str
    source: str
    seed: int
    tasks: list[str]
    base: list[float]
    matrix: list[list[float]]
    average: float
    backward: float | None
    forward: float | None
    training: list[dict[str, float]]
    cost: dict[str, Any]
    settings: dict[str, Any]
    records: dict[str, list[float]]
    commit: str = field(default_factory=machine.commit)
    versions: dict[str, str] = field(default_factory=machine.versions)
    machine: dict[str, Any] = field(default_factory=machine.machine)


class Runner(Sitting):
    """Runs the plan for one model."""

    jobs = "continual.job"
    plan: Plan

    def make(self) -> None:
        """Every method's records, seed by seed."""
        for seed in self.plan.seeds:
            for method in self.plan.methods:
                if not self.only or method in self.only:
                    self.one(method, seed)

    # -- data --------------------------------------------------------------------------------------------------------

    @property
    def data(self) -> Path:
        """Folder of the tasks' records."""
        return self.work / "data"

    def write_data(self) -> None:
        """Every task's training and test records, and all training records together.

        Raises:
            InputError: there are too few, or those that are there were drawn under another plan.
        """
        drawn = [self.plan.tasks, self.plan.training_records, self.plan.test_records]
        made = self.data / "drawn.json"
        if made.is_file():
            if json.loads(made.read_text(encoding="utf-8")) != drawn:
                raise InputError(f"{self.data} was made under another plan; give another --work")
            return
        every: list[sets.Row] = []
        for name in self.plan.tasks:
            training, test = sets.drawn(name, self.data_root, self.plan.training_records, self.plan.test_records)
            every += training
            for part, rows in (("train", training), ("test", test)):
                write_rows(self.data / name / f"{part}.jsonl", rows)
        write_rows(self.data / "all.jsonl", every)
        write_text(made, json.dumps(drawn))

    # -- jobs --------------------------------------------------------------------------------------------------------

    def trained(self, method: str, seed: int, place: int) -> Path:
        """The folder of a method's run after that task; its checkpoint is in `checkpoint`, its metrics in `metrics.json`."""
        method = "imsm" if method == "nearest" else method  # which has its adapters
        folder = self.work / self.model / method / f"seed-{seed}" / (f"{place}-{self.plan.tasks[place]}")
        settings = {**self.plan.train}
        if method == "all":
            folder = folder.with_name("all")
            settings["max_steps"] *= len(self.plan.tasks)
        done, before = folder / "metrics.json", None
        if done.is_file():
            if json.loads(done.read_text(encoding="utf-8"))["settings"] != settings:
                raise InputError(f"{folder} was trained under another plan; give another --work")
            return folder
        if place and method != "all":
            before = str(self.trained(method, seed, place - 1) / "checkpoint")
        shutil.rmtree(folder, ignore_errors=True)
        name = self.plan.tasks[place]
        found = self.job(
            f"{method}, seed {seed}, training {'all' if method == 'all' else name}",
            do="train" if method == "imsm" else "adapter",
            name=name,
            before=before,
            orthogonal=place + 1 if method == "orthogonal" else 0,
            settings=settings,
            folder=str(folder / "checkpoint"),
            data=str(self.data / "all.jsonl" if method == "all" else self.data / name / "train.jsonl"),
            seed=seed,
        )
        write_text(done, json.dumps({"metrics": found, "settings": settings}))
        return folder

    def scored(self, what: str, spec: str, output: Path, nearest: bool = False) -> tuple[list[float], Path]:
        """The scores of a checkpoint on all tasks, and the file with its answers."""
        if not output.is_file():
            self.job(
                f"{what}, test",
                do="evaluate",
                spec=spec,
                tasks=self.plan.tasks,
                nearest=nearest,
                data_root=str(self.data),
                output=str(output),
                batch_size=EVALUATION_BATCH,
            )
        found = read_result(output).tasks
        return [found[name].metrics[found[name].score].value for name in self.plan.tasks], output

    def rows(self, method: str, seed: int) -> Iterator[tuple[Path, list[float], Path]]:
        """After each task: the run's folder, the scores, and the file with the answers; once for all tasks at once."""
        tasks = len(self.plan.tasks)
        for place in [tasks - 1] if method == "all" else range(tasks):
            folder = self.trained(method, seed, place)
            nearest = method == "nearest"
            output = folder / ("test-nearest.json" if nearest else "test.json")
            # With one task there is nothing to route: that adapter answers.
            suffix = "@gate=0" if nearest and place == 0 else ""
            what = f"{method}, seed {seed}, after {folder.name}"
            yield folder, *self.scored(what, f"{folder / 'checkpoint'}{suffix}", output, nearest and place > 0)

    def cost(self, seed: int) -> dict[str, Any]:
        """What a query costs with one task and with all, measured once."""
        first, last = (self.trained("imsm", seed, place) for place in (0, len(self.plan.tasks) - 1))
        made = last / "cost.json"
        if not made.is_file():
            name = self.plan.tasks[0]
            own = [json.loads(line)["input"] for line in (self.data / name / "test.jsonl").read_text().splitlines()]
            checkpoints = {"one": str(first / "checkpoint"), "all": str(last / "checkpoint")}
            found = self.job("imsm, cost of a query", do="cost", own=own, other=[OTHER], **checkpoints)
            write_text(made, json.dumps(found))
        return dict(json.loads(made.read_text(encoding="utf-8")))

    # -- records -----------------------------------------------------------------------------------------------------

    def one(self, method: str, seed: int) -> None:
        """One record: the method's matrix, and what it says."""
        path = self.out / self.model / f"{method}-seed-{seed}.json"
        settings = {key: value for key, value in asdict(self.plan).items() if key not in ("methods", "seeds")}
        if is_done(path, settings, lambda path: json.loads(path.read_text(encoding="utf-8"))["settings"]):
            return
        base, _ = self.scored("base", self.folder, self.work / self.model / "base.json")
        found = list(self.rows(method, seed))
        matrix = [row for _, row, _ in found]
        whole = len(matrix) == len(self.plan.tasks)
        result = read_result(found[-1][2]).tasks
        training = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder, _, _ in found]
        record = Record(
            model=title(self.model),
            method=method,
            title=self.plan.methods[method]["title"],
            source=self.plan.methods[method]["source"],
            seed=seed,
            tasks=self.plan.tasks,
            base=base,
            matrix=matrix,
            average=scores.average_accuracy(matrix),
            backward=scores.backward_transfer(matrix) if whole else None,
            forward=scores.forward_transfer(matrix, base) if whole else None,
            training=[entry["metrics"] for entry in training],
            cost=self.cost(seed) if method == "imsm" else {},
            settings=settings,
            records={name: [one.scores[task.score] for one in task.records] for name, task in result.items()},
        )
        write_text(path, json.dumps(asdict(record), ensure_ascii=False, indent=1) + "\n")


def write_rows(path: Path, rows: list[sets.Row]) -> None:
    """Records as JSON Lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
