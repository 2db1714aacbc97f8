"""Examples for the eye."""

from __future__ import annotations

from itertools import groupby

from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from imsm.data.rendering import IGNORED, Example, decode

LEARNT = "bold green"


def describe(example: Example, tokenizer: PreTrainedTokenizerBase, tokens: bool = False) -> Group:
    """An example as training sees it: its text, what is learnt in «…» and in colour; with `tokens`, a table of them."""
    learnt = sum(label != IGNORED for label in example.labels)
    title = Text(f"record {example.line}: {len(example.input_ids)} tokens, {learnt} of them learnt", style="bold")
    text = Text()
    start = 0
    for supervised, run in groupby(example.labels, key=lambda label: label != IGNORED):
        end = start + len(list(run))
        piece = _decoded(example.input_ids, start, end, tokenizer)
        text.append(f"«{piece}»" if supervised else piece, style=LEARNT if supervised else None)
        start = end
    return Group(title, text, *([_table(example, tokenizer)] if tokens else []), Text())


def _table(example: Example, tokenizer: PreTrainedTokenizerBase) -> Table:
    table = Table("position", "id", "token", "label")
    for position, (token_id, label) in enumerate(zip(example.input_ids, example.labels, strict=True)):
        table.add_row(
            str(position),
            str(token_id),
            Text(str(tokenizer.convert_ids_to_tokens(token_id))),
            str(label),
            style=LEARNT if label != IGNORED else None,
        )
    return table


def _decoded(ids: list[int], start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of the tokens from `start` to `end`; as a difference, since some tokenizers drop a text's first space."""
    before, through = decode(tokenizer, ids[:start]), decode(tokenizer, ids[:end])
    return through[len(before) :] if through.startswith(before) else decode(tokenizer, ids[start:end])
