"""How sure a score is: 95 % percentile intervals from records drawn with replacement (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from imsm.evaluation.metrics import Metric
from imsm.evaluation.results import Estimate

#: Percentiles that 95 % of the resampled values lie between.
BOUNDS = (2.5, 97.5)


def bootstrap(metric: Metric, columns: np.ndarray, resamples: int = 1000, seed: int = 0) -> Estimate:
    """The metric over (n, k) columns, one row a record, with its interval. The same seed gives the same interval."""
    return _estimate(lambda rows: metric.value(columns[rows]), len(columns), resamples, seed)


def paired_bootstrap(
    metric: Metric, before: np.ndarray, after: np.ndarray, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """The metric of `after` less that of `before`, (n, k) columns of the same records in the same order.

    Each resample draws the same records from both, so that what makes a record hard for both cancels.
    """
    assert before.shape == after.shape, "before and after are columns of the same records"
    return _estimate(lambda rows: metric.value(after[rows]) - metric.value(before[rows]), len(before), resamples, seed)


def _estimate(value: Callable[[np.ndarray], float], records: int, resamples: int, seed: int) -> Estimate:
    assert records, "there are no records"
    generator = np.random.default_rng(seed)
    values = [value(generator.integers(records, size=records)) for _ in range(resamples)]
    low, high = np.percentile(values, BOUNDS)
    return Estimate(value(np.arange(records)), float(low), float(high))
