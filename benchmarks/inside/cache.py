"""The twin cache with what the gates behind layers need of the tokens it holds."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from imsm.cache import TwinCache
from imsm.errors import InputError
from imsm.query import RunningQuery


class InsideCache(TwinCache):
    """A `TwinCache` of one answer.

    Attributes:
        inside: by layer, sums of both streams' normalised hidden states over the tokens of the query.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside: dict[str, RunningQuery] = {}

    def begin_answer(self, prompt_length: int | None) -> None:
        """As the base class.

        Raises:
            InputError: the cache holds another answer, whose states were mixed by its own query.
        """
        if self.seen > 0:
            raise InputError(
                "with gates behind layers a cache serves one answer: start from a fresh cache for the next"
            )
        super().begin_answer(prompt_length)

    def reset(self) -> None:
        super().reset()
        self.inside = {}

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise InputError("a cache of gates behind layers cannot be cropped; start from a fresh cache")

    def _select(self, rows: Tensor) -> None:
        super()._select(rows)
        self.inside = {layer: sums.select(rows) for layer, sums in self.inside.items()}
