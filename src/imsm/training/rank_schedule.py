"""Adapters whose rank changes while they train (AdaLoRA): their schedule, penalty, and what a resume needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STATE = "rank_schedule.safetensors"
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankSchedule(TrainerCallback):
    """Runs peft's rank allocation after every optimizer step.

    Args:
        peft_model: a peft model whose tuner has `update_and_allocate`.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        self.tuner: Any = peft_model.base_model
        self.config = peft_model.active_peft_config

    @staticmethod
    def applies_to(model: Any) -> bool:
        """Whether the model's adapter has a rank schedule."""
        return isinstance(model, PeftModel) and hasattr(model.base_model, "update_and_allocate")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Gradients are still there; peft counts steps from 0.
        self.tuner.update_and_allocate(state.global_step)

    def penalty(self) -> Tensor:
        """Mean Frobenius distance of the singular bases from orthonormal ones, times `orth_reg_weight` (AdaLoRA, eq. 4)."""
        distances = []
        for name, p in self.tuner.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device, dtype=p.dtype)))
        return self.config.orth_reg_weight * torch.stack(distances).mean()

    def save(self, folder: Path) -> None:
        """Writes the allocator's running averages and the ranks chosen so far."""
        allocator = self.tuner.rankallocator
        tensors = {f"{kind}/{name}": t for kind in AVERAGES for name, t in getattr(allocator, kind).items()}
        ranks = {
            name: torch.as_tensor(kept).reshape(-1).tolist() for name, kept in (self.config.rank_pattern or {}).items()
        }
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
            folder / STATE,
            metadata={"format": "pt", "rank_pattern": json.dumps(ranks)},
        )

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        allocator = self.tuner.rankallocator
        device = next(nn.Module.parameters(self.tuner)).device
        allocator.reset_ipt()
        with safe_open(folder / STATE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, name = key.split("/", 1)
                getattr(allocator, kind)[name] = file.get_tensor(key).to(device)
            self.config.rank_pattern = json.loads(file.metadata()["rank_pattern"])
