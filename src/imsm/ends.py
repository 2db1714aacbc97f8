"""The tokens that end answers, as generation settings have them: none, one, or several."""

from __future__ import annotations

from collections.abc import Sequence

#: As transformers knows `eos_token_id`.
Ends = int | Sequence[int] | None


def listed(ends: Ends) -> list[int]:
    """The tokens, none for None."""
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def joined(ends: Ends, more: Ends) -> Ends:
    """Those of both, each once, the first ones first; `ends` as it is if there is nothing new among `more`."""
    known, new = listed(ends), dict.fromkeys(listed(more))
    added = [end for end in new if end not in known]
    if not added:
        return ends
    return [*known, *added] if len(known) + len(added) > 1 else added[0]
