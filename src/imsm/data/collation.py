"""Examples to batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from imsm.data.rendering import IGNORED, Example
from imsm.errors import InputError


class AnswerCollator:
    """Pads examples on the right to the longest one.

    Args:
        tokenizer: gives the padding token; the end-of-sequence token stands in if there is none.
        pad_to_multiple_of: the batch's length is rounded up to a multiple of this.

    Raises:
        InputError: the tokenizer has neither token, or `pad_to_multiple_of` is not positive.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int = 1) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise InputError(
                "the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token"
            )
        if pad_to_multiple_of < 1:
            raise InputError(f"pad_to_multiple_of must be a positive integer, got {pad_to_multiple_of}")
        self.pad: int = pad
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each (B, T), int64."""
        multiple = self.pad_to_multiple_of
        length = -(-max(len(example.input_ids) for example in examples) // multiple) * multiple

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.long)

        return {
            "input_ids": padded([example.input_ids for example in examples], self.pad),
            "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
            "labels": padded([example.labels for example in examples], IGNORED),
        }
