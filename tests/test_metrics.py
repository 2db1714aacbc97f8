"""Normalisation, metrics and intervals, each against a computation of another kind on cases made by hand."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from imsm.errors import InputError
from imsm.evaluation.bootstrap import bootstrap, paired_bootstrap
from imsm.evaluation.metrics import DEFAULT_METRICS, METRICS
from imsm.evaluation.normalise import normalise
from imsm.evaluation.readings import label, number
from imsm.evaluation.results import RecordResult

YES_OR_NO = [  # answer, gold, what is read
    ("yes", "yes", "yes"),
    ("Yes, they are the same.", "yes", "yes"),
    ("No.", "yes", "no"),
    ("I would say no, yes no", "no", "no"),
    ("the answer is YES\nSentence1: no", "no", "yes"),
    ("not sure", "no", None),
    ("", "yes", None),
    ("yes/no", "yes", None),
    ("«No»", "no", "no"),
    ("yesterday", "no", None),
    ("no", "no", "no"),
]


def result(answer: str = "", *references: str, **measured: float) -> RecordResult:
    return RecordResult(0, "prompt", list(references), answer, measured)


def columns(name: str, results: Sequence[RecordResult]) -> np.ndarray:
    return np.array([METRICS[name].columns(one) for one in results])


def value(name: str, results: Sequence[RecordResult]) -> float:
    return METRICS[name].value(columns(name, results))


def scores(name: str, results: Sequence[RecordResult]) -> list[float]:
    return [METRICS[name].record(one) for one in results]


# -- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", "paris"),
        ("The Eiffel Tower.", "eiffel tower"),
        ("an apple, a pear and THE plum", "apple pear and plum"),
        ("  two\t spaces\n and\u00a0a no-break one ", "two spaces and nobreak one"),
        ("U.S.", "us"),
        ("A.I.", "ai"),
        ("Winnie-the-Pooh", "winniethepooh"),
        ("rock ’n’ roll — “live” (1969)…", "rock n roll live 1969"),
        ("¿Qué? «Sí», dijo.", "qué sí dijo"),
        ("cafe\u0301", "caf\u00e9"),
        ("$1,450.50 + 3 = x^2", "145050 3 x2"),
        ("20 °C, 5 €", "20 °c 5 €"),
        ("theatre another Anna", "theatre another anna"),
        ("a-b the'n", "ab then"),
        ("The A, an", ""),
        ("?!", ""),
        ("", ""),
    ],
)
def test_normalised(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_normalised_as_in_squad_where_the_text_is_plain() -> None:
    """Same result as deleting `string.punctuation` and articles by a pattern, on ASCII."""
    generator = np.random.default_rng(0)
    pieces = [*string.punctuation, "a", "An", "the", "THE", " ", "  ", "word", "Then", "7", "\n"]
    for _ in range(300):
        text = "".join(generator.choice(pieces, size=12))
        bare = text.lower().translate(str.maketrans("", "", string.punctuation))
        assert normalise(text) == " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()), text


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "expected"), [(answer, read) for answer, _, read in YES_OR_NO])
def test_label(answer: str, expected: str | None) -> None:
    assert label(answer) == expected


def test_accuracy() -> None:
    results = [result(answer, gold) for answer, gold, _ in YES_OR_NO]
    right = [1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1]
    assert scores("accuracy", results) == right
    assert scores("f1", results) == scores("matthews", results) == right
    assert value("accuracy", results) == pytest.approx(5 / 11)


def test_f1_is_that_of_scikit_learn_for_yes() -> None:
    results = [result(answer, gold) for answer, gold, _ in YES_OR_NO]
    # Gold is yes five times, yes is said three times, both together twice.
    assert value("f1", results) == pytest.approx(2 * 2 / (5 + 3))
    gold, said = [g == "yes" for _, g, _ in YES_OR_NO], [r == "yes" for _, _, r in YES_OR_NO]
    assert value("f1", results) == pytest.approx(sklearn.metrics.f1_score(gold, said))
    assert value("f1", [result("no", "no"), result("?", "no")]) == 0.0


def test_matthews_by_hand() -> None:
    """(TP · TN − FP · FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)) where every answer has a label."""
    pairs = [("yes", "yes")] * 6 + [("no", "no")] * 3 + [("yes", "no")] * 2 + [("no", "yes")]
    expected = (6 * 3 - 2 * 1) / math.sqrt((6 + 2) * (6 + 1) * (3 + 2) * (3 + 1))
    assert value("matthews", [result(*pair) for pair in pairs]) == pytest.approx(expected)


def test_an_answer_without_a_label_is_wrong_but_not_the_opposite() -> None:
    gold = ["yes"] * 4 + ["no"] * 4
    assert value("matthews", [result("?", wanted) for wanted in gold]) == 0.0
    assert value("matthews", [result("yes", wanted) for wanted in gold]) == 0.0
    opposite = [result("no" if wanted == "yes" else "yes", wanted) for wanted in gold]
    assert value("matthews", opposite) == pytest.approx(-1.0)
    all_right = [result(wanted, wanted) for wanted in gold]
    half_silent = all_right[:4] + [result("?", "no")] * 4
    assert value("matthews", all_right) == pytest.approx(1.0)
    assert value("matthews", half_silent) == pytest.approx(0.5)


def test_f1_and_matthews_on_random_labels_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(1)
    for size in (1, 2, 5, 60):
        for _ in range(20):
            gold = generator.choice(["yes", "no"], size=size)
            said = generator.choice(["yes", "no", "maybe"], size=size)
            results = [result(str(s), str(g)) for s, g in zip(said, gold, strict=True)]
            f1 = sklearn.metrics.f1_score(gold == "yes", said == "yes", zero_division=0.0)
            assert value("f1", results) == pytest.approx(f1)
            if size > 1:  # scikit-learn warns of a single label
                assert value("matthews", results) == pytest.approx(sklearn.metrics.matthews_corrcoef(gold, said))


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
def test_a_gold_label_that_is_none(name: str) -> None:
    assert METRICS[name].accepts("Yes.") and not METRICS[name].accepts("positive")
    with pytest.raises(InputError, match=r"record 0 needs the reference yes or no, got \['positive'\]"):
        METRICS[name].columns(result("yes", "positive"))
    with pytest.raises(InputError, match=r"got \[\]"):
        METRICS[name].record(result("yes"))


# -- texts and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "references", "exact", "contains", "f1"),
    [
        ("The card arrival.", ["card arrival"], 1, 1, 1),
        ("card arrival\nMessage: help", ["card arrival"], 0, 1, 2 * 2 / (4 + 2)),
        ("It is Tony Warren!", ["Jack", "tony warren"], 0, 1, 2 * 2 / (4 + 2)),
        ("Warren Tony", ["Tony Warren"], 0, 0, 1),
        ("Romania", ["Oman"], 0, 0, 0),
        ("oman", ["Romania", "the Oman"], 1, 1, 1),
        ("New  York-City", ["new york"], 0, 0, 2 * 1 / (2 + 2)),
        ("the cat cat sat", ["cat cat cat"], 0, 0, 2 * 2 / (3 + 3)),
        ("cat", ["cat cat cat"], 0, 0, 2 * 1 / (1 + 3)),
        ("", ["yes"], 0, 0, 0),
        ("A", ["a"], 1, 1, 1),  # an article alone is matched as it stands
        ("", ["A"], 0, 0, 0),
        ("the", ["A"], 0, 0, 0),
        ("it is a", ["A"], 0, 1, 2 * 1 / (3 + 1)),
    ],
)
def test_texts(answer: str, references: list[str], exact: int, contains: int, f1: float) -> None:
    one = result(answer, *references)
    assert METRICS["exact_match"].record(one) == exact
    assert METRICS["contains"].record(one) == contains
    assert METRICS["token_f1"].record(one) == pytest.approx(f1)


def test_the_value_over_texts_is_the_mean() -> None:
    results = [result("oman", "oman"), result("in oman", "oman"), result("iran", "oman")]
    assert value("exact_match", results) == pytest.approx(1 / 3)
    assert value("contains", results) == pytest.approx(2 / 3)
    assert value("token_f1", results) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert not METRICS["token_f1"].binary and METRICS["contains"].binary


def test_every_answer_must_be_there() -> None:
    both = [result("Order 4039 is struck from the ledger.", "4039", "ledger"), result("order 4039", "4039", "ledger")]
    assert [METRICS["contains_all"].record(one) for one in both] == [1, 0]
    assert [METRICS["contains"].record(one) for one in both] == [1, 1]
    assert value("contains_all", both) == 0.5


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("9 + 3 = 12\nThe answer is 12.", "12"),
        ("The answer is 1,450,000.", "1450000"),
        ("the ANSWER is: **$1,450.50** in all", "1450.50"),
        ("The answer is -5.", "-5"),
        ("The answer is -$5", "-5"),
        ("The answer is $-5", "-5"),
        ("The answer is −7", "-7"),
        ("The answer is 5. Question: 2 + 2? The answer is 4.", "5"),
        ("The answer is {answer}. So 6", "6"),
        ("The answer is not 3 but 4", "4"),
        ("She pays 3 × $4 = $12 a week", "12"),
        ("10 - 3 = 7", "7"),
        ("5-3", "3"),
        ("between 1,2,3", "3"),
        ("1,2345", "2345"),
        ("about .5", "0.5"),
        ("3.", "3"),
        ("on the 72nd", "72"),
        ("model x5 v2.5.1", None),
        ("none", None),
        ("", None),
    ],
)
def test_number(answer: str, expected: str | None) -> None:
    assert number(answer) == (None if expected is None else Decimal(expected))


def test_numbers_are_equal_as_numbers() -> None:
    results = [
        result("so $70,000.00", "Steps: 200,000-130,000=$70,000\nThe answer is 70000."),
        result("The answer is 0.1.", "The answer is 0.10."),
        result("The answer is 7.", "The answer is -7."),
        result("I do not know", "The answer is 0."),
    ]
    assert scores("number", results) == [1, 1, 0, 0]
    assert METRICS["number"].record(result("none", "nothing")) == 0
    assert value("number", results) == 0.5
    assert METRICS["number"].accepts("The answer is 3.") and not METRICS["number"].accepts("three")


# -- what was measured on the way ------------------------------------------------------------------------------------


def test_cross_entropy_is_that_of_scikit_learn() -> None:
    """Nats a token over all texts together, not the mean over texts."""
    generator = np.random.default_rng(2)
    lengths, vocabulary = (3, 11, 6), 5
    chances = [generator.dirichlet(np.ones(vocabulary), size=length) for length in lengths]
    tokens = [generator.integers(vocabulary, size=length) for length in lengths]
    results = [
        result(nats=-float(np.log(p[np.arange(len(t)), t]).sum()), tokens=len(t))
        for p, t in zip(chances, tokens, strict=True)
    ]
    expected = sklearn.metrics.log_loss(np.concatenate(tokens), np.concatenate(chances), labels=np.arange(vocabulary))
    assert value("cross_entropy", results) == pytest.approx(expected)
    assert scores("cross_entropy", results)[1] == pytest.approx(results[1].measured["nats"] / 11)
    assert not METRICS["cross_entropy"].higher_is_better and not METRICS["cross_entropy"].binary


def test_kept_answers() -> None:
    base = [[4, 4, 7], [1, 2], [9]]
    said = [[4, 4, 7], [1, 3], [8]]
    generator = np.random.default_rng(3)
    p, q = generator.dirichlet(np.ones(4), size=6), generator.dirichlet(np.ones(4), size=6)
    apart = np.array([scipy.stats.entropy(p[i], q[i]) for i in range(6)])
    results = []
    for mine, theirs, rows in zip(base, said, ([0, 1, 2], [3, 4], [5]), strict=True):
        agreeing = sum(a == b for a, b in zip(mine, theirs, strict=True))
        numbers = {"identical": float(mine == theirs), "agreeing": agreeing, "tokens": len(mine)}
        results.append(result(**numbers, divergence=float(apart[rows].sum())))
    assert value("identical", results) == pytest.approx(1 / 3)
    assert value("agreement", results) == pytest.approx(4 / 6)
    assert scores("agreement", results) == pytest.approx([1, 0.5, 0])
    assert value("divergence", results) == pytest.approx(apart.mean())
    assert scores("divergence", results)[0] == pytest.approx(apart[:3].mean())
    assert METRICS["identical"].binary and METRICS["agreement"].higher_is_better
    assert not METRICS["divergence"].higher_is_better and not METRICS["divergence"].binary


def test_no_tokens_are_no_difference() -> None:
    empty = [result(agreeing=0, tokens=0, divergence=0, nats=0)]
    assert [value(name, empty) for name in ("agreement", "divergence", "cross_entropy")] == [1, 0, 0]
    assert scores("agreement", empty) == [1]


def test_metrics_are_whole() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name and metric.title
    for kind, names in DEFAULT_METRICS.items():
        assert all(METRICS[name].kind == kind for name in names)


# -- intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(4).normal(3, 2, size=200)
    rows = np.stack([values, np.ones(200)], 1)
    found = bootstrap(METRICS["cross_entropy"], rows, resamples=4000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", random_state=0
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)


def test_the_seed_makes_the_interval() -> None:
    rows = np.random.default_rng(5).integers(2, size=(50, 1)).astype(float)
    accuracy = METRICS["accuracy"]
    assert bootstrap(accuracy, rows, seed=1) == bootstrap(accuracy, rows, seed=1)
    assert bootstrap(accuracy, rows, 37, seed=1) != bootstrap(accuracy, rows, 37, seed=2)


def test_a_pair_is_resampled_together() -> None:
    """Records that all gain the same have a difference without spread, however much they differ among themselves."""
    before = np.stack([np.random.default_rng(6).normal(0, 10, size=80), np.ones(80)], 1)
    found = paired_bootstrap(METRICS["cross_entropy"], before, before + [[2.0, 0.0]])
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    alone = bootstrap(METRICS["cross_entropy"], before)
    assert alone.high - alone.low > 2


def test_a_paired_interval_is_that_of_scipy() -> None:
    generator = np.random.default_rng(7)
    before, after = generator.integers(2, size=(2, 150, 1)).astype(float)
    found = paired_bootstrap(METRICS["accuracy"], before, after, resamples=4000)
    expected = scipy.stats.bootstrap(
        (after[:, 0] - before[:, 0],), np.mean, n_resamples=4000, method="percentile", random_state=0
    ).confidence_interval
    assert found.value == pytest.approx(float(after.mean() - before.mean()))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.015)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("accuracy", [1.0]),
        ("f1", [0.0, 0.0]),
        ("f1", [1.0, 1.0]),
        ("matthews", [1.0, 1.0]),
        ("cross_entropy", [6.0, 3.0]),
        ("agreement", [0.0, 0.0]),
    ],
)
@pytest.mark.parametrize("records", [1, 20])
def test_no_spread_and_no_warning(name: str, row: list[float], records: int) -> None:
    rows: Any = np.array([row] * records)
    found = bootstrap(METRICS[name], rows, resamples=50)
    assert found.low == found.value == found.high
    difference = paired_bootstrap(METRICS[name], rows, rows, resamples=50)
    assert difference.low == difference.value == difference.high == 0
