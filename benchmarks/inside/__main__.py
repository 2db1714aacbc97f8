"""`python -m benchmarks.inside run` trains and evaluates the variants, over as many sittings as it takes; `report` prints a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands import deadline, exit_status, run_and_report, start
from imsm.errors import InputError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made, run, _ = run_and_report("inside", __doc__, "print a table of the records")
    run.add_argument("--model", default="smollm2", help="smollm2, gemma3 or a model's folder")
    run.add_argument(
        "--layers", type=int, nargs="+", help="layers, from 0 (default: a third and two thirds of the way up)"
    )
    run.add_argument("--variants", nargs="+", default=[], help="lora, final, both and layers (default: all)")
    run.add_argument("--records", type=int, default=1200, help="training records (default: 1200)")
    run.add_argument("--seed", type=int, default=0, help="of all trainings (default: 0)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status, 2 for what the user can mend."""
    args = parser().parse_args(arguments)
    return exit_status(lambda: report(args) if args.verb == "report" else run(args))


def report(args: argparse.Namespace) -> None:
    """Prints the table."""
    from benchmarks.inside.report import text

    print(text(args.out))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments say.

    Raises:
        InputError: an argument is wrong, data are missing, or what is there was made otherwise.
    """
    from transformers import AutoConfig

    from benchmarks.inside.gates import refuse_layers
    from benchmarks.inside.plan import VARIANTS, make_plan
    from benchmarks.inside.run import Runner
    from benchmarks.models import model_folder

    end = deadline(args)
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        raise InputError(f"--variants must be some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    if args.records < 1:
        raise InputError(f"--records must be a positive integer, got {args.records}")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed must be an integer from 0 to below 2**32, got {args.seed}")
    name, folder = Path(args.model).name, model_folder(args.model)
    count = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).num_hidden_layers
    # A third and two thirds of the way up, unless told otherwise.
    usual = {max(round(share * count / 3), 1) - 1 for share in (1, 2)}
    layers = sorted(usual if args.layers is None else args.layers)
    refuse_layers(layers, count)
    plan = make_plan(name, layers, args.variants or list(VARIANTS), args.records, args.seed)
    Runner(plan, name, folder, args.data_root, args.work.resolve(), args.out, end).run()


if __name__ == "__main__":
    start(main)
