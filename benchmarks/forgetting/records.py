"""The records of the runs: one small JSON a checkpoint, with every score and every record's own, but no texts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imsm.errors import InputError
from imsm.folders import write_text


@dataclass
class Record:
    """What is kept of one evaluated checkpoint.

    model, method, title, source, seed: whose run it is; the base model's method is `base`.
    varied: what was varied in evaluation alone, such as `@scale=0.5`, or nothing.
    learning_rate, tried: the rate, and the validation score of each that was tried.
    training: metrics of the training run.
    settings: the plan's and the method's.
    tasks: by name: `title`, `kind`, `score` (the metric that counts), `metrics` (value, low, high), `chance`,
        `fingerprint`, and `records`, every record's own score.
    balance: gain, plasticity, retention and harmonic mean against the base, as `imsm audit` has them, and the shares they
        are made of; empty for the base itself.
    commit, versions, machine: where it was made.
    """

    model: str
    method: str
    title: str
    source: str
    seed: int
    varied: str
    learning_rate: float | None
    tried: dict[str, float]
    training: dict[str, float]
    settings: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    balance: dict[str, Any]
    commit: str
    versions: dict[str, str]
    machine: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes beside and renames."""
        write_text(path, json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n")


def read(path: Path) -> Record:
    """The record in a file.

    Raises:
        InputError: the file is damaged or no record.
    """
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a record of the forgetting benchmark: {error}") from error


def read_all(folder: Path) -> list[Record]:
    """Every record under a folder.

    Raises:
        InputError: there is none, or one is damaged.
    """
    found = [read(path) for path in sorted(folder.rglob("*.json"))]
    if not found:
        raise InputError(f"there are no records in {folder}; make some first: python -m benchmarks.forgetting run")
    return found


def summary(result: Any) -> dict[str, dict[str, Any]]:
    """The tasks of a `Result` without their texts."""
    return {
        name: {
            "title": task.title,
            "kind": task.kind,
            "score": task.score,
            "metrics": {
                metric: [estimate.value, estimate.low, estimate.high] for metric, estimate in task.metrics.items()
            },
            "chance": task.chance,
            "fingerprint": task.fingerprint,
            "records": [round(record.scores[task.score], 4) for record in task.records],
        }
        for name, task in result.tasks.items()
    }
