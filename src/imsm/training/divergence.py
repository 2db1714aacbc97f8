"""The divergence from the base model as a term of the loss: KL(base ‖ model), in mean nats a token.

The base model's distributions come from the same weights, with the adapter off and without gradients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imsm.data import IGNORED, AnswerCollator, Example
from imsm.model import SiameseForCausalLM
from imsm.samples import Sample

#: Logits whose divergence is computed at a time.
VALUES = 1 << 24


def kl_divergence(base: Tensor, tuned: Tensor, where: Tensor) -> Tensor:
    """Mean of KL(base ‖ tuned) over the positions of `where`, () float32; 0 if there are none.

    Of the float32 copies and softmaxes that it takes there are never more than some rows' in memory, in the backward pass
    neither: with a vocabulary of 262,144 tokens each of them would be a megabyte a position.

    Args:
        base: logits (B, T, V), without gradients.
        tuned: logits (B, T, V).
        where: (B, T) bool.
    """
    rows = max(VALUES // base.shape[-1], 1)
    total = torch.zeros((), device=tuned.device)
    parts = (x.to(tuned.device).flatten(0, 1).split(rows) for x in (base, tuned, where))
    for expected, found, kept in zip(*parts, strict=True):
        total = total + checkpoint(_summed, expected, found, kept, use_reentrant=False, preserve_rng_state=False)
    return total / where.sum().clamp(min=1).to(total.device)


def _summed(base: Tensor, tuned: Tensor, kept: Tensor) -> Tensor:
    expected, found = (x[kept].float().log_softmax(dim=-1) for x in (base, tuned))
    return nn.functional.kl_div(found, expected, reduction="sum", log_target=True)


class Divergence(Protocol):
    """A term of the loss in training.

    weight: its weight beside the cross-entropy.
    output_logits: whether it needs the logits of the training batch.
    """

    weight: float
    output_logits: bool

    def share(self, inputs: dict[str, Any]) -> int | Tensor:
        """What a training batch's divergence counts in the mean over those of an optimizer step."""
        ...

    def __call__(self, model: SiameseForCausalLM, inputs: dict[str, Any], outputs: Any, place: int) -> Tensor:
        """The divergence, (), from the training batch, what the model made of it, and the forward pass's number."""
        ...


class PromptDivergence:
    """On the prompts of the training batch (Li & Hoiem 2016, "Learning without Forgetting", ECCV).

    A position counts if its token and the next one are the prompt's, so that nothing is held against the answer.

    Args:
        weight: of the divergence.
    """

    output_logits = True

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def share(self, inputs: dict[str, Any]) -> Tensor:
        # By positions, so that a step is the same in however many passes it is made.
        return prompt_positions(inputs["labels"], inputs["attention_mask"]).sum()

    def __call__(self, model: SiameseForCausalLM, inputs: dict[str, Any], outputs: Any, place: int) -> Tensor:
        where = prompt_positions(inputs["labels"], inputs["attention_mask"])
        base = base_logits(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        return kl_divergence(base, outputs.logits, where)


class SampleDivergence:
    """On texts that the base model sampled, a batch of them a forward pass (Bansal & Sanghavi 2025, "Context-Free
    Synthetic Data Mitigates Forgetting", arXiv 2505.13811, where samples estimate this divergence).

    Each pass through the samples is in an order of its own, which depends on the seed alone.

    Args:
        weight: of the divergence.
        samples: the texts.
        collator: makes batches of them.
        batch_size: texts a forward pass.
        seed: of their order.
        force_gate: 0 compares the tuned stream with the base model, None the siamese model's mix.
    """

    output_logits = False

    def __init__(
        self,
        weight: float,
        samples: list[Sample],
        collator: AnswerCollator,
        batch_size: int,
        seed: int,
        force_gate: float | None = None,
    ) -> None:
        self.weight = weight
        self.examples = [sampled_example(sample) for sample in samples]
        self.collator = collator
        self.batch_size = batch_size
        self.seed = seed
        self.force_gate = force_gate
        self._order = lru_cache(maxsize=2)(self._draw)

    def share(self, inputs: dict[str, Any]) -> int:
        return 1

    def batch(self, place: int) -> list[Example]:
        """The texts of the forward pass of that number."""
        size = len(self.examples)
        found = range(place * self.batch_size, (place + 1) * self.batch_size)
        return [self.examples[self._order(number // size)[number % size]] for number in found]

    def _draw(self, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return list(torch.randperm(len(self.examples), generator=generator).tolist())

    def __call__(self, model: SiameseForCausalLM, inputs: dict[str, Any], outputs: Any, place: int) -> Tensor:
        device: Any = inputs["input_ids"].device
        batch = {name: tensor.to(device) for name, tensor in self.collator(self.batch(place)).items()}
        labels = batch.pop("labels")
        attended = batch["attention_mask"].bool()
        # The last token of a text predicts none of it.
        where = attended & nn.functional.pad(attended[:, 1:], (0, 1))
        tuned = model(
            **batch, prompt_mask=attended & (labels == IGNORED), use_cache=False, force_gate=self.force_gate
        ).logits
        return kl_divergence(base_logits(model, batch), tuned, where)


def prompt_positions(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """Positions whose token and whose next token are read and not learnt, (B, T) bool."""
    prompt = (labels == IGNORED) & attention_mask.bool()
    return prompt & nn.functional.pad(prompt[:, 1:], (0, 1))


def sampled_example(sample: Sample) -> Example:
    """A sampled text as an example whose answer is learnt."""
    ids = sample.prompt_ids + sample.answer_ids
    return Example(ids, [IGNORED] * len(sample.prompt_ids) + sample.answer_ids, 0)


@torch.no_grad()
def base_logits(model: SiameseForCausalLM, inputs: dict[str, Any]) -> Tensor:
    """The base model's logits, (B, T, V)."""
    return model(**inputs, use_cache=False, force_gate=1.0).logits  # type: ignore[no-any-return]
