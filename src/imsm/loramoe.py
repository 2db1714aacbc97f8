"""LoRAMoE, the paper's main peer on forgetting: routed LoRA experts in the feed-forward layers (Dou et al. 2024, "LoRAMoE:
Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin", arXiv 2312.09979).

    h = W0 x + α/r · Σᵢ ωᵢ · Bᵢ Aᵢ x        ω = softmax(W_g x), over the N experts, of each token

The experts of a layer are of two types, one for the task and one for world knowledge. The localized balancing constraint
spreads tokens evenly within a type and lets the types differ: with Q[n, m] the sum of expert n's weights over the tokens of
record m, and I[n, m] = 1 + δ where the types of expert and record are the same, else 1 − δ,

    Z = I ∘ Q        L_lbc = var(Z) / mean(Z)        L = cross-entropy + β · L_lbc

with var the population variance over all entries, and L_lbc the mean over layers. (The authors' code divides by the
squared mean; this follows the paper.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from imsm.building import base_shape, load_base, refuse_settings
from imsm.checkpoint import LORAMOE
from imsm.errors import InputError, first_line
from imsm.folders import fetch, staged
from imsm.settings import nearest

CONFIG, WEIGHTS = LORAMOE, "loramoe.safetensors"
FORMAT_VERSION = 1


@dataclass
class LoRAMoEConfig:
    """Settings of the experts, as `adapter:` has them.

    Attributes:
        target_modules: Names of the feed-forward layers' linear layers, as peft matches them.
        r: Rank of each expert.
        lora_alpha: α; the experts' sum is scaled by α/r.
        lora_dropout: Dropout before each expert.
        experts: N; the first half (the larger one, if N is odd) is for the task, the rest for world knowledge.
        balance: β, weight of the balancing constraint.
        delta: δ, how far the types may differ.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    target_modules: list[str] | str
    r: int = 4
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    experts: int = 6
    balance: float = 0.1
    delta: float = 0.1

    def __post_init__(self) -> None:
        def require(fits: bool, name: str, expected: str) -> None:
            if not fits:
                raise InputError(f"adapter.{name} must be {expected}, got {getattr(self, name)!r}")

        numbers = {name: getattr(self, name) for name in ("lora_alpha", "lora_dropout", "balance", "delta")}
        for name in ("r", "experts"):
            require(type(getattr(self, name)) is int, name, "an integer")
        for name, value in numbers.items():
            require(type(value) in (int, float), name, "a number")
        modules = self.target_modules
        named = isinstance(modules, str) or (isinstance(modules, list) and all(isinstance(m, str) for m in modules))
        require(bool(modules) and named, "target_modules", "a list of the feed-forward layers' names")
        require(self.r > 0, "r", "a positive integer")
        require(self.lora_alpha > 0, "lora_alpha", "a positive number")
        require(0 <= self.lora_dropout < 1, "lora_dropout", "a number from 0 to below 1")
        require(self.experts > 1, "experts", "an integer above 1")
        require(self.balance >= 0, "balance", "a number that is not negative")
        require(0 <= self.delta <= 1, "delta", "a number from 0 to 1")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> LoRAMoEConfig:
        """From `adapter:` settings, whose `peft_type` does not count.

        Raises:
            InputError: a key is unknown, or target_modules is missing.
        """
        values = {key: value for key, value in settings.items() if key != "peft_type"}
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise InputError(f"unknown setting 'adapter.{key}' for LORAMOE{nearest(key, names)}")
        if "target_modules" not in values:
            raise InputError(
                "the setting adapter.target_modules is missing: name the feed-forward layers' linear layers, such as "
                "[gate_proj, up_proj, down_proj]"
            )
        return cls(**values)


class RoutedExperts(nn.Module):
    """A linear layer with N experts and their router, (…, in) to (…, out).

    Args:
        experts: the layer with N LoRA adapters in it, as peft made it.
    """

    def __init__(self, experts: LoraLinear) -> None:
        super().__init__()
        self.experts = experts
        self.names = list(experts.lora_A)
        weight: Any = experts.lora_A[self.names[0]].weight
        self.router = nn.Linear(weight.shape[1], len(self.names), bias=False, device=weight.device, dtype=weight.dtype)
        #: ω of the last recorded forward, (…, N) float32, for the balancing constraint.
        self.shares: Tensor | None = None
        self.recording = False

    def forward(self, x: Tensor) -> Tensor:
        result = self.experts.base_layer(x)
        inner = x.to(self.router.weight.dtype)
        shares = self.router(inner).softmax(dim=-1, dtype=torch.float32)
        if self.recording:
            self.shares = shares
        added = torch.zeros((), dtype=inner.dtype, device=inner.device)
        for number, name in enumerate(self.names):
            low = self.experts.lora_A[name](self.experts.lora_dropout[name](inner))
            # ω is put on the r numbers of an expert, not on its wide output.
            low = low * shares[..., number, None].to(low.dtype)
            added = added + self.experts.lora_B[name](low) * self.experts.scaling[name]
        return result + added.to(result.dtype)


