"""The wording of a task: what its prompts have in common, told from what each is about, and put in other words."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

#: Prompts that are looked at; more would not change what is common to them.
LOOKED_AT = 2000
#: Words in a row that must be shared, by what share of the prompts, and by how many at least.
RUN = 3
SHARE = 0.2
LEAST = 3
#: How often two words of such a run must go with the third, where they are.
TOGETHER = 0.5
#: A word, a line break, other white space, or another character.
PIECE = re.compile(r"\w+(?:['’]\w+)*|\n|[^\S\n]+|[^\w\s]")
#: Marks that end what stands before them.
ENDING = frozenset(".?!…")
#: Characters that follow a word without a space.
CLOSING = frozenset(".,:;!?…)]}")
#: Changes to a text at a time, at most.
CHANGES = 3
#: Attempts at a change that leaves something of the wording.
ATTEMPTS = 8


@dataclass(frozen=True)
class Part:
    """A stretch of a prompt.

    words: its words, punctuation marks and line breaks, if it is of the wording; its text, if it is content.
    shared: whether it is of the wording.
    """

    words: list[str]
    shared: bool


class Wording:
    """The words that prompts of a task share.

    A word belongs to the wording if it stands in a run of three that a fifth of the prompts have, and at least three, and
    whose first two words are followed by the third, and its last two led by the first, in half of the prompts that have
    them. So a task may have several wordings, with contents anywhere, and contents may begin alike. A prompt's beginning
    and end count as words. In the midst of a line, where contents have phrases too, it takes half of the prompts.

    Args:
        prompts: the texts of each prompt.
    """

    def __init__(self, prompts: Sequence[Sequence[str]]) -> None:
        looked_at = prompts[:: max(len(prompts) // LOOKED_AT, 1)]
        counts: Counter[tuple[str, ...]] = Counter()
        for texts in looked_at:
            words = [_words(text) for text in texts]
            counts.update({run for size in (RUN - 1, RUN) for found in words for run in _runs(found, size)})
        needed = max(LEAST, math.ceil(SHARE * len(looked_at)))
        self.common = {
            run: 2 * count >= len(looked_at)
            for run, count in counts.items()
            if len(run) == RUN and count >= max(needed, TOGETHER * counts[run[1:]], TOGETHER * counts[run[:-1]])
        }
        #: Words of the contents, each as often as it is there.
        self.words = [
            word
            for texts in looked_at
            for text in texts
            for part in self.parts(text)
            if not part.shared
            for word in _words(part.words[0])
            if word.isalnum()
        ]

    def parts(self, text: str) -> list[Part]:
        """A text's wording and contents, in their order; contents as they are, but for white space around them."""
        places = [
            found.span() for found in PIECE.finditer(text) if found.group() == "\n" or not found.group().isspace()
        ]
        words = [text[start:end] for start, end in places]
        shared, usual = [False] * len(words), [False] * len(words)
        for first, run in enumerate(_runs(words, RUN), 1 - RUN):
            if run in self.common:
                for place in range(max(first, 0), min(first + RUN, len(words))):
                    shared[place] = True
                    usual[place] |= self.common[run]
        for is_shared, group in groupby(range(len(words)), key=shared.copy().__getitem__):
            found = list(group)
            inside = found[0] > 0 and found[-1] + 1 < len(words) and all(words[place] != "\n" for place in found)
            if is_shared and inside and not any(usual[place] for place in found):
                shared[found[0] : found[-1] + 1] = [False] * len(found)
        for place in range(1, len(words)):
            if words[place] in ENDING and not shared[place - 1]:
                shared[place] = False
        parts = []
        for is_shared, group in groupby(range(len(words)), key=shared.__getitem__):
            found = list(group)
            stretch = (
                words[found[0] : found[-1] + 1] if is_shared else [text[places[found[0]][0] : places[found[-1]][1]]]
            )
            parts.append(Part(stretch, is_shared))
        return parts

    def contents(self, text: str) -> str:
        """A text without its wording: a content a line."""
        return "\n".join(part.words[0].strip() for part in self.parts(text) if not part.shared).strip()

    def reworded(self, text: str, rng: random.Random) -> str | None:
        """The text in other words, contents as they are; None if it shares no words with others."""
        parts = self.parts(text)
        if not any(_says(part) for part in parts):
            return None
        for _ in range(ATTEMPTS):
            changed = parts
            for change in rng.sample(
                (self._drop, self._shuffle, self._replace, self._remove, _swap), rng.randint(1, CHANGES)
            ):
                changed = change(changed, rng)
            found = joined(changed)
            if found != text and any(_says(part) for part in changed):
                return found
        return None

    def reshaped(self, text: str, rng: random.Random) -> str:
        """The text in the same words, laid out otherwise: case, punctuation, line breaks, quotation marks."""
        parts = self.parts(text)
        shared = [part for part in parts if part.shared]
        changes = rng.sample(SHARED_SHAPES, rng.randint(1, CHANGES)) if shared else []
        for change in changes:
            parts = change(parts, rng)
        found = joined(parts)
        if not changes or rng.random() < 0.2:
            found = whole_shape(found, rng)
        return found

    def _drop(self, parts: Sequence[Part], rng: random.Random) -> list[Part]:
        """Some of the wording's words are left out."""
        share = rng.uniform(0.2, 0.7)
        return _changed(parts, lambda words: [word for word in words if rng.random() > share])

    def _shuffle(self, parts: Sequence[Part], rng: random.Random) -> list[Part]:
        """The words of each stretch of the wording in another order."""
        return _changed(parts, lambda words: rng.sample(words, len(words)))

    def _replace(self, parts: Sequence[Part], rng: random.Random) -> list[Part]:
        """Some of the wording's words are others from contents."""
        if not self.words:
            return list(parts)
        share = rng.uniform(0.2, 0.5)
        return _changed(
            parts,
            lambda words: [
                rng.choice(self.words) if word[0].isalnum() and rng.random() < share else word for word in words
            ],
        )

    def _remove(self, parts: Sequence[Part], rng: random.Random) -> list[Part]:
        """Lines of the wording are left out."""

        def some(words: list[str]) -> list[str]:
            lines: list[list[str]] = [[]]
            for word in words:
                lines[-1].append(word)
                if word == "\n":
                    lines.append([])
            return [word for line in lines if rng.random() < 0.5 for word in line]

        return _changed(parts, some)


