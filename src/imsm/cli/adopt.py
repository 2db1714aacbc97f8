"""`imsm adopt`: a siamese checkpoint of an adapter that was trained elsewhere, and what it keeps, before and after."""

from __future__ import annotations

import argparse
import json
import operator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from imsm.building import fetch_adapter, read_adapter_config
from imsm.errors import InputError
from imsm.settings import DataConfig, DreamsConfig, TrainConfig, argument_parser, load, setting_types

if TYPE_CHECKING:
    from imsm.evaluation.task import Task
    from imsm.training.adoption import Adopted

#: Folder in the checkpoint for what the audit leaves.
AUDIT = "audit"


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    args = read_arguments(argv)
    config = read_config(args)
    retained = read_retained(args, config)

    from imsm.evaluation.held_out import held_out_task
    from imsm.training import adopt

    adopted = adopt(
        args.adapter,
        config,
        held_out=args.held_out,
        held_out_dreams=args.held_out if args.data_root is None else 0,
        check=lambda records, tokenizer: held_out_task(records, tokenizer, args.metric),
    )
    figures = "; ".join(f"{name} {value:g}" for name, value in adopted.metrics.items())
    print(f"The adapter is adopted ({figures}).")
    if args.held_out:
        audit_adopted(adopted, retained, args, config)
    print(f"The checkpoint is in {adopted.folder}; use it: imsm generate {adopted.folder} 'PROMPT'")
    return 0


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; settings given are in `settings`, as text.

    Raises:
        InputError: a number is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="imsm adopt",
        usage="imsm adopt ADAPTER --data FILE --output DIR [--base NAME] [--held-out N] [--KEY VALUE …]",
        description="Make a siamese checkpoint of an adapter that was trained with peft, anywhere. The adapter stays as it "
        "is; what is learnt is which prompts are its task, from the task's data and the base model's own dreams. Prints "
        "what base, adapter alone and adopted model score on held-out records, and what they keep of the base's answers.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub name of the adapter")
    parser.add_argument("--data", required=True, metavar="FILE", help="the task's records, as for `imsm train`")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--base", metavar="NAME", help="the base model, if not the one that the adapter names")
    parser.add_argument("--eval", metavar="FILE", help="held-out records (default: some of --data are set aside)")
    parser.add_argument(
        "--held-out", type=int, default=32, metavar="N", help="records to test on; 0: no test (default: 32)"
    )
    parser.add_argument("--metric", default="exact_match", help="how answers to them are scored (default: exact_match)")
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the files of --retained (default: further dreams stand in)",
    )
    parser.add_argument(
        "--retained",
        nargs="+",
        metavar="TASK",
        help="tasks of kept answers (default with --data-root: all built-in ones)",
    )
    settings = parser.add_argument_group("settings, as of `imsm train`")
    helps = {action.dest: action.help for action in argument_parser()._actions}
    usual = TrainConfig(model="-", output_dir="-", data=DataConfig(train="-"))
    for key in setting_keys():
        default = json.dumps(operator.attrgetter(key)(usual))
        settings.add_argument(
            f"--{key}",
            dest=f"settings.{key}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{helps[key]} (default: {default})",
        )
    args = parser.parse_args(spelt_out(argv))
    if args.held_out < 0:
        raise InputError(f"--held-out must not be negative, got {args.held_out}")
    if args.retained and args.data_root is None:
        raise InputError("--retained needs the tasks' files: give their folder with --data-root")
    return args


def setting_keys() -> list[str]:
    """The settings of a run that can be given here."""
    from imsm.training.adoption import FIXED, SETTINGS

    data = [f"data.{field.name}" for field in fields(DataConfig) if field.name not in ("train", "eval")]
    dreams = [f"dreams.{field.name}" for field in fields(DreamsConfig) if field.name not in FIXED]
    return [*SETTINGS, *data, *dreams]


def spelt_out(argv: list[str]) -> list[str]:
    """The arguments with settings' names as settings have them, and `true` behind those that are switches alone."""
    types = {f"--{key}": setting_types()[key] for key in setting_keys()}
    given = []
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, has_value, value = argument.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        if name not in types:
            given.append(argument)
        elif types[name] is bool and not has_value and following.lower() not in ("true", "false"):
            given.append(f"{name}=true")
        else:
            given.append(f"{name}{has_value}{value}")
    return given


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The settings that the command line gives.

    Raises:
        InputError: a setting cannot be used, or the adapter cannot be read or names no base model.
    """
    texts = {key.removeprefix("settings."): text for key, text in vars(args).items() if key.startswith("settings.")}
    base = args.base
    if base is None:
        folder = fetch_adapter(args.adapter)
        named = read_adapter_config(folder)
        base = named.base_model_name_or_path
        if not base:
            raise InputError(f"{folder} does not name its base model; give it with --base")
        if named.revision:
            texts.setdefault("revision", named.revision)
    given = {"model": base, "output_dir": args.output, "data.train": args.data, **texts}
    return load(None, given if args.eval is None else {**given, "data.eval": args.eval})


def read_retained(args: argparse.Namespace, config: TrainConfig) -> list[Task]:
    """The tasks of kept answers that the command line names, once their data have been read.

    Raises:
        InputError: there is no such task, it is of another kind, or its data are missing or wrong.
    """
    from imsm.cli.tasks import read_kept
    from imsm.evaluation.metrics import METRICS

    if args.metric not in METRICS or METRICS[args.metric].kind != "answer":
        names = ", ".join(name for name, metric in METRICS.items() if metric.kind == "answer")
        raise InputError(f"--metric must be one of {names}; got {args.metric!r}")
    if args.data_root is None or not args.held_out:
        return []
    return read_kept(args.retained or ["kept"], args.data_root, args.held_out, config.seed)


def audit_adopted(adopted: Adopted, retained: list[Task], args: argparse.Namespace, config: TrainConfig) -> None:
    """Prints what base, adapter and adopted model score and keep; the records are in the checkpoint's folder."""
    from imsm.evaluation.held_out import dreams_task, held_out_task
    from imsm.evaluation.minds import audit_minds
    from imsm.evaluation.page import write_page
    from imsm.evaluation.tables import show

    target, records = held_out_task(adopted.held_out, adopted.tokenizer, args.metric)
    given = {target.name: records}
    tasks = [target, *retained]
    if not retained:
        dreams, asked = dreams_task(adopted.dreams, adopted.tokenizer)
        if asked:
            tasks.append(dreams)
            given[dreams.name] = asked
    folder = adopted.folder / AUDIT
    made = audit_minds(
        adopted.model,
        adopted.tokenizer,
        (config.model, args.adapter, str(adopted.folder)),
        tasks,
        target.name,
        folder,
        given=given,
        data_root=args.data_root,
        limit=args.held_out,
        batch_size=config.eval_batch_size,
        seed=config.seed,
        progress=config.progress,
    )
    write_page(made, folder / "audit.html")
    show(made, Console())
    print(f"{folder / 'audit.html'} has the pictures and the records.")
