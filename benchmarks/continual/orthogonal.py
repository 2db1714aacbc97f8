"""Orthogonal updates, after O-LoRA (Wang et al. 2023, arXiv 2310.14152): each task learns ranks of its own, beside frozen ones.

The adapter after k tasks is one LoRA of rank k · r: the first (k − 1) · r rows of every A, and columns of every B, are those
of the tasks before and stay as they are; the new ones learn under the penalty λ · Σ |A_old A_newᵀ|. So it is an adapter that
peft alone can load, and the sum of all tasks' updates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imsm.building import ADAPTER

#: λ, as in the authors' code.
PENALTY = 0.5


def widened(adapter: dict[str, Any], tasks: int) -> dict[str, Any]:
    """The settings of the LoRA after so many tasks; its strength is that of each alone."""
    return {**adapter, "r": adapter["r"] * tasks, "lora_alpha": adapter["lora_alpha"] * tasks}


@torch.no_grad()
def keep_before(model: nn.Module, before: Path, penalty: float = PENALTY) -> None:
    """Puts the ranks of the tasks before into a wider, fresh LoRA, and lets only the others learn.

    Args:
        model: with the adapter, whose parameters have `lora_A` or `lora_B` in their names.
        before: folder of the adapter after the tasks before.
        penalty: λ.
    """
    saved = load_file(before / ADAPTER)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        old = saved[name.replace(".default.", ".")].to(parameter)
        if ".lora_A." in name:
            parameter[: len(old)] = old
            parameter.register_hook(_rows(parameter, old, penalty))
        else:
            parameter[:, : old.shape[1]] = old
            parameter[:, old.shape[1] :] = 0
            parameter.register_hook(_columns(old.shape[1]))


def _rows(parameter: Tensor, old: Tensor, penalty: float) -> Any:
    """From the gradient of A to that of its new rows, with the penalty's in it."""

    def hook(gradient: Tensor) -> Tensor:
        new = parameter.detach()[len(old) :]
        made = torch.zeros_like(gradient)
        made[len(old) :] = gradient[len(old) :] + penalty * torch.sign(new @ old.t()) @ old
        return made

    return hook


def _columns(old: int) -> Any:
    """From the gradient of B to that of its new columns."""

    def hook(gradient: Tensor) -> Tensor:
        made = gradient.clone()
        made[:, :old] = 0
        return made

    return hook
