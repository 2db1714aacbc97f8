"""Models and tokenizers of a checkpoint, from their folders or the Hub onto their device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from imsm.building import has_tokenizer, load_base
from imsm.checkpoint import read_config
from imsm.errors import InputError, first_line
from imsm.model import SiameseForCausalLM


@dataclass(frozen=True)
class Loading:
    """How models are loaded.

    dtype: "auto" or a dtype's name.
    device: None for a GPU if there is one.
    trust_remote_code: run code that a repository brings.
    """

    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False

    @property
    def kwargs(self) -> dict[str, Any]:
        """For `from_pretrained`."""
        return {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}

    def placed(self, model: Any) -> Any:
        """The model on its device, in eval mode.

        Raises:
            InputError: the device cannot be used.
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device} cannot be used: {first_line(error)}") from error

    def base(self, name: str, revision: str | None = None) -> PreTrainedModel:
        """A plain model on its device. Raises `InputError`, see `building.load_base`."""
        kwargs = self.kwargs if revision is None else {**self.kwargs, "revision": revision}
        return self.placed(load_base(name, kwargs)[0])  # type: ignore[no-any-return]

    def tokenizer(self, folder: Path, *others: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer in a checkpoint's folder, or else the first of `others`.

        Raises:
            InputError: there is none, or it can neither pad nor end.
        """
        names = [str(folder)] if has_tokenizer(folder) else []
        source = next(iter([*names, *filter(None, others)]), str(folder))
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"no tokenizer in {folder} nor with its base: {first_line(error)}; save one into the folder"
            ) from error
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {source} has neither a padding nor an end-of-sequence token")
        return tokenizer  # type: ignore[no-any-return]


def load_siamese(
    name: str, base: str | None, loading: Loading
) -> tuple[SiameseForCausalLM, PreTrainedTokenizerBase, str | None]:
    """A siamese model, its tokenizer, and the name of its base.

    Raises:
        InputError: see `SiameseForCausalLM.from_pretrained`; or there is no tokenizer.
    """
    folder, config = read_config(name, {})
    model = SiameseForCausalLM.from_pretrained(folder, base=base, **loading.kwargs)
    tokenizer = loading.tokenizer(folder, base, config.base_model)
    return loading.placed(model), tokenizer, base or config.base_model
