"""The divergence from the base model as a term of the loss: KL(base ‖ model), in mean nats a token.

The base model's distributions come from the same weights, with the adapter off and without gradients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imsm.data import IGNORED, AnswerCollator, Example
from imsm.model import SiameseForCausalLM
from imsm.samples import Sample


def kl_divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """Mean of KL(base ‖ tuned) over N positions, () float32, from logits (N, V); 0 if N is 0."""
    expected, found = base.float().log_softmax(dim=-1), tuned.float().log_softmax(dim=-1)
    total = nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
    return total / max(len(tuned), 1)


class Divergence(Protocol):
    """A term of the loss in training.

    weight: its weight beside the cross-entropy.
    output_logits: whether it needs the logits of the training batch.
    """

    weight: float
    output_logits: bool

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

    def __call__(self, model: SiameseForCausalLM, inputs: dict[str, Any], outputs: Any, place: int) -> Tensor:
        where = prompt_positions(inputs["labels"], inputs["attention_mask"])
        if not bool(where.any()):
            return outputs.logits.new_zeros((), dtype=torch.float32)
        base = base_logits(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        return kl_divergence(base[where], outputs.logits[where])


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
        return kl_divergence(base_logits(model, batch)[where], tuned[where])


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
