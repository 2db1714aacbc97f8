"""What the base model says to a task's prompts, kept on the disk: it is the same for every checkpoint that is held against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imsm.evaluation.partial import writing
from imsm.evaluation.passes import Pass
from imsm.fingerprint import fingerprint
from imsm.folders import replacing
from imsm.generation import Answer
from imsm.model import SiameseForCausalLM


@dataclass(frozen=True)
class Reference:
    """The base model's greedy answer to a prompt, and its distributions along it.

    answer: of n tokens.
    log_probs: (n, V) float32, of each token given those before.
    """

    answer: Answer
    log_probs: Tensor


class References:
    """Files of references, one a batch of prompts, in a folder.

    Args:
        folder: is made where it is not there. A batch takes 4 bytes for each token of its answers and of the vocabulary.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._base: str | None = None

    def of(
        self,
        base: Pass,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        make: Callable[[], list[Reference]],
    ) -> list[Reference]:
        """The references of a batch, read if they are there, else made and written.

        Args:
            base: the base model, the same for all calls.
            prompts: tokens of the batch's prompts.
            max_new_tokens: longest answer.
            make: gives the references.

        Raises:
            InputError: they cannot be written.
        """
        if self._base is None:
            self._base = fingerprint(_plain(base), [], {"device": base.model.device.type})
        asked = json.dumps([self._base, [list(prompt) for prompt in prompts], max_new_tokens])
        path = self.folder / f"{xxhash.xxh3_128_hexdigest(asked.encode())}.safetensors"
        if (found := _read(path)) is None:
            found = make()
            with writing(path):
                _write(path, found)
        return found


def _plain(base: Pass) -> object:
    """The model below the adapter of whatever runs as the base."""
    model = base.model
    if isinstance(model, SiameseForCausalLM):
        return model.base
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _read(path: Path) -> list[Reference] | None:
    """A batch's references; None if there is no such file, or none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            answers = json.loads(file.metadata()["answers"])
            return [Reference(Answer(**answer), file.get_tensor(str(row))) for row, answer in enumerate(answers)]
    except (OSError, SafetensorError):
        return None


def _write(path: Path, references: Sequence[Reference]) -> None:
    """Writes a batch's references, whole or not at all."""
    answers = [vars(reference.answer) for reference in references]
    tensors = {str(row): reference.log_probs.cpu().contiguous() for row, reference in enumerate(references)}
    with replacing(path) as beside:
        save_file(tensors, beside, {"answers": json.dumps(answers)})
