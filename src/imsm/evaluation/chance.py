"""Records lost and gained beyond what guessing alone brings about.

The response model: before and after, a model either knows a record and answers it right, or guesses and is right with
the guess rate c of the task, each time anew. Let U be the records that are known neither before nor after. Among them

    wrong, wrong    U (1 - c) (1 - c)
    right, wrong    U c (1 - c)          looks like a loss
    wrong, right    U (1 - c) c          looks like a gain

and no other records are wrong both times. So the n00 records that are wrong both times tell how many were lost by
luck, and as many gained by luck:

    by luck = n00 c / (1 - c)

With two answers it is as many as are wrong both times, with four a third of them. Taking it off both sides leaves the
net change as it was. What is left of the losses is at least 0, and at most the records that the base had right beyond
chance, n (s - c) with s its share right: of the share (s - c) / (1 - c) that it knew, a record forgotten shows as a
loss unless guessed right after, so with probability 1 - c. For gains, s is the share right after. The bounds also
serve where a model does not guess afresh, such as one that said yes to everything and says no to everything now.

The idea of counting changes record by record and taking off those that guessing explains is from Harmon et al.,
"Mapping Post-Training Forgetting in Language Models at Scale" (arXiv 2510.17776). They expect the changes from the two
accuracies; here the records that are wrong both times stand in their place, so that what the two models know need not
be independent, which for a model and its fine-tune it is not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Adjusted:
    """Records lost and gained, adjusted for chance.

    by_luck: losses, and as many gains, that guessing alone brings about.
    lost, gained: what is left of those observed; fractions of a record are possible.
    """

    by_luck: float
    lost: float
    gained: float


def adjust(kept: int, lost: int, gained: int, wrong: int, guess_rate: float) -> Adjusted:
    """Takes chance off losses and gains, as the module says.

    Args:
        kept, lost, gained, wrong: records right both times, right before only, right after only, never right.
        guess_rate: how often a guess is right, in [0, 1).
    """
    records = kept + lost + gained + wrong
    by_luck = wrong * guess_rate / (1 - guess_rate)
    known_before = max(0.0, kept + lost - records * guess_rate)
    known_after = max(0.0, kept + gained - records * guess_rate)
    return Adjusted(
        by_luck,
        min(max(0.0, lost - by_luck), known_before),
        min(max(0.0, gained - by_luck), known_after),
    )
