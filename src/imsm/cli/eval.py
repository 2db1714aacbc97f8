"""`imsm eval`: tasks run on a checkpoint of any kind, to one JSON file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imsm.cli.checkpoint import add_model_arguments
from imsm.cli.tasks import add_task_arguments, named_tasks, read_data, refuse_missing, run_tasks
from imsm.errors import InputError

if TYPE_CHECKING:
    from imsm.evaluation.results import Result

CHECKPOINT = (
    "folder or Hub name of a siamese checkpoint, a peft adapter, a LoRAMoE or a plain model; NAME@gate=0.25 fixes a "
    "siamese model's gate (1: base), NAME@recall=2 turns its dial, NAME@scale=0.5 sets an adapter's strength (0: base)"
)


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="imsm eval",
        description="Run tasks on a checkpoint. A run that is cut goes on where it was when it is started again.",
    )
    add_model_arguments(parser, CHECKPOINT)
    add_task_arguments(parser, required=True)
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="what to write (default: the checkpoint's name + .eval.json)"
    )
    args = parser.parse_args(argv)
    output = args.output or default_output(args.checkpoint)
    if output.suffix != ".json":
        raise InputError(f"--output must be a .json file, got {output}")

    from imsm.evaluation.candidates import find_kind, open_candidate
    from imsm.evaluation.running import partial_path

    refuse_missing([args.checkpoint], args.base)
    tasks = named_tasks(args)
    kind, kept = find_kind(args.checkpoint), [task.name for task in tasks if task.kind == "kept"]
    if kind == "plain" and kept and args.base is None:
        raise InputError(
            f"{args.checkpoint} is a whole model, which does not say what it was tuned from, so that {', '.join(kept)} would "
            "hold it against itself; give the base model with --base NAME"
        )
    read_data(tasks, args)
    candidate = open_candidate(args.checkpoint, args.base, args.dtype, args.device, args.trust_remote_code)
    try:
        result = run_tasks(candidate, tasks, output, args)
    except KeyboardInterrupt:
        if partial_path(output).exists():
            again = " without --fresh" if args.fresh else ""
            print(f"What is finished is kept; the same command{again} goes on from there.", file=sys.stderr)
        raise
    show(result)
    print(f"Every record is in {output}")
    return 0


def default_output(spec: str) -> Path:
    """A file in the current folder, by the checkpoint's own name and its suffixes."""
    name = Path(spec).name
    return Path(f"{Path(spec).resolve().name if name in ('', '..') else name}.eval.json")


def show(result: Result) -> None:
    """Prints the table of a result's metrics."""
    from imsm.evaluation.metrics import METRICS

    table = Table("task", "metric", title=Text(f"{result.checkpoint} ({result.kind})"), title_justify="left")
    for column in ("value", "95 % interval", "records", "seconds"):
        table.add_column(column, justify="right")
    for task in result.tasks.values():
        for place, (name, estimate) in enumerate(task.metrics.items()):
            once = place == 0
            table.add_row(
                Text(task.title if once else ""),
                METRICS[name].title,
                f"{estimate.value:.4f}",
                f"{estimate.low:.4f} … {estimate.high:.4f}",
                f"{len(task.records):,}" if once else "",
                f"{task.seconds:.1f}" if once else "",
            )
    Console().print(table, markup=False)
