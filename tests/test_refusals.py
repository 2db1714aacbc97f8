"""What cannot work is refused when the model is built, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from zoo import METHODS, VOCAB, tiny_base, tiny_siamese

from imsm import InputError, SiameseForCausalLM


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **settings})


def initialised(name: str) -> peft.LoraConfig:
    """With an initialisation whose own requirements (packages, data) are not met here."""
    config = lora()
    config.init_lora_weights = name  # type: ignore[assignment]
    return config


REFUSED: list[tuple[Any, str]] = [
    (lora(init_lora_weights="pissa"), "'pissa' rewrites base weights"),
    (lora(init_lora_weights="pissa_niter_4"), "rewrites base weights"),
    (lora(init_lora_weights="olora"), "'olora' rewrites base weights"),
    (initialised("corda"), "'corda' rewrites base weights"),
    (initialised("loftq"), "'loftq' rewrites base weights"),
    (lora(bias="all"), "bias must be 'none', got 'all'"),
    (lora(bias="lora_only"), "bias must be 'none', got 'lora_only'"),
    (lora(modules_to_save=["lm_head"]), "changes the output head"),
    (lora(target_modules=["q_proj", "lm_head"]), "changes the output head"),
    (lora(target_modules=["nowhere"]), "peft cannot put this adapter into LlamaForCausalLM: Target modules"),
    (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "changes the sequence's length from 6 to 10",
    ),
    (
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
        "changes the sequence's length from 6 to 10",
    ),
    ({"r": 4}, "must be a peft PeftConfig or an adapter's folder, got dict"),
    ("nowhere/at/all", "'nowhere/at/all' is not a folder"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_adapters(config: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        SiameseForCausalLM.from_base(tiny_base("llama"), config)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


IDS = torch.arange(1, 7)[None]


def state(base: torch.nn.Module) -> dict[str, Any]:
    """What a refusal must leave alone."""
    return {
        "modules": [(name, module, module.training) for name, module in base.named_modules()],
        "weights": [(name, id(parameter), parameter.requires_grad) for name, parameter in base.named_parameters()],
        "attributes": set(vars(base)),
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in base.modules()],
    }


def other_shape(tmp_path: Path) -> str:
    """A trained adapter on whose tensors peft fails when it has put its layers in already."""
    peft.get_peft_model(tiny_base("llama"), lora(target_modules=["up_proj"], r=8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    return str(tmp_path)


def other_layers(tmp_path: Path) -> str:
    """A trained adapter that has more tensors than its settings say."""
    peft.get_peft_model(tiny_base("llama"), lora()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    return str(tmp_path)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        *(config for config, _ in REFUSED),
        lora(target_modules=["q_proj", "embed_tokens", "lm_head"], modules_to_save=["norm"]),
        peft.LNTuningConfig(target_modules=["lm_head", "norm"]),
        other_shape,
        other_layers,
    ],
)
def test_after_a_refusal_the_base_is_as_it_was_and_takes_another_adapter(
    config: Any, training: bool, tmp_path: Path
) -> None:
    base = tiny_base("llama").train(training)
    base.model.embed_tokens.requires_grad_(False)
    before, logits = state(base), base(IDS).logits
    with pytest.raises(InputError):
        SiameseForCausalLM.from_base(base, config(tmp_path) if callable(config) else config)
    assert state(base) == before
    assert torch.equal(base(IDS).logits, logits)
    model = SiameseForCausalLM.from_base(base, lora()).eval()
    assert torch.equal(model(IDS, force_gate=1.0).logits, logits)


def test_trained_biases_are_taken_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("qwen2")
    before, logits = state(base), base(IDS).logits
    with monkeypatch.context() as patch:
        patch.setattr("imsm.building.refuse_settings", lambda *args, **kwargs: None)
        with pytest.raises(InputError, match="trains the base weight"):
            SiameseForCausalLM.from_base(base, lora(bias="all"))
    assert state(base) == before and torch.equal(base(IDS).logits, logits)
    SiameseForCausalLM.from_base(base, lora())


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_a_base_whose_weights_were_rewritten_is_not_taken_for_the_plain_one(
    modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imsm.building.REWRITING_INITIALISATIONS", ("no such thing",))
    base = tiny_base("llama")
    with pytest.raises(InputError, match="load the base again|changes the output head"):
        SiameseForCausalLM.from_base(base, lora(init_lora_weights="pissa", target_modules=modules))
    with pytest.raises(InputError, match="already carries an adapter"):
        SiameseForCausalLM.from_base(base, lora())


def test_an_initialisation_that_rewrites_weights_is_found_by_running_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe does not need the list of names."""
    monkeypatch.setattr("imsm.building.REWRITING_INITIALISATIONS", ("no such thing",))
    with pytest.raises(InputError, match="changes base weights when it is created"):
        SiameseForCausalLM.from_base(tiny_base("llama"), lora(init_lora_weights="pissa"))


