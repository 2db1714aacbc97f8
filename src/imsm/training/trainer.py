"""A `Trainer` whose checkpoints hold what learns, appear in one rename, and resume exactly where a run was killed."""

from __future__ import annotations

import math
import shutil
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from imsm.errors import InputError
from imsm.training.batching import LengthSampler
from imsm.training.plan import Plan

#: Every trained tensor as it is in memory, beside the portable checkpoint (which peft may prune).
TRAINED = "trained.safetensors"


class RunTrainer(Trainer, ABC):
    """What the trainers of all methods share.

    Against `Trainer`: checkpoints hold what learns, appear in one rename and resume bit for bit; a loss that is no number
    stops the run; tokens are counted.

    Args:
        model: what is trained.
        group_by_length: make batches of examples of similar length; the training data must have `examples`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *rest: Any,
        group_by_length: bool = False,
        **kwargs: Any,
    ) -> None:
        if args is not None and args.n_gpu > 1:
            # Else `Trainer` runs copies of the model in threads, which share what a call keeps on the model.
            print(
                f"one of {args.n_gpu} GPUs is used; to use all, start with torchrun --nproc-per-node {args.n_gpu} "
                "-m imsm_cli train …",
                file=sys.stderr,
            )
            args._n_gpu = 1
        super().__init__(model, args, *rest, **kwargs)
        self.group_by_length = group_by_length
        #: What checkpoints say that the run is to do.
        self.plan: Plan | None = None
        self._stage: Path | None = None
        self._tokens: Tensor | int = 0

    @abstractmethod
    def save_portable(self, folder: Path) -> None:
        """Writes the checkpoint that users load."""

    def finish(self) -> None:
        """Takes off the model what was put on it for training."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # In place of the autocast it leaves a forward without the decorators of the model's own.
        vars(self.model).pop("forward", None)

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

    def count_tokens(self, inputs: dict[str, Any]) -> None:
        """Adds the tokens of a batch to those seen."""
        mask = inputs.get("attention_mask")
        # Not read before it is asked for: on a GPU that would wait for all that is queued.
        self._tokens = self._tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`.

        Raises:
            FloatingPointError: the loss is not a finite number any more.
        """
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: lower learning_rate, or load the model with "
                "dtype: float32; the checkpoints before are whole"
            )
        super().log(logs, start_time)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def restore(self, folder: Path) -> None:
        """Takes what a checkpoint learnt, and how far it got, with nothing left to train.

        `train` would not do: from a last step within an epoch it takes one more.

        Raises:
            InputError: the checkpoint is of another model.
        """
        self._load_from_checkpoint(str(folder))
        self._load_rng_state(str(folder))
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))

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
                if self.plan is not None:
                    self.plan.write(made)
                shutil.rmtree(run / made.name, ignore_errors=True)
                made.rename(run / made.name)
            shutil.rmtree(stage, ignore_errors=True)
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.save_portable(folder)
        save_file(self._trained(), folder / TRAINED, metadata={"format": "pt"})

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


def trained_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Everything that learns, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
