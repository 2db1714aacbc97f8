"""A tiny base model whose dreams are legible, an adapter for it that peft wrote, and a task that the adapter knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import CHATML, SPECIAL
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from zoo import disturb, tiny_chat

from imsm.building import ADAPTER, ADAPTER_CONFIG
from imsm.dreams import CHAT, PLAIN
from imsm.generation import answers

CORPUS = [
    *PLAIN,
    *CHAT,
    "the quick brown fox jumps over a lazy dog while zebras vex bold knights",
    "How do I open an account? Yes, you can. No, it is not so!\nuser assistant system",
    "Which card is it? Message: Card:",
]
WORDS = [
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "while",
    "zebras",
    "vex",
    "bold",
    "knights",
    "open",
    "account",
    "you",
    "can",
    "not",
    "so",
]


def write_base(folder: Path) -> str:
    """A random chat model that knows some English words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        CORPUS * 5, trainers.BpeTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|eos|>", extra_special_tokens=SPECIAL[1:3]
    )
    tokenizer.chat_template = CHATML
    tiny_chat(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def adapted(base: str) -> Any:
    """The base model with a LoRA that changes what it says, always the same."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"),
    )
    disturb(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.half())
    return model.eval()


def write_adapter(folder: Path, base: str) -> str:
    """That LoRA in peft's format, but not as the peft that is installed here would write it: in half precision."""
    adapted(base).save_pretrained(folder)
    save_file({name: x.half() for name, x in load_file(folder / ADAPTER).items()}, folder / ADAPTER)
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, "peft_version": "0.9.0"}))
    return str(folder)


def write_data(path: Path, base: str, count: int) -> str:
    """Records whose answers are the first words that the adapter says."""
    prompts = [f"Which card is it?\nMessage: {WORDS[i % 18]} {WORDS[i * 7 % 17]}\nCard:" for i in range(3 * count)]
    said = answers(adapted(base), AutoTokenizer.from_pretrained(base), prompts, max_new_tokens=8)
    records = []
    for answer in sorted(said, key=lambda answer: answer.index):
        words = answer.text.split()[:-1]
        if any(c.isalnum() for c in "".join(words)):
            records.append({"input": prompts[answer.index], "output": " " + " ".join(words)})
    assert len(records) >= count
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:count]), encoding="utf-8")
    return str(path)
