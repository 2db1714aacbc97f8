"""Examples to batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from imsm.data.rendering import IGNORED, Example
from imsm.errors import InputError


class AnswerCollator:
    """Puts each example in a row of its own, or packs several into one; pads rows on the right to the longest one.

    Args:
        tokenizer: gives the padding token; the end-of-sequence token stands in if there is none.
        pad_to_multiple_of: the batch's length is rounded up to a multiple of this.
        row_length: pack the examples of a batch into as few rows of at most so many tokens as first-fit finds; a longer
            example gets a longer row. Without it each has its own row.

    Raises:
        InputError: the tokenizer has neither token, or `pad_to_multiple_of` or `row_length` is not positive.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int = 1, row_length: int | None = None
    ) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise InputError(
                "the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token"
            )
        for name, value in (("pad_to_multiple_of", pad_to_multiple_of), ("row_length", row_length)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be a positive integer, got {value}")
        self.tokenizer = tokenizer
        self.pad: int = pad
        self.pad_to_multiple_of = pad_to_multiple_of
        self.row_length = row_length

    def rows(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The examples of each row, in the order in which they stand there."""
        if self.row_length is None:
            return [[example] for example in examples]
        capacity = max(self.row_length, max(len(example.input_ids) for example in examples))
        rows: list[list[Example]] = []
        room: list[int] = []
        for example in sorted(examples, key=lambda example: -len(example.input_ids)):
            size = len(example.input_ids)
            row = next((i for i, left in enumerate(room) if left >= size), None)
            if row is None:
                row = len(rows)
                rows.append([])
                room.append(capacity)
            rows[row].append(example)
            room[row] -= size
        return rows

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (B, T) int64, with `attention_mask`, or, of packed rows, with `position_ids`.

        Packed rows have no mask: positions start at 0 with each example and with the padding behind the last one, which
        is how transformers keeps them apart. An example's first label is `IGNORED` there: no token of its own predicts it.
        """
        rows = self.rows(examples)
        ids = [[token for example in row for token in example.input_ids] for row in rows]
        labels = [[label for example in row for label in example.labels] for row in rows]
        multiple = self.pad_to_multiple_of
        length = -(-max(map(len, ids)) // multiple) * multiple

        def padded(lines: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([line + [fill] * (length - len(line)) for line in lines], dtype=torch.long)

        if self.row_length is None:
            mask = [[1] * len(row) for row in ids]
            return {
                "input_ids": padded(ids, self.pad),
                "attention_mask": padded(mask, 0),
                "labels": padded(labels, IGNORED),
            }
        labels = [[label for example in row for label in (IGNORED, *example.labels[1:])] for row in rows]
        positions = [
            [position for example in row for position in range(len(example.input_ids))]
            + list(range(length - len(filled)))
            for row, filled in zip(rows, ids, strict=True)
        ]
        return {
            "input_ids": padded(ids, self.pad),
            "position_ids": torch.tensor(positions, dtype=torch.long),
            "labels": padded(labels, IGNORED),
        }
