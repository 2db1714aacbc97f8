"""Tokens decoded a second, a siamese model's against its adapter's alone (paper: "Inference Speed")."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from imsm.evaluation.candidates import Candidate
from imsm.generation import prompt_ids


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
    inputs = [torch.tensor([prompt_ids(candidate.tokenizer, prompt)], device=siamese.device) for prompt in prompts]
    pad = candidate.tokenizer.pad_token_id
    if pad is None:
        pad = candidate.tokenizer.eos_token_id
    for repetition in range(repetitions + 1):
        for name, model in models.items():
            began = time.perf_counter()
            for ids in inputs:
                with torch.inference_mode():
                    model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=new_tokens,
                        min_new_tokens=new_tokens,
                        do_sample=False,
                        pad_token_id=pad,
                    )
            if ids.is_cuda:
                torch.cuda.synchronize()
            if repetition:
                found[name].append(len(inputs) * new_tokens / (time.perf_counter() - began))
    return Speed(median(found["plain"]), median(found["siamese"]))
