"""`imsm chat`: a conversation with a checkpoint, answers streamed as they come."""

from __future__ import annotations

import argparse
import math

from imsm.cli.checkpoint import add_model_arguments, add_sampling_arguments, dial, load_checkpoint, sampling
from imsm.errors import InputError
from imsm.generation import stream

HELP = (
    "/reset starts anew · /recall SHIFT turns the dial (inf base, -inf tuned, 0 as trained) · /gate VALUE forces the gate "
    "(1 base, 0 tuned, off: learned) · /quit or Ctrl-D ends"
)


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(prog="imsm chat", description="Talk with a checkpoint.", epilog=HELP)
    add_model_arguments(parser)
    parser.add_argument("--system", help="a system message in front of the conversation")
    add_sampling_arguments(parser)
    args = parser.parse_args(argv)
    settings, turned = sampling(args), dial(args)
    model, tokenizer = load_checkpoint(args)
    if not tokenizer.chat_template:
        raise InputError("this model's tokenizer has no chat template; use `imsm generate --plain`")
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    force_gate: float | None = None
    print(HELP)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return 0
        if not said:
            continue
        if said == "/quit":
            return 0
        if said == "/reset":
            messages = list(start)
            continue
        if said.startswith("/gate"):
            force_gate = parse_gate(said)
            continue
        if said.startswith("/recall"):
            turned["recall"] = parse_recall(said, turned["recall"])
            continue
        if said.startswith("/"):
            print(HELP)
            continue
        messages.append({"role": "user", "content": said})
        extra = turned if force_gate is None else {"force_gate": force_gate}
        answer = ""
        for piece in stream(model, tokenizer, messages, max_new_tokens=args.max_new_tokens, **settings, **extra):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer.strip()})


def parse_gate(command: str) -> float | None:
    """The value in a `/gate VALUE` command; anything but a number in [0, 1] switches forcing off."""
    try:
        value = float(command.removeprefix("/gate"))
    except ValueError:
        value = -1.0
    if 0 <= value <= 1:
        print(f"gate forced to {value:g}")
        return value
    print("gate as learned")
    return None


def parse_recall(command: str, present: float) -> float:
    """The shift in a `/recall SHIFT` command; anything but a number leaves the present one."""
    try:
        value = float(command.removeprefix("/recall"))
    except ValueError:
        value = math.nan
    if math.isnan(value):
        print(f"recall is {present:g}; give a number, inf or -inf")
        return present
    print(f"recall is {value:g}")
    return value
