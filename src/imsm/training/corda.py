"""CorDA as a baseline: a LoRA adapter that starts in the directions which the base model's own texts need least (Yang et
al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", NeurIPS; knowledge-preserving mode).

It moves a part of each base weight into the adapter, so it is trained outside the siamese model; what is saved is the
difference from the start, as an ordinary LoRA adapter of twice the rank for the untouched base.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from imsm.building import ADAPTER
from imsm.errors import InputError, first_line
from imsm.folders import staged
from imsm.samples import Sample


class CordaAdapter:
    """A CorDA adapter in a base model, whose weights it changes.

    Args:
        base: the base model.
        config: LoRA with `init_lora_weights="corda"`.
        samples: the texts whose directions are kept, read one by one.

    Raises:
        InputError: peft refuses model or settings, or a package that it needs for them is missing.
    """

    def __init__(self, base: PreTrainedModel, config: LoraConfig, samples: Sequence[Sample]) -> None:
        try:
            # It imports a package that peft itself does not require.
            from peft.tuners.lora.corda import preprocess_corda
        except ImportError as error:
            raise InputError("peft needs the package attrs for CorDA: pip install attrs") from error
        if config.target_modules == "all-linear":
            # peft would resolve it only after the texts were read.
            config.target_modules = linear_layers(base)

        def read() -> None:
            for sample in samples:
                base(torch.tensor([sample.prompt_ids + sample.answer_ids], device=base.device), use_cache=False)

        try:
            preprocess_corda(base, config, read)
            model = get_peft_model(base, config)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise InputError(f"peft cannot start CorDA in {type(base).__name__}: {first_line(error)}") from error
        assert isinstance(model, PeftModel)
        self.model = model
        own: Any = model.active_peft_config
        # Or peft would take the same part away again wherever it loads the adapter.
        own.init_lora_weights, own.corda_config = True, None
        self._start = {
            name: tensor.detach().cpu().clone()
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }

    def save(self, folder: Path) -> None:
        """Writes the adapter for the untouched base model, in peft's format."""
        with tempfile.TemporaryDirectory() as temporary, torch.random.fork_rng([]), staged(folder) as stage:
            start = Path(temporary) / "start"
            start.mkdir()
            save_file(self._start, start / ADAPTER, metadata={"format": "pt"})
            # peft loads the start beside the trained adapter for a moment, which draws random numbers.
            self.model.save_pretrained(
                str(stage), path_initial_model_for_weight_conversion=str(start), save_embedding_layers=False
            )


def knowledge_preserving(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy of `adapter` settings; those of CorDA with its knowledge-preserving mode, which peft does not assume.

    Raises:
        InputError: they ask for another mode.
    """
    settings = dict(settings)
    own = settings.get("corda_config") or {}
    if str(settings.get("init_lora_weights")).lower() == "corda" and isinstance(own, dict):
        settings["init_lora_weights"] = "corda"
        settings["corda_config"] = {"corda_method": "kpm", **own}
        if (method := settings["corda_config"]["corda_method"]) != "kpm":
            raise InputError(
                "adapter.corda_config.corda_method must be kpm, which keeps what the base model's own texts need (the other "
                f"mode reads texts of the task instead), got {method!r}"
            )
    return settings


def linear_layers(base: Any) -> list[str]:
    """Names of the linear layers but the output head, as peft matches them."""
    head = base.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    return sorted(found)
