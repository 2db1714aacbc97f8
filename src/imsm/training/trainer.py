"""A `Trainer` that knows the two parts of a siamese model and resumes exactly where it was killed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from imsm.errors import InputError
from imsm.folders import staged
from imsm.gates import Mix
from imsm.model import SiameseForCausalLM
from imsm.training.batching import LengthSampler
from imsm.training.rank_schedule import RankSchedule

#: Every trained tensor as it is in memory, beside the portable checkpoint (which peft may prune).
TRAINED = "trained.safetensors"


class GateMeter:
    """Mean of the gate over the positions it was computed on since the last reading."""

    def __init__(self, gate: nn.Module) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._handle = gate.register_forward_hook(self._on_gate)

    def _on_gate(self, module: nn.Module, args: tuple[Any, ...], mix: Mix) -> None:
        self._sum = self._sum + mix.gate.detach().sum()
        self._count += mix.gate.numel()

    def read(self) -> float | None:
        """The mean, or None if the gate was not computed; starts anew."""
        mean = float(self._sum) / self._count if self._count else None
        self._sum, self._count = 0.0, 0
        return mean

    def remove(self) -> None:
        """Take the hook off the gate."""
        self._handle.remove()


class SiameseTrainer(Trainer):
    """Trains adapter and gate of a siamese model, or its adapter alone.

    Against `Trainer`: the gate has a learning rate of its own; checkpoints hold adapter and gate, never the base, appear
    in one rename and resume bit for bit; logs carry the mean gate and tokens per second.

    Args:
        model: the siamese model.
        gate_learning_rate: the gate's learning rate; the adapter's is `args.learning_rate`.
        adapter_only: train and save what peft alone would, the baseline: the gate is forced to the tuned stream, so
            that the frozen one is never run, and a difference between the two methods is the method's.
        group_by_length: make batches of examples of similar length; the training data must have `examples`.
    """

    def __init__(
        self,
        model: SiameseForCausalLM,
        *args: Any,
        gate_learning_rate: float = 1e-3,
        adapter_only: bool = False,
        group_by_length: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        self.siamese = model
        self.group_by_length = group_by_length
        self.gate_learning_rate = gate_learning_rate
        self.adapter_only = adapter_only
        self.gate_meter = GateMeter(model.gate)
        self.rank_schedule: RankSchedule | None = None
        if RankSchedule.applies_to(model.peft_model):
            self.rank_schedule = RankSchedule(model.peft_model)
            self.add_callback(self.rank_schedule)
        self._stage: Path | None = None
        self._tokens: Tensor | int = 0

    @property
    def tokens_seen(self) -> int:
        """Tokens read in training so far by this process; without padding, unless rows are packed."""
        return int(self._tokens)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            return super()._get_train_sampler(dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = [len(example.input_ids) for example in dataset.examples]
        # Not by `set_epoch`: what accelerate tells a sampler of the epoch is lost where a resumed run skips batches.
        return LengthSampler(lengths, step, self.args.seed, lambda: int(self.state.epoch or 0))

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

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss; with AdaLoRA its orthogonality penalty, which peft adds in a forward that makes the loss."""
        if self.adapter_only:
            inputs = {**inputs, "force_gate": 0.0}
        if model.training:
            mask = inputs.get("attention_mask")
            # Not read before it is asked for: on a GPU that would wait for all that is queued.
            self._tokens = self._tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.rank_schedule is None or not model.training:
            return result
        penalty = self.rank_schedule.penalty() / self.current_gradient_accumulation_steps
        return (result[0] + penalty, result[1]) if isinstance(result, tuple) else result + penalty

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean gate since the last entry.

        Raises:
            FloatingPointError: the loss is not a finite number any more.
        """
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: lower learning_rate, or load the model with "
                "dtype: float32; the checkpoints before are whole"
            )
        if (mean := self.gate_meter.read()) is not None:
            logs["eval_gate" if "eval_loss" in logs else "gate"] = mean
        super().log(logs, start_time)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def last_checkpoint(self) -> str | None:
        """The newest complete checkpoint of this run, if there is one."""
        folder = Path(str(self.args.output_dir))
        return get_last_checkpoint(str(folder)) if folder.is_dir() else None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes into a folder of its own and renames, so that a killed process leaves no half checkpoint."""
        run = Path(str(self.args.output_dir))
        stage = run / ".saving"
        if self.args.should_save:
            shutil.rmtree(stage, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._stage = stage
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._stage = None
        self.accelerator.wait_for_everyone()  # each process has put its random state there
        if self.args.should_save:
            for made in stage.iterdir():
                shutil.rmtree(run / made.name, ignore_errors=True)
                made.rename(run / made.name)
            shutil.rmtree(stage, ignore_errors=True)
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.save_portable(folder)
        save_file(self._trained(), folder / TRAINED, metadata={"format": "pt"})
        if self.rank_schedule is not None:
            self.rank_schedule.save(folder)

    def save_portable(self, folder: Path) -> None:
        """The checkpoint folder of the siamese model, or peft's own of the adapter alone."""
        if self.adapter_only:
            with staged(folder) as stage:
                self.siamese.peft_model.save_pretrained(str(stage), save_embedding_layers=False)
        else:
            self.siamese.save_pretrained(folder)

    def _trained(self) -> dict[str, Tensor]:
        return {
            name: parameter.detach().contiguous().cpu() for name, parameter in trained_parameters(self.model).items()
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED
        if not path.is_file():
            raise InputError(f"{resume_from_checkpoint} cannot be resumed: {TRAINED} is missing")
        saved = load_file(path)
        own = trained_parameters(model or self.model)
        if {k: tuple(v.shape) for k, v in saved.items()} != {k: tuple(v.shape) for k, v in own.items()}:
            raise InputError(
                f"{resume_from_checkpoint} was trained with another adapter or gate than the settings say; resume with the "
                "settings saved beside it"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
        if self.rank_schedule is not None:
            self.rank_schedule.load(Path(resume_from_checkpoint))


def trained_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Everything that learns, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
