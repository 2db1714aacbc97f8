"""`imsm data show`: how training sees the records of a file or Hub data set."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer

from imsm.data import IGNORED, ExampleSet, describe, read_examples
from imsm.errors import InputError, first_line
from imsm.settings import DataConfig

DEFAULT_LENGTH = DataConfig(train="-").max_length


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(prog="imsm data", description="Look at training data.")
    show = parser.add_subparsers(required=True, metavar="show").add_parser(
        "show",
        help="how records are rendered, tokenised and masked",
        description="How records are rendered, tokenised and masked. What is learnt stands in «…».",
    )
    show.add_argument("source", metavar="FILE", help="a .jsonl, .json or .parquet file, or a Hub data set")
    show.add_argument("--model", required=True, help="folder or Hub name of the tokenizer")
    show.add_argument("--split", default="train", help="split, if FILE is a Hub data set (default: train)")
    show.add_argument("--count", type=int, default=3, metavar="N", help="records shown (default: 3)")
    show.add_argument(
        "--max-length",
        type=int,
        default=DEFAULT_LENGTH,
        metavar="N",
        help=f"limit in tokens (default: {DEFAULT_LENGTH})",
    )
    show.add_argument("--no-eos", action="store_true", help="as with data.add_eos: false")
    show.add_argument("--tokens", action="store_true", help="also list every token with its label")
    show.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the tokenizer's repository brings"
    )
    args = parser.parse_args(argv)
    if args.count < 0:
        raise InputError(f"--count must not be negative, got {args.count}")
    config = DataConfig(train=args.source, max_length=args.max_length, add_eos=not args.no_eos)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer of --model {args.model!r} cannot be loaded: {first_line(error)}") from error
    found = read_examples(args.source, tokenizer, config, args.split)

    console = Console(highlight=False)
    for example in found.examples[: args.count]:
        console.print(describe(example, tokenizer, tokens=args.tokens), soft_wrap=True)
    console.print(Text(summary(found)), soft_wrap=True)
    return 0


def summary(found: ExampleSet) -> str:
    """Counts of records and tokens, the format found, and every problem."""
    lines = [f"{found.source}: {len(found)} usable records of format {found.format}"]
    if found.examples:
        lengths = [len(example.input_ids) for example in found.examples]
        learnt = sum(label != IGNORED for example in found.examples for label in example.labels)
        lines.append(
            f"tokens a record: {min(lengths)} to {max(lengths)}, mean {sum(lengths) / len(lengths):.1f}; "
            f"{learnt / sum(lengths):.1%} of them learnt"
        )
    return "\n".join([*lines, found.report(limit=None) if found.problems else "no problems"])
