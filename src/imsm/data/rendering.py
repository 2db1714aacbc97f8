"""From prompt and answers to tokens and labels.

A prompt's tokens are exactly those that generation makes of it; what follows never changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from imsm.data.formats import Conversation, Pair, RecordError
from imsm.errors import InputError

#: Label of the tokens that are not learnt.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A tokenised record.

    input_ids: prompt and answers, (T,).
    labels: the answers' tokens where they stand, `IGNORED` elsewhere, (T,).
    line: the record's number in its source.
    """

    input_ids: list[int]
    labels: list[int]
    line: int


class Renderer:
    """Turns pairs and conversations into examples.

    Args:
        tokenizer: of the base model, or of the adapter or checkpoint that is gone on with.
        add_eos: end answers with the end-of-sequence token, unless the chat template ends them.
        max_length: tokens of the longest record that is rendered, `data.max_length`; None for no limit.

    Raises:
        InputError: `add_eos` with a tokenizer that has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_eos: bool = True, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.eos: int | None = tokenizer.eos_token_id if add_eos else None
        self.special = set(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        if add_eos and self.eos is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token to end answers with; set data.add_eos to false"
            )

    def render(self, parsed: Pair | Conversation, line: int) -> Example:
        """Tokens and labels of one record.

        Raises:
            RecordError: it is longer than `max_length`, the chat template refuses the conversation, or an answer has no
                tokens.
            InputError: there is no chat template, or its text for a turn depends on what comes after.
        """
        found = self._pair(parsed, line) if isinstance(parsed, Pair) else self._conversation(parsed, line)
        self._refuse_long(len(found.input_ids))
        return found

    def _refuse_long(self, length: int, more: bool = False) -> None:
        """Raises `RecordError` if so many tokens, and `more` to come, are too many."""
        if self.max_length is not None and length > self.max_length:
            raise RecordError(
                f"{'at least ' if more else ''}{length} tokens, more than data.max_length {self.max_length}"
            )

    def _pair(self, pair: Pair, line: int) -> Example:
        prompt = self._tokens(pair.prompt, special=True)
        ids = self._extend(prompt, pair.prompt, pair.completion, special=True)
        if self.eos is not None and ids[-1] != self.eos:
            ids = ids + [self.eos]
        if len(ids) == len(prompt):
            raise RecordError("the answer has no tokens")
        return Example(ids, [IGNORED] * len(prompt) + ids[len(prompt) :], line)

    def _conversation(self, conversation: Conversation, line: int) -> Example:
        messages = conversation.messages
        text, ended = "", False
        ids: list[int] = []
        labels: list[int] = []
        for index in range(conversation.first, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            prompt = self._template(messages[:index], prompt=True)
            turn = self._template(messages[: index + 1], prompt=False)
            if not (prompt.startswith(text) and turn.startswith(prompt)):
                raise InputError(
                    f"the tokenizer's chat template changes the text before turn {index + 1} once that turn is there "
                    "(some remove earlier thinking), so prompts would not be those of generation; give each answer a "
                    "record of its own, with 'prompt' and 'completion' as lists of messages"
                )
            ids = self._extend(ids, text, prompt[len(text) :])
            labels += [IGNORED] * (len(ids) - len(labels))
            ids = self._extend(ids, prompt, turn[len(prompt) :])
            end, ended = self._end_of_answer(ids, len(labels))
            labels += ids[len(labels) : end]
            labels += [IGNORED] * (len(ids) - len(labels))
            # Every answer reads all before it again, so what is too long already is not read on.
            self._refuse_long(len(ids), more=index + 1 < len(messages))
            text = turn
        if self.eos is not None and not ended:
            ids, labels = ids + [self.eos], labels + [self.eos]
        return Example(ids, labels, line)

    def _template(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise InputError(
                "records are conversations, but the model's tokenizer has no chat template; use a model that has one, "
                "or records of 'prompt' and 'completion' texts"
            )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise RecordError(f"the chat template refuses the conversation: {error}") from error

    def _extend(self, ids: list[int], text: str, more: str, special: bool = False) -> list[int]:
        """`ids` of `text`, then those of `more`: tokenised as one text unless that changes `ids`."""
        whole = self._tokens(text + more, special)
        return whole if whole[: len(ids)] == ids else ids + self._tokens(more, special=False)

    def _end_of_answer(self, ids: list[int], start: int) -> tuple[int, bool]:
        """Where the answer that starts at `start` ends, and whether with an end-of-turn token.

        White space that the template puts behind that token is not the answer's: generation stops before it.
        """
        end = len(ids)
        while end > start and ids[end - 1] not in self.special and not decode(self.tokenizer, [ids[end - 1]]).strip():
            end -= 1
        ended = end > start and ids[end - 1] in self.special
        return (end if ended else len(ids)), ended

    def _tokens(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of tokens, special ones included, with nothing tidied up."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
