"""`imsm generate`: answers to prompts, and on request the two memories' own answers beside them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from imsm.cli.checkpoint import add_model_arguments, add_sampling_arguments, dial, load_checkpoint, sampling
from imsm.data.formats import RecordError, read_messages, refuse_half_characters
from imsm.data.records import type_name
from imsm.errors import InputError
from imsm.generation import Prompt, answers

#: What `--compare` shows, as values of `force_gate`.
MEMORIES = {"base": 1.0, "tuned": 0.0, "interwoven": None}


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="imsm generate", description="Answers to prompts given as arguments, in a file, or on standard input."
    )
    add_model_arguments(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a prompt (quote it); none: read --file or stdin")
    parser.add_argument("--file", type=Path, help="prompts, one a line; or .jsonl with 'prompt', 'input' or 'messages'")
    parser.add_argument("--plain", action="store_true", help="give prompts as they are, without the chat template")
    parser.add_argument("--compare", action="store_true", help="also print the answers of base and tuned stream alone")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt instead of text")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts decoded together (default: 8)")
    add_sampling_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be a positive integer, got {args.batch_size}")
    texts = read_prompts(args)
    settings, turned = sampling(args), dial(args)
    model, tokenizer = load_checkpoint(args)
    prompts = [as_prompt(text, chat=bool(tokenizer.chat_template) and not args.plain) for text in texts]

    said: dict[str, dict[int, str]] = {}
    for name, gate in MEMORIES.items() if args.compare else [("interwoven", None)]:
        extra: dict[str, Any] = turned if gate is None else {"force_gate": gate}
        batch = answers(
            model,
            tokenizer,
            prompts,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            **settings,
            **extra,
        )
        said[name] = {answer.index: answer.text for answer in batch}
    for i, text in enumerate(texts):
        show(text, {name: by_index[i] for name, by_index in said.items()}, args)
    return 0


def read_prompts(args: argparse.Namespace) -> list[Any]:
    """Prompts from the arguments, the file or standard input: texts, or lists of messages.

    Raises:
        InputError: there are none, or the file cannot be read.
    """
    if args.prompts and args.file:
        raise InputError("give prompts as arguments or in --file, not both")
    if args.prompts:
        return list(args.prompts)
    if args.file is None:
        if sys.stdin.isatty():
            print("Prompts, one a line; end with Ctrl-D.", file=sys.stderr)
        lines = sys.stdin.read().splitlines()
    else:
        try:
            # Other marks that end lines, such as U+2028, may stand in a JSON text.
            lines = args.file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompts cannot be read from {args.file}: {error}") from error
    prompts: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if args.file is None or args.file.suffix != ".jsonl":
            prompts.append(line.rstrip("\r"))
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"{args.file} line {number} is not JSON: {error}") from error
        keys = [key for key in ("prompt", "input", "messages") if isinstance(entry, dict) and entry.get(key)]
        if not keys:
            raise InputError(f"{args.file} line {number} needs 'prompt', 'input' or 'messages'")
        value = entry[keys[0]]
        try:
            if keys[0] == "messages":
                value = read_messages(value, "messages")
                value = value[:-1] if value[-1]["role"] == "assistant" else value
                if not value:
                    raise RecordError("'messages' has no turn to answer")
            elif not isinstance(value, str):
                raise RecordError(f"'{keys[0]}' must be a text, got {type_name(value)}")
            else:
                refuse_half_characters(value, keys[0])
        except RecordError as error:
            raise InputError(f"{args.file} line {number}: {error}") from error
        prompts.append(value)
    if not prompts:
        raise InputError("no prompts given: pass them as arguments, with --file, or on standard input")
    return prompts


def as_prompt(prompt: Any, chat: bool) -> Prompt:
    """A text as a user's turn where the model chats; everything else as it is."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def show(prompt: Any, said: dict[str, str], args: argparse.Namespace) -> None:
    """Prints one prompt's answers."""
    if args.json:
        print(json.dumps({"prompt": prompt, **({"answer": said["interwoven"]} if len(said) == 1 else said)}))
    elif args.compare:
        table = Table(*said, title=str(prompt), title_justify="left", expand=True)
        table.add_row(*said.values())
        Console().print(table, markup=False)
    else:
        print(said["interwoven"])
