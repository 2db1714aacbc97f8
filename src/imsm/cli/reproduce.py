"""`imsm reproduce`: the paper's tables and figures anew, for any model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from imsm.errors import InputError
from imsm.reproduce.paper import paper_tables

if TYPE_CHECKING:
    from imsm.reproduce.plans import Job
    from imsm.reproduce.running import Study


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    args = read_arguments(argv)
    from imsm.reproduce.plans import chosen, make_plan, merged, share
    from imsm.reproduce.processes import join, run_alone

    names = list(paper_tables()) if args.tables == ["all"] else list(dict.fromkeys(args.tables))
    study = make_study(args)
    plans = [make_plan(name, args.trained_on, study.recipe.methods) for name in names]
    jobs = chosen(merged(plans), args.only)
    for job in jobs:
        if job.run.trained_on is not None:
            study.config(job.run, Path("train.jsonl"))  # a wrong recipe shows before the first run
    if args.dry_run:
        if args.data_root is not None:
            study.check_data(jobs)
        show_jobs(jobs, study)
        return 0
    processes = join()
    if processes.is_main_process:
        study.open()
        study.check_data(jobs)
    processes.wait_for_everyone()
    if processes.num_processes == 1:
        for job in jobs:
            study.do(job)
    else:
        failed = 0
        for job in share(jobs, processes.process_index, processes.num_processes):
            if study.missing(job):
                own = [*without_only(argv), "--only", job.run.name, "--no-tables"]
                failed = failed or run_alone(["reproduce", *own], processes.local_process_index)
        processes.wait_for_everyone()
        if failed:
            return failed
    if processes.is_main_process and not args.no_tables:
        from imsm.reproduce.comparison import compare
        from imsm.reproduce.tables import show, write

        for plan in plans:
            comparison = compare(plan, study)
            write(comparison, plan, study.output)
            show(comparison, plan, Console())
        print(f"Tables, checkpoints and every record are in {study.output}")
    return 0


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: a number is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="imsm reproduce",
        description="Remake the paper's tables and figures for a model: train, evaluate, and print ours beside the "
        "paper's. What is done already is not done again. Under `accelerate launch` or torchrun the runs are shared "
        "among the devices.",
        allow_abbrev=False,
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=f"{', '.join(paper_tables())}, or all")
    parser.add_argument(
        "--model", required=True, help="a recipe's name; or a model's folder or Hub name, together with --recipe"
    )
    parser.add_argument("--recipe", metavar="NAME", help="a shipped recipe's name, or a .yaml file")
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of TASK/train.jsonl and TASK/test.jsonl (default: the Hub)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for everything (default: reproduced/RECIPE)")
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="only runs whose name fits, such as 'gsm8k/*lora'; repeatable",
    )
    parser.add_argument("--trained-on", metavar="TASK", help="train on this task where the paper has another")
    parser.add_argument("--records", type=int, metavar="N", help="training records of a task at most")
    parser.add_argument("--limit", type=int, metavar="N", help="test records of a task at most")
    parser.add_argument("--epochs", type=float, metavar="N", help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="records evaluated together (default: 8)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository brings")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read the files of --data-root, list the runs and what is missing of each",
    )
    parser.add_argument("--no-tables", action="store_true", help="do the runs, print no table")
    args = parser.parse_args(argv)
    for flag in ("records", "limit", "epochs", "batch_size"):
        value = getattr(args, flag)
        if value is not None and value <= 0:
            raise InputError(f"--{flag.replace('_', '-')} must be positive, got {value:g}")
    return args


def make_study(args: argparse.Namespace) -> Study:
    """The study that the command line is about.

    Raises:
        InputError: there is no such recipe, or it names no model and none is given.
    """
    from imsm.reproduce.recipes import read_recipe
    from imsm.reproduce.running import Scale, Study

    recipe = read_recipe(args.recipe or args.model)
    model = args.model if args.recipe else recipe.model
    if model is None:
        raise InputError(
            f"the recipe {recipe.name} names no model: give its folder or Hub name, as --model NAME --recipe {recipe.name}"
        )
    named = Path(recipe.name).stem if recipe.name.endswith((".yaml", ".yml")) else recipe.name
    output = args.output or Path("reproduced") / named
    scale = Scale(args.records, args.limit, args.epochs, args.seed)
    return Study(output, recipe, model, scale, args.data_root, args.batch_size, args.trust_remote_code)


def without_only(argv: list[str]) -> list[str]:
    """The arguments but for --only and its values."""
    kept: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "--only":
            rest.pop(0)
        elif not argument.startswith("--only="):
            kept.append(argument)
    return kept


def show_jobs(jobs: list[Job], study: Study) -> None:
    """Prints the runs, and what is missing of each."""
    print(f"{len(jobs)} runs of {study.title} in {study.output}")
    for job in jobs:
        print(f"{job.run.name}: {', '.join(study.missing(job)) or 'done'}")
