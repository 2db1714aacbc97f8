"""The trainer of siamese models, and of their adapter alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imsm.checkpoint import write_adapter
from imsm.folders import staged
from imsm.gates import Mix
from imsm.model import SiameseForCausalLM
from imsm.training.divergence import Divergence
from imsm.training.rank_schedule import RankSchedule
from imsm.training.trainer import RunTrainer


class GateMeter:
    """Mean of the gate over the positions it was computed on since the last reading."""

    def __init__(self, gate: nn.Module) -> None:
        self._sum: Tensor | float = 0.0
        self._on = True
        self._count = 0
        self._handle = gate.register_forward_hook(self._on_gate)

    def _on_gate(self, module: nn.Module, args: tuple[Any, ...], mix: Mix) -> None:
        if not self._on:
            return
        self._sum = self._sum + mix.gate.detach().sum()
        self._count += mix.gate.numel()

    def read(self) -> float | None:
        """The mean, or None if the gate was not computed; starts anew."""
        mean = float(self._sum) / self._count if self._count else None
        self._sum, self._count = 0.0, 0
        return mean

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within: the gate is not measured."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def remove(self) -> None:
        """Take the hook off the gate."""
        self._handle.remove()


class SiameseTrainer(RunTrainer):
    """Trains adapter and gate of a siamese model, or its adapter alone.

    Against `RunTrainer`: the gate has a learning rate of its own; logs carry the mean gate.

    Args:
        model: the siamese model.
        gate_learning_rate: the gate's learning rate; the adapter's is `args.learning_rate`.
        adapter_only: train and save what peft alone would, the baseline: the gate is forced to the tuned stream, so
            that the frozen one is never run, and a difference between the two methods is the method's. Its weights are
            frozen until `finish`.
        group_by_length: make batches of examples of similar length; the training data must have `examples`.
        divergence: adds the divergence from the base model to the loss, and its mean to the logs, as `kl`.
    """

    def __init__(
        self,
        model: SiameseForCausalLM,
        *args: Any,
        gate_learning_rate: float = 1e-3,
        adapter_only: bool = False,
        group_by_length: bool = False,
        divergence: Divergence | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, group_by_length=group_by_length, **kwargs)
        self.siamese = model
        self.gate_learning_rate = gate_learning_rate
        self.adapter_only = adapter_only
        self.divergence = divergence
        # A forced gate has no gradients, and distributed processes wait for those of all that learns.
        self._idle = [p for p in model.gate.parameters() if p.requires_grad] if adapter_only else []
        for parameter in self._idle:
            parameter.requires_grad_(False)
        self.gate_meter = GateMeter(model.gate)
        self.rank_schedule: RankSchedule | None = None
        if RankSchedule.applies_to(model.peft_model):
            self.rank_schedule = RankSchedule(model.peft_model)
            self.add_callback(self.rank_schedule)
        self._step = self._passes = 0
        self._shares: Tensor | float = 1.0
        #: By optimizer step, since the last entry in the logs.
        self._divergences: dict[int, Tensor] = {}

    def finish(self) -> None:
        super().finish()
        self.gate_meter.remove()
        for parameter in self._idle:
            parameter.requires_grad_(True)

    # -- optimisation ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for the adapter, one for the gate."""
        if self.optimizer is None:
            opt_model: Any = self.model if model is None else model
            gate = {id(p) for p in opt_model.gate.parameters()}
            learned = [p for p in opt_model.parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [{"params": [p for p in learned if id(p) not in gate]}]
            groups.append({"params": [p for p in learned if id(p) in gate], "lr": self.gate_learning_rate})
            for group in groups:
                group["weight_decay"] = self.args.weight_decay
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **settings)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The model's loss; with AdaLoRA its orthogonality penalty, which peft adds in a forward that makes the loss; and
        the divergence from the base model, if asked for."""
        if self.adapter_only:
            inputs = {**inputs, "force_gate": 0.0}
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        self.count_tokens(inputs)
        if self.divergence is not None and self.divergence.output_logits:
            inputs = {**inputs, "output_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        if self.rank_schedule is not None:
            loss = loss + self.rank_schedule.penalty() / self.current_gradient_accumulation_steps
        if self.divergence is not None:
            with self.gate_meter.paused():
                found = self.divergence(self.siamese, inputs, outputs, self._place())
            # Processes' gradients are averaged.
            found = found * (self.divergence.share(inputs) * self.args.world_size / self._shares)
            step = self.state.global_step
            self._divergences[step] = self._divergences.get(step, 0) + found.detach()
            loss = loss + self.divergence.weight * found
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As `Trainer`: the batches of an optimizer step; what all of them count in the mean divergence is summed up."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.divergence is not None:
            own = torch.as_tensor(sum(self.divergence.share(batch) for batch in batches), device=device)
            self._shares = self.accelerator.gather(own.float()).sum().clamp(min=1)
        return batches, items

    def _place(self) -> int:
        """The number of this forward pass in the whole run, over all processes; the same again after a resume."""
        if self._step != self.state.global_step:
            self._step, self._passes = self.state.global_step, 0
        place = self._step * self.args.gradient_accumulation_steps + self._passes
        self._passes += 1
        return place * self.args.world_size + self.args.process_index

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean gate, and the mean divergence from the base model, since the last entry.

        Raises:
            FloatingPointError: the loss is not a finite number any more.
        """
        if (mean := self.gate_meter.read()) is not None:
            logs["eval_gate" if "eval_loss" in logs else "gate"] = mean
        if "loss" in logs and self._divergences:
            own = torch.stack(list(self._divergences.values())).mean()
            logs["kl"] = float(self.accelerator.gather(own).mean())
            self._divergences = {}
        super().log(logs, start_time)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_portable(self, folder: Path) -> None:
        """The checkpoint folder of the siamese model, or peft's own of the adapter alone."""
        if self.adapter_only:
            with staged(folder) as stage:
                write_adapter(self.siamese, self.siamese.active, stage, with_card=True)
        else:
            self.siamese.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.rank_schedule is not None:
            self.rank_schedule.save(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.rank_schedule is not None:
            self.rank_schedule.load(Path(resume_from_checkpoint))
