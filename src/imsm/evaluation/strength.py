"""The strength of an adapter: what it adds to the base weights, times a factor (WiSE-FT; Wortsman et al., 2022).

W = W0 + factor · ΔW
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor

from imsm.errors import InputError


def set_strength(peft_model: PeftModel, factor: float, base_logits: Tensor) -> None:
    """Multiplies the active adapter's scaling by `factor`, in place: 0 gives the base model, 1 the adapter as it is.

    Args:
        peft_model: the model with the adapter on, in eval mode.
        factor: 0 or more.
        base_logits: `sample_logits` of the base model.

    Raises:
        InputError: a part of the adapter has no scaling, or the adapter at 0 is not the base model.
    """
    config, name = peft_model.active_peft_config, peft_model.active_adapter
    kind = getattr(config.peft_type, "value", config.peft_type)
    layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
    whole = any(isinstance(module, AuxiliaryTrainingWrapper) for module in peft_model.modules())
    scalings = [scaling for layer in layers if name in (scaling := getattr(layer, "scaling", None) or {})]
    if whole or not layers or len(scalings) < len(layers):
        raise InputError(
            f"@scale needs an adapter all of whose parts are scaled, such as LoRA; {kind} as configured has parts that "
            "are not"
        )
    before = [scaling[name] for scaling in scalings]
    try:
        # Changed in place, since views of the layers share these.
        for scaling in scalings:
            scaling[name] = 0.0
        if not torch.equal(sample_logits(peft_model.get_base_model()), base_logits):
            raise InputError(
                f"@scale needs an adapter that is the base model at strength 0; {kind} as configured is not "
                "(DoRA also trains the weights' magnitudes)"
            )
    finally:
        for scaling, value in zip(scalings, before, strict=True):
            scaling[name] = value
    for scaling in scalings:
        scaling[name] = scaling[name] * factor


@contextmanager
def switched_off(peft_model: PeftModel) -> Iterator[Any]:
    """Within: the model that the adapter is in, with the adapter off. Not all adapters leave the base model then."""
    with warnings.catch_warnings():
        # peft says that trained biases stay on; `sample_logits` shows it.
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        with peft_model.disable_adapter():
            yield peft_model.get_base_model()


@torch.inference_mode()
def sample_logits(model: Any, **kwargs: Any) -> Tensor:
    """Logits (2, 6, V) of a model, called with `kwargs` besides, on a few of its tokens."""
    embedding = model.get_input_embeddings().weight
    ids = (torch.arange(2 * 6, device=embedding.device) * 7 % embedding.shape[0]).view(2, 6)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kwargs).logits  # type: ignore[no-any-return]
