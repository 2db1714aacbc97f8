"""Conversations that turn from a task to something else, and back: whether a prompt is the task's, its last turn decides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from imsm.data.rendering import Example
from imsm.data.turns import Messages, Spoken, Turns, prompt_and_answer


class Answered(Protocol):
    """A prompt that is not the task's, and its answer, such as `imsm.samples.Sample`."""

    @property
    def prompt_ids(self) -> list[int]: ...

    @property
    def answer_ids(self) -> list[int]: ...


def turning(
    examples: Sequence[Example], dreams: Sequence[Answered], tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Conversations of an example and a dream each, as many as there are of the fewer, the pairs drawn by the seed.

    A system message of the example's stands first in both. Dreams without an answer, and prompts that are not written by
    the tokenizer's chat template or plain text, are passed over; without a chat template there are no conversations.

    Args:
        examples: of the task.
        dreams: with answers.
        tokenizer: that of both.
        seed: of the pairs.

    Returns:
        Prompts in which a dream and its answer are followed by the example's prompt, which are the task's; and prompts in
        which the example and its answer are followed by the dream's, which are not.
    """
    turns = Turns(tokenizer)
    if turns.user is None:
        return [], []
    tasks = _told(turns, [prompt_and_answer(example) for example in examples])
    others = _told(turns, [(dream.prompt_ids, dream.answer_ids) for dream in dreams])
    rng = random.Random(f"{seed} turning")
    rng.shuffle(tasks)
    rng.shuffle(others)
    to_task, to_dream = [], []
    for (task, solved), (other, said) in zip(tasks, others, strict=False):
        system = [message for message in task if message["role"] == "system"]
        asked = task[len(system) :]
        strange = [message for message in other if message["role"] != "system"]
        to_task.append(turns.write(Spoken([*system, *strange, said, *asked], chat=True)))
        to_dream.append(turns.write(Spoken([*system, *asked, solved, *strange], chat=True)))
    return [ids for ids in to_task if ids], [ids for ids in to_dream if ids]


def _told(turns: Turns, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[Messages, dict[str, str]]]:
    """Messages and answer of each pair that has both."""
    found = []
    for prompt, answer in pairs:
        spoken = turns.read(prompt)
        text = str(turns.tokenizer.decode(answer, skip_special_tokens=True)).strip()
        if spoken is not None and text:
            found.append((spoken.messages, {"role": "assistant", "content": text}))
    return found
