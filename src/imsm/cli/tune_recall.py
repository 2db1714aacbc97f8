"""`imsm tune-recall`: a checkpoint along the recall dial, and where the dial stands best."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from imsm.checkpoint import read_config, write_recall
from imsm.cli.checkpoint import add_model_arguments, refuse_seed
from imsm.errors import InputError
from imsm.folders import folder_here, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from imsm.evaluation.recall import Dialled
    from imsm.evaluation.task import Task, TaskRecord
    from imsm.model import SiameseForCausalLM

    Asked = tuple[Task, Sequence[TaskRecord]]


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    args = read_arguments(argv)
    recalls = read_recalls(args.recalls)
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; name a folder")
    folder, _ = read_config(args.checkpoint, {})
    if args.write and not Path(args.checkpoint).is_dir():
        raise InputError(
            f"--write needs a checkpoint in a folder, and {args.checkpoint} is the Hub's; download it first"
        )

    from imsm.evaluation.recall import along_the_dial
    from imsm.evaluation.recall_views import draw, table, value

    model, tokenizer, target, retained = prepared(args, folder)
    dialled = along_the_dial(model, tokenizer, target, retained, recalls, batch_size=args.batch_size, seed=args.seed)
    Console().print(table(dialled), markup=False)
    write_text(args.output / "recall.json", json.dumps(facts(dialled, args, target, retained), indent=1) + "\n")
    try:
        draw(dialled, args.output / "recall.png")
    except InputError as error:
        print(f"{args.output / 'recall.png'} is left out: {error}", file=sys.stderr)
    pick = dialled.pick
    print(f"Best at recall {value(pick.recall)}; {args.output} has the figures.")
    if args.write:
        write_recall(folder, pick.recall)
        print(f"{folder} has it as its default now.")
    return 0


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: a number is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="imsm tune-recall",
        description="Evaluate a siamese checkpoint along the recall dial: its score on the task against the share of the base "
        "model's own answers that it keeps. Prints a table, writes recall.json and recall.png, and names the value with the "
        "highest harmonic mean of the two.",
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="validation records of the task, as for `imsm train`"
    )
    parser.add_argument("--split", default="validation", help="split, if FILE is a Hub data set (default: validation)")
    parser.add_argument("--metric", default="exact_match", help="how answers are scored (default: exact_match)")
    parser.add_argument(
        "--retained", nargs="+", metavar="TASK", help="tasks of kept answers (default: dreams of the base model)"
    )
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="folder of their files (default: their public data sets)"
    )
    parser.add_argument(
        "--recalls", metavar="LIST", help="values with commas between (default: -inf,-2,-1,-0.5,0,0.5,1,2,inf)"
    )
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="records of each at most (default: 100)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="records run together (default: 8)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of records and of the intervals (default: 0)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("recall"), metavar="DIR", help="folder to write (default: recall)"
    )
    parser.add_argument("--write", action="store_true", help="make the value found the checkpoint's default")
    args = parser.parse_args(argv)
    for flag, value in {"--limit": args.limit, "--batch-size": args.batch_size}.items():
        if value < 1:
            raise InputError(f"{flag} must be a positive integer, got {value}")
    refuse_seed(args.seed)
    if args.data_root is not None and not args.retained:
        raise InputError("--data-root holds the files of --retained; name the tasks")
    return args


def read_recalls(text: str | None) -> list[float]:
    """The values of the dial.

    Raises:
        InputError: one of them is no number.
    """
    from imsm.evaluation.recall import RECALLS

    if text is None:
        return list(RECALLS)
    try:
        values = [float(part) for part in text.replace("−", "-").split(",")]
    except ValueError:
        values = [math.nan]
    if any(map(math.isnan, values)):
        raise InputError(
            f"--recalls must be numbers, inf or -inf with commas between, such as -inf,-1,0,1,inf; got {text!r}"
        )
    return values


def prepared(
    args: argparse.Namespace, folder: Path
) -> tuple[SiameseForCausalLM, PreTrainedTokenizerBase, Asked, list[Asked]]:
    """Model, tokenizer, and what to ask: the task, and what is to be kept.

    Raises:
        InputError: data or model cannot be used.
    """
    from imsm.cli.tasks import read_kept
    from imsm.data import load_examples
    from imsm.evaluation.held_out import held_out_task
    from imsm.evaluation.loading import Loading
    from imsm.evaluation.sources import load_records
    from imsm.model import SiameseForCausalLM
    from imsm.settings import DataConfig

    loading = Loading(args.dtype, args.device, args.trust_remote_code)
    _, config = read_config(folder, {})
    name = args.base or config.base_model
    if name is None:
        raise InputError(f"{folder} does not name its base model; give it with --base")
    folder_here(name, "base model")
    tokenizer = loading.tokenizer(folder, name)
    add_eos = tokenizer.eos_token_id is not None
    settings = DataConfig(train=args.data, split=args.split, max_length=sys.maxsize, add_eos=add_eos)
    found = load_examples(settings, tokenizer)
    places = sorted(random.Random(args.seed).sample(range(len(found)), min(args.limit, len(found))))
    target = held_out_task([found.examples[place] for place in places], tokenizer, args.metric)
    tasks = read_kept(args.retained, args.data_root, args.limit, args.seed) if args.retained else []
    retained: list[Asked] = [(task, load_records(task, args.data_root, args.limit, args.seed)) for task in tasks]
    base = loading.base(name, config.base_revision if args.base is None else None)
    if not tasks:
        retained = [dreamt(base, tokenizer, config.training, args.limit)]
    model = loading.placed(SiameseForCausalLM.from_pretrained(folder, base=base))
    return model, tokenizer, target, retained


def dreamt(base: Any, tokenizer: PreTrainedTokenizerBase, training: dict[str, Any], count: int) -> Asked:
    """Dreams of the base model by another seed than that of the training."""
    from imsm.dreams import dream
    from imsm.evaluation.held_out import dreams_task
    from imsm.training.progress import BuildBar

    seed = int(training.get("settings", {}).get("seed", 0)) + 2
    return dreams_task(
        dream(base, tokenizer, count, seed % 2**32, answers=False, report=BuildBar("dreams", "texts")), tokenizer
    )


def facts(dialled: Dialled, args: argparse.Namespace, target: Asked, retained: list[Asked]) -> dict[str, Any]:
    """All figures as JSON values."""
    return {
        "checkpoint": args.checkpoint,
        "data": args.data,
        "metric": dialled.metric,
        "records": {task.name: len(records) for task, records in (target, *retained)},
        "settings": {"limit": args.limit, "batch_size": args.batch_size, "seed": args.seed, "dtype": args.dtype},
        "answers_decoded": dialled.answers,
        "dial": [stand.facts() for stand in dialled.stands],
        "pick": dialled.pick.facts(),
    }
