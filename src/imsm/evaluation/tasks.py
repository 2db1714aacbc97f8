"""The built-in tasks (paper: "Datasets"), and how tasks are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from imsm.errors import InputError
from imsm.evaluation.hub import HUB
from imsm.evaluation.metrics import DEFAULT_METRICS
from imsm.evaluation.task import Task
from imsm.evaluation.task_file import read_task
from imsm.settings import nearest

__all__ = ["TASKS", "TASK_GROUPS", "find_tasks", "read_task"]


def _answered(name: str, title: str, metrics: tuple[str, ...], longest: int, chance: float | None = None) -> Task:
    return Task(name, title, "answer", f"{name}/test.jsonl", metrics, HUB[name], max_new_tokens=longest, chance=chance)


def _kept(task: Task) -> Task:
    """Whether a task's prompts still get the base model's own answers. No labels are needed."""
    return replace(
        task,
        name=f"kept_{task.name}",
        title=f"{task.title}: answers kept",
        kind="kept",
        metrics=DEFAULT_METRICS["kept"],
        reference=None,
        max_new_tokens=16,
        chance=None,
    )


_ANSWERED = [
    _answered("mrpc", "MRPC", ("accuracy", "f1"), 8, chance=0.5),
    _answered("cola", "CoLA", ("matthews", "accuracy"), 8, chance=0.0),
    _answered("ropes", "ROPES", ("exact_match", "token_f1"), 32),
    _answered("gsm8k", "GSM8K", ("number",), 256),
    _answered("webq", "WebQuestions", ("contains",), 32),
    _answered("freebaseqa", "FreebaseQA", ("contains",), 32),
    _answered("multirc", "MultiRC", ("accuracy",), 8, chance=0.5),
    _answered("banking77", "Banking77", ("exact_match",), 16, chance=1 / 77),
]
_TEXT = Task(
    "wiki", "Plain text", "text", "wiki/sentences.jsonl", ("cross_entropy",), HUB["wiki"], "{text}", reference=None
)
_KEPT = [_kept(task) for task in _ANSWERED if task.name in ("webq", "freebaseqa", "multirc", "cola", "gsm8k")]

#: The built-in tasks by name. GSM8K, ROPES and the trivia have no score of guessing; Matthews of guessing is 0.
TASKS: dict[str, Task] = {task.name: task for task in (*_ANSWERED, _TEXT, *_KEPT)}

#: Names for several tasks at once. The first two are the paper's.
TASK_GROUPS: dict[str, list[str]] = {
    "targets": ["mrpc", "cola", "ropes", "gsm8k"],
    "retained": ["webq", "freebaseqa", "multirc"],
    "kept": [task.name for task in _KEPT],
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, in order, each once. A name is a built-in task, a group of them, or a .yaml file.

    Raises:
        InputError: a name is unknown, a file is wrong (see `read_task`), or two different tasks have one name.
    """
    found: dict[str, Task] = {}
    for name in names:
        for task in _tasks_of(name):
            if found.setdefault(task.name, task) != task:
                raise InputError(f"two different tasks are named {task.name!r}; give one of them another name")
    if not found:
        raise InputError(f"no task is given; built in are {', '.join(TASKS)}")
    return list(found.values())


def _tasks_of(name: str) -> list[Task]:
    if name in TASKS:
        return [TASKS[name]]
    if name in TASK_GROUPS:
        return [TASKS[member] for member in TASK_GROUPS[name]]
    if name.endswith((".yaml", ".yml")):
        return [read_task(Path(name))]
    raise InputError(
        f"unknown task {name!r}; built in are {', '.join(TASKS)}; groups are {', '.join(TASK_GROUPS)}; a task of your own "
        f"is a .yaml file{nearest(name, [*TASKS, *TASK_GROUPS])}"
    )
