"""One job in a process of its own: a training run, or the evaluation of one checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

#: The validation records as a task of their own.
VALIDATION = "validation"


def child(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Does what the task says and yields what came of it."""
    yield {"train": train, "evaluate": evaluate}[task["do"]](task)


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Trains into `folder`; gives the run's metrics."""
    from benchmarks.forgetting.plan import train_config
    from imsm import DataConfig
    from imsm import train as run

    config = train_config(
        task["settings"],
        model=task["model"],
        output_dir=task["folder"],
        data=DataConfig(train=task["data"]),
        seed=task["seed"],
        learning_rate=task["learning_rate"],
        save_steps=10**6,
        logging_steps=10,
        tensorboard=False,
        progress=False,
    )
    return dict(run(config).metrics)


def evaluate(task: dict[str, Any]) -> dict[str, Any]:
    """Evaluates `spec` on `tasks` into the file `output`, or goes on where that was cut."""
    from imsm.evaluation.candidates import open_candidate
    from imsm.evaluation.running import evaluate as run
    from imsm.evaluation.tasks import TASKS, find_tasks

    if task["tasks"] == [VALIDATION]:
        tasks = [replace(TASKS[task["target"]], name=VALIDATION, title="Validation", file="validation.jsonl", hub=None)]
    else:
        tasks = find_tasks(task["tasks"])
    candidate = open_candidate(task["spec"], base=task["model"], dtype="float32")
    run(
        candidate,
        tasks,
        data_root=Path(task["data_root"]),
        output=Path(task["output"]),
        limit=task["limit"],
        batch_size=task["batch_size"],
        progress=False,
    )
    return {}
