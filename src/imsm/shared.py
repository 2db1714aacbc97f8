"""Both streams in one pass: a batch of 2B rows, the B frozen ones first, through weights that are read once.

Every base layer sees the doubled batch; what an adapter adds is added to the tuned rows alone. Layers below the first
adapted one are run on B rows, since both streams are the same there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from imsm.attention import fold_attention
from imsm.views import FewRowsLinear, view


def double(value: Any, batch: int) -> Any:
    """A tensor (B, ...) as (2B, ...), once for each stream, also inside a mapping; all else as it is."""
    if isinstance(value, dict):
        return {name: double(part, batch) for name, part in value.items()}
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
        return torch.cat([value, value])
    return value


class Around(nn.Module):
    """Stands in a layer's place and answers for it: tuners read weights off their base layer, models settings."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class SharedBase(Around):
    """Stands where a tuner's own base layer was: runs it once on both streams' rows, gives back the tuned ones."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        #: The frozen rows of the call under way, before and after the base layer.
        self.frozen: Tensor | None = None
        self.done = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.frozen is not None
        half = self.frozen.shape[0]
        both = self.layer(torch.cat([self.frozen.to(x.dtype), x]), *args, **kwargs)
        self.frozen, self.done = both[:half], True
        return both[half:]


class TwinLayer(nn.Module):
    """Any of peft's layers on the doubled batch: what it does to its tuned rows is its own affair.

    Args:
        tuned: a view of peft's layer, with a `SharedBase` in it if it has a base layer.
        base: the frozen layer.
        shared: that `SharedBase`.
    """

    def __init__(self, tuned: nn.Module, base: nn.Module, shared: SharedBase | None) -> None:
        super().__init__()
        self.tuned = tuned
        self.base = base
        self.shared = shared

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        half = x.shape[0] // 2
        if self.shared is None:
            return torch.cat([self.base(x[:half], *args, **kwargs), self.tuned(x[half:], *args, **kwargs)])
        self.shared.frozen, self.shared.done = x[:half], False
        tuned = self.tuned(x[half:], *args, **kwargs)
        # Some methods replace the base layer and never call it.
        frozen = self.shared.frozen if self.shared.done else self.base(x[:half], *args, **kwargs)
        self.shared.frozen = None
        return torch.cat([frozen, tuned])


class TwinLowRank(nn.Module):
    """Plain LoRA on the doubled batch: W x for all rows, + s · B A x for the tuned ones, in place.

    The same as `TwinLayer` would compute, in fewer and smaller steps.
    """

    def __init__(self, tuner: Any, name: str, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = tuner.lora_A[name], tuner.lora_B[name]
        self._scaling, self._name = tuner.scaling, name

    @staticmethod
    def adapter_of(tuner: nn.Module) -> str | None:
        """The name of the one plain adapter that acts in a layer, or None if there is another kind of thing in it."""
        if type(tuner) is not lora.Linear or tuner.disable_adapters or len(tuner.active_adapters) != 1:
            return None
        name = tuner.active_adapters[0]
        plain = name in tuner.lora_A and name not in tuner.lora_variant and tuner.lora_B[name].bias is None
        return name if plain else None

    def forward(self, x: Tensor) -> Tensor:
        down, up, scaling = self.down.weight, self.up.weight, self._scaling[self._name]
        half = x.shape[0] // 2
        if isinstance(self.base, FewRowsLinear) and self.base.serves(x) and down.dtype == x.dtype:
            rows = x.reshape(-1, x.shape[-1])
            both = self.base.transposed(rows)
            tuned = rows.shape[0] // 2
            both[:, tuned:].addmm_(up, torch.mm(down, rows[tuned:].t()), alpha=scaling)
            return both.t().reshape(*x.shape[:-1], -1)
        y = self.base(x)
        linear = nn.functional.linear
        y[half:].add_(linear(linear(x[half:].to(down.dtype), down), up), alpha=scaling)
        return y


class OnceLayer(Around):
    """A layer below the first adapted one: run on the frozen rows, since the tuned ones are the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = x.shape[0]

        def half(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(half(part) for part in value)
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows:
                return value[: rows // 2]
            return value

        output = self.layer(half(x), *map(half, args), **{name: half(value) for name, value in kwargs.items()})
        if isinstance(output, tuple):
            return tuple(double(part, rows // 2) for part in output)
        return double(output, rows // 2)


def frozen_view(base: nn.Module) -> nn.Module:
    """The base model without the adapter in it."""

    def replace(module: nn.Module, of: Callable[[nn.Module], nn.Module]) -> nn.Module | None:
        inner = without_adapter(module)
        return None if inner is None else of(inner)

    return view(base, replace)


def shared_view(base: nn.Module, once: int) -> nn.Module:
    """The model that runs both streams on the doubled batch, its lowest `once` layers on the frozen rows only."""

    def replace(module: nn.Module, of: Callable[[nn.Module], nn.Module]) -> nn.Module | None:
        if type(module) is nn.Linear:
            return FewRowsLinear.of(module)
        inner = without_adapter(module)
        if inner is None:
            return None
        if (name := TwinLowRank.adapter_of(module)) is not None:
            return TwinLowRank(module, name, of(inner))
        shared = SharedBase(of(inner)) if hasattr(module, "base_layer") else None
        tuned = copy.copy(module)
        tuned.training = False
        if shared is not None:
            tuned._modules = {**module._modules, "base_layer": shared}
        return TwinLayer(tuned, of(inner), shared)

    made = view(base, replace)
    layers = decoder_layers(made)
    for i in range(once):
        layers[i] = OnceLayer(layers[i])
    fold_attention(made, base)
    return made


def without_adapter(module: nn.Module) -> nn.Module | None:
    """The module that peft put its own in place of; None for modules that are not peft's."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module  # type: ignore[return-value]
    return None


def is_adapted(module: nn.Module) -> bool:
    """Whether anything of peft's is in a module."""
    return any(isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for part in module.modules())


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of layers that a model has."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())


def layers_below(base: nn.Module) -> int:
    """How many of the lowest layers come before the first that carries a part of the adapter."""
    return next((i for i, layer in enumerate(decoder_layers(base)) if is_adapted(layer)), 0)
