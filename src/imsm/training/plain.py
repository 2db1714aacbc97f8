"""Training of models that are not siamese: fully tuned ones, LoRAMoE, and adapters that rewrite base weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from imsm.data import IGNORED
from imsm.loss import answer_loss
from imsm.streams import HeadTap, output_head
from imsm.training.trainer import RunTrainer, trained_parameters

#: A term of the loss of the last forward, from its attention mask and from which records are the base model's own.
Penalty = Callable[[Tensor, Tensor], Tensor]


class AnswerLM(nn.Module):
    """A causal language model that gives its loss on the answers, with the head on supervised positions alone.

    Args:
        lm: the model that answers: a transformers model, or peft's around one.
        base: the transformers model.
        save: writes the checkpoint that users load into a folder.
        penalty: a further term of the loss, in training.
        watched: a context for the forward passes that it is taken from.
    """

    # The loss below divides by `num_items_in_batch`, so Trainer's accumulation is exact.
    accepts_loss_kwargs = True

    def __init__(
        self,
        lm: Any,
        base: PreTrainedModel,
        save: Callable[[Path], None],
        penalty: Penalty | None = None,
        watched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.tap = HeadTap(output_head(base))
        self.save = save
        self.penalty = penalty
        self.watched = watched

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The mean cross-entropy of the answers' tokens, (), as `loss`.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T), −100 where nothing is scored.
            attention_mask: (B, T), 0 on padding.
            num_items_in_batch: divisor of the loss instead of the number of supervised positions.
        """
        # Position t is scored on token t + 1.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        supervised = targets != IGNORED
        with self.tap.replacing(lambda memory: memory[supervised][None]), self._watch():
            logits = self.lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        self.tap.memory = None
        return {"loss": answer_loss(logits[0], targets[supervised], num_items_in_batch)}

    def _watch(self) -> AbstractContextManager[None]:
        return self.watched() if self.training else nullcontext()


class PlainTrainer(RunTrainer):
    """Trains an `AnswerLM`.

    Args:
        model: the model.
        whole: all weights are trained, so that the portable checkpoint has everything a resume needs of the model.
    """

    def __init__(self, model: AnswerLM, *args: Any, whole: bool = False, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.answering = model
        self.whole = whole

    def finish(self) -> None:
        super().finish()
        self.answering.tap.remove()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The loss on the answers, in training with the penalty."""
        inputs = dict(inputs)
        own = inputs.pop("own", None)
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        if model.training:
            self.count_tokens(inputs)
            if self.answering.penalty is not None:
                assert own is not None
                penalty = self.answering.penalty(inputs["attention_mask"], own)
                loss = loss + penalty / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def save_portable(self, folder: Path) -> None:
        self.answering.save(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.whole:
            self.save_portable(Path(output_dir or str(self.args.output_dir)))
        else:
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.whole:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        lm = self.answering.lm
        saved = type(lm).from_pretrained(resume_from_checkpoint, dtype=lm.dtype)
        with torch.no_grad():
            for name, parameter in trained_parameters(saved).items():
                lm.get_parameter(name).copy_(parameter)
