"""`python -m benchmarks.forgetting run` does what plan.yaml says, over as many sittings as it takes; `report` writes the page."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands import deadline, exit_status, run_and_report, start
from imsm.errors import InputError

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made, run, report = run_and_report(
        "forgetting", __doc__, "make docs/forgetting.md and its picture from the records"
    )
    run.add_argument("--model", nargs="+", default=["smollm2", "gemma3"], help="smollm2, gemma3 or a model's folder")
    run.add_argument("--plan", type=Path, default=HERE / "plan.yaml", help="what is to be done")
    run.add_argument("--methods", nargs="+", default=[], help="names of the plan's methods (default: all)")
    report.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs", help="folder that is written to")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status, 2 for what the user can mend."""
    args = parser().parse_args(arguments)
    return exit_status(lambda: report(args) if args.verb == "report" else run(args))


def report(args: argparse.Namespace) -> None:
    """Writes the page."""
    from benchmarks.forgetting.report import write

    print(write(args.out, args.docs))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments say.

    Raises:
        InputError: an argument is wrong, data are missing, or what is there was made otherwise.
    """
    from benchmarks.forgetting.plan import read_plan
    from benchmarks.forgetting.run import Runner
    from benchmarks.models import model_folder

    end = deadline(args)
    for model in args.model:
        name = Path(model).name
        plan = read_plan(name, args.plan)
        if unknown := [method for method in args.methods if method not in plan.methods]:
            raise InputError(
                f"the plan for {name} has no method {', '.join(unknown)}; it has {', '.join(plan.methods)}"
            )
        folders = (args.data_root, args.work.resolve(), args.out)
        Runner(plan, name, model_folder(model), *folders, end, tuple(args.methods)).run()


if __name__ == "__main__":
    start(main)
