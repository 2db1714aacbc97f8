"""The date that some chat templates write: one for all days where texts are sampled and kept, the day's where they are used.

Prompts of the task carry the day's date. Texts that stand beside them must too, or the date would tell the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from imsm.data.turns import user_turn

#: The date of all that is kept; Llama 3.2's template has it where there is no clock.
DATE = datetime(2024, 7, 26)
#: What templates ask for the date.
CLOCK = "strftime_now"


@contextmanager
def one_date(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within: the tokenizer's chat template writes `DATE` in place of the day's date."""
    template = tokenizer.chat_template or ""
    texts = template.values() if isinstance(template, dict) else [template]
    # The environment is the template's own: others write their date as ever.
    names = [_compile_jinja_template(text).environment.globals for text in texts if CLOCK in text]
    clocks = [found[CLOCK] for found in names]
    try:
        for found in names:
            found[CLOCK] = DATE.strftime
        yield
    finally:
        for found, clock in zip(names, clocks, strict=True):
            found[CLOCK] = clock


class Dates:
    """Prompts' tokens with the day's date, and with `DATE`, where that stands before the first turn of the user.

    Of a template that writes no date, and where another text precedes the date, both are the same.

    Args:
        tokenizer: whose chat template may write the date.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        today = _lead(tokenizer)
        with one_date(tokenizer):
            kept = _lead(tokenizer)
        # Up to the date alone: what follows it depends on the messages.
        while today and kept and today[-1] == kept[-1]:
            today, kept = today[:-1], kept[:-1]
        self._today, self._kept = today, kept

    def keep(self, ids: Sequence[int]) -> list[int]:
        """A prompt of today, as it is kept."""
        return _exchanged(ids, self._today, self._kept)

    def renew(self, ids: Sequence[int]) -> list[int]:
        """A prompt that was kept, as it is today."""
        return _exchanged(ids, self._kept, self._today)


def _lead(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens before a user's first text."""
    turn = user_turn(tokenizer)
    return [] if turn is None else list(tokenizer(turn.before, add_special_tokens=False)["input_ids"])


def _exchanged(ids: Sequence[int], old: list[int], new: list[int]) -> list[int]:
    return new + list(ids[len(old) :]) if list(ids[: len(old)]) == old else list(ids)
