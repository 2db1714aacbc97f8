"""Does what the plan says and is not done yet: trainings at every rate, the choice among them, evaluations."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.forgetting import records
from benchmarks.forgetting.job import VALIDATION
from benchmarks.forgetting.plan import Method, Plan, train_config
from benchmarks.models import title
from benchmarks.sitting import EVALUATION_BATCH, Sitting, is_done
from imsm.errors import InputError
from imsm.evaluation.balance import balance
from imsm.evaluation.comparison import compare
from imsm.evaluation.results import read_result
from imsm.folders import write_text
from imsm.settings import read_yaml
from imsm.training.run import SETTINGS


class Runner(Sitting):
    """Runs the plan for one model. `data_root` has the tasks' files, and the target's training file."""

    jobs = "forgetting.job"
    plan: Plan

    def make(self) -> None:
        """The base model's record, then those of the methods.

        Raises:
            InputError: an earlier record was made under another plan.
        """
        self.base()
        for method, seed, varied in self.order():
            if not self.only or method.name in self.only:
                self.one(method, seed, varied)

    def order(self) -> Iterator[tuple[Method, int, str]]:
        """First one seed of every method, then the sweeps, then the further seeds."""
        methods = list(self.plan.methods.values())
        yield from ((method, method.seeds[0], "") for method in methods)
        yield from ((method, method.seeds[0], suffix) for method in methods for suffix in method.suffixes)
        most = max(len(method.seeds) for method in methods)
        for place in range(1, most):
            yield from ((method, method.seeds[place], "") for method in methods if place < len(method.seeds))

    # -- data --------------------------------------------------------------------------------------------------------

    def write_data(self) -> None:
        """Training and validation records, drawn once from the target's training file.

        Raises:
            InputError: there are too few, or those that are there were drawn under another plan.
        """
        made = self.work / "data" / "train.jsonl"
        if made.is_file():
            drawn = len(made.read_text(encoding="utf-8").splitlines())
            held_out = len(made.with_name("validation.jsonl").read_text(encoding="utf-8").splitlines())
            if (drawn, held_out) != (self.plan.training_records, self.plan.validation_records):
                raise InputError(f"{made.parent} was made under another plan; give another --work")
            return
        source = self.data_root / self.plan.target / "train.jsonl"
        if not source.is_file():
            raise InputError(f"--data-root {self.data_root} has no {self.plan.target}/train.jsonl")
        lines = source.read_text(encoding="utf-8").splitlines()
        wanted = self.plan.training_records + self.plan.validation_records
        if len(lines) < wanted:
            raise InputError(f"{source} has {len(lines)} records, the plan wants {wanted}")
        chosen = random.Random(0).sample(lines, wanted)
        folder = self.work / "data"
        for name, part in (
            ("validation", chosen[: self.plan.validation_records]),
            ("train", chosen[self.plan.validation_records :]),
        ):
            write_text(folder / f"{name}.jsonl", "\n".join(part) + "\n")

    @property
    def references(self) -> Path:
        """Folder of the base model's answers: they are the same for every checkpoint."""
        return self.work / self.model / "references"

    # -- jobs --------------------------------------------------------------------------------------------------------

    def trained(self, method: Method, seed: int, rate: float) -> Path:
        """The checkpoint of one training run, trained now if need be; its metrics are in `metrics.json`."""
        folder = self.work / self.model / method.name / f"rate-{rate:g}-seed-{seed}"
        done = folder / "metrics.json"
        settings = {**self.plan.train, **method.train}
        if done.is_file():
            self.refuse_other(folder, settings)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            source = {}
            if method.adopts is not None:
                adapter = self.trained(self.plan.methods[method.adopts], seed, rate) / "checkpoint"
                source = {"adapter": str(adapter)}
            found = self.job(
                f"{method.name}, rate {rate:g}, seed {seed}, {'adoption' if source else 'training'}",
                do="adopt" if source else "train",
                **source,
                settings=settings,
                folder=str(folder / "checkpoint"),
                data=str(self.work / "data" / "train.jsonl"),
                seed=seed,
                learning_rate=rate,
            )
            write_text(done, json.dumps(found))
        return folder

    def refuse_other(self, folder: Path, settings: dict[str, Any]) -> None:
        """Raises `InputError` if the run in a folder was trained under other settings."""
        was = read_yaml(folder / "checkpoint" / SETTINGS)
        now = train_config(settings, model=was.model, output_dir=was.output_dir, data=was.data)
        if changed := [key for key in settings if getattr(was, key) != getattr(now, key)]:
            raise InputError(
                f"{folder} was trained under another plan: other {', '.join(changed)}; give another --work"
            )

    def validated(self, method: Method, rate: float) -> float:
        """The target's score of one rate on the validation records, at the first seed."""
        folder = self.trained(method, method.seeds[0], rate)
        output = folder / "validation.json"
        if not output.is_file():
            self.evaluation(method, folder, output, "", [VALIDATION], self.work / "data", self.plan.validation_records)
        task = read_result(output).tasks[VALIDATION]
        return task.metrics[task.score].value

    def evaluation(
        self, method: Method, folder: Path, output: Path, suffix: str, tasks: list[str], root: Path, limit: int
    ) -> None:
        """Evaluates one checkpoint into a file."""
        what = f"{method.name}{suffix}, {folder.name}, {'validation' if tasks == [VALIDATION] else 'test'}"
        self.evaluated(what, f"{folder / 'checkpoint'}{suffix}", output, tasks, root, limit)

    def evaluated(self, what: str, spec: str, output: Path, tasks: list[str], root: Path, limit: int) -> None:
        """The same for whatever `imsm eval` takes."""
        self.job(
            what,
            do="evaluate",
            spec=spec,
            target=self.plan.target,
            tasks=tasks,
            data_root=str(root),
            output=str(output),
            limit=limit,
            limits=self.plan.limits,
            batch_size=EVALUATION_BATCH,
            references=str(self.references),
        )

    def rate(self, method: Method) -> tuple[float, dict[str, float]]:
        """The rate that is best on the validation records (the lower of equals), and what each gave."""
        if method.rate_of is not None:
            return self.rate(self.plan.methods[method.rate_of])[0], {}
        if len(method.learning_rates) == 1:
            return method.learning_rates[0], {}
        tried = {rate: self.validated(method, rate) for rate in method.learning_rates}
        best = max(sorted(tried), key=lambda rate: tried[rate])
        return best, {f"{rate:g}": score for rate, score in tried.items()}

    # -- records -----------------------------------------------------------------------------------------------------

    def base(self) -> None:
        """The base model's record."""
        path = self.out / self.model / "base.json"
        settings = self.plan.settings
        if not is_done(path, settings, made_under):
            output = self.base_result(again=True)
            self.keep(path, output, Method("base", "base model", "", {}, (0,)), 0, "", None, {}, {}, settings)

    def base_result(self, again: bool = False) -> Path:
        """The base model's full outputs, made now if need be: all others are held against them.

        `again`: have outputs that are there compared with the plan, which loads the model.
        """
        output = self.work / self.model / "base.json"
        if again or not output.is_file():
            self.evaluated("base, test", self.folder, output, self.plan.tasks, self.data_root, self.plan.limit)
        return output

    def one(self, method: Method, seed: int, varied: str) -> None:
        """One record: the method's checkpoint of that seed, trained at its best rate, on the test records."""
        path = self.out / self.model / f"{method.name}-seed-{seed}{varied}.json"
        settings = {**self.plan.settings, "method": method.train}
        if is_done(path, settings, made_under):
            return
        self.base_result()
        rate, tried = self.rate(method)
        folder = self.trained(method, seed, rate)
        output = folder / f"test{varied}.json"
        self.evaluation(method, folder, output, varied, self.plan.tasks, self.data_root, self.plan.limit)
        training = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        self.keep(path, output, method, seed, varied, rate, tried, training, settings)

    def keep(
        self,
        path: Path,
        output: Path,
        method: Method,
        seed: int,
        varied: str,
        rate: float | None,
        tried: dict[str, float],
        training: dict[str, float],
        settings: dict[str, Any],
    ) -> None:
        """Writes the record of an evaluation."""
        result, against = read_result(output), {}
        if method.name != "base":
            before, target = read_result(self.base_result()), self.plan.target
            weighed = compare(before, result, [target, *settings["retained"]])
            against = asdict(balance(weighed, [target]))
        records.Record(
            model=title(self.model),
            method=method.name,
            title=method.title,
            source=method.source,
            seed=seed,
            varied=varied,
            learning_rate=rate,
            tried=tried,
            training=training,
            settings=settings,
            tasks=records.summary(result),
            balance=against,
            commit=machine.commit(),
            versions=machine.versions(),
            machine=machine.machine(),
        ).save(path)


def made_under(path: Path) -> dict[str, Any]:
    """The settings of a record."""
    return records.read(path).settings
