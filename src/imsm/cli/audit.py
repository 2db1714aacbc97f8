"""`imsm audit`: what fine-tuning taught and what it cost, checkpoints against their base, as table, JSON and page."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console

from imsm.cli.checkpoint import add_loading_arguments
from imsm.cli.tasks import add_task_arguments, named_tasks, read_data, refuse_missing, run_tasks
from imsm.errors import InputError, first_line
from imsm.evaluation.audit import Audit, audit
from imsm.evaluation.candidates import Candidate, find_kind, open_candidate, release_memory
from imsm.evaluation.comparison import common_tasks, same_base
from imsm.evaluation.page import write_page
from imsm.evaluation.results import Result, read_result
from imsm.evaluation.tables import show
from imsm.evaluation.task import Task
from imsm.evaluation.tasks import TASK_GROUPS, read_task
from imsm.folders import write_text

#: Kinds of checkpoints that are a base and something on it.
ADAPTED = ("siamese", "peft", "loramoe")


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="imsm audit",
        description="Hold checkpoints against their base model: what was learned on the target tasks, and what was lost "
        "on the others. Prints tables, and writes audit.json and audit.html. A run that is cut goes on where it was.",
    )
    given = "folder or Hub name, or a result of `imsm eval` (.json)"
    parser.add_argument("before", metavar="BASE", help=f"the base model: {given}")
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help=f"siamese checkpoint, peft adapter, LoRAMoE or whole model: {given}; with @gate=0.5, @recall=0.5 or @scale=0.5 at the end",
    )
    add_task_arguments(parser, required=False)
    parser.add_argument(
        "--targets", nargs="+", metavar="TASK", required=True, help="those of the tasks that were trained for"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("audit"),
        metavar="DIR",
        help="folder to write; results in it are reused (default: audit)",
    )
    add_loading_arguments(parser)
    args = parser.parse_args(argv)

    made = make(args)
    show(made, Console())
    print(f"{args.output / 'audit.html'} has the pictures and the records, {args.output / 'audit.json'} all figures.")
    return 0


def make(args: argparse.Namespace) -> Audit:
    """Evaluates what is no result yet, compares, and writes both files.

    Raises:
        InputError: a checkpoint or task cannot be used, or results do not go together.
    """
    specs = [args.before, *args.checkpoints]
    if repeated := [spec for i, spec in enumerate(specs) if spec in specs[:i]]:
        raise InputError(f"{repeated[0]} is given twice")
    refuse_missing([spec for spec in specs if not is_result(spec)], args.base)
    prepare(args.output)
    results: dict[str, Result] = {spec: read_result(spec) for spec in specs if is_result(spec)}
    tasks: list[Task] = []
    if results.keys() == set(specs):
        names = task_names(args.tasks or ()) or None
    elif args.tasks:
        tasks = named_tasks(args)
        names = [task.name for task in tasks]
    else:
        raise InputError("name with --tasks what to evaluate the checkpoints on")
    targets = task_names(args.targets)
    # What can be said before models run for hours.
    if names is not None and (unknown := [name for name in targets if name not in names]):
        raise InputError(f"the target {unknown[0]!r} is not among the tasks; there are {', '.join(names)}")
    if kept := [task.name for task in tasks if task.name in targets and task.kind == "kept"]:
        raise InputError(f"{kept[0]!r} measures what was kept and cannot be a target")
    for spec in specs:
        kind = results[spec].kind if spec in results else find_kind(spec)
        if spec == args.before and kind in ADAPTED:
            raise InputError(
                f"BASE must be the model before training, and {spec} is a {kind} checkpoint; name its base first"
            )
    read_data(tasks, args)
    paths = {spec: Path(spec) for spec in results}
    for spec in specs:
        before = results.get(args.before)
        if spec not in results:
            paths[spec] = args.output / "results" / f"{slug(spec)}.json"
            results[spec] = evaluated(spec, before, tasks, paths[spec], args)
        elif before is not None and spec != args.before:
            same_base(before, results[spec])

    before, *afters = (results[spec] for spec in specs)
    made = audit(
        before,
        afters,
        names or common_tasks(before, afters),
        targets,
        [os.path.relpath(paths[spec], args.output) for spec in specs],
    )
    write_json(made, args.output / "audit.json")
    write_page(made, args.output / "audit.html")
    return made


def is_result(spec: str) -> bool:
    """Whether a result stands in a checkpoint's place."""
    return spec.endswith(".json") and not Path(spec).is_dir()


def task_names(given: Sequence[str]) -> list[str]:
    """Names of tasks, as results have them: of a group its members, of a file the name in it."""
    names: list[str] = []
    for name in given:
        if name.endswith((".yaml", ".yml")):
            names.append(read_task(Path(name)).name)
        else:
            names += TASK_GROUPS.get(name, [name])
    return list(dict.fromkeys(names))


def prepare(output: Path) -> None:
    """Makes the folder.

    Raises:
        InputError: it cannot be made, such as where a file stands in its place.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    try:
        (output / "results").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output} cannot be made: {first_line(error)}") from error


def slug(spec: str) -> str:
    """A file name for a checkpoint: its last part, and a hash so that no two share one."""
    last = re.sub(r"[^\w.@=-]+", "-", Path(spec).name) or "checkpoint"
    return f"{last}-{xxhash.xxh32_hexdigest(spec.encode())}"


def evaluated(
    spec: str, before: Result | None, tasks: Sequence[Task], output: Path, args: argparse.Namespace
) -> Result:
    """One checkpoint's result, with one model in memory at a time.

    Args:
        before: of the base; None if this is the base, of which kept answers need no measuring.
    """
    candidate = opened(spec, before, args)
    try:
        if before is None:
            tasks = [task for task in tasks if task.kind != "kept"]
        else:
            same_base(before, candidate)
        return run_tasks(candidate, tasks, output, args)
    finally:
        del candidate
        release_memory()


def opened(spec: str, before: Result | None, args: argparse.Namespace) -> Candidate:
    """The loaded checkpoint; a whole model, which cannot say what it was tuned from, belongs to the base given."""
    base: Any = args.base
    if before is not None and base is None and find_kind(spec) == "plain":
        base = before.base["name"]
    return open_candidate(spec, base, args.dtype, args.device, args.trust_remote_code)


def write_json(made: Audit, path: Path) -> None:
    """Writes all figures."""
    write_text(path, json.dumps(made.facts(), indent=1) + "\n")
