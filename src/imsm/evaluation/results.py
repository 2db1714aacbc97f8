"""What an evaluation leaves: every record's output, and a summary with intervals, as one JSON file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from imsm.errors import InputError
from imsm.evaluation.task import Kind
from imsm.folders import write_text

FORMAT = 1


@dataclass
class RecordResult:
    """One record.

    index: its place in the task.
    prompt, references: the record.
    answer: what the model said; for plain text, nothing.
    measured: what was counted on the way, such as `nats` and `tokens` of a text.
    scores: by metric, the record's own score.
    """

    index: int
    prompt: str
    references: list[str]
    answer: str
    measured: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Estimate:
    """A metric over all records, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass
class TaskResult:
    """One task.

    task, title, kind: see `Task`.
    score: the metric that is the task's score.
    metrics: every metric's estimate.
    chance: the score of guessing, if guessing has a chance.
    records: every record's output, in order.
    seconds: time it took.
    fingerprint: of the records and how they were asked; what is compared must agree in it.
    """

    task: str
    title: str
    kind: Kind
    score: str
    metrics: dict[str, Estimate]
    chance: float | None
    records: list[RecordResult]
    seconds: float
    fingerprint: str


@dataclass
class Result:
    """One run of `imsm eval`.

    checkpoint: what was evaluated, as it was given.
    kind: what it is: base, siamese, peft, loramoe or full.
    base: name and shape of its base model: `name`, and the fields of `building.base_shape`.
    settings: how it was evaluated.
    where: versions and machine.
    tasks: by name.
    """

    checkpoint: str
    kind: str
    base: dict[str, Any]
    settings: dict[str, Any]
    where: dict[str, Any]
    tasks: dict[str, TaskResult]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes beside and renames."""
        write_text(Path(path), json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, indent=1) + "\n")


def read_result(path: str | os.PathLike[str]) -> Result:
    """The result in a file.

    Raises:
        InputError: it is missing, damaged, no result, or of a newer version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the result {os.fspath(path)} cannot be read: {error}") from error
    if not isinstance(content, dict) or "tasks" not in content or "checkpoint" not in content:
        raise InputError(f"{os.fspath(path)} is not a result of `imsm eval`")
    if content.pop("format", None) != FORMAT:
        raise InputError(f"{os.fspath(path)} was written by another version of imsm; evaluate again")
    try:
        tasks = {name: _task(value) for name, value in content.pop("tasks").items()}
        return Result(**content, tasks=tasks)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{os.fspath(path)} is a damaged result: {error}") from error


def _task(value: dict[str, Any]) -> TaskResult:
    metrics = {name: Estimate(**estimate) for name, estimate in value.pop("metrics").items()}
    records = [RecordResult(**record) for record in value.pop("records")]
    return TaskResult(**value, metrics=metrics, records=records)
