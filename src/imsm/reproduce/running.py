"""Doing the runs: each is trained, evaluated task by task, and timed; what is done already is left alone.

OUTPUT/study.json           what the runs have in common; a folder holds one such study
OUTPUT/data/TASK.jsonl      the records that were trained on
OUTPUT/runs/NAME/           the checkpoint, and measured.json when training is finished
OUTPUT/results/NAME/TASK.json
OUTPUT/speed/NAME.json
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from imsm.errors import InputError
from imsm.evaluation.candidates import Candidate, open_candidate, release_memory
from imsm.evaluation.results import TaskResult, read_result
from imsm.evaluation.running import evaluate
from imsm.evaluation.sources import load_records
from imsm.evaluation.task import TaskRecord
from imsm.evaluation.tasks import TASKS
from imsm.folders import write_text
from imsm.reproduce.peak import peak_memory
from imsm.reproduce.plans import ORIGINAL, Job, Run
from imsm.reproduce.recipes import Recipe
from imsm.reproduce.speed import Speed, measure
from imsm.settings import DataConfig, TrainConfig
from imsm.training import train

#: Prompts that decoding is timed on.
TIMED = 4


@dataclass(frozen=True)
class Scale:
    """How much of the paper's work is done; None is all of it.

    records: training records of a task at most.
    limit: test records of a task at most.
    epochs: instead of the recipe's.
    seed: of records, initialisation, order and intervals.
    """

    records: int | None = None
    limit: int | None = None
    epochs: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Study:
    """Runs of one model under one recipe and scale, in one folder.

    output: the folder.
    recipe: settings.
    model: folder or Hub name of the base model.
    scale: see there.
    data_root: folder of the tasks' files; None for their public data sets.
    batch_size: records evaluated together.
    trust_remote_code: run code that the model's repository brings.
    progress: show it.
    """

    output: Path
    recipe: Recipe
    model: str
    scale: Scale
    data_root: Path | None
    batch_size: int = 8
    trust_remote_code: bool = False
    progress: bool = True

    @property
    def title(self) -> str:
        """The model's name in tables."""
        if self.model == self.recipe.model:
            return self.recipe.title
        return f"{Path(self.model).name} by the recipe {self.recipe.name}"

    # -- what is there -----------------------------------------------------------------------------------------------

    def folder(self, run: Run) -> Path:
        """Of its checkpoint."""
        return self.output / "runs" / run.name

    def result_file(self, run: Run, task: str) -> Path:
        """Of its evaluation on a task."""
        return self.output / "results" / run.name / f"{task}.json"

    def train_file(self, task: str) -> Path:
        """Of the records of a task that are trained on."""
        return self.output / "data" / f"{task}.jsonl"

    def speed_file(self, run: Run) -> Path:
        """Of how fast a siamese run decodes."""
        return self.output / "speed" / f"{run.name}.json"

    def result(self, run: Run, task: str) -> TaskResult | None:
        """Its evaluation on a task, if that is done."""
        file = self.result_file(run, task)
        return read_result(file).tasks[task] if file.is_file() else None

    def measured(self, run: Run) -> dict[str, Any] | None:
        """What was measured in training, `parameters`, `seconds` and `memory`, if that is done."""
        return _read(self.folder(run) / "measured.json")

    def speed(self, run: Run) -> Speed | None:
        """How fast a siamese run decodes, if that is measured."""
        found = _read(self.speed_file(run))
        return None if found is None else Speed(**found)

    def missing(self, job: Job) -> list[str]:
        """What of a job is still to be done, in words."""
        if job.run.method != ORIGINAL and not self.measured(job.run):
            # What is there of it is another training's.
            return ["train", *job.tasks, *(["speed"] if job.speed else [])]
        left = [task for task in job.tasks if not self.result_file(job.run, task).is_file()]
        return left + (["speed"] if job.speed and self.speed(job.run) is None else [])

    # -- doing it ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Makes the folder, or checks that what is in it is of this study.

        Raises:
            InputError: it holds runs of another model, recipe or scale.
        """
        data_root = None if self.data_root is None else str(self.data_root.resolve())
        facts = {
            "model": self.model,
            "data_root": data_root,
            "recipe": asdict(self.recipe),
            "scale": asdict(self.scale),
        }
        own = json.loads(json.dumps(facts))
        found = _read(self.output / "study.json")
        begun = any((self.output / part).exists() for part in ("runs", "results", "speed"))
        if found is None or (found != own and not begun):
            if found is not None:
                # What was drawn for a study that came no further may be of other data.
                for name in TASKS:
                    self.train_file(name).unlink(missing_ok=True)
            _write(self.output / "study.json", own)
            return
        was, now = (
            {**facts["scale"], **{k: facts.get(k) for k in ("model", "data_root", "recipe")}} for facts in (found, own)
        )
        changed = [
            f"the {key} is another" if key == "recipe" else f"{key} was {was[key]}, now {now[key]}"
            for key in now
            if was[key] != now[key]
        ]
        if changed:
            raise InputError(f"{self.output} holds other runs: {'; '.join(changed)}; give another --output")

    def check_data(self, jobs: Sequence[Job]) -> None:
        """Reads what the jobs still need of tasks' files or data sets, before the first run takes its hours.

        Raises:
            InputError: data are missing or wrong.
        """
        left = {job.run: self.missing(job) for job in jobs}
        tested = [task for job in jobs for task in job.tasks if task in left[job.run]]
        for task in dict.fromkeys(tested):
            load_records(TASKS[task], self.data_root, self.scale.limit, self.scale.seed)
        trained = [job.run.trained_on for job in jobs if "train" in left[job.run] and job.run.trained_on]
        for task in dict.fromkeys(trained):
            if not self.train_file(task).is_file():
                self._train_records(task)

    def config(self, run: Run, train_file: Path) -> TrainConfig:
        """The run's training settings. Errors as for `Recipe.config`."""
        data = DataConfig(train=str(train_file), bad_records="skip")
        overrides: dict[str, Any] = {} if self.scale.epochs is None else {"epochs": self.scale.epochs}
        config = self.recipe.config(run, self.model, data, self.folder(run), **overrides)
        return replace(
            config,
            seed=self.scale.seed,
            trust_remote_code=self.trust_remote_code,
            save_total_limit=1,
            tensorboard=False,
            progress=self.progress,
        )

    def do(self, job: Job, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> None:
        """What is missing of a job.

        Raises:
            InputError: data are missing, or the model and the recipe do not go together.
        """
        left = self.missing(job)
        if not left:
            return
        say(f"{job.run.name}: {', '.join(left)}")
        if "train" in left:
            for task in job.tasks:
                self.result_file(job.run, task).unlink(missing_ok=True)
            self.speed_file(job.run).unlink(missing_ok=True)
            self._train(job.run)
        if left != ["train"]:
            self._evaluate(job, [task for task in job.tasks if task in left], "speed" in left)
        release_memory()  # before the next model is loaded

    def _train(self, run: Run) -> None:
        assert run.trained_on is not None
        config = self.config(run, self._train_file(run.trained_on))
        folder = self.folder(run)
        if (folder / "settings.yaml").is_file():
            config = replace(config, resume=True)
        with peak_memory() as peak:
            result = train(config)
        parameters = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
        for saved in folder.glob("checkpoint-*"):
            shutil.rmtree(saved)
        facts = {"parameters": parameters, "seconds": result.metrics["seconds"], "memory": peak.get("bytes")}
        _write(folder / "measured.json", facts)

    def _train_file(self, name: str) -> Path:
        """The training records of a task as a file, with the very prompts that it is evaluated on."""
        file = self.train_file(name)
        if not file.is_file():
            lines = [
                json.dumps({"input": record.prompt, "output": record.references[0]}, ensure_ascii=False)
                for record in self._train_records(name)
            ]
            write_text(file, "\n".join(lines) + "\n")
        return file

    def _train_records(self, name: str) -> list[TaskRecord]:
        """What a task's training file or split has."""
        task = TASKS[name]
        hub = None if task.hub is None else replace(task.hub, split="train")
        source = replace(task, file=str(Path(task.file).with_name("train.jsonl")), hub=hub)
        return load_records(source, self.data_root, self.scale.records, self.scale.seed)

    def _evaluate(self, job: Job, tasks: list[str], timed: bool) -> None:
        dtype = self.recipe.settings.get("dtype", "auto")
        if job.run.method == ORIGINAL:
            candidate = open_candidate(self.model, None, dtype, None, self.trust_remote_code)
        else:
            candidate = open_candidate(str(self.folder(job.run)), self.model, dtype, None, self.trust_remote_code)
        for task in tasks:
            evaluate(
                candidate,
                [TASKS[task]],
                data_root=self.data_root,
                output=self.result_file(job.run, task),
                limit=self.scale.limit,
                batch_size=self.batch_size,
                seed=self.scale.seed,
                progress=self.progress,
            )
        if timed:
            self._time(candidate, job.run)

    def _time(self, candidate: Candidate, run: Run) -> None:
        assert run.trained_on is not None
        records = load_records(TASKS[run.trained_on], self.data_root, TIMED, self.scale.seed)
        found = measure(candidate, [record.prompt for record in records])
        _write(self.speed_file(run), asdict(found))


def _read(path: Path) -> Any:
    """A JSON file's content; None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; remove it, and it is made again") from error


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
