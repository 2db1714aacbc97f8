"""What the verbs that run a checkpoint share: their arguments, and loading model and tokenizer."""

from __future__ import annotations

import argparse
import math
from typing import Any

from transformers import PreTrainedTokenizerBase

from imsm.errors import InputError
from imsm.evaluation.loading import Loading, load_siamese
from imsm.model import SiameseForCausalLM


def add_model_arguments(
    parser: argparse.ArgumentParser, checkpoint: str = "folder or Hub name of a siamese checkpoint"
) -> None:
    """The checkpoint, which help describes as `checkpoint`, and how to load it."""
    parser.add_argument("checkpoint", help=checkpoint)
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """How checkpoints are loaded."""
    parser.add_argument("--base", help="folder or Hub name of the base model, if not the one that the checkpoint names")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument(
        "--device", default=None, help="for example cuda, cuda:1, mps or cpu (default: GPU if there is one)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the base model's repository brings"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How answers are decoded."""
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of sampling (default: 1)")
    parser.add_argument("--seed", type=int, default=None, help="seed of sampling")
    parser.add_argument("--task", metavar="NAME", help="have this task answer (default: each prompt finds its own)")
    parser.add_argument(
        "--recall",
        type=float,
        default=None,
        metavar="SHIFT",
        help="the dial: shift of the gate's logits; inf is the base model, -inf the adapted one, 0 the mix as trained (default: "
        "the checkpoint's own, which is 0 unless tune-recall wrote another)",
    )
    parser.add_argument(
        "--recall-floor", type=float, default=0.0, metavar="G", help="least weight of the base's memory (default: 0)"
    )
    parser.add_argument(
        "--recall-ceiling",
        type=float,
        default=1.0,
        metavar="G",
        help="greatest weight of the base's memory (default: 1)",
    )


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """`generate` arguments from the command line's.

    Raises:
        InputError: a value out of range.
    """
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be a positive integer, got {args.max_new_tokens}")
    if not 0 <= args.temperature < math.inf:
        raise InputError(f"--temperature must be 0 (greedy) or positive, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top-p must be in (0, 1], got {args.top_p}")
    if args.seed is not None:
        refuse_seed(args.seed)
        from transformers import set_seed

        set_seed(args.seed)
    chosen = {} if args.task is None else {"task": args.task}
    if args.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **chosen}
    return {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0, **chosen}


def refuse_seed(seed: int) -> None:
    """Raises `InputError` for a seed that not all generators take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be an integer from 0 to below 2**32, got {seed}")


def dial(args: argparse.Namespace) -> dict[str, float | None]:
    """The recall dial as `generate` arguments; without a shift the checkpoint's own counts.

    Raises:
        InputError: a value out of range.
    """
    if args.recall is not None and math.isnan(args.recall):
        raise InputError("--recall must be a number, inf or -inf, got nan")
    if not 0 <= args.recall_floor <= args.recall_ceiling <= 1:
        raise InputError(
            "--recall-floor and --recall-ceiling must be 0 ≤ floor ≤ ceiling ≤ 1, got "
            f"{args.recall_floor:g} and {args.recall_ceiling:g}"
        )
    return {"recall": args.recall, "recall_floor": args.recall_floor, "recall_ceiling": args.recall_ceiling}


def load_checkpoint(args: argparse.Namespace) -> tuple[SiameseForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer of the siamese checkpoint that the arguments name.

    Raises:
        InputError: see `load_siamese`.
    """
    loading = Loading(args.dtype, args.device, args.trust_remote_code)
    model, tokenizer, _ = load_siamese(args.checkpoint, args.base, loading)
    return model, tokenizer