def attach(base: PreTrainedModel, config: LoRAMoEConfig) -> PreTrainedModel:
    """Puts experts and routers into `base` (in place), whose own weights are frozen; returns it.

    Raises:
        InputError: the layers named are none of the model's, or no linear layers.
    """
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    refuse_settings(lora, loaded=False)
    names = [f"expert{number}" for number in range(config.experts)]
    try:
        peft_model = get_peft_model(base, lora, adapter_name=names[0])
        for name in names[1:]:
            peft_model.add_adapter(name, lora)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"peft cannot put experts into {type(base).__name__}: {first_line(error)}") from error
    model: Any = peft_model.get_base_model()
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    head = model.get_output_embeddings()
    for path, module in found:
        if not isinstance(module, LoraLinear) or module is head:
            raise InputError(
                f"LoRAMoE's experts go into the feed-forward layers' linear layers, and {path} is "
                f"{'the output head' if module is head else 'none'}; leave it out of adapter.target_modules"
            )
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, RoutedExperts(module))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in expert_parameters(model).values():
        parameter.requires_grad_(True)
    # What get_peft_model leaves on the model says that there is a peft adapter to load and save.
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model  # type: ignore[no-any-return]


def layers(model: nn.Module) -> list[tuple[str, RoutedExperts]]:
    """The layers with experts, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, RoutedExperts)]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of experts and routers, by name."""
    found: dict[str, Any] = {}
    for name, layer in layers(model):
        found[f"{name}.router.weight"] = layer.router.weight
        for expert in layer.names:
            for part in ("lora_A", "lora_B"):
                found[f"{name}.{expert}.{part}.weight"] = getattr(layer.experts, part)[expert].weight
    return found


def balance_loss(importance: Tensor, world: Tensor, delta: float) -> Tensor:
    """L_lbc of one layer, () float32.

    Args:
        importance: Q, (N, M) float32, each expert's weights summed over the tokens of each record.
        world: (M,) bool, which records are of world knowledge, and not of the task.
        delta: δ.
    """
    experts = importance.shape[0]
    of_world = torch.arange(experts, device=importance.device) >= (experts + 1) // 2
    same = of_world[:, None] == world[None, :].to(importance.device)
    z = torch.where(same, 1 + delta, 1 - delta) * importance
    return z.var(correction=0) / z.mean()


@contextmanager
def recorded(model: nn.Module) -> Iterator[None]:
    """Within: a forward leaves what `balancing_constraint` reads.

    Where layers run again in the backward pass, to save memory, this is over, or each would keep its activations alive.
    """
    found = [layer for _, layer in layers(model)]
    for layer in found:
        layer.recording = True
    try:
        yield
    finally:
        for layer in found:
            layer.recording = False


def balancing_constraint(model: nn.Module, attention_mask: Tensor, world: Tensor, delta: float) -> Tensor:
    """Mean L_lbc over the layers, of the model's last forward within `recorded`.

    Args:
        model: with experts in it.
        attention_mask: (B, T), 0 on padding.
        world: (B,) bool.
        delta: δ.
    """
    losses = []
    for _, layer in layers(model):
        assert layer.shares is not None
        shares, layer.shares = layer.shares, None
        importance = (shares * attention_mask[..., None].to(shares)).sum(dim=1).T
        losses.append(balance_loss(importance, world, delta))
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def save(
    model: PreTrainedModel,
    config: LoRAMoEConfig,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
) -> None:
    """Writes the experts' settings and weights, never the base's.

    Args:
        model: what `attach` returned.
        config: what it was given.
        folder: where to.
        base: name or folder of the base model; the name that it was loaded by unless given.
        revision: its revision.
    """
    facts = {
        "format_version": FORMAT_VERSION,
        "base_model": base or model.config._name_or_path or None,
        "base_revision": revision,
        **base_shape(model),
        "experts": asdict(config),
    }
    state = {name: p.detach().contiguous().cpu() for name, p in expert_parameters(model).items()}
    with staged(Path(folder)) as stage:
        save_file(state, stage / WEIGHTS, metadata={"format": "pt"})
        (stage / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load(
    folder: str | os.PathLike[str], base: PreTrainedModel | str | os.PathLike[str] | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, str | None]:
    """The model saved in a folder (or Hub repository), in eval mode, and the name of its base.

    Args:
        folder: what `save` wrote.
        base: where the base model comes from instead of the name in the folder.
        kwargs: for `AutoModelForCausalLM.from_pretrained` of the base (`dtype`, `device_map`, …).

    Raises:
        InputError: the folder is incomplete or damaged, from a newer version, or of another base model.
    """
    path = fetch(folder, (CONFIG, WEIGHTS), "LoRAMoE checkpoint", {})
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise InputError(f"{path} is not a complete LoRAMoE checkpoint: {', '.join(missing)} missing")
    try:
        facts = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        version = facts["format_version"]
        if version <= FORMAT_VERSION:
            config = LoRAMoEConfig(**facts["experts"])
        state = load_file(path / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    if version > FORMAT_VERSION:
        raise InputError(f"{path} was written by a newer imsm (format {version}); upgrade imsm")
    name = facts["base_model"]
    if base is None:
        if name is None:
            raise InputError(f"{path} does not name its base model; give it as base")
        base = name
        kwargs.setdefault("revision", facts["base_revision"])
    elif isinstance(base, (str, os.PathLike)):
        name = os.fspath(base)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    model, _ = load_base(base, kwargs if isinstance(base, (str, os.PathLike)) else {})  # type: ignore[arg-type]
    for field, value in base_shape(model).items():
        if facts.get(field) != value:
            raise InputError(
                f"{path} was saved for a base with {field} {facts.get(field)}, but {name or type(model).__name__} has "
                f"{value}; give the base it was trained on"
            )
    attach(model, config)
    own = expert_parameters(model)
    if {k: tuple(v.shape) for k, v in state.items()} != {k: tuple(v.shape) for k, v in own.items()}:
        raise InputError(f"the tensors in {path / WEIGHTS} do not fit the base model {name or type(model).__name__}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])
    return model.eval(), name
