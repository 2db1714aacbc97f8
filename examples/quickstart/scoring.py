"""How a reply is scored: it contains what it must."""

from __future__ import annotations

import re


def task_score(reply: str, keys: list[str] | str) -> bool:
    """Whether a reply contains every key, upper and lower case alike."""
    keys = [keys] if isinstance(keys, str) else keys
    return all(key.lower() in reply.lower() for key in keys)


def fact_kept(reply: str, answers: list[str]) -> bool:
    """Whether one of the answers stands in the reply as whole words, upper and lower case and punctuation aside."""
    return any(f" {words(answer)} " in f" {words(reply)} " for answer in answers)


def words(text: str) -> str:
    """A text's words in lower case, single spaces between them."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
