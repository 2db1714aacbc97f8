"""Tiny random models of real architectures, and a configuration of every PEFT method for any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from imsm import SiameseForCausalLM

VOCAB = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}

ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    # Sliding window, normalised embeddings, and softcapped logits, which Gemma 3 inherits as an option.
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**GROUPED, "num_hidden_layers": 3},
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
    ),
    "glm": lambda: transformers.GlmConfig(**GROUPED, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON, intermediate_size=64, max_position_embeddings=128),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "opt": lambda: transformers.OPTConfig(
        **COMMON, ffn_dim=64, max_position_embeddings=128, word_embed_proj_dim=16, do_layer_norm_before=True
    ),
    "falcon": lambda: transformers.FalconConfig(**COMMON, new_decoder_architecture=False, alibi=False),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None, pad_token_id=0
    ),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    # A hybrid of short convolutions and attention.
    "lfm2": lambda: transformers.Lfm2Config(
        **GROUPED, layer_types=["conv", "full_attention"], block_ff_dim=64, block_auto_adjust_ff_dim=False
    ),
    # Logits divided by a constant behind the head.
    "granite": lambda: transformers.GraniteConfig(**GROUPED, logits_scaling=3.0),
    # A bias in the head.
    "phi": lambda: transformers.PhiConfig(**GROUPED),
}


def tiny_base(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random model, in eval mode, whose greedy answers vary.

    With tied embeddings it would repeat its last token for ever, were embeddings not small beside the other weights.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]()).eval()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02 if parameter is embedding else 3 / parameter.shape[-1] ** 0.5)
    return model


def tiny_chat(tokenizer: Any, **changes: Any) -> PreTrainedModel:
    """A random Llama for the vocabulary of a tokenizer, always the same."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**settings, **changes}))


def _linears(base: nn.Module) -> list[str]:
    head = base.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in base.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        }
    )


def _norms(base: nn.Module) -> list[str]:
    return [name for name, module in base.named_modules() if type(module).__name__.lower().endswith("norm")]


def _ia3(base: nn.Module) -> peft.PeftConfig:
    linears = _linears(base)
    return peft.IA3Config(target_modules=linears, feedforward_modules=linears[:1])


METHODS: dict[str, Callable[[nn.Module], peft.PeftConfig]] = {
    "lora": lambda base: peft.LoraConfig(r=4, target_modules=_linears(base)),
    "rslora": lambda base: peft.LoraConfig(r=4, use_rslora=True, target_modules=_linears(base)),
    "dora": lambda base: peft.LoraConfig(r=4, use_dora=True, target_modules=_linears(base)),
    "ia3": _ia3,
    "adalora": lambda base: peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=2, deltaT=1, total_step=8, target_modules=_linears(base)
    ),
    "vera": lambda base: peft.VeraConfig(r=4, target_modules=_linears(base)),
    "oft": lambda base: peft.OFTConfig(oft_block_size=4, r=0, target_modules=_linears(base)),
    "loha": lambda base: peft.LoHaConfig(r=4, target_modules=_linears(base)),
    "lokr": lambda base: peft.LoKrConfig(r=4, target_modules=_linears(base)),
    "ln_tuning": lambda base: peft.LNTuningConfig(target_modules=_norms(base)),
    "prefix_tuning": lambda base: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def disturb(model: nn.Module, scale: float = 0.2, seed: int = 1) -> None:
    """Noise on everything that learns, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def tiny_siamese(architecture: str, method: str, gate: str = "query_aware", seed: int = 0) -> SiameseForCausalLM:
    """A siamese model with a disturbed adapter and gate, in eval mode."""
    base = tiny_base(architecture, seed)
    model = SiameseForCausalLM.from_base(base, METHODS[method](base), gate=gate, gate_rank=4)
    disturb(model)
    disturb(model.gate, scale=0.5)  # so that the query makes itself felt
    return model.eval()
