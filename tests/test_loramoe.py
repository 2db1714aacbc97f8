"""LoRAMoE: its equations on hand-computed cases, and its way to the disk and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import disturb, tiny_base

from imsm import InputError, loramoe
from imsm.loramoe import LoRAMoEConfig

FFN = ["gate_proj", "up_proj", "down_proj"]


def small(**changes: Any) -> LoRAMoEConfig:
    return LoRAMoEConfig(**{"target_modules": FFN, "r": 2, "lora_alpha": 6, "experts": 3, **changes})


def built(**changes: Any) -> PreTrainedModel:
    model = loramoe.attach(tiny_base("llama"), small(**changes))
    disturb(model)
    return model.eval()


def test_the_layer_is_the_published_equation_by_hand() -> None:
    """h = W0 x + α/r Σ ωᵢ Bᵢ Aᵢ x with two experts of rank 1, two inputs and one output."""
    model = tiny_base("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(2, 1, bias=False)
    # The layer is too narrow to be run by the model; it is asked alone.
    loramoe.attach(model, LoRAMoEConfig("model.layers.0.mlp.up_proj", r=1, lora_alpha=4, experts=2))
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.experts.base_layer.weight.copy_(torch.tensor([[2.0, 1.0]]))
        layer.router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]).log1p())  # rows (ln 2, 0) and (0, 0)
        for name, a, b in (("expert0", [1.0, 1.0], 0.5), ("expert1", [0.0, 3.0], -1.0)):
            layer.experts.lora_A[name].weight.copy_(torch.tensor([a]))
            layer.experts.lora_B[name].weight.copy_(torch.tensor([[b]]))
    # x = (1, 2): W0 x = 4; ω = (2, 1)/3; E₀ x = 0.5 · 3 = 1.5; E₁ x = −6; h = 4 + 4 · (1 − 2) = 0.
    # x = (0, 1): W0 x = 1; ω = (1, 1)/2; E₀ x = 0.5; E₁ x = −3; h = 1 + 4 · (0.25 − 1.5) = −4.
    found = layer(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]))
    assert torch.allclose(found, torch.tensor([[[0.0], [-4.0]]]), atol=1e-6)


def test_the_layer_is_the_naive_sum_in_a_model() -> None:
    model = built()
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    weights = (x @ layer.router.weight.T).softmax(-1)
    expected = x @ layer.experts.base_layer.weight.T
    for i, name in enumerate(layer.names):
        delta = layer.experts.lora_B[name].weight @ layer.experts.lora_A[name].weight
        expected = expected + 6 / 2 * weights[..., i, None] * (x @ delta.T)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_the_balance_loss_by_hand() -> None:
    """Experts 0 and 1 are the task's, 2 is the world's; record 0 is of the task, record 1 of the world."""
    importance = torch.tensor([[2.0, 1.0], [4.0, 1.0], [4.0, 2.0]])
    # δ = ½: I = [[1.5, 0.5], [1.5, 0.5], [0.5, 1.5]]; Z = [[3, 0.5], [6, 0.5], [2, 3]]: mean 2.5, variance 3.4166…
    found = loramoe.balance_loss(importance, torch.tensor([False, True]), 0.5)
    assert found.item() == pytest.approx((0.25 + 4 + 12.25 + 4 + 0.25 + 0.25) / 6 / 2.5)
    assert loramoe.balance_loss(torch.ones(4, 3), torch.zeros(3, dtype=torch.bool), 0.0).item() == 0


def test_the_constraint_counts_each_token_once_and_no_padding() -> None:
    model = built().train()
    ids = torch.arange(1, 11).view(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    world = torch.tensor([False, True])
    with loramoe.recorded(model):
        model(ids, attention_mask=mask)
    expected = []
    for _, layer in loramoe.layers(model):
        assert layer.shares is not None
        rows = [layer.shares[row, : int(mask[row].sum())].sum(0) for row in range(2)]
        assert [row.sum().item() for row in rows] == pytest.approx([5, 3])
        expected.append(loramoe.balance_loss(torch.stack(rows, 1), world, 0.1))
    found = loramoe.balancing_constraint(model, mask, world, 0.1)
    assert found.item() == pytest.approx(torch.stack(expected).mean().item())
    found.backward()
    routers = [layer.router.weight for _, layer in loramoe.layers(model)]
    assert all(router.grad is not None and router.grad.abs().max() > 0 for router in routers)


def test_it_starts_as_the_base_model_and_trains_experts_and_routers_alone() -> None:
    ids = torch.arange(1, 11).view(2, 5)
    base = tiny_base("llama")
    expected = base(ids).logits
    model = loramoe.attach(base, small())
    assert torch.allclose(model(ids).logits, expected, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * (3 * 2 + 1) == len(loramoe.expert_parameters(model))
    assert all("lora_" in name or "router" in name for name in trained)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_cached_generation_is_the_uncached_one(architecture: str) -> None:
    """gpt2's feed-forward layers are Conv1D."""
    modules = FFN if architecture == "llama" else ["c_fc", "mlp.c_proj"]
    model = loramoe.attach(tiny_base(architecture), small(target_modules=modules))
    disturb(model)
    ids = torch.arange(1, 7).view(1, 6)
    cached = model.eval().generate(ids, max_new_tokens=8, do_sample=False)
    for _ in range(8):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


