"""Paired tests of before against after on the same records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Differences that vary less than this, relative to their size, are equal but for rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Test:
    """A paired test.

    name: what tables call it.
    p: two-sided p value; None where there are too few records for a test.
    """

    name: str
    p: float | None


def mcnemar(lost: int, gained: int) -> Test:
    """Exact McNemar test: were changes between right and wrong as likely in one direction as in the other?

    The records that changed are heads and tails of a fair coin under the null hypothesis (a two-sided binomial test).

    Args:
        lost: records right before and wrong after.
        gained: records wrong before and right after.
    """
    from scipy.stats import binomtest

    changed = lost + gained
    return Test("McNemar", float(binomtest(lost, changed, 0.5).pvalue) if changed else 1.0)


def paired_t(before: Sequence[float], after: Sequence[float]) -> Test:
    """Paired t-test of the records' own scores.

    Differences that do not vary have no t: p is 1 where nothing changed, and 0 where every record changed by the same.
    """
    from scipy.stats import ttest_rel

    difference = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    if len(difference) < 2:
        return Test("paired t", None)
    size = float(np.abs(difference).max())
    if float(np.ptp(difference)) <= ROUNDING * max(size, float(np.abs(before).max())):
        return Test("paired t", 0.0 if size > ROUNDING * float(np.abs(before).max()) else 1.0)
    return Test("paired t", float(ttest_rel(after, before).pvalue))
