"""Prompt templates: texts with names of fields in braces, such as `Question: {question}`."""

from __future__ import annotations

import string
from collections.abc import Mapping

from imsm.errors import InputError


def prompt_fields(template: str) -> list[str]:
    """The fields that a template names, in order.

    Raises:
        InputError: it names none, its braces do not pair, or anything but a field's name stands in them.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"the prompt {template!r} is wrong: {error}; write {{{{ and }}}} for braces as such"
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion or not name.strip() or set(name) & set(".[]")):
            raise InputError(f"the prompt {template!r} must have the bare name of a field in each pair of braces")
    names = [name for _, name, _, _ in parts if name is not None]
    if not names:
        raise InputError(f"the prompt {template!r} must name a field of the records in braces, such as {{input}}")
    return names


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each field's value in its place; braces in a value stay."""
    return "".join(
        literal + ("" if name is None else values[name]) for literal, name, _, _ in string.Formatter().parse(template)
    )
