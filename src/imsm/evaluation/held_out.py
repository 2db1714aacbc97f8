"""Tasks whose records come from no file of their own: records of training data that were held out, and dreams."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from imsm.data import Example
from imsm.data.rendering import decode
from imsm.data.turns import Turns, prompt_and_answer
from imsm.errors import InputError
from imsm.evaluation.metrics import DEFAULT_METRICS, METRICS
from imsm.evaluation.task import Task, TaskRecord
from imsm.samples import Sample

#: Tokens that an answer may take beyond the longest one wanted, so that one that goes on shows as wrong.
MORE = 8
#: Longest answer to a dream, as with the built-in tasks of kept answers.
KEPT_TOKENS = 16


def held_out_task(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, metric: str, name: str = "held_out"
) -> tuple[Task, list[TaskRecord]]:
    """The task of answering examples' prompts, each held against the example's first answer.

    Args:
        examples: with a prompt before their first answer.
        tokenizer: that of the examples.
        metric: of `METRICS`, for answers.
        name: the task's name.

    Raises:
        InputError: there is no such metric, it cannot score an answer, or an example has no prompt.
    """
    fitting = [key for key, value in METRICS.items() if value.kind == "answer"]
    if metric not in fitting:
        raise InputError(f"the metric must be one of {', '.join(fitting)}; got {metric!r}")
    turns, records, longest = Turns(tokenizer), [], 1
    for example in examples:
        prompt, answer = prompt_and_answer(example)
        longest = max(longest, len(answer))
        reference = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        if not prompt:
            raise InputError(f"record {example.line} has no prompt before its answer, so that nothing can be asked")
        if not METRICS[metric].accepts(reference):
            raise InputError(
                f"record {example.line}: the metric {metric} needs {METRICS[metric].expects} as answer, got {reference!r}"
            )
        records.append(_asked(turns, prompt, (reference,)))
    task = Task(name, "Held-out records", "answer", "", (metric,), max_new_tokens=longest + MORE)
    return task, records


def dreams_task(
    dreams: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, name: str = "kept_dreams"
) -> tuple[Task, list[TaskRecord]]:
    """The task of still answering dreams as the base model does."""
    turns = Turns(tokenizer)
    task = Task(
        name,
        "Dreams: answers kept",
        "kept",
        "",
        DEFAULT_METRICS["kept"],
        reference=None,
        max_new_tokens=KEPT_TOKENS,
    )
    return task, [_asked(turns, sample.prompt_ids, ()) for sample in dreams]


def _asked(turns: Turns, prompt: list[int], references: tuple[str, ...]) -> TaskRecord:
    """The record that asks with these tokens."""
    spoken = turns.read(prompt)
    if spoken is None:  # markup that is not the chat template's: a text like any other
        start = next((place for place, token in enumerate(prompt) if token not in turns.special), 0)
        return TaskRecord(decode(turns.tokenizer, prompt[start:]), references)
    if not spoken.chat:
        return TaskRecord(spoken.text, references)
    messages = tuple((message["role"], message["content"]) for message in spoken.messages)
    said = "\n".join(f"{role}: {content}" for role, content in messages)
    return TaskRecord(messages[0][1] if len(messages) == 1 else said, references, messages)
