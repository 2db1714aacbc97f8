"""The gate of a finished adapter, fitted to constants: both streams' memories of the task, and of the base model's dreams.

Neither stream learns any more, so every memory is computed once; a step is the gate and the output head alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imsm.data import AnswerCollator, Example
from imsm.data.batches import length_batches
from imsm.model import SiameseForCausalLM
from imsm.query import IGNORE, answer_boundaries, pool_within
from imsm.training.border import Report
from imsm.training.divergence import kl_divergence


@dataclass(frozen=True)
class Constants:
    """What a gate reads at the supervised positions of some examples; all (S, d), `targets` (S,).

    example: (S,), which of the examples each position is of.
    """

    base: Tensor
    tuned: Tensor
    base_query: Tensor
    tuned_query: Tensor
    targets: Tensor
    example: Tensor

    def to(self, device: Any) -> Constants:
        """The same on a device."""
        return Constants(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def of(self, examples: Tensor) -> Constants:
        """Those of some of the examples."""
        where = torch.isin(self.example, examples)
        return Constants(*(getattr(self, name)[where] for name in self.__dataclass_fields__))


@torch.no_grad()
def constants(
    model: SiameseForCausalLM,
    examples: Sequence[Example],
    collator: AnswerCollator,
    bf16: bool = False,
    report: Report | None = None,
) -> Constants:
    """Both streams' memories and pooled queries at the supervised positions; as in eval mode, on the CPU."""
    device: Any = model.get_input_embeddings().weight.device
    streams, rows, done = model.streams, [], 0
    for chosen in length_batches([len(example.input_ids) for example in examples]):
        batch = {name: x.to(device) for name, x in collator([examples[index] for index in chosen]).items()}
        labels = batch.pop("labels")
        memories = []
        for run in (streams.frozen, streams.tuned):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                run({**batch, "use_cache": False}, None)
            memory, streams.tap.memory = streams.tap.memory, None
            assert memory is not None
            memories.append(memory)
        labels = labels.to(memories[0].device)
        attended = batch["attention_mask"].bool().to(memories[0].device)
        boundary = answer_boundaries(labels, attended)
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        where = targets != IGNORE
        number = torch.tensor(chosen, device=labels.device)[:, None].expand_as(labels)
        parts = [memory[where] for memory in memories]
        parts += [pool_within(memory, attended, boundary)[where] for memory in memories]
        rows.append([part.cpu() for part in (*parts, targets[where], number[where])])
        done += len(chosen)
        if report is not None:
            report(done, len(examples))
    return Constants(*(torch.cat(column) for column in zip(*rows, strict=True)))


def fit_gate(
    model: SiameseForCausalLM,
    task: Constants,
    dreams: Constants | None,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    report: Report | None = None,
) -> list[float]:
    """Learns the gate's weights by cross-entropy on the task and `weight` · KL(base ‖ mix) on the dreams.

    Args:
        model: whose adapter stays as it is.
        task, dreams: constants of examples and of dreams' answers.
        steps: optimizer steps; the learning rate falls to 0 along a cosine.
        learning_rate: the highest.
        weight: of the divergence.
        batch_size: examples, and dreams, a step.
        seed: of their order.
        report: called with the steps done and those to do.

    Returns:
        the loss of every step; empty if the gate has nothing to learn.
    """
    learnt = list(model.gate.parameters())
    if not learnt:
        return []
    device: Any = model.get_output_embeddings().weight.device
    frozen = [parameter for parameter in model.peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    orders = [_Order(part, batch_size, generator) for part in (task, dreams) if part is not None and len(part.example)]
    losses: list[float] = []
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.gate.train()
    try:
        torch.manual_seed(seed)
        for step in range(steps):
            own, *other = (order.next().to(device) for order in orders)
            loss = nn.functional.cross_entropy(logits(model, _mixed(model, own)).float(), own.targets)
            if other and weight:
                with torch.no_grad():
                    expected = logits(model, other[0].base)
                found = logits(model, _mixed(model, other[0]))
                everywhere = torch.ones(1, len(found), dtype=torch.bool, device=device)
                loss = loss + weight * kl_divergence(expected[None], found[None], everywhere)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if report is not None:
                report(step + 1, steps)
    finally:
        model.gate.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return losses


class _Order:
    """Batches of constants, by examples in an order drawn anew in every turn."""

    def __init__(self, part: Constants, size: int, generator: torch.Generator) -> None:
        self.part, self.size, self.generator = part, size, generator
        self.numbers = part.example.unique()
        self.left = self.numbers[:0]

    def next(self) -> Constants:
        if len(self.left) < min(self.size, len(self.numbers)):
            self.left = self.numbers[torch.randperm(len(self.numbers), generator=self.generator)]
        chosen, self.left = self.left[: self.size], self.left[self.size :]
        return self.part.of(chosen)


def _mixed(model: SiameseForCausalLM, part: Constants) -> Tensor:
    memory: Tensor = model.gate(part.base, part.tuned, part.base_query, part.tuned_query).memory
    return memory


def logits(model: SiameseForCausalLM, memory: Tensor) -> Tensor:
    """What the base model makes of memories (S, d) from its output head on, (S, V)."""
    # The model's own forward on one token, whose memory these take the place of: whatever it does behind the head is done.
    device: Any = model.get_input_embeddings().weight.device
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    return model.streams.tuned({"input_ids": one, "use_cache": False}, None, lambda _: memory[None]).logits[0]  # type: ignore[no-any-return]
