"""What the verbs that run tasks share: their arguments, and running the tasks on a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imsm.errors import InputError

if TYPE_CHECKING:
    from imsm.evaluation.candidates import Candidate
    from imsm.evaluation.results import Result
    from imsm.evaluation.task import Task


def add_task_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Which tasks, on which records, and how they are run; `required`: whether tasks must be named."""
    named = "built-in tasks or groups of them, or .yaml files of your own" + (
        "" if required else "; not needed if all are results"
    )
    parser.add_argument("--tasks", nargs="+", required=required, metavar="TASK", help=named)
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="folder of the tasks' files (default: their public data sets)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="records of a task at most (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="records run together (default: 8)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of records and of the intervals (default: 0)"
    )
    parser.add_argument("--fresh", action="store_true", help="start anew, whatever an earlier run left")


def refuse_missing(checkpoints: Sequence[str], base: str | None) -> None:
    """Raises `InputError` for a checkpoint or base that is a path, and there is no such folder; the Hub is not asked."""
    from imsm.evaluation.candidates import read_spec
    from imsm.folders import folder_here

    for spec in checkpoints:
        folder_here(read_spec(spec)[0], "checkpoint")
    if base is not None:
        folder_here(base, "base model")


def named_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks that the command line names.

    Raises:
        InputError: a number is out of range, or there is no such task.
    """
    from imsm.cli.checkpoint import refuse_seed
    from imsm.evaluation.tasks import find_tasks

    for flag, value in {"--batch-size": args.batch_size, "--limit": args.limit}.items():
        if value is not None and value < 1:
            raise InputError(f"{flag} must be a positive integer, got {value}")
    refuse_seed(args.seed)
    return find_tasks(args.tasks)


def read_data(tasks: Sequence[Task], args: argparse.Namespace) -> None:
    """Reads the tasks' data, before a model is loaded for them.

    Raises:
        InputError: data are missing or wrong.
    """
    from imsm.evaluation.sources import load_records

    for task in tasks:
        load_records(task, args.data_root, args.limit, args.seed)


def read_kept(names: Sequence[str], data_root: Path | None, limit: int | None, seed: int) -> list[Task]:
    """Tasks of kept answers, once their data have been read.

    Raises:
        InputError: there is no such task, it is of another kind, or its data are missing or wrong.
    """
    from imsm.evaluation.sources import load_records
    from imsm.evaluation.tasks import TASK_GROUPS, find_tasks

    tasks = find_tasks(names)
    for task in tasks:
        if task.kind != "kept":
            raise InputError(
                f"--retained takes tasks of kept answers, such as {', '.join(TASK_GROUPS['kept'])}; got {task.name!r}"
            )
        load_records(task, data_root, limit, seed)
    return tasks


def run_tasks(candidate: Candidate, tasks: Sequence[Task], output: Path, args: argparse.Namespace) -> Result:
    """The result of the tasks as the command line wants them run. Errors as for `evaluate`."""
    from imsm.evaluation.running import evaluate

    return evaluate(
        candidate,
        tasks,
        data_root=args.data_root,
        output=output,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        fresh=args.fresh,
    )
