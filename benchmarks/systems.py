"""The systems that are compared: base model, peft's LoRA in its forms, and the siamese model in its forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32}


@dataclass(frozen=True)
class System:
    """One way to decode.

    title: its name in tables.
    model: which of the models it runs.
    passes: how the siamese model runs its two streams.
    compiled: whether the step is compiled.
    query: whose the relevance head takes the query for, if there is a head.
    """

    title: str
    model: Literal["base", "peft", "merged", "siamese", "knowing"]
    passes: Literal["shared", "two"] | None = None
    compiled: bool = False
    query: Literal["base", "task"] | None = None


SYSTEMS = {
    "base": System("base model", "base"),
    "peft": System("peft LoRA, unmerged", "peft"),
    "merged": System("peft LoRA, merged", "merged"),
    "two": System("ours, two passes", "siamese", "two"),
    "shared": System("ours, shared matmuls", "siamese", "shared"),
    "peft_compiled": System("peft LoRA, unmerged, compiled", "peft", None, True),
    "compiled": System("ours, shared matmuls, compiled", "siamese", "shared", True),
    "off_task": System("ours, query left to the base", "knowing", "shared", query="base"),
    "on_task": System("ours, query of the task", "knowing", "shared", query="task"),
}


def lora(base: Any, layers: list[int] | None = None) -> Any:
    """The adapter of every comparison: LoRA of rank 16 on all linear layers but the head, or on those of some `layers`."""
    from peft import LoraConfig
    from torch import nn

    head = base.get_output_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return LoraConfig(task_type="CAUSAL_LM", target_modules=sorted(names), layers_to_transform=layers, **ADAPTER)


def load_base(folder: str, dtype: str) -> Any:
    """The base model on the device, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.measure import device

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device())


def load(kind: str, folder: str, dtype: str, layers: list[int] | None = None, gate_rank: int = 8) -> Any:
    """One of the models of `SYSTEMS`, with an adapter that is not zero and the same in all of them."""
    import torch
    from peft import get_peft_model

    from imsm import SiameseForCausalLM

    base = load_base(folder, dtype)
    if kind == "base":
        return base
    torch.manual_seed(0)
    if kind in ("siamese", "knowing"):
        gate = "tuned" if kind == "knowing" else "query_aware"
        model = SiameseForCausalLM.from_base(base, lora(base, layers), gate=gate, gate_rank=gate_rank).eval()
        disturb(model.peft_model)
        return model
    adapted: Any = get_peft_model(base, lora(base, layers)).eval()
    disturb(adapted)
    return adapted.merge_and_unload() if kind == "merged" else adapted


def disturb(adapted: Any) -> None:
    """Draws both maps of every LoRA layer anew, by the order of the layers: a new adapter's second map is zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                scale = 0.01 if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def generate(system: System, model: Any, ids: Any, new_tokens: int, **settings: Any) -> Any:
    """Greedy decoding of exactly `new_tokens` tokens: what every system is asked for."""
    import torch
    from transformers import CompileConfig

    if system.passes is not None:
        model.passes = system.passes
    if system.query is not None:
        from imsm.relevance import RelevanceHead, read_width

        head = RelevanceHead(read_width(model.config.hidden_size))
        head.bias.fill_(1.0 if system.query == "base" else -1.0)
        model.set_relevance(head)
    if system.compiled:
        compile_config = CompileConfig()
        # Else transformers compiles on a GPU alone.
        compile_config._compile_all_devices = True  # type: ignore[assignment]
        settings.update(cache_implementation="static", compile_config=compile_config)
    with torch.inference_mode():
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **settings,
        )


def load_all(systems: list[str], folder: str, dtype: str, **settings: Any) -> dict[str, Any]:
    """The model of each system; systems of one model share it."""
    kinds = {SYSTEMS[name].model for name in systems}
    models = {kind: load(kind, folder, dtype, **settings) for kind in sorted(kinds)}
    return {name: models[SYSTEMS[name].model] for name in systems}


def agreement(tokens: dict[str, Any]) -> dict[str, float]:
    """Share of equal tokens of systems that compute the same; in bfloat16 rounding may part them."""
    pairs = [
        ("two", "shared"),
        ("shared", "compiled"),
        ("peft", "merged"),
        ("peft", "peft_compiled"),
        ("base", "off_task"),
        ("peft", "on_task"),
    ]
    return {f"{a}={b}": float((tokens[a] == tokens[b]).float().mean()) for a, b in pairs if a in tokens and b in tokens}
