"""Attention of a decoding step on a CPU: the query heads of a key/value head as one small matrix.

With grouped-query attention PyTorch's kernel reads keys and values once a query head; folded into the query's length,
the heads of a group read them once. transformers does the same where there is a mask and nothing is compiled.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: What configs call it.
FOLDED = "imsm_folded_sdpa"


def folded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; for one new token a row on a CPU, with query heads folded.

    Args:
        query: (B, H, T, d).
        key, value: (B, G, S, d), G a divisor of H.
        attention_mask: (B or 1, 1, T, S) or None.

    Returns:
        (B, T, H, d), and None for the weights.
    """
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    plain = kwargs.get("position_bias") is None and (attention_mask is None or attention_mask.shape[1] == 1)
    if length != 1 or groups == heads or query.device.type != "cpu" or not plain or kwargs.get("s_aux") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[return-value]
    mixed = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, groups, heads // groups, dim), key, value, attention_mask, scale=kwargs.get("scaling")
    )
    return mixed.reshape(batch, 1, heads, mixed.shape[-1]), None


def fold_attention(model: nn.Module, original: nn.Module) -> None:
    """Lets the modules of a view that are not those of the original use `folded_attention`, if it used SDPA.

    Nothing is done to models that do not look their attention up in transformers' registry.
    """
    if not getattr(original, "_supports_attention_backend", False):
        return
    own = {id(module) for module in original.modules()}
    folded: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if id(module) in own or not isinstance(config, PretrainedConfig) or config._attn_implementation != "sdpa":
            continue
        if id(config) not in folded:
            folded[id(config)] = copy.deepcopy(config)
            folded[id(config)]._attn_implementation = FOLDED
        module.__dict__["config"] = folded[id(config)]
    if folded:
        AttentionInterface.register(FOLDED, folded_attention)
        AttentionMaskInterface.register(FOLDED, sdpa_mask)
