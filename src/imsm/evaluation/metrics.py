"""How records are scored (paper: "Evaluation Metrics"): each metric's own columns a record, and its value over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from imsm.errors import InputError
from imsm.evaluation.readings import Label, contained, equal, label, number, overlap
from imsm.evaluation.results import RecordResult
from imsm.evaluation.task import Kind

#: A label as a number; an answer without one is a class of its own.
CLASSES: dict[Label | None, float] = {"no": 0.0, "yes": 1.0, None: 2.0}


@dataclass(frozen=True)
class Metric:
    """A metric.

    name: its key in `METRICS`.
    title: what tables call it.
    columns: (k,) numbers of one record that `value` needs of it.
    value: the metric over (n, k) columns; the bootstrap calls it on resampled rows.
    record: the record's own score, for paired tests (1 right, 0 wrong, where there is right and wrong).
    higher_is_better: False for cross-entropy and divergence.
    binary: records are right or wrong, so that paired tests count them.
    kind: the tasks it can score.
    accepts: whether an answer can be held against this reference.
    expects: such references in words.
    """

    name: str
    title: str
    columns: Callable[[RecordResult], tuple[float, ...]]
    value: Callable[[np.ndarray], float]
    record: Callable[[RecordResult], float]
    higher_is_better: bool = True
    binary: bool = True
    kind: Kind = "answer"
    accepts: Callable[[str], bool] = lambda reference: bool(reference.strip())
    expects: str = "a text that is not empty"


# -- labels ----------------------------------------------------------------------------------------------------------


def _has_label(reference: str) -> bool:
    return label(reference) is not None


def _gold(result: RecordResult) -> Label:
    """The label of the record's first reference."""
    gold = label(result.references[0]) if result.references else None
    if gold is None:
        raise InputError(f"record {result.index} needs the reference yes or no, got {result.references}")
    return gold


def _right_label(result: RecordResult) -> float:
    return float(label(result.answer) == _gold(result))


def _is_yes(result: RecordResult) -> tuple[float, ...]:
    """Gold and answer: 1 for yes, 0 for anything else."""
    return float(_gold(result) == "yes"), float(label(result.answer) == "yes")


def _classes(result: RecordResult) -> tuple[float, ...]:
    return CLASSES[_gold(result)], CLASSES[label(result.answer)]


def _f1(columns: np.ndarray) -> float:
    """2 · both / (gold + said); 0 where no record is yes and none was called so."""
    positives = columns.sum()
    return float(2 * (columns[:, 0] * columns[:, 1]).sum() / positives) if positives else 0.0


def _matthews(columns: np.ndarray) -> float:
    """The correlation of gold and answer as classes, for more than two of them (Gorodkin 2004).

    An answer without a label is a third class, that no record's gold is. So it is wrong wherever it occurs, but stands
    for no label in particular: who never gives one gets 0, as who always gives the same, and not the -1 that counting
    it as the opposite of gold would yield. 0 wherever gold or the answers are one class alone.
    """
    pairs = columns.astype(int)
    counts = np.bincount(3 * pairs[:, 0] + pairs[:, 1], minlength=9).reshape(3, 3).astype(float)
    total, gold, said = counts.sum(), counts.sum(1), counts.sum(0)
    spread = (total**2 - said @ said) * (total**2 - gold @ gold)
    return float((np.trace(counts) * total - gold @ said) / np.sqrt(spread)) if spread else 0.0


# -- texts and numbers -----------------------------------------------------------------------------------------------


def _best(score: Callable[[str, str], float]) -> Callable[[RecordResult], float]:
    """The record's score by its best reference."""
    return lambda result: max((float(score(result.answer, wanted)) for wanted in result.references), default=0.0)


def _contains_all(result: RecordResult) -> float:
    return float(all(contained(result.answer, wanted) for wanted in result.references))


def _has_number(reference: str) -> bool:
    return number(reference) is not None


def _same_number(answer: str, reference: str) -> bool:
    said = number(answer)
    return said is not None and said == number(reference)


# -- what was measured on the way ------------------------------------------------------------------------------------


def _counted(key: str) -> Callable[[RecordResult], tuple[float, ...]]:
    """What was measured under `key`, and the tokens it was measured on."""
    return lambda result: (float(result.measured[key]), float(result.measured["tokens"]))


def _a_token(empty: float) -> Callable[[np.ndarray], float]:
    """The first column's sum for each token of the second; `empty` where there are no tokens."""

    def value(columns: np.ndarray) -> float:
        counted, tokens = columns.sum(0)
        return float(counted / tokens) if tokens else empty

    return value


def _mean(columns: np.ndarray) -> float:
    return float(columns.mean())


def _mean_of(score: Callable[[RecordResult], float], name: str, title: str, **about: Any) -> Metric:
    """The mean of the records' own scores; `about`: further fields of the metric."""
    return Metric(name, title, lambda result: (score(result),), _mean, score, **about)


def _per_token(key: str, name: str, title: str, kind: Kind, higher_is_better: bool = False) -> Metric:
    """What was measured under `key`, a token."""
    columns, value = _counted(key), _a_token(1.0 if higher_is_better else 0.0)

    def score(result: RecordResult) -> float:
        return value(np.array([columns(result)]))

    return Metric(name, title, columns, value, score, higher_is_better, binary=False, kind=kind)


_LABELLED: dict[str, Any] = {"accepts": _has_label, "expects": "yes or no"}

#: By name. All lie between 0 and 1 but Matthews (-1 to 1), cross-entropy and divergence (from 0 up, in nats).
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # Answers with yes or no. One without either is wrong.
        _mean_of(_right_label, "accuracy", "Accuracy", **_LABELLED),
        Metric("f1", "F1", _is_yes, _f1, _right_label, **_LABELLED),
        Metric("matthews", "Matthews correlation", _classes, _matthews, _right_label, **_LABELLED),
        # Free answers; the best reference counts.
        _mean_of(_best(equal), "exact_match", "Exact match"),
        _mean_of(_best(overlap), "token_f1", "Token F1", binary=False),
        _mean_of(_best(contained), "contains", "Contains the answer"),
        # Here all references must stand in the answer.
        _mean_of(_contains_all, "contains_all", "Contains every answer"),
        _mean_of(_best(_same_number), "number", "Number right", accepts=_has_number, expects="a text with a number"),
        # Plain text: nats a token.
        _per_token("nats", "cross_entropy", "Cross-entropy", "text"),
        # Answers held against the base model's own: the share that is identical, the share of their tokens that the
        # model would choose too, and KL(base ‖ model) a token, in nats.
        _mean_of(lambda result: float(result.measured["identical"]), "identical", "Identical", kind="kept"),
        _per_token("agreeing", "agreement", "Token agreement", "kept", higher_is_better=True),
        _per_token("divergence", "divergence", "KL divergence", "kept"),
    )
}

#: What a task of each kind measures unless it says otherwise; the first is its score.
DEFAULT_METRICS: dict[Kind, tuple[str, ...]] = {
    "answer": ("exact_match",),
    "text": ("cross_entropy",),
    "kept": ("identical", "agreement", "divergence"),
}
