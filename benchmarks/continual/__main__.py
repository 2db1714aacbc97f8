"""`python -m benchmarks.continual run` does what plan.yaml says, over as many sittings as it takes; `report` prints tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands import deadline, exit_status, run_and_report, start
from imsm.errors import InputError

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made, run, _ = run_and_report("continual", __doc__, "print the records as tables")
    run.add_argument("--model", nargs="+", default=["smollm2"], help="smollm2, gemma3 or a model's folder")
    run.add_argument("--plan", type=Path, default=HERE / "plan.yaml", help="what is to be done")
    run.add_argument("--methods", nargs="+", default=[], help="names of the plan's methods (default: all)")
    run.add_argument("--records", type=int, help="training records of a task (default: the plan's)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status, 2 for what the user can mend."""
    args = parser().parse_args(arguments)
    return exit_status(lambda: report(args) if args.verb == "report" else run(args))


def report(args: argparse.Namespace) -> None:
    """Prints the tables."""
    from benchmarks.continual.report import page, read_all

    print(page(read_all(args.out)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments say.

    Raises:
        InputError: an argument is wrong, data are missing, or what is there was made otherwise.
    """
    from benchmarks.continual.run import Runner, read_plan
    from benchmarks.models import model_folder

    end = deadline(args)
    if args.records is not None and args.records < 1:
        raise InputError(f"--records must be a positive integer, got {args.records}")
    plan = read_plan(args.plan, args.records)
    if unknown := [method for method in args.methods if method not in plan.methods]:
        raise InputError(f"the plan has no method {', '.join(unknown)}; it has {', '.join(plan.methods)}")
    for model in args.model:
        name = Path(model).name
        folders = (args.data_root, args.work.resolve(), args.out)
        Runner(plan, name, model_folder(model), *folders, end, tuple(args.methods)).run()


if __name__ == "__main__":
    start(main)
