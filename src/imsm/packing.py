"""Whether a model keeps the examples of a packed row apart: found by running it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from imsm.errors import InputError, first_line
from imsm.model import SiameseForCausalLM


@torch.no_grad()
def refuse_unpackable(model: SiameseForCausalLM) -> None:
    """Runs both streams on three short examples, packed into two rows and one by one.

    Raises:
        InputError: a memory depends on what else is in its row.
    """
    was_training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says of some methods that they ignore positions; it shows below
            for run in (model.streams.frozen, model.streams.tuned):
                _refuse_leak(model, run)
    finally:
        model.streams.tap.memory = None
        model.train(was_training)


def _refuse_leak(model: SiameseForCausalLM, run: Any) -> None:
    device: Any = model.get_input_embeddings().weight.device
    ids = (torch.arange(12, device=device) * 7 % (model.config.vocab_size - 1) + 1)[None]
    lengths = (4, 5, 3)

    def memory(rows: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": rows, "position_ids": positions.to(device), "use_cache": False}
        try:
            run(inputs, None)
        except Exception as error:
            raise InputError(_message(model, first_line(error))) from error
        found = model.streams.tap.memory
        assert found is not None
        return found.float()

    # Two rows: the first holds two examples, the second one example and then padding.
    rows = torch.cat([ids[:, :9], torch.nn.functional.pad(ids[:, 9:], (0, 6), value=1)])
    packed = memory(rows, torch.tensor([[*range(4), *range(5)], [*range(3), *range(6)]]))
    tolerance = 1e-3 if packed.dtype == model.base.dtype else 3e-2
    found = torch.cat([packed[0], packed[1, :3]])
    alone = torch.cat([memory(part, torch.arange(part.shape[1])[None])[0] for part in ids.split(lengths, dim=1)])
    if not bool((found - alone).abs().max() < tolerance * alone.abs().max()):
        raise InputError(_message(model, "a memory changes with what is packed beside it"))


def _message(model: SiameseForCausalLM, reason: str) -> str:
    return (
        f"packing is on, but {type(model.base).__name__} as loaded, with this adapter, does not keep the examples of a "
        f"row apart ({reason}); set packing: false (group_by_length saves most of the padding too)"
    )
