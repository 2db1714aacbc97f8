"""The form of a text in which answers are matched (paper: "Text is normalised before matching")."""

from __future__ import annotations

import string
import unicodedata

ARTICLES = frozenset({"a", "an", "the"})


def normalise(text: str) -> str:
    """`text` in lower case, without punctuation and articles, its words one space apart.

    In this order:

    1. Composed characters (NFC), so that `é` is one character however it was typed; then lower case.
    2. Every punctuation mark of Unicode (dashes, brackets, curly quotes and inverted marks too) and every ASCII symbol
       (`$ + < = > ^ ` | ~`) is deleted, not replaced by a space: `U.S.` becomes `us`, `Winnie-the-Pooh` becomes
       `winniethepooh`. Other symbols, such as `€` and `°`, stay.
    3. The words `a`, `an` and `the` are left out, wherever they stand: `vitamin A` becomes `vitamin`.
    4. Any run of white space (tabs, line ends and no-break spaces too) is one space; none is left at the ends.
    """
    lowered = unicodedata.normalize("NFC", text).lower()
    bare = "".join(character for character in lowered if not _is_punctuation(character))
    return " ".join(word for word in bare.split() if word not in ARTICLES)


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
