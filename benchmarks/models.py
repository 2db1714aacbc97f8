"""The models that are measured, and the text that they are given."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from imsm.errors import InputError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
NAMES = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma-3-270M"}


def quickstart(name: str) -> ModuleType:
    """A module of the quickstart."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look up the module that they are in.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def quickstart_models() -> ModuleType:
    """The quickstart's module that makes folders of the models in PyPI packages."""
    return quickstart("model")


def model_folder(model: str) -> str:
    """The folder of one of `NAMES`, converted on the first call; or `model` itself, which is a folder.

    Raises:
        InputError: it is neither.
        SystemExit: the package with the model is not installed; the status is 2.
    """
    if model in NAMES:
        return str(getattr(quickstart_models(), model)())
    if (Path(model) / "config.json").is_file():
        return str(Path(model).resolve())
    raise InputError(f"--model must be one of {', '.join(NAMES)}, or a model's folder; got {model!r}")


def title(model: str) -> str:
    """The model's name in tables."""
    return NAMES.get(model, Path(model).name)


def prompts(folder: str, batch: int, length: int) -> Any:
    """(batch, length) int64: stretches of the quickstart's dialogues, each row from another place."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (EXAMPLES / "shop-train.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(message["content"] for line in lines for message in json.loads(line)["messages"])
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = max(len(ids) // batch, 1)
    return torch.tensor([[ids[(row * step + place) % len(ids)] for place in range(length)] for row in range(batch)])
