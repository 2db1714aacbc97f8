"""The loss: cross-entropy on the answers' tokens, by a fused kernel where there is one for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor, nn

CrossEntropy = Callable[..., Tensor]


@cache
def fused_cross_entropy(device_type: str) -> CrossEntropy | None:
    """Liger's kernel, which needs no memory for the gradient of the logits; on GPUs where `liger-kernel` is installed."""
    if device_type not in ("cuda", "xpu"):
        return None
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return None
    return liger_cross_entropy  # type: ignore[no-any-return]


def answer_loss(logits: Tensor, targets: Tensor, num_items: int | Tensor | None) -> Tensor:
    """Cross-entropy of (N, V) logits on (N,) tokens in float32: their mean, or their sum over `num_items`.

    A fused kernel may put the gradient in the place of float32 logits.
    """
    fused = fused_cross_entropy(logits.device.type) if targets.numel() > 0 else None
    # Liger's kernel would sum up the loss in the dtype of the logits.
    total = (fused or nn.functional.cross_entropy)(logits.float(), targets, reduction="sum")
    if num_items is None:
        num_items = max(targets.numel(), 1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
