"""What learns and what does not, and the loss it learns from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from zoo import ARCHITECTURES, METHODS, VOCAB, disturb, tiny_base, tiny_siamese

import imsm.loss
from imsm import GATES, SiameseForCausalLM

IDS = torch.tensor([[5, 9, 33, 2, 61, 17, 4, 8], [8, 8, 21, 40, 3, 50, 0, 0]])
MASK = (IDS != 0).long()
LABELS = torch.where(torch.arange(8) < torch.tensor([[4], [3]]), -100, IDS).masked_fill(MASK == 0, -100)
BATCH: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def gradients(model: SiameseForCausalLM, **batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**(BATCH | batch)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
def test_adapter_and_gate_learn_and_nothing_else(method: str) -> None:
    model = tiny_siamese("llama", method).train()
    found = gradients(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trained
    assert {"gate.down.weight", "gate.up.weight"} <= trained
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
    base = {name.split(".")[-3] for name, p in model.named_parameters() if not p.requires_grad}
    assert "embed_tokens" in base or "model" in base or base


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_learns(gate: str) -> None:
    model = tiny_siamese("llama", "lora", gate).train()
    found = gradients(model)
    for name, parameter in model.gate.named_parameters():
        assert found[f"gate.{name}"].abs().max() > 0
        assert parameter.dtype == torch.float32
    assert bool(list(model.gate.parameters())) == (gate not in ("average", "tuned"))


def test_the_frozen_stream_has_no_graph_and_no_dropout() -> None:
    """GPT-2 has dropout of its own: it must act in the tuned stream only."""
    base = AutoModelForCausalLM.from_config(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5)
    )
    model = SiameseForCausalLM.from_base(base, METHODS["lora"](base), gate_rank=4).train()
    disturb(model)
    first, second = (model(IDS, output_memories=True) for _ in range(2))
    assert torch.equal(first.base_memory, second.base_memory)
    assert not torch.equal(first.tuned_memory, second.tuned_memory)
    assert not first.base_memory.requires_grad and first.tuned_memory.requires_grad
    assert model.training and all(module.training for module in base.modules())
    model.eval()
    assert torch.equal(model(IDS, output_memories=True).base_memory, first.base_memory)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient.checkpointing.*is deprecated:FutureWarning")
def test_checkpointing_gives_the_same_gradients(architecture: str, reentrant: bool) -> None:
    model = tiny_siamese(architecture, "lora").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    again = gradients(model)
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.allclose(plain[name], again[name], atol=1e-6), name
    model.activation_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_loss_is_the_mean_over_the_answers() -> None:
    model = tiny_siamese("llama", "lora")
    full = model(**BATCH, output_logits=True)
    shifted = LABELS[:, 1:]
    expected = cross_entropy(full.logits[:, :-1][shifted != -100], shifted[shifted != -100])
    assert torch.allclose(full.loss, expected, atol=1e-6)
    short = model(**BATCH)
    assert torch.allclose(short.loss, expected, atol=1e-6)
    assert short.logits is None and short.past_key_values is None
    count = int((shifted != -100).sum())
    assert torch.allclose(model(**BATCH, num_items_in_batch=2 * count).loss, expected / 2, atol=1e-6)
    assert model(**BATCH, output_logits=True, logits_to_keep=2).logits.shape[1] == 2


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "granite", "phi", "bloom"])
def test_the_head_runs_on_the_answers_only(architecture: str) -> None:
    """And what stands behind the head (softcapping, scaling, a bias) is done to them."""
    model = tiny_siamese(architecture, "lora")
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda m, args, out: seen.append(tuple(args[0].shape[:-1]))
    )
    short = model(**BATCH)
    handle.remove()
    assert seen == [(2, 0), (1, int((LABELS[:, 1:] != -100).sum()))]
    assert torch.allclose(short.loss, model(**BATCH, output_logits=True).loss, atol=1e-5)


def test_no_answer_at_all_is_a_loss_of_zero() -> None:
    model = tiny_siamese("llama", "lora").train()
    loss = model(IDS, labels=torch.full_like(IDS, -100)).loss
    assert loss == 0
    loss.backward()


def test_accumulating_records_one_by_one_gives_the_batch_s_gradient() -> None:
    model = tiny_siamese("llama", "lora")
    whole = gradients(model)
    count = int((LABELS[:, 1:] != -100).sum())
    model.zero_grad()
    for row in range(2):
        model(
            IDS[row : row + 1],
            attention_mask=MASK[row : row + 1],
            labels=LABELS[row : row + 1],
            num_items_in_batch=count,
        ).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, whole[name], atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(dtype: torch.dtype) -> None:
    base = tiny_base("llama").to(dtype)
    expected = base(IDS, attention_mask=MASK).logits
    model = SiameseForCausalLM.from_base(base, METHODS["lora"](base), gate_rank=4)
    disturb(model, scale=0.05)
    out = model.eval()(IDS, attention_mask=MASK, output_gate=True)
    assert out.logits.dtype == dtype and out.gate.dtype == torch.float32
    assert torch.equal(model(IDS, attention_mask=MASK, force_gate=1).logits, expected)
    assert all(p.dtype == torch.float32 for p in model.gate.parameters())
    found = gradients(model.train())
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    model.eval()
    prompt = {"input_ids": IDS[:1, :4], "attention_mask": MASK[:1, :4]}
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_cast_as_a_whole_the_gate_still_computes_in_float32() -> None:
    model = tiny_siamese("llama", "lora").to(torch.bfloat16)
    assert model(IDS, output_gate=True).gate.dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(architecture: str) -> None:
    model = tiny_siamese(architecture, "lora").train()
    before = model(**BATCH).loss.item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
    assert model(**BATCH).loss.item() < before


def test_a_fused_kernel_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with Liger; here something like it, which overwrites the logits as Liger does."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            total = cross_entropy(logits, targets, reduction="sum")
            slope = torch.softmax(logits, dim=-1) - torch.nn.functional.one_hot(targets, logits.shape[-1])
            logits.data.copy_(slope)
            ctx.save_for_backward(logits)
            return total

        @staticmethod
        def backward(ctx: Any, *outer: torch.Tensor) -> Any:
            return ctx.saved_tensors[0] * outer[0], None

    calls = []

    def kernel(logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum" and logits.dtype == torch.float32
        calls.append(len(targets))
        return Fused.apply(logits, targets)

    for architecture in ("llama", "gemma3", "granite"):
        model = tiny_siamese(architecture, "lora")
        expected = gradients(model)
        with monkeypatch.context() as patch:
            patch.setattr(imsm.loss, "fused_cross_entropy", lambda device_type: kernel)
            found = gradients(model)
            assert model(IDS, labels=torch.full_like(IDS, -100)).loss == 0  # nothing to launch a kernel on
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, atol=1e-5), (architecture, name)
    assert calls == [7] * 3
    assert imsm.loss.fused_cross_entropy("cpu") is None
