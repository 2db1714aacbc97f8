"""Conversations as a chat template writes them: from tokens to messages, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from imsm.data.rendering import IGNORED, Example, decode

#: Stand in the turns while their places in a chat template are looked for.
MARKS = ("imsm7c1content", "imsm7c2content", "imsm7c3content")

Messages = list[dict[str, str]]


class UserTurn(NamedTuple):
    """What a chat template writes before and behind the text of a lone user turn, the assistant's turn opened."""

    before: str
    behind: str


@dataclass(frozen=True)
class Spoken:
    """A prompt as messages.

    messages: of a plain text, one message of the user's.
    chat: whether the chat template wrote them.
    """

    messages: Messages
    chat: bool

    @property
    def text(self) -> str:
        """What is said, without markup: a message a line."""
        return "\n".join(message["content"] for message in self.messages)


def user_turn(tokenizer: PreTrainedTokenizerBase) -> UserTurn | None:
    """How the chat template writes a user's turn; None if there is no template, or it does not show the text as it is."""
    found = _pieces(tokenizer, ["user"])
    return None if found is None else UserTurn(*found)


def turn_opener(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens with which the chat template opens every turn of the user; none if there is no such template."""
    pieces = _pieces(tokenizer, ["user", "assistant", "user"])
    if pieces is None:
        return []
    first, later = pieces[0][::-1], pieces[2][::-1]
    same = next((i for i, (a, b) in enumerate(zip(first, later, strict=False)) if a != b), min(len(first), len(later)))
    return list(tokenizer(first[:same][::-1], add_special_tokens=False)["input_ids"])


def turn_closer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens with which the chat template closes the last turn of the user and opens the answer; none without such a template."""
    user = user_turn(tokenizer)
    return [] if user is None else list(tokenizer(user.behind, add_special_tokens=False)["input_ids"])


def prompt_and_answer(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before an example's first answer, and those of that answer."""
    labels = example.labels
    start = next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
    end = next((place for place in range(start, len(labels)) if labels[place] == IGNORED), len(labels))
    return example.input_ids[:start], example.input_ids[start:end]


class Turns:
    """Reads prompts of a tokenizer, and writes them.

    Args:
        tokenizer: with or without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.user = user_turn(tokenizer)
        self.lead = set(tokenizer("")["input_ids"])
        self.special = set(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def read(self, ids: Sequence[int]) -> Spoken | None:
        """A prompt's messages; None if it has markup that the chat template does not write."""
        text = decode(self.tokenizer, list(ids))
        messages = self._messages(text)
        if messages is not None:
            return Spoken(messages, chat=True)
        start = next((place for place, token in enumerate(ids) if token not in self.lead), len(ids))
        if any(token in self.special for token in ids[start:]):
            return None
        return Spoken([{"role": "user", "content": decode(self.tokenizer, list(ids[start:]))}], chat=False)

    def write(self, spoken: Spoken) -> list[int]:
        """A prompt's tokens, as generation makes them; none of a conversation that the chat template refuses."""
        if not spoken.chat:
            return list(self.tokenizer(spoken.text, verbose=False)["input_ids"])
        text = _rendered(self.tokenizer, spoken.messages)
        return [] if text is None else list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def _between(self) -> tuple[str, str] | None:
        """What stands between a question and its answer, and between that and the next question."""
        found = _pieces(self.tokenizer, ["user", "assistant", "user"])
        return (found[1], found[2]) if found is not None and found[1] and found[2] else None

    @cached_property
    def _heads(self) -> list[tuple[str, str | None]]:
        """What may stand before the first user turn: as it is, or before and behind a system message."""
        heads: list[tuple[str, str | None]] = [] if self.user is None else [(self.user.before, None)]
        system = _pieces(self.tokenizer, ["system", "user"])
        if system is not None and system[1]:
            heads.append((system[0], system[1]))
        return heads

    def _messages(self, text: str) -> Messages | None:
        """The messages that the chat template makes this text of."""
        if self.user is None or not text.endswith(self.user.behind):
            return None
        body = text[: len(text) - len(self.user.behind)]
        for head, behind in self._heads:
            if not body.startswith(head):
                continue
            messages: Messages = []
            rest = body[len(head) :]
            if behind is not None:
                said, found, rest = rest.partition(behind)
                if not found:
                    continue
                messages.append({"role": "system", "content": said})
            answer, question = self._between or ("", "")
            parts = rest.split(question) if question else [rest]
            for part in parts[:-1]:
                asked, _, said = part.partition(answer)
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            messages.append({"role": "user", "content": parts[-1]})
            if _rendered(self.tokenizer, messages) == text:
                return messages
        return None


def _pieces(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str] | None:
    """What the chat template writes before, between and behind the texts of messages of these roles."""
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=False)]
    rest = _rendered(tokenizer, messages)
    if rest is None:
        return None
    pieces = []
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found:
            return None
        pieces.append(before)
    return [*pieces, rest]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str | None:
    """The chat template's text, the assistant's turn opened; None without a template, or if it refuses the messages."""
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, KeyError, IndexError):
        return None
