"""A task: what is asked, where its records come from, and how answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from imsm.errors import InputError

#: answer: prompts are answered and the answers scored; text: plain text is scored; kept: answers are held against the
#: base model's own.
Kind = Literal["answer", "text", "kept"]


@dataclass(frozen=True)
class TaskRecord:
    """One record of a task.

    prompt: what the model is given as text; for plain text, the text; for a conversation, its turns to be read.
    references: the answers that count; empty where the task has none.
    turns: role and content of a conversation's turns, which the chat template makes the prompt of.
    """

    prompt: str
    references: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class HubSource:
    """Where a task's records are on the Hub.

    name, config, split, revision: as `datasets.load_dataset` takes them.
    convert: a row of it, its labels by name, to records in the task's prompt format.
    """

    name: str
    config: str | None
    split: str
    convert: Callable[[Mapping[str, Any]], list[TaskRecord]]
    revision: str | None = None


@dataclass(frozen=True)
class Task:
    """A task.

    name: what `--tasks` calls it.
    title: what tables call it.
    kind: what is measured, see `Kind`.
    file: its records in the data root, a .jsonl, .json or .parquet file such as `mrpc/test.jsonl`.
    metrics: keys of `METRICS`; the first is the task's score.
    hub: the public data set, for when there is no data root.
    prompt: template of the prompt over the file's fields, such as `{input}`.
    reference: the field with the reference answer or answers; None if there are none.
    max_new_tokens: longest answer.
    chance: the score of guessing, if guessing has a chance.
    chat: ask in the tokenizer's chat template, as a user's turn; "auto": where it has one.
    messages: the field with a conversation, which is asked up to its last assistant's turn in place of the prompt.
    limit: records at most, whatever more a run would take.

    Raises:
        InputError: the fields contradict each other.
    """

    name: str
    title: str
    kind: Kind
    file: str
    metrics: tuple[str, ...]
    hub: HubSource | None = None
    prompt: str = "{input}"
    reference: str | None = "output"
    max_new_tokens: int = 32
    chance: float | None = None
    chat: bool | Literal["auto"] = False
    messages: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.metrics:
            raise InputError(f"task {self.name!r} needs at least one metric")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens of task {self.name!r} must be positive, got {self.max_new_tokens}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"the limit of task {self.name!r} must be positive, got {self.limit}")
        if self.messages is not None and self.kind == "text":
            raise InputError(f"task {self.name!r} scores plain texts, which are no conversations; leave out messages")
