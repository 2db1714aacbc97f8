"""The `imsm` command. Outside the package, whose import takes seconds: help and version must not wait for it."""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from difflib import get_close_matches

VERBS = {
    "train": "fine-tune a model as a YAML file of settings says",
    "adopt": "make a siamese checkpoint of an adapter that was trained elsewhere, as it is",
    "generate": "answer prompts with a checkpoint, on request beside both memories' own answers",
    "chat": "talk with a checkpoint",
    "eval": "score a checkpoint of any kind on tasks, and hold it against its base model's own answers",
    "audit": "hold checkpoints against their base: what was learned, what was lost",
    "tune-recall": "find where a checkpoint's dial stands best between its task and the base model's own answers",
    "export": "give a checkpoint's adapter back in peft's own format",
    "reproduce": "remake the paper's tables and figures for a model, ours beside the paper's",
    "data": "`data show FILE`: how records are rendered, tokenised and masked",
    "task": "list, remove, rename, export and import a checkpoint's tasks",
    "info": "say what a checkpoint is: base, method, gate, parameters, training",
}

#: Numbers below zero that argparse does not know as such.
NEGATIVE = re.compile(r"-inf(,\S*)?|-[\d.]+,\S*", re.IGNORECASE)
USAGE = "usage: imsm [--version] [--help] [--traceback] VERB …"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status.

    0: done. 1: it failed while running. 2: something given cannot work. 130: interrupted. 141: the reader of the
    output went away. Errors are one line on standard error; `--traceback` or IMSM_TRACEBACK=1 shows where they arose.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal's encoding may lack a character of an answer
    # Libraries telling each other about renamed functions are of no use to who runs a command.
    warnings.simplefilter("ignore", FutureWarning)
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = os.environ.get("IMSM_TRACEBACK", "") not in ("", "0")
    if "--traceback" in arguments:
        arguments.remove("--traceback")
        show_traceback = True
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("imsm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        errors = sys.modules.get("imsm.errors")
        if errors is not None and isinstance(error, errors.InputError):
            print(f"imsm: {error}", file=sys.stderr)
            return 2
        print(f"imsm: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_help(), file=sys.stderr)
        return 2
    verb, *rest = arguments
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb in ("-V", "--version"):
        from importlib.metadata import version

        print(f"imsm {version('imsm')}")
        return 0
    if verb not in VERBS:
        kind = "option" if verb.startswith("-") else "verb"
        known = ["--help", "--traceback", "--version"] if kind == "option" else list(VERBS)
        near = get_close_matches(verb, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        print(f"imsm: unknown {kind} {verb!r}; {hint}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"imsm.cli.{verb.replace('-', '_')}").run(joined(rest)))


def joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with a value such as -inf or -2,0 tied to its option, since argparse would take it for an option."""
    found: list[str] = []
    for argument in arguments:
        if NEGATIVE.fullmatch(argument) and found and re.fullmatch(r"--[\w-]+", found[-1]):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def _help() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            USAGE,
            "",
            "Fine-tune large language models without making them forget.",
            "",
            *(f"  {verb:<{width}}  {does}" for verb, does in VERBS.items()),
            "",
            "`imsm VERB --help` says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
