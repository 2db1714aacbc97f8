"""Views: further module trees over the parameters and buffers of a model, with some of its modules replaced.

A stream of a siamese model is a view of the base model: the frozen one has base layers where peft put its own, the
shared one has layers that serve both streams. So switching streams is calling another view, and no flag is set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: From a module and a function that makes its view, to what stands in its place; None keeps the module.
Replace = Callable[[nn.Module, Callable[[nn.Module], nn.Module]], "nn.Module | None"]

#: Least and greatest number of rows, by dtype, for which the product with the transposed rows is the faster one on a CPU.
FEW_ROWS = {torch.float32: (1, 64), torch.bfloat16: (9, 64)}


class PatchedForwardError(Exception):
    """A module's `forward` was replaced on the instance, so that a view of it would run the original."""


def view(model: nn.Module, replace: Replace) -> nn.Module:
    """A module tree over the parameters, buffers and hooks of `model`, in eval mode, with modules replaced.

    What is done to parameters and buffers through either tree (`.to()`, an optimizer step) is seen in the other.

    Raises:
        PatchedForwardError: see there.
    """
    made: dict[int, nn.Module] = {}

    def of(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            replacement = replace(module, of)
            made[id(module)] = shell(module) if replacement is None else replacement
        return made[id(module)]

    def shell(module: nn.Module) -> nn.Module:
        if "forward" in vars(module):
            raise PatchedForwardError(
                f"{type(module).__name__}.forward was replaced on the instance, as accelerate does for several devices"
            )
        if module._buffers and not module._modules and not module._parameters:
            return module  # rotary tables and the like change as they run: both trees must see the same state
        copied = copy.copy(module)
        copied.training = False
        copied._modules = {name: None if child is None else of(child) for name, child in module._modules.items()}
        return copied

    return of(model)


class FewRowsLinear(nn.Linear):
    """A view of an `nn.Linear` whose product with a few rows reads the weights at the memory's full speed.

    MKL's float32 product of one to some dozens of rows with a weight matrix is up to three times slower on a CPU than
    that of the matrix with the transposed rows; with a single row it is faster to compute two. In bfloat16 the gain is
    small, and there is none with few rows.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> FewRowsLinear:
        """The view of `linear`."""
        made = copy.copy(linear)
        made.__class__ = cls
        made.training = False
        assert isinstance(made, cls)
        return made

    @staticmethod
    def serves(x: Tensor) -> bool:
        """Whether `x` (..., in) has as many rows as it pays for, on a device and in a dtype where it does.

        Autocast would give the product another dtype than what is added to it in place.
        """
        if x.device.type != "cpu" or x.dtype not in FEW_ROWS or torch.is_autocast_enabled("cpu"):
            return False
        least, most = FEW_ROWS[x.dtype]
        rows = x.numel() // x.shape[-1]
        return bool(least <= rows <= most)  # not `in range`, which a graph for any number of rows has no answer to

    def transposed(self, x: Tensor) -> Tensor:
        """The product (out, rows) with `x` (rows, in), a fresh tensor."""
        if x.shape[0] == 1:
            x = torch.cat([x, x])
        y = torch.mm(self.weight, x.t())
        return y if self.bias is None else y.add_(self.bias[:, None])

    def forward(self, input: Tensor) -> Tensor:
        if not self.serves(input) or self.weight.dtype != input.dtype:
            return nn.functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, input.shape[-1])
        return self.transposed(rows)[:, : rows.shape[0]].t().reshape(*input.shape[:-1], -1)
