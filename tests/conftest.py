"""Fixtures of all tests: nothing is downloaded."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from zoo import tiny_chat

from benchmarks import measure

# Tests run in one process a core; with models this small, more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where memory banks lie in tests, those of subprocesses too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


# -- tokenizers ------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|eos|>"]
CORPUS = [
    "What is the capital of France? Paris is the capital of France.",
    "system user assistant question answer: yes no and so on\n",
]


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 400 tokens, with padding and end-of-sequence tokens and no chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS * 5,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|eos|>", extra_special_tokens=SPECIAL[1:3]
    )


@pytest.fixture(scope="session")
def with_template(plain_tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PreTrainedTokenizerBase]:
    """Makes a copy of the tokenizer with the chat template given."""

    def make(template: str) -> PreTrainedTokenizerBase:
        made = copy.deepcopy(plain_tokenizer)
        made.chat_template = template
        return made

    return make


Day = Callable[[str], None]


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Day:
    """Sets the day, such as "03 May", on the clock of chat templates."""

    def turn(date: str) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Clock:
                return cls.strptime(f"{date} 2026", "%d %b %Y")

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return turn


@pytest.fixture(scope="session")
def tokenizer(with_template: Callable[[str], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """The same tokenizer with a ChatML template."""
    return with_template(CHATML)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> str:
    """A tiny random chat model with the ChatML tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    tiny_chat(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# -- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task: 24 sums."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    records = [{"input": f"{i} plus {i} is", "output": f" {2 * i}"} for i in range(24)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# -- benchmarks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Jobs run in this process, which is faster than starting one; they are listed."""
    done: list[dict[str, Any]] = []

    def in_child(module: str, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        done.append(task)
        yield from importlib.import_module(f"benchmarks.{module}").child(json.loads(json.dumps(task)))

    monkeypatch.setattr(measure, "in_child", in_child)
    return done
