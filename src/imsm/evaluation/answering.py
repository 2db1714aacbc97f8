"""Tasks of kind `answer`: prompts are answered greedily (paper: "Evaluation Metrics"), and the answers scored."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from imsm.errors import InputError, first_line
from imsm.evaluation.candidates import Candidate
from imsm.evaluation.results import RecordResult
from imsm.evaluation.task import Task, TaskRecord
from imsm.generation import Prompt, prompt_ids


def asked(task: Task, record: TaskRecord, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """What the model is given: a conversation, the prompt's text, or a user's turn of it where the task chats."""
    if record.turns:
        return [{"role": role, "content": content} for role, content in record.turns]
    chats = bool(tokenizer.chat_template) if task.chat == "auto" else task.chat
    return [{"role": "user", "content": record.prompt}] if chats else record.prompt


def tokens(tokenizer: PreTrainedTokenizerBase, task: Task, records: Sequence[TaskRecord]) -> list[list[int]]:
    """What is asked of each record, in tokens.

    Raises:
        InputError: the chat template refuses a record.
    """
    found = []
    for number, record in enumerate(records, 1):
        try:
            found.append(prompt_ids(tokenizer, asked(task, record, tokenizer)))
        except TemplateError as error:
            raise InputError(
                f"record {number} of task {task.name!r}: the chat template refuses it ({first_line(error)}); correct the "
                "record, or take another tokenizer"
            ) from error
    return found


def refuse_long(task: Task, lengths: Sequence[int], longest: int | None) -> None:
    """Raises `InputError` if one of the task's records, with its answer, is longer than the model can read."""
    more = 0 if task.kind == "text" else task.max_new_tokens
    for number, length in enumerate(lengths, 1):
        if longest and length + more > longest:
            raise InputError(
                f"record {number} of task {task.name!r} takes {length + more} tokens, the model reads {longest}; leave the "
                "record out, or lower the task's max_new_tokens"
            )


def run(candidate: Candidate, task: Task, records: Sequence[tuple[int, TaskRecord]]) -> list[RecordResult]:
    """The candidate's answers to a batch of records, each with its place in the task; not scored yet."""
    prompts = [asked(task, record, candidate.tokenizer) for _, record in records]
    said = candidate.own.answers(prompts, task.max_new_tokens)
    return [
        RecordResult(index, record.prompt, list(record.references), answer.text)
        for (index, record), answer in zip(records, said, strict=True)
    ]
