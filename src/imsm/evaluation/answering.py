"""Tasks of kind `answer`: prompts are answered greedily (paper: "Evaluation Metrics"), and the answers scored."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from imsm.evaluation.candidates import Candidate
from imsm.evaluation.results import RecordResult
from imsm.evaluation.task import Task, TaskRecord
from imsm.generation import Prompt


def asked(task: Task, record: TaskRecord, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """What the model is given: a conversation, the prompt's text, or a user's turn of it where the task chats."""
    if record.turns:
        return [{"role": role, "content": content} for role, content in record.turns]
    chats = bool(tokenizer.chat_template) if task.chat == "auto" else task.chat
    return [{"role": "user", "content": record.prompt}] if chats else record.prompt


def run(candidate: Candidate, task: Task, records: Sequence[tuple[int, TaskRecord]]) -> list[RecordResult]:
    """The candidate's answers to a batch of records, each with its place in the task; not scored yet."""
    prompts = [asked(task, record, candidate.tokenizer) for _, record in records]
    said = candidate.own.answers(prompts, task.max_new_tokens)
    return [
        RecordResult(index, record.prompt, list(record.references), answer.text)
        for (index, record), answer in zip(records, said, strict=True)
    ]
