"""What is read out of a free answer before it is scored: a label, a number, words."""

from __future__ import annotations

import re
from collections import Counter
from decimal import Decimal
from typing import Literal

from imsm.evaluation.normalise import normalise

Label = Literal["yes", "no"]

#: A number that is no part of a word or of another number: a minus, a currency sign, or both; then digits, thousands set
#: off by commas.
NUMBER = (
    r"(?<![^\W_])(?<![0-9]\.)(?P<minus>[-−]?)[$£€]?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
FINAL = re.compile(r"the answer is\W*?" + NUMBER, re.IGNORECASE)
ANY = re.compile(NUMBER)


def label(answer: str) -> Label | None:
    """The first word of the normalised answer that is `yes` or `no`; None if there is none.

    Only these two words count: `not`, `nope` and `true` are no labels, and `yes/no` is the word `yesno`.
    """
    labels: dict[str, Label] = {"yes": "yes", "no": "no"}
    return next((labels[word] for word in normalise(answer).split() if word in labels), None)


def number(answer: str) -> Decimal | None:
    """N of the first `The answer is N.`, else the last number of the answer; None if there is none.

    Between `is` and N only signs may stand, as in `the answer is: **$1,450.00**`. A minus belongs to a number unless
    a digit or letter is right before it: `5-3` ends in 3.
    """
    final = FINAL.search(answer)
    found = [final] if final else list(ANY.finditer(answer))
    if not found:
        return None
    value = Decimal(found[-1]["digits"].replace(",", ""))
    return -value if found[-1]["minus"] else value


def equal(answer: str, reference: str) -> bool:
    """Whether both have the same normalised text."""
    said, wanted = _forms(answer, reference)
    return said == wanted


def contained(answer: str, reference: str) -> bool:
    """Whether the words of the normalised reference stand in the normalised answer, one after the other."""
    said, wanted = _forms(answer, reference)
    return f" {wanted} " in f" {said} "


def overlap(answer: str, reference: str) -> float:
    """F1 of the words that the normalised answer and reference share, each as often as both have it."""
    said, wanted = (form.split() for form in _forms(answer, reference))
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def _forms(answer: str, reference: str) -> tuple[str, str]:
    """Both normalised; but a reference of which nothing is left, such as `A` or `?`, is matched as it was written."""
    wanted = normalise(reference)
    if wanted:
        return normalise(answer), wanted
    return " ".join(answer.lower().split()), " ".join(reference.lower().split())
