"""Formats of records, and the prompt and answers in a record of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from imsm.data.records import Record, RecordSet, type_name
from imsm.errors import InputError

#: Each format's keys; the first format that a record is complete in is its own.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "input/output": ("input", "output"),
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")


class RecordError(ValueError):
    """Why one record cannot be used; becomes a `Problem` of the set."""


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion, as plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an answer to learn; the assistant's turns from `first` on are learnt."""

    messages: list[dict[str, Any]]
    first: int


def find_format(found: RecordSet) -> str:
    """The format of all records, found by looking at their keys.

    Raises:
        InputError: no record is of a known format, or not all of those that are have one in common.
    """
    complete = {
        name: [record for record in found.records if all(key in record.fields for key in keys)]
        for name, keys in FORMATS.items()
    }
    known = {record.line for records in complete.values() for record in records}
    if not known:
        raise InputError(
            f"no record of {found.source} has a known format: keys found: {_keys(found.records)}; expected: "
            + ", or ".join(" and ".join(map(repr, keys)) for keys in FORMATS.values())
        )
    for name, records in complete.items():
        if len(records) == len(known):
            if name == "input/output" and any("instruction" in record.fields for record in records):
                raise InputError(
                    f"records of {found.source} have an 'instruction' beside 'input', which would be left out: join "
                    "the two to one text in 'input'"
                )
            return name
    firsts = {name: records[0].line for name, records in complete.items() if records}
    raise InputError(
        f"{found.source} mixes formats: "
        + ", ".join(f"{name} ({found.unit} {line})" for name, line in firsts.items())
        + f"; keys found: {_keys(found.records)}; split it into files of one format"
    )


def parse(fields: dict[str, Any], format: str) -> Pair | Conversation:
    """Prompt and answers of a record's fields; other keys are ignored.

    Raises:
        RecordError: a field is missing, of the wrong type, or empty.
    """
    missing = [key for key in FORMATS[format] if key not in fields]
    if missing:
        keys = ", ".join(map(repr, fields)) or "none"
        raise RecordError(f"{' and '.join(map(repr, missing))} missing; keys found: {keys}")
    if format == "messages":
        messages = read_messages(fields["messages"], "messages")
        return _conversation(messages, 0)
    if format == "input/output":
        output = fields["output"]
        if isinstance(output, list):
            if not output:
                raise RecordError("'output' is an empty list")
            output = output[0]
        return Pair(_text(fields["input"], "input"), _text(output, "output"))
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = read_messages(prompt, "prompt")
        return _conversation(messages + read_messages(completion, "completion"), len(messages))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise RecordError(
            "'prompt' and 'completion' must both be texts or both lists of messages, got "
            f"{type_name(prompt)} and {type_name(completion)}"
        )
    return Pair(_text(prompt, "prompt"), _text(completion, "completion"))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"'{name}' must be a text, got {type_name(value)}")
    if not value.strip():
        raise RecordError(f"'{name}' is empty")
    refuse_half_characters(value, name)
    return value


def refuse_half_characters(text: str, name: str) -> None:
    """Raises `RecordError` for a text that no tokenizer and no file takes: one with half of a character beyond U+FFFF."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RecordError(f"'{name}' has half of a character (a lone surrogate) in {text[:60]!r}; correct it")


def read_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages in a field of that name, what is null left out.

    Raises:
        RecordError: it is not a list of messages.
    """
    if not isinstance(value, list):
        raise RecordError(f"'{name}' must be a list of messages, got {type_name(value)}")
    if not value:
        raise RecordError(f"'{name}' is empty")
    messages = []
    for index, message in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise RecordError(f"'{where}' must be an object with 'role' and 'content', got {type_name(message)}")
        if message.get("role") not in ROLES:
            raise RecordError(f"'{where}.role' must be one of {', '.join(ROLES)}; got {message.get('role')!r}")
        content = message.get("content")
        if message["role"] == "assistant":
            _text(content, f"{where}.content")
        elif not isinstance(content, str):
            raise RecordError(f"'{where}.content' must be a text, got {type_name(content)}")
        else:
            refuse_half_characters(content, f"{where}.content")
        messages.append({key: part for key, part in message.items() if part is not None})
    return messages


def _conversation(messages: list[dict[str, Any]], first: int) -> Conversation:
    answers = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if not answers:
        raise RecordError("no assistant turn, so there is nothing to learn")
    if answers[0] == 0:
        raise RecordError("the first turn is the assistant's; a prompt must come before it")
    return Conversation(messages[: answers[-1] + 1], first)


def _keys(records: Sequence[Record]) -> str:
    keys = sorted({repr(key) for record in records for key in record.fields})
    return ", ".join(keys[:20] + (["…"] if len(keys) > 20 else [])) or "none"
