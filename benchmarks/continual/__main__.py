"""`python -m benchmarks.continual run` does what plan.yaml says, over as many sittings as it takes; `report` prints tables."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from imsm.errors import InputError

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.continual", description=__doc__)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="{run,report}")
    run = verbs.add_parser("run", help="train and evaluate what is not done yet")
    run.add_argument("--data-root", type=Path, required=True, help="folder with the data sets' files")
    run.add_argument("--model", nargs="+", default=["smollm2"], help="smollm2, gemma3 or a model's folder")
    run.add_argument("--plan", type=Path, default=HERE / "plan.yaml", help="what is to be done")
    run.add_argument("--work", type=Path, default=Path("continual"), help="folder for checkpoints and full outputs")
    run.add_argument("--methods", nargs="+", default=[], help="names of the plan's methods (default: all)")
    run.add_argument("--records", type=int, help="training records of a task (default: the plan's)")
    run.add_argument("--budget-minutes", type=float, default=float("inf"), help="begin no job after this time")
    report = verbs.add_parser("report", help="print the records as tables")
    for verb in (run, report):
        verb.add_argument("--out", type=Path, default=HERE / "results", help="folder of the records")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status, 2 for what the user can mend."""
    args = parser().parse_args(arguments)
    try:
        if args.verb == "report":
            from benchmarks.continual.report import page, read_all

            print(page(read_all(args.out)))
            return 0
        from benchmarks.continual.run import Runner, read_plan
        from benchmarks.models import model_folder

        deadline = time.monotonic() + 60 * args.budget_minutes
        if args.records is not None and args.records < 1:
            raise InputError(f"--records must be a positive integer, got {args.records}")
        plan = read_plan(args.plan, args.records)
        if unknown := [method for method in args.methods if method not in plan.methods]:
            raise InputError(f"the plan has no method {', '.join(unknown)}; it has {', '.join(plan.methods)}")
        for model in args.model:
            name = Path(model).name
            folders = (args.data_root, args.work.resolve(), args.out)
            Runner(plan, name, model_folder(model), *folders, deadline, tuple(args.methods)).run()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # So that a run that is cut ends the process that works, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main())
