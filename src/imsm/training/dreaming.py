"""What a run learns from the base model's dreams: a relevance head, and a gate if there is one to learn."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imsm.building import longest_input
from imsm.data import AnswerCollator, Example
from imsm.data.dresses import Dress, dresses
from imsm.data.turns import turn_closer, turn_opener
from imsm.dreams import dream, read_anchors
from imsm.errors import InputError
from imsm.model import SiameseForCausalLM
from imsm.samples import Sample
from imsm.settings import TrainConfig
from imsm.training.border import Report, fit_border
from imsm.training.divergence import sampled_example
from imsm.training.refit import constants, fit_gate

#: Examples that the gate's fit reads.
GATE_EXAMPLES = 1024
#: Share of the task's prompts that the head sees in other dresses too.
DRESSED = 1 / 2
#: Share of the dreams that the head sees in forms that say nothing of any task, too.
FRAMED = 1 / 2


@dataclass
class Dreams:
    """What is not the task.

    samples: dreams, with the base model's answers if the gate learns from them.
    anchors: prompts that the user wants answered as before.
    seconds: what having them took.
    """

    samples: list[Sample]
    anchors: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0


def dreams_of(
    config: TrainConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: Report | None = None
) -> Dreams:
    """The dreams of a plain base model, and the anchors.

    Raises:
        InputError: there are no dreams, or the anchors cannot be read.
    """
    settings, began, longest = config.dreams, time.monotonic(), longest_input(base)
    anchors = [] if settings.anchors is None else read_anchors(settings.anchors, tokenizer)
    if longest is not None and (most := max(map(len, anchors), default=0)) > longest:
        raise InputError(f"{settings.anchors} has an anchor of {most} tokens, the model reads {longest}; shorten it")
    samples = dream(
        base,
        tokenizer,
        settings.count,
        config.seed,
        prompt_tokens=settings.prompt_tokens,
        answer_tokens=settings.answer_tokens,
        answers=refits(config),
        report=report,
    )
    return Dreams(samples, anchors, time.monotonic() - began)


def refits(config: TrainConfig) -> bool:
    """Whether the gate is fitted to the finished adapter."""
    return config.reads("dreams.gate_steps")


def dressed_dreams(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> list[Dress]:
    """What a head sees of dreams: each as it is, those that ask as questions, too, and `FRAMED` of them, the first, in a form.

    Few dreams end as a question does, and none has a heading before its text and a space to fill in behind it. A task's
    prompts may: neither the mark nor the form alone must make a prompt the task's.
    """
    examples = [sampled_example(sample) for sample in samples]
    framed = dresses(examples, tokenizer, kinds=("framed",), others=round(FRAMED * len(examples)))
    return [*dresses(examples, tokenizer, kinds=("trained", "asked")), *framed]


def learn_from_dreams(
    config: TrainConfig,
    model: SiameseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    dreams: Dreams,
    report: Report | None = None,
) -> dict[str, float]:
    """Fits the head, and before it the gate where the run refits it; gives what came of it.

    Raises:
        InputError: the examples have no prompts.
    """
    settings, found = config.dreams, {}
    if refits(config):
        collator = AnswerCollator(tokenizer)
        chosen = random.Random(config.seed).sample(list(examples), min(GATE_EXAMPLES, len(examples)))
        losses = fit_gate(
            model,
            constants(model, chosen, collator, config.bf16, report),
            constants(model, [sampled_example(sample) for sample in dreams.samples], collator, config.bf16, report),
            steps=settings.gate_steps,
            learning_rate=config.gate_learning_rate,
            weight=settings.weight,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        found["gate_loss"] = sum(losses[-10:]) / len(losses[-10:])
    chosen = random.Random(config.seed).sample(list(examples), min(settings.task_prompts, len(examples)))
    found_dresses = dresses(chosen, tokenizer, config.seed, others=math.ceil(DRESSED * len(chosen)))
    # Other words may take more tokens than the model reads.
    longest = longest_input(model.base) or math.inf
    found_dresses = [dress for dress in found_dresses if 0 < len(dress.prompt_ids) <= longest]
    if not found_dresses:
        raise InputError("dreams: no training record has a prompt before its answer; set dreams: off")
    others = [dress for dress in dressed_dreams(dreams.samples, tokenizer) if len(dress.prompt_ids) <= longest]
    border = fit_border(
        model,
        [dress.prompt_ids for dress in found_dresses],
        [dress.prompt_ids for dress in others],
        origins=[dress.index for dress in found_dresses],
        dream_origins=[dress.index for dress in others],
        anchors=dreams.anchors,
        opener=turn_opener(tokenizer),
        closer=turn_closer(tokenizer),
        false_recall=settings.false_recall,
        bf16=config.bf16,
        report=report,
    )
    found |= {"false_recall": border.false_recall, "dreams_kept": border.dreams_kept}
    return found if border.others_left is None else found | {"others_left": border.others_left}