def test_trained_biases_are_found_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imsm.building.refuse_settings", lambda *args, **kwargs: None)
    with pytest.raises(InputError, match=r"trains the base weight .*bias"):
        SiameseForCausalLM.from_base(tiny_base("qwen2"), lora(bias="all"))


def test_a_safe_initialisation_is_not_refused() -> None:
    for initialisation in (True, False, "gaussian"):
        SiameseForCausalLM.from_base(tiny_base("llama"), lora(init_lora_weights=initialisation))


def test_encoder_decoder_models() -> None:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(InputError, match="encoder-decoder model; a causal"):
        SiameseForCausalLM.from_base(model, lora(target_modules=["q", "v"]))


def test_models_that_are_not_causal() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for model in (transformers.BertForMaskedLM(config), transformers.BertLMHeadModel(config)):
        with pytest.raises(InputError, match=rf"{type(model).__name__} is not causal"):
            SiameseForCausalLM.from_base(model, lora(target_modules=["query", "value"]))
    config.is_decoder = True
    SiameseForCausalLM.from_base(transformers.BertLMHeadModel(config), lora(target_modules=["query", "value"]))


def test_models_without_an_output_head() -> None:
    config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match="LlamaModel has no output head"):
        SiameseForCausalLM.from_base(transformers.AutoModel.from_config(config), lora())
    with pytest.raises(InputError, match="must be a transformers causal language model, got Linear"):
        SiameseForCausalLM.from_base(torch.nn.Linear(2, 2), lora())


def test_a_base_that_carries_an_adapter_merged_or_not() -> None:
    adapted = peft.get_peft_model(tiny_base("llama"), lora())
    for base in (adapted, adapted.get_base_model()):
        with pytest.raises(InputError, match="already carries an adapter"):
            SiameseForCausalLM.from_base(base, lora())
    adapted.merge_adapter()
    with pytest.raises(InputError, match=r"already carries an adapter \(merged or not\)"):
        SiameseForCausalLM.from_base(adapted.get_base_model(), lora())


def test_an_adapter_s_folder_is_no_base(tmp_path: Path) -> None:
    """transformers would load the base with the adapter in it."""
    tiny_base("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(base, lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"adapter' holds an adapter, where the plain base model .* is needed"):
        SiameseForCausalLM.from_base(tmp_path / "adapter", lora())


def test_an_adapter_that_is_merged_later() -> None:
    model = tiny_siamese("llama", "lora")
    ids = torch.arange(1, 7)[None]
    before = model(ids).logits
    model.peft_model.merge_adapter()
    with pytest.raises(InputError, match="the adapter is merged into the base weights"):
        model(ids)
    model.peft_model.unmerge_adapter()
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_the_base_is_as_it_was_after_a_refusal_of_settings() -> None:
    base = tiny_base("llama")
    ids = torch.arange(1, 7)[None]
    before = base(ids).logits
    for config in (lora(init_lora_weights="olora"), lora(bias="all")):
        with pytest.raises(InputError):
            SiameseForCausalLM.from_base(base, config)
    with pytest.raises(InputError, match="gate_rank must be a positive integer below the hidden size 32, got 32"):
        SiameseForCausalLM.from_base(base, lora(), gate_rank=32)
    assert torch.equal(base(ids).logits, before)
    SiameseForCausalLM.from_base(base, lora())


def test_base_arguments_need_a_name() -> None:
    with pytest.raises(InputError, match="dtype can only be given with a base's name or folder"):
        SiameseForCausalLM.from_base(tiny_base("llama"), lora(), dtype=torch.float32)
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        SiameseForCausalLM.from_base("/nowhere/at/all", lora())


def test_an_adapter_folder_without_its_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no adapter: adapter_config.json is missing"):
        SiameseForCausalLM.from_base(tiny_base("llama"), tmp_path)


def test_an_adapter_with_pickled_weights_is_not_opened(tmp_path: Path) -> None:
    base = tiny_base("llama")
    peft.get_peft_model(base, lora()).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="adapter_model.safetensors is missing"):
        SiameseForCausalLM.from_base(tiny_base("llama"), tmp_path)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    peft.get_peft_model(tiny_base("llama"), lora()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"tensors .*do not fit|peft cannot put this adapter"):
        SiameseForCausalLM.from_base(tiny_base("gemma3"), tmp_path)


def test_a_trained_adapter_is_loaded_with_its_weights(tmp_path: Path) -> None:
    trained = tiny_siamese("llama", "lora")
    trained.peft_model.save_pretrained(tmp_path)
    adopted = SiameseForCausalLM.from_base(tiny_base("llama"), tmp_path)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(adopted.eval()(ids, force_gate=0).logits, trained(ids, force_gate=0).logits)
    assert all(p.requires_grad for name, p in adopted.named_parameters() if "lora_" in name)


def test_unknown_gate() -> None:
    with pytest.raises(InputError, match="gate must be one of query_aware, token"):
        SiameseForCausalLM.from_base(tiny_base("llama"), METHODS["lora"](tiny_base("llama")), gate="magic")