def test_saved_and_loaded(base_folder: str, tmp_path: Path) -> None:
    config = small()
    model = loramoe.attach(AutoModelForCausalLM.from_pretrained(base_folder), config)
    disturb(model)
    loramoe.save(model.eval(), config, tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [loramoe.WEIGHTS, loramoe.CONFIG]
    again, name = loramoe.load(tmp_path / "x")
    assert name == base_folder and not again.training
    for key, parameter in loramoe.expert_parameters(model).items():
        assert torch.equal(loramoe.expert_parameters(again)[key], parameter)
    ids = torch.arange(1, 11).view(2, 5)
    assert torch.equal(again(ids).logits, model(ids).logits)
    given, name = loramoe.load(tmp_path / "x", base=AutoModelForCausalLM.from_pretrained(base_folder))
    assert name == base_folder and torch.equal(given(ids).logits, model(ids).logits)


def test_what_cannot_be_loaded_is_refused(base_folder: str, tmp_path: Path) -> None:
    config = small()
    folder = tmp_path / "x"
    loramoe.save(loramoe.attach(AutoModelForCausalLM.from_pretrained(base_folder), config), config, folder)
    facts = json.loads((folder / loramoe.CONFIG).read_text())

    def refused(message: str, **changes: Any) -> None:
        (folder / loramoe.CONFIG).write_text(json.dumps({**facts, **changes}))
        with pytest.raises(InputError, match=message):
            loramoe.load(folder)

    refused("written by a newer imsm", format_version=2)
    refused("does not name its base model", base_model=None)
    refused("saved for a base with hidden_size 7", hidden_size=7)
    refused("the tensors in .* do not fit", experts={**facts["experts"], "experts": 2})
    refused("cannot be read", experts={"rank": 2})
    (folder / loramoe.WEIGHTS).unlink()
    refused("loramoe.safetensors missing")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the setting adapter.target_modules is missing"),
        (
            {"target_modules": ["a"], "expert": 4},
            "unknown setting 'adapter.expert' for LORAMOE; did you mean 'experts'?",
        ),
        ({"target_modules": []}, "adapter.target_modules must be a list of the feed-forward layers' names, got []"),
        ({"target_modules": ["a"], "experts": 1}, "adapter.experts must be an integer above 1, got 1"),
        ({"target_modules": ["a"], "r": "4"}, "adapter.r must be an integer, got '4'"),
        ({"target_modules": ["a"], "delta": 2.0}, "adapter.delta must be a number from 0 to 1, got 2.0"),
        ({"target_modules": ["a"], "balance": -1}, "adapter.balance must be a number that is not negative, got -1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        LoRAMoEConfig.from_settings({"peft_type": "LORAMOE", **settings})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["nowhere"], "peft cannot put experts into LlamaForCausalLM: Target modules"),
        (["embed_tokens"], "embed_tokens is none"),
        (["lm_head"], "lm_head is the output head"),
    ],
)
def test_layers_that_cannot_have_experts_are_refused(modules: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loramoe.attach(tiny_base("llama"), small(target_modules=modules))
