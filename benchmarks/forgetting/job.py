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
    yield {"train": train, "adopt": adopt, "evaluate": evaluate}[task["do"]](task)


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Trains into `folder`; gives the run's metrics."""
    from imsm import train as run

    return dict(run(run_config(task)).metrics)


def adopt(task: dict[str, Any]) -> dict[str, Any]:
    """Adopts the adapter in `adapter` into `folder`; gives what its fit came to."""
    from imsm import adopt as run

    return dict(run(task["adapter"], run_config(task)).metrics)


def run_config(task: dict[str, Any]) -> Any:
    """The `TrainConfig` of a training task."""
    from benchmarks.forgetting.plan import train_config
    from imsm import DataConfig

    return train_config(
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


def evaluate(task: dict[str, Any]) -> dict[str, Any]:
    """Evaluates `spec` on `tasks` into the file `output`, or goes on where that was cut."""
    from imsm.evaluation.candidates import open_candidate

    return evaluate_candidate(task, open_candidate(task["spec"], base=task["model"], dtype="float32"))


def evaluate_candidate(task: dict[str, Any], candidate: Any) -> dict[str, Any]:
    """The same for a `Candidate` that is loaded."""
    from imsm.evaluation.running import evaluate as run
    from imsm.evaluation.tasks import TASKS, find_tasks

    if task["tasks"] == [VALIDATION]:
        tasks = [replace(TASKS[task["target"]], name=VALIDATION, title="Validation", file="validation.jsonl", hub=None)]
    else:
        tasks = [replace(one, limit=task["limits"].get(one.name, one.limit)) for one in find_tasks(task["tasks"])]
    run(
        candidate,
        tasks,
        data_root=Path(task["data_root"]),
        output=Path(task["output"]),
        limit=task["limit"],
        batch_size=task["batch_size"],
        progress=False,
        references=Path(task["references"]),
    )
    return {}
