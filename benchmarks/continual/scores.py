"""What a matrix of scores says of learning tasks in a row (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, section 3).

R[i][j] is the score on task j after learning task i, b[j] that of the base model, T the number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def average_accuracy(scores: Matrix) -> float:
    """(1/T) Σ_j R[T][j]: what all tasks come to after the last one."""
    return sum(scores[-1]) / len(scores[-1])


def backward_transfer(scores: Matrix) -> float:
    """(1/(T−1)) Σ_{j<T} R[T][j] − R[j][j]: what learning the later tasks did to the earlier ones; below 0 is forgetting."""
    tasks = len(scores)
    return sum(scores[-1][j] - scores[j][j] for j in range(tasks - 1)) / (tasks - 1)


def forward_transfer(scores: Matrix, base: Sequence[float]) -> float:
    """(1/(T−1)) Σ_{j>1} R[j−1][j] − b[j]: what the tasks before did to one that is yet to be learnt.

    The base model stands where the paper has a model of random weights.
    """
    tasks = len(scores)
    return sum(scores[j - 1][j] - base[j] for j in range(1, tasks)) / (tasks - 1)
