"""What a run keeps of the base model by its own texts: the texts, and their share of the training records."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imsm.data import AnswerCollator, Example, ExampleSet
from imsm.dreams import dream
from imsm.errors import InputError
from imsm.samples import Report, Sample, read_prompts, sample_texts
from imsm.settings import TrainConfig
from imsm.training.divergence import Divergence, PromptDivergence, SampleDivergence, sampled_example


@dataclass(frozen=True)
class Replayed(Example):
    """An example that the base model answered itself."""


def texts_needed(config: TrainConfig, records: int) -> int:
    """How many of the base model's own texts a run on so many records uses."""
    wanted = [0]
    if config.retain.kind in ("kl_samples", "kl_dreams") or config.corda:
        wanted.append(config.retain.samples)
    if config.retain.kind == "replay":
        wanted.append(replay_count(config.retain.share, records))
    return max(wanted)


def replay_count(share: float, records: int) -> int:
    """Records to add to `records` so that they are that share of all, at least one."""
    return max(math.ceil(round(share * records / (1 - share), 6)), 1)


def base_texts(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    report: Report | None = None,
) -> list[Sample]:
    """The base model's own texts: its answers to the prompts of `retain.prompts`, to prompts that it samples, or its dreams.

    `report` is called with the texts there are and those wanted, while some are made.

    Raises:
        InputError: the prompts cannot be read or are too long, or the model gives nothing that can be used.
    """
    settings = config.retain
    if settings.kind == "kl_dreams":
        own = config.dreams
        return dream(
            base,
            tokenizer,
            count,
            config.seed,
            prompt_tokens=own.prompt_tokens,
            answer_tokens=own.answer_tokens,
            report=report,
        )
    prompts = None
    if settings.prompts is not None:
        room = config.data.max_length - settings.sample_tokens
        found = read_prompts(settings.prompts, tokenizer)
        prompts = [ids for ids in found if len(ids) <= room]
        if not prompts:
            raise InputError(
                f"no prompt of retain.prompts {settings.prompts} leaves room for an answer of retain.sample_tokens "
                f"{settings.sample_tokens} in data.max_length {config.data.max_length}; raise data.max_length"
            )
        if len(prompts) < len(found) and PartialState().is_main_process:
            print(
                f"retain: {len(found) - len(prompts)} of {len(found)} prompts are left out, as they leave no room for an answer "
                f"in data.max_length {config.data.max_length}",
                file=sys.stderr,
            )
    return sample_texts(
        base,
        tokenizer,
        count,
        config.seed,
        prompt_tokens=settings.sample_tokens,
        answer_tokens=settings.sample_tokens,
        prompts=prompts,
        report=report,
    )


def with_replay(train_set: ExampleSet, samples: Sequence[Sample], share: float) -> ExampleSet:
    """The training records and, behind them, the base model's own answers, which are `share` of all if there are enough."""
    own = [sampled_example(sample) for sample in samples[: replay_count(share, len(train_set.examples))]]
    replayed: list[Example] = [Replayed(e.input_ids, e.labels, e.line) for e in own]
    return replace(train_set, examples=train_set.examples + replayed)


def divergence(config: TrainConfig, samples: list[Sample], collator: AnswerCollator) -> Divergence | None:
    """The term of the loss that `retain` asks for."""
    settings = config.retain
    if settings.kind == "kl_prompts":
        return PromptDivergence(settings.weight)
    if settings.kind in ("kl_samples", "kl_dreams"):
        return SampleDivergence(
            settings.weight,
            samples,
            collator,
            settings.batch_size,
            config.seed,
            force_gate=None if config.method == "imsm" and not config.two_phases else 0.0,
        )
    return None


class OwnCollator:
    """Adds to a collator's batches which records are the base model's own, (B,) bool, as `own`.

    Args:
        collator: makes the batches, a record a row.
    """

    def __init__(self, collator: AnswerCollator) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = self.collator(examples)
        batch["own"] = torch.tensor([isinstance(example, Replayed) for example in examples])
        return batch