def joined(parts: Sequence[Part]) -> str:
    """The text of parts: a space between words, a line break between contents that have nothing else between them."""
    text = ""
    for before, part in zip([None, *parts], parts, strict=False):
        if before is not None and not (part.shared or before.shared):
            text += "\n"
        for word in part.words:
            if word == "\n":
                text = text.rstrip(" ") + word
            elif not text or text.endswith("\n") or (part.shared and word in CLOSING):
                text += word
            else:
                text += " " + word
    return text.strip()


def _words(text: str) -> list[str]:
    return [piece for piece in PIECE.findall(text) if piece == "\n" or not piece.isspace()]


def _runs(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """Each run of so many words, with empty ones before the first and behind the last."""
    edge = [""] * (RUN - 1)
    whole = [*edge, *words, *edge]
    return (tuple(whole[place : place + size]) for place in range(len(whole) - size + 1))


def _says(part: Part) -> bool:
    return part.shared and any(word[0].isalnum() for word in part.words)


def _changed(parts: Sequence[Part], change: Callable[[list[str]], list[str]]) -> list[Part]:
    """The parts with the wording's words changed, those without words left out."""
    found = [Part(change(part.words), True) if part.shared else part for part in parts]
    return [part for part in found if part.words]


def _swap(parts: Sequence[Part], rng: random.Random) -> list[Part]:
    """All of the wording before the contents, or behind them."""
    said = [word for part in parts if part.shared for word in part.words]
    contents = [part for part in parts if not part.shared]
    return [*contents, Part(["\n", *said], True)] if rng.random() < 0.5 else [Part([*said, "\n"], True), *contents]


def _case(parts: Sequence[Part], rng: random.Random) -> list[Part]:
    change = rng.choice((str.lower, str.upper, str.title))
    return _changed(parts, lambda words: [change(word) for word in words])


def _unpunctuated(parts: Sequence[Part], rng: random.Random) -> list[Part]:
    return _changed(parts, lambda words: [word for word in words if word == "\n" or word[0].isalnum()])


def _punctuated(parts: Sequence[Part], rng: random.Random) -> list[Part]:
    mark = rng.choice(("-", "=", "?", "…", "→", "|"))
    return _changed(parts, lambda words: [mark if word in (":", ".") else word for word in words])


def _flattened(parts: Sequence[Part], rng: random.Random) -> list[Part]:
    return _changed(parts, lambda words: [word for word in words if word != "\n"])


def _spaced(parts: Sequence[Part], rng: random.Random) -> list[Part]:
    mark = rng.choice(("\n", ":"))
    return _changed(
        parts, lambda words: [copy for word in words for copy in ([word, "\n"] if word == mark else [word])]
    )


def _quoted(parts: Sequence[Part], rng: random.Random) -> list[Part]:
    before, behind = rng.choice(('""', "''", "“”", "``", "()"))
    return [part if part.shared else Part([f"{before}{part.words[0]}{behind}"], False) for part in parts]


def unmarked(text: str) -> str:
    """A text in small letters, without a mark at its end."""
    return _unended(text.lower()).rstrip()


def whole_shape(text: str, rng: random.Random) -> str:
    """A text in small letters, or without a mark at its end, or with a line break there, or in quotation marks."""
    return rng.choice(WHOLE_SHAPES)(text)


def _unended(text: str) -> str:
    return text.rstrip(".?!:") or text


def _ended(text: str) -> str:
    return text + "\n"


SHARED_SHAPES = (_case, _unpunctuated, _punctuated, _flattened, _spaced, _quoted)
WHOLE_SHAPES: tuple[Callable[[str], str], ...] = (str.lower, _unended, _ended, '"{}"'.format)
