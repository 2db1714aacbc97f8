"""The fingerprint of frozen memories: a hash of everything they depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy
import torch
import transformers
import xxhash
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from imsm.errors import InputError

#: Bytes of a tensor that are copied from its device at a time.
CHUNK = 1 << 26


class Tokens(Protocol):
    """What is read of an example."""

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def labels(self) -> list[int]: ...


def base_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a base model by the names they had before an adapter was put into it."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    own: dict[str, Any] = dict(module._buffers)
    # Beside the parameters it gives what quantised layers keep elsewhere.
    module._save_to_state_dict(own, "", False)
    for name, value in own.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
    for name, child in module.named_children():
        yield from base_tensors(child, f"{prefix}{name}.")


def fingerprint(base: Any, examples: Iterable[Tokens], settings: dict[str, Any]) -> str:
    """Hash of base weights, base configuration, transformers version, tokens and labels, and `settings`.

    Tokens and labels are what tokenizer, rendering and data come to, so a change of any of those that matters is in them.

    Args:
        base: the base model; an adapter in it does not count.
        examples: in their order.
        settings: whatever else the memories depend on, as JSON values.

    Returns:
        32 hexadecimal digits.

    Raises:
        InputError: weights are not in memory.
    """
    digest = xxhash.xxh3_128()
    config = {key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"}
    config["attention"] = base.config._attn_implementation
    facts = [type(base).__name__, config, transformers.__version__, settings]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in base_tensors(base):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.device.type == "meta":
            raise InputError(
                f"the base weight {name} is offloaded, so a memory bank cannot be told from a stale one; load the model "
                "without offloading, or set memory_bank: off"
            )
        add_values(digest, tensor)
    for example in examples:
        digest.update(_numbers(example.input_ids))
        digest.update(_numbers(example.labels))
    return digest.hexdigest()


def add_values(digest: xxhash.xxh3_128, tensor: Tensor) -> None:
    """Adds a tensor's values to a hash, without a second copy of it in memory."""
    flat = tensor.detach().contiguous().reshape(-1)
    step = CHUNK // flat.element_size()
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].cpu().view(torch.uint8).numpy().data)


def _numbers(values: Sequence[int]) -> bytes:
    """The values, and before them how many there are."""
    return numpy.array([len(values), *values], dtype=numpy.int64).tobytes()
