"""Tokens decoded a second, a siamese model's against its adapter's alone (paper: "Inference Speed")."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from imsm.evaluation.candidates import Candidate
from imsm.generation import continuations, padding_id, prompt_ids


@dataclass(frozen=True)
class Speed:
    """Medians over repetitions, in tokens a second: the adapter's alone, and with IMSM on it."""

    plain: float
    siamese: float


def measure(candidate: Candidate, prompts: Sequence[str], *, new_tokens: int = 64, repetitions: int = 5) -> Speed:
    """Greedy decoding of one prompt at a time, `new_tokens` each; both alternate, after a round to warm up.

    The adapter alone is decoded by peft, with the weights that the siamese model holds.
    """
    siamese: Any = candidate.model
    models = {"plain": siamese.peft_model, "siamese": siamese}
    found: dict[str, list[float]] = {name: [] for name in models}
    inputs = [prompt_ids(candidate.tokenizer, prompt) for prompt in prompts]
    pad = padding_id(candidate.tokenizer)
    settings: dict[str, Any] = {"min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad}
    for repetition in range(repetitions + 1):
        for name, model in models.items():
            began = time.perf_counter()
            for ids in inputs:
                # It ends when the tokens are on the CPU, so a GPU has nothing left to do.
                continuations(model, [ids], pad, max_new_tokens=new_tokens, **settings)
            if repetition:
                found[name].append(len(inputs) * new_tokens / (time.perf_counter() - began))
    return Speed(median(found["plain"]), median(found["siamese"]))
