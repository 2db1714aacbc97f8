"""Audits: figures against hand-made cases, the page as a browser would parse it, and the verb on tiny models."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase
from zoo import METHODS, disturb

import imsm_cli
from imsm import InputError, SiameseForCausalLM
from imsm.evaluation import audit as audits
from imsm.evaluation import figures
from imsm.evaluation.balance import balance
from imsm.evaluation.bootstrap import bootstrap, paired_bootstrap
from imsm.evaluation.chance import adjust
from imsm.evaluation.comparison import common_tasks, compare, same_base
from imsm.evaluation.metrics import METRICS
from imsm.evaluation.page import SHOWN, render
from imsm.evaluation.pictures import Box, _room, against, shorten
from imsm.evaluation.results import Estimate, RecordResult, Result, TaskResult
from imsm.evaluation.significance import mcnemar, paired_t
from imsm.evaluation.tables import show
from imsm.evaluation.verdict import sentence, verdict

BASE = {"name": "base", "base_model_type": "llama", "hidden_size": 8, "vocab_size": 64, "num_hidden_layers": 2}
EVIL = "<script>alert('x')</script> & <img src=https://example.org/x.png>"


def estimated(score: str, others: tuple[str, ...], records: list[RecordResult]) -> dict[str, Estimate]:
    return {
        name: bootstrap(METRICS[name], np.array([METRICS[name].columns(record) for record in records]))
        for name in (score, *others)
    }


def trivia(right: str, name: str = "trivia", metric: str = "contains", chance: float | None = None) -> TaskResult:
    """A task whose answers are right where `right` has a 1."""
    records = [
        RecordResult(i, f"question {i}", ["yes"], "yes" if mark == "1" else "no") for i, mark in enumerate(right)
    ]
    metrics = estimated(metric, (), records)
    return TaskResult(name, name.capitalize(), "answer", metric, metrics, chance, records, 1.0, f"of {name}")


def text(nats: list[float], name: str = "text") -> TaskResult:
    """A task of plain texts of 10 tokens each."""
    records = [RecordResult(i, f"text {i}", [], "", {"nats": n, "tokens": 10.0}) for i, n in enumerate(nats)]
    metrics = estimated("cross_entropy", (), records)
    return TaskResult(name, name.capitalize(), "text", "cross_entropy", metrics, None, records, 1.0, f"of {name}")


def kept(identical: list[float], score: str = "identical") -> TaskResult:
    """A task of kept answers of 4 tokens, each of which agrees where the answer does, and else none."""
    records = [
        RecordResult(
            i, f"prompt {i}", ["said by base"], "said by base" if same else "other",
            {"identical": same, "agreeing": 4 * same, "tokens": 4.0, "divergence": 2 * (1 - same)},
        )
        for i, same in enumerate(identical)
    ]  # fmt: skip
    others = tuple(name for name in ("identical", "agreement", "divergence") if name != score)
    metrics = estimated(score, others, records)
    return TaskResult("kept", "Answers kept", "kept", score, metrics, None, records, 1.0, "of kept")


def result(checkpoint: str, *tasks: TaskResult, kind: str = "peft", base: dict[str, Any] = BASE) -> Result:
    return Result(checkpoint, kind, base, {}, {}, {task.task: task for task in tasks})


@pytest.fixture(scope="module")
def before() -> Result:
    return result("base", trivia("0001", "bank"), trivia("1" * 30 + "0" * 10), text([20.0, 30.0, 25.0]), kind="base")


@pytest.fixture(scope="module")
def after() -> Result:
    """The target learned whole, 24 records of trivia lost and 5 gained, text a little worse, half the answers kept."""
    return result(
        "runs/lora",
        trivia("1111", "bank"),
        trivia("1" * 6 + "0" * 24 + "1" * 5 + "0" * 5),
        text([25.0, 33.0, 28.0]),
        kept([1.0, 0.0, 1.0, 0.0]),
    )


@pytest.fixture(scope="module")
def made(before: Result, after: Result) -> audits.Audit:
    gentle = replace(after, checkpoint="runs/imsm", kind="siamese")
    gentle.tasks = after.tasks | {"trivia": trivia("1" * 29 + "0" * 11), "bank": trivia("0111", "bank")}
    paths = ["results/base.json", "results/lora.json", "results/imsm.json"]
    return audits.audit(before, [after, gentle], common_tasks(before, [after, gentle]), ["bank"], paths)


# -- tests of significance -------------------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    # 1 lost of 6 changed: 2 · (C(6,0) + C(6,1)) / 2⁶.
    assert mcnemar(1, 5).p == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(5, 1) == mcnemar(1, 5)
    assert mcnemar(0, 10).p == pytest.approx(2 / 1024)
    assert mcnemar(0, 0).p == mcnemar(4, 4).p == 1.0


def test_paired_t_by_hand() -> None:
    # Differences 1, 1, 2, 4: mean 2, standard deviation √2, so t = 2 / (√2 / √4) = 2 √2 at 3 degrees of freedom. There
    # the distribution is F(t) = 1/2 + (x / (1 + x²) + arctan x) / π with x = t / √3.
    x = 2 * np.sqrt(2) / np.sqrt(3)
    expected = 2 * (0.5 - (x / (1 + x * x) + np.arctan(x)) / np.pi)
    assert paired_t([0, 0, 0, 0], [1, 1, 2, 4]).p == pytest.approx(expected)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        ([0.5, 0.7, 0.1], [0.5, 0.7, 0.1], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], 0.0),  # the same difference but for rounding
        ([1e-9, 1e-9], [3e-9, 3e-9], 0.0),
        ([1.0], [2.0], None),
    ],
)
def test_paired_t_where_nothing_varies(first: list[float], second: list[float], p: float | None) -> None:
    assert paired_t(first, second).p == p


# -- chance ----------------------------------------------------------------------------------------------------------


def test_adjustment_by_hand() -> None:
    # Two answers: as many are lost by luck as are wrong both times.
    assert adjust(kept=60, lost=15, gained=13, wrong=12, guess_rate=0.5) == (
        adjust(60, 15, 13, 12, 0.5).__class__(by_luck=12.0, lost=3.0, gained=1.0)
    )
    # Four: a third of them.
    four = adjust(kept=10, lost=15, gained=3, wrong=12, guess_rate=0.25)
    assert (four.by_luck, four.lost, four.gained) == (4.0, 11.0, 0.0)
    # No guess is ever right.
    open_ended = adjust(10, 15, 3, 12, 0.0)
    assert (open_ended.by_luck, open_ended.lost, open_ended.gained) == (0.0, 15, 3)


def test_no_more_is_lost_than_was_right_beyond_chance() -> None:
    # Yes to everything, then no to everything: half right before and after, nothing known, nothing lost.
    flipped = adjust(kept=0, lost=50, gained=50, wrong=0, guess_rate=0.5)
    assert (flipped.lost, flipped.gained) == (0.0, 0.0)


def test_adjustment_on_simulated_guessers() -> None:
    """What the response model was made with comes out: 20 % forgotten, each seen as a loss in 3 of 4 cases."""
    generator = np.random.default_rng(0)
    n, c = 200_000, 0.25
    known = generator.random(n) < 0.5
    still = known & (generator.random(n) >= 0.4)
    right = known | (generator.random(n) < c)
    then = still | (generator.random(n) < c)
    pairs = [int(np.sum((right == a) & (then == b))) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))]
    adjusted = adjust(*pairs, c)
    assert pairs[2] / n > 0.09  # gains that are all luck
    assert adjusted.lost / n == pytest.approx(0.5 * 0.4 * (1 - c), abs=0.004)
    assert adjusted.gained / n == pytest.approx(0.0, abs=0.004)


# -- comparison ------------------------------------------------------------------------------------------------------


def test_records_lost_and_gained(before: Result, after: Result) -> None:
    task = compare(before, after, ["trivia"]).tasks["trivia"]
    assert task.lost is not None and task.gained is not None
    assert [move.index for move in task.lost] == list(range(6, 30)) and len(task.gained) == 5
    assert task.right == 30 and task.records == 40 and task.adjusted is None
    move = task.lost[0]
    assert (move.prompt, move.references, move.before, move.after) == ("question 6", ["yes"], "yes", "no")
    assert (task.score.before.value, task.score.after.value) == (0.75, 11 / 40)
    assert task.score.change.value == pytest.approx(-19 / 40) and task.score.direction == "worse"
    assert task.score.test == mcnemar(24, 5)
    rows = [np.array([[float(r.answer == "yes")] for r in found.tasks["trivia"].records]) for found in (before, after)]
    assert task.score.change == paired_bootstrap(METRICS["contains"], *rows)


def test_text_has_no_right_and_wrong(before: Result, after: Result) -> None:
    task = compare(before, after, ["text"]).tasks["text"]
    assert task.lost is task.gained is task.right is task.adjusted is None
    assert task.score.direction == "worse" and task.score.change.value == pytest.approx(86 / 30 - 75 / 30)
    assert task.score.test == paired_t([2.0, 3.0, 2.5], [2.5, 3.3, 2.8])


@pytest.mark.parametrize("score", ["identical", "agreement", "divergence"])
def test_kept_answers_were_all_kept_before(before: Result, score: str) -> None:
    theirs = kept([1.0, 0.0, 1.0, 1.0], score)
    task = compare(before, result("x", theirs), ["kept"]).tasks["kept"]
    start = 0.0 if score == "divergence" else 1.0
    assert task.score.before == Estimate(start, start, start)
    assert task.score.change.value == pytest.approx(task.score.after.value - start)
    assert task.score.change.low == pytest.approx(task.score.after.low - start)
    assert [change.metric for change in task.others] == [name for name in theirs.metrics if name != score]
    if score == "identical":
        assert task.lost is not None and task.right == 4 and task.gained == []
        assert [(move.index, move.before, move.after) for move in task.lost] == [(1, "said by base", "other")]
    again = compare(result("b", kept([1.0] * 4, score), kind="base"), result("x", theirs), ["kept"])
    assert again.tasks["kept"].score == task.score


def test_guess_rate_of_correlated_labels() -> None:
    """Guessing has a Matthews correlation of 0, but is right half of the time."""

    def labelled(answers: str) -> TaskResult:
        gold = ["yes", "no"] * 4
        marks = zip(gold, answers, strict=True)
        records = [RecordResult(i, "p", [g], "yes" if a == "y" else "no") for i, (g, a) in enumerate(marks)]
        metrics = estimated("matthews", ("accuracy",), records)
        return TaskResult("cola", "CoLA", "answer", "matthews", metrics, 0.0, records, 1.0, "of cola")

    found = compare(result("b", labelled("ynynynny")), result("x", labelled("nnynynny")), ["cola"]).tasks["cola"]
    assert found.lost is not None and len(found.lost) == 1 and found.gained == []
    # 6 of 8 right before, so 2 beyond chance; 2 wrong both times.
    assert found.adjusted == adjust(5, 1, 0, 2, 0.5) and found.adjusted.by_luck == 2.0
    assert [change.metric for change in found.others] == ["accuracy"]


def test_refused_comparisons(before: Result, after: Result) -> None:
    def refused(theirs: Result, message: str, task: str = "trivia") -> None:
        with pytest.raises(InputError, match=message):
            compare(before, theirs, [task])

    other = trivia("1" * 40)
    refused(result("x", replace(other, fingerprint="else")), "base and x were asked different records of 'trivia'")
    refused(result("x", trivia("1" * 39)), "different records")
    rescored = replace(other, score="exact_match", metrics={"exact_match": Estimate(1, 1, 1)})
    refused(result("x", rescored), "'trivia' is scored by 'contains' for base, but by 'exact_match' for x")
    refused(result("x", other), "result of base has no task 'mrpc'; it has bank, trivia, text", "mrpc")
    refused(result("x", other), "result of x has no task 'bank'; it has trivia", "bank")
    with pytest.raises(InputError, match="no metric 'colour'; there are accuracy"):
        odd = replace(other, score="colour", metrics={"colour": Estimate(1, 1, 1)})
        compare(result("b", odd), result("x", odd), ["trivia"])
    with pytest.raises(InputError, match=r"no task in common \(b: bank; x: trivia\)"):
        common_tasks(result("b", trivia("1", "bank")), [result("x", trivia("1"))])


def test_two_bases(before: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="x does not belong to the base base: they differ in hidden_size 8 and 16"):
        same_base(before, result("x", base={**BASE, "hidden_size": 16}))
    elsewhere = {**BASE, "name": "other"}
    with pytest.raises(InputError, match="x was trained on other, but the base is base; .* --base"):
        same_base(before, result("x", base=elsewhere))
    same_base(before, result("merged", base=elsewhere, kind="base"))  # a whole model that names no base
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    same_base(before, result("x", base={**BASE, "name": str(tmp_path / "base")}))  # the same folder


def test_common_tasks_take_kept_answers_without_the_base(before: Result, after: Result) -> None:
    assert common_tasks(before, [after]) == ["bank", "trivia", "text", "kept"]
    assert common_tasks(before, [after, result("x", trivia("1" * 40))]) == ["trivia"]


# -- balance ---------------------------------------------------------------------------------------------------------


def test_balance_by_hand(before: Result, after: Result) -> None:
    found = balance(compare(before, after, ["bank", "trivia", "text", "kept"]), ["bank"])
    assert found.gain == pytest.approx(0.75) and found.plasticity == 1.0  # 0.25 -> 1 of a room of 0.75
    assert found.kept == pytest.approx({"trivia": (11 / 40) / 0.75, "text": 75 / 86, "kept": 0.5})
    retention = (11 / 30 + 75 / 86 + 0.5) / 3
    assert found.retention == pytest.approx(retention)
    assert found.harmonic == pytest.approx(2 * retention / (1 + retention))


def test_a_gain_elsewhere_hides_no_loss() -> None:
    ours = result("b", trivia("1000", "t"), trivia("1000", "up"), trivia("1111", "down"))
    theirs = result("x", trivia("1110", "t"), trivia("1111", "up"), trivia("1100", "down"))
    found = balance(compare(ours, theirs, list(ours.tasks)), ["t"])
    assert found.kept == {"up": 1.0, "down": 0.5} and found.retention == 0.75
    assert found.plasticity == pytest.approx(2 / 3)


def test_what_cannot_measure_is_left_out() -> None:
    ours = result(
        "b", trivia("1111", "full"), trivia("0011", "coin", chance=0.5), trivia("0000", "zero"), trivia("0111", "fine")
    )
    found = balance(compare(ours, replace(ours, checkpoint="x"), list(ours.tasks)), ["full"])
    assert found.left_out == {
        "full": "the base is already without fault",
        "coin": "the base is no better than chance",
        "zero": "the base scores 0",
    }
    assert found.plasticity is None and found.harmonic is None and found.retention == 1.0
    against = result("b", *ours.tasks.values(), trivia("0000", "correlated", chance=0.0))
    negative = compare(against, replace(against, checkpoint="x"), ["fine", "correlated"])
    assert balance(negative, ["fine"]).left_out == {"correlated": "the base is no better than chance"}
    divergent = compare(ours, result("x", *ours.tasks.values(), kept([1.0, 0.0], "divergence")), ["fine", "kept"])
    assert "0" in balance(divergent, ["fine"]).left_out["kept"]


def test_worse_targets_count_as_nothing_learned() -> None:
    ours = result("b", trivia("0011", "t"), text([10.0, 20.0], "loss"), trivia("1", "other"))
    theirs = result("x", trivia("0001", "t"), text([5.0, 10.0], "loss"), trivia("1", "other"))
    comparison = compare(ours, theirs, list(ours.tasks))
    assert balance(comparison, ["t"]).plasticity == 0.0 and balance(comparison, ["t"]).harmonic == 0.0
    falling = balance(comparison, ["loss"])  # half of the nats are gone
    assert falling.plasticity == pytest.approx(0.5) and falling.gain == pytest.approx(0.75)


def test_refused_targets(before: Result, after: Result) -> None:
    comparison = compare(before, after, ["bank", "kept"])
    with pytest.raises(InputError, match="target 'mrpc' is not among the tasks; there are bank, kept"):
        balance(comparison, ["mrpc"])
    with pytest.raises(InputError, match="'kept' measures what was kept and cannot be a target"):
        balance(comparison, ["kept"])
    with pytest.raises(InputError, match="no target given"):
        balance(comparison, [])


# -- words and figures -----------------------------------------------------------------------------------------------


def test_figures() -> None:
    assert [figures.score(x) for x in (0.7131, -0.2, -0.00001)] == ["71.3", "−20.0", "0.0"]
    assert [figures.signed(x) for x in (0.05, -0.05, 0.0, -0.0001)] == ["+5.0", "−5.0", "0.0", "0.0"]
    assert figures.signed(0.25, higher_is_better=False) == "+0.250"
    assert figures.interval(Estimate(0, -0.01, 0.02), change=True) == "[−1.0, +2.0]"
    assert [figures.p_value(p) for p in (None, 0.0, 0.0123, 1.0)] == ["–", "< 0.001", "0.012", "1.000"]
    assert [figures.count(n) for n in (3.0, 2.25, 1200)] == ["3", "2.2", "1,200"]
    assert [figures.percent(share) for share in (None, 0.961)] == ["–", "96.1 %"]


def test_labels_are_short_and_distinct() -> None:
    assert figures.labels(["runs/lora", "hub/imsm@gate=0.5"]) == ["lora", "imsm@gate=0.5"]
    assert figures.labels(["a/lora/last", "a/imsm/last"]) == ["lora/last", "imsm/last"]
    assert figures.labels(["x/lora", "lora"]) == ["x/lora", "lora"]
    assert figures.labels(["lora", "lora"]) == ["lora (1)", "lora (2)"]


def test_verdict_of_one(made: audits.Audit) -> None:
    alone = replace(made, entries=made.entries[:1])
    assert verdict(alone) == (
        "lora learned Bank (25.0 → 100.0), and kept 58.0 % of the base's score on 3 other tasks; measurably worse: "
        "Trivia (75.0 → 27.5), Text (2.500 → 2.867)."
    )


def test_verdict_of_several(made: audits.Audit) -> None:
    assert verdict(made).startswith("Of 2 checkpoints, ")
    assert made.entries[0].balance.harmonic == pytest.approx(0.734, abs=1e-3)
    assert verdict(made).startswith("Of 2 checkpoints, lora balances learning and keeping best (73.4 %): it learned")


def test_verdict_of_little() -> None:
    ours = result("b", trivia("0011", "t"), trivia("0000", "zero"))
    theirs = replace(ours, checkpoint="x")
    made = audits.audit(ours, [theirs], ["t"], ["t"], ["b.json", "x.json"])
    assert sentence(made.entries[0]) == (
        "x did not measurably change T (50.0 → 50.0), and what it kept of other skills was not measured."
    )
    made = audits.audit(ours, [theirs, replace(theirs, checkpoint="y")], ["t", "zero"], ["t"], ["b", "x", "y"])
    assert "no task can tell" in verdict(made)
    assert sentence(made.entries[0]) == (
        "x did not measurably change T (50.0 → 50.0), and no other task can tell what it kept."
    )
    assert against(made) is None and "<svg" in render(made)


def test_verdict_where_nobody_learned() -> None:
    ours = result("b", trivia("0011", "t"), trivia("0011", "other"))
    theirs = [replace(ours, checkpoint=name) for name in "xy"]
    made = audits.audit(ours, theirs, ["t", "other"], ["t"], ["b", "x", "y"])
    assert verdict(made) == "None of the 2 checkpoints both learned and kept anything."


def printed(made: audits.Audit) -> str:
    console = Console(width=160, file=io.StringIO())
    show(made, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal(made: audits.Audit) -> None:
    shown = printed(made)
    assert re.search(r"Trivia +75\.0 +27\.5 +−47\.5 ", shown) and verdict(made)[:60] in shown
    assert re.search(r"Trivia .*24 .*5 ", shown) and "Text ↓" in shown and "Bank ◎" in shown
    assert re.search(r"imsm .* 66\.7 %", shown)


def test_terminal_leaves_brackets_alone(before: Result, after: Result) -> None:
    """Names in brackets are no markup."""
    odd = replace(after, checkpoint="[red]odd")
    odd.tasks = after.tasks | {"bank": replace(after.tasks["bank"], title="[bold]Bank")}
    shown = printed(audits.audit(before, [odd], ["bank", "trivia"], ["bank"], ["b", "x"]))
    assert shown.count("[red]odd") >= 3 and "[bold]Bank" in shown


# -- json ------------------------------------------------------------------------------------------------------------


def test_facts_hold_every_figure(made: audits.Audit) -> None:
    facts = json.loads(json.dumps(made.facts(), allow_nan=False))
    first = facts["checkpoints"][0]
    trivia_facts = first["tasks"]["trivia"]
    assert trivia_facts["lost"] == list(range(6, 30)) and trivia_facts["right_before"] == 30
    assert trivia_facts["metrics"]["contains"]["test"] == "McNemar"
    assert trivia_facts["metrics"]["contains"]["p"] == mcnemar(24, 5).p
    assert set(first["tasks"]["kept"]["metrics"]) == {"identical", "agreement", "divergence"}
    assert first["balance"]["plasticity"] == 1.0
    assert facts["matrix"]["bank"] == {"before": 0.25, "after": {"lora": 1.0, "imsm": 0.75}}
    assert facts["result"] == "results/base.json" and first["result"] == "results/lora.json"


# -- the page --------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "img", "link", "hr", "input"}
SHAPES = {"line", "rect", "circle", "polyline", "polygon", "path", "text", "g", "svg", "title"}


class Page(HTMLParser):
    """Parses the page, and fails where tags do not pair or something outside is asked for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img"}
        given = dict(attrs)
        assert not {"src", "href", "srcset", "style", "background"} & set(given)
        assert not any(name.startswith("on") for name in given)
        self.tags.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_and_alone(made: audits.Audit) -> None:
    html = render(made)
    page = Page(html)
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html
    pictures = [given for tag, given in page.tags if tag == "svg"]
    assert len(pictures) == 1 + 4
    assert all(given["role"] == "img" and given["aria-label"] for given in pictures)
    ids = [given["id"] for _, given in page.tags if "id" in given]
    labels = {given["aria-labelledby"] for _, given in page.tags if "aria-labelledby" in given}
    assert len(ids) == len(set(ids)) and labels <= set(ids)
    read = " ".join("".join(page.text).split())
    assert verdict(made) in read and all(sentence(entry) in read for entry in made.entries)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_page_shows_some_records_and_counts_the_rest(made: audits.Audit) -> None:
    page = Page(render(replace(made, entries=made.entries[:1])))
    read = " ".join("".join(page.text).split())
    assert "Trivia: 24 lost" in read and f"and {24 - SHOWN} more" in read and "Trivia: 5 gained" in read
    assert "question 25" in read and "question 26" not in read
    assert sum(tag == "article" for tag, _ in page.tags) == SHOWN + 5 + 3 + 2


def test_page_escapes_what_models_say(before: Result, after: Result) -> None:
    evil = replace(after, checkpoint=f"runs/{EVIL.replace('/', '')}")
    evil.tasks = dict(after.tasks)
    records = [replace(r, answer=EVIL + "\x00\ud800", prompt=EVIL) for r in after.tasks["trivia"].records]
    evil.tasks["trivia"] = replace(after.tasks["trivia"], records=records, title=EVIL)
    html = render(audits.audit(before, [evil], ["bank", "trivia"], ["bank"], ["b", EVIL]))
    page = Page(html)  # no script, no image
    assert EVIL in "".join(page.text) and "\x00" not in html
    html.encode("utf-8")


def test_one_point_a_checkpoint_at_its_place(made: audits.Audit) -> None:
    page = Page(str(against(made)))
    circles = [given for tag, given in page.tags if tag == "circle"]
    assert [given["class"] for given in circles] == ["base", "s0", "s1"]
    base, lora, gentle = ((float(given["cx"]), float(given["cy"])) for given in circles)
    assert lora[1] < gentle[1] < base[1]  # learned more is higher
    assert lora[0] < gentle[0] < base[0]  # kept more is further right
    assert {"base", "lora", "imsm"} <= set(page.text)


def test_names_make_room_for_each_other() -> None:
    taken: list[Box] = []
    for _ in range(9):
        box = _room(300, 200, 60, taken)
        assert not any(box.meets(other) for other in taken)
        taken.append(box)
    assert shorten("replay-with-gate=0.5", 11) == "repla…e=0.5" and shorten("short", 8) == "short"


def test_bars_reach_to_their_scores(made: audits.Audit) -> None:
    from imsm.evaluation.pictures import BAR_LEFT, BAR_RIGHT, bars

    page = Page(str(bars(made, "bank")))
    widths = [float(given["width"]) for tag, given in page.tags if tag == "rect"]
    assert widths == pytest.approx(
        [0.25 * (BAR_RIGHT - BAR_LEFT), BAR_RIGHT - BAR_LEFT, 0.75 * (BAR_RIGHT - BAR_LEFT)], abs=0.1
    )
    assert {"25.0", "100.0", "75.0"} <= set(page.text)


def test_bars_below_zero() -> None:
    """A correlation may be negative; its bar goes to the left of 0."""
    from imsm.evaluation.pictures import bars

    gold = ["yes", "no"] * 4

    def labelled(turned: bool) -> TaskResult:
        answers = gold[1:] + gold[:1] if turned else gold
        records = [RecordResult(i, "p", [g], a) for i, (g, a) in enumerate(zip(gold, answers, strict=True))]
        metrics = {"matthews": Estimate(-1.0 if turned else 1.0, -1.0 if turned else 1.0, -1.0 if turned else 1.0)}
        return TaskResult("cola", "CoLA", "answer", "matthews", metrics, 0.0, records, 1.0, "of cola")

    made = audits.audit(result("b", labelled(False)), [result("x", labelled(True))], ["cola"], ["cola"], ["b", "x"])
    rects = [given for tag, given in Page(str(bars(made, "cola"))).tags if tag == "rect"]
    left, right = (float(given["x"]) for given in rects)
    assert left > right and rects[0]["width"] == rects[1]["width"] and float(str(rects[0]["width"])) > 0


# -- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A base, an adapter of it, a siamese checkpoint, a tuned whole model, a narrower base; and data."""
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(folder / "base")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "full")
    narrow = LlamaConfig(**{**config.to_dict(), "hidden_size": 8})
    AutoModelForCausalLM.from_config(narrow).save_pretrained(folder / "narrow")
    for name in ("base", "full", "narrow"):
        tokenizer.save_pretrained(folder / name)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base")
    siamese = SiameseForCausalLM.from_base(loaded, METHODS["lora"](base), gate_rank=4)
    disturb(siamese, scale=0.3)
    siamese.save_pretrained(folder / "siamese")
    siamese.peft_model.save_pretrained(str(folder / "lora"), save_embedding_layers=False)
    for task in ("webq", "multirc"):
        (folder / task).mkdir()
        lines = [json.dumps({"input": f"Question {i}?", "output": "yes" if i % 2 else "no"}) for i in range(5)]
        (folder / task / "test.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mine.yaml").write_text("file: webq/test.jsonl\nmetrics: token_f1\nmax_new_tokens: 4\n")
    return folder


def call(folder: Path, *argv: str) -> int:
    return imsm_cli.main(["audit", *argv, "--data-root", str(folder)])


def test_audit_of_every_kind(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = [str(models / name) for name in ("siamese", "siamese@gate=1", "lora", "full")]
    tasks = ["--tasks", "multirc", "kept_webq", str(models / "mine.yaml"), "--targets", str(models / "mine.yaml")]
    out = tmp_path / "out"
    assert call(models, str(models / "base"), *checkpoints, *tasks, "--output", str(out), "--batch-size", "3") == 0
    shown = capsys.readouterr().out
    assert "siamese@gate=1" in shown and "plasticity" in shown and str(out / "audit.html") in shown
    facts = json.loads((out / "audit.json").read_text())
    assert [entry["kind"] for entry in facts["checkpoints"]] == ["siamese", "siamese", "peft", "full"]
    frozen = facts["checkpoints"][1]["tasks"]
    assert frozen["kept_webq"]["metrics"]["identical"]["after"]["value"] == 1.0  # a gate of 1 is the base
    assert frozen["multirc"]["lost"] == frozen["multirc"]["gained"] == []
    assert facts["checkpoints"][3]["tasks"]["kept_webq"]["metrics"]["identical"]["after"]["value"] < 1.0
    base_result = json.loads((out / facts["result"]).read_text())
    assert "kept_webq" not in base_result["tasks"]
    Page((out / "audit.html").read_text(encoding="utf-8"))

    # Again from the results alone, in another folder, without models and data.
    results = [str(out / found["result"]) for found in (facts, *facts["checkpoints"])]
    status = imsm_cli.main(["audit", *results, "--targets", "mine", "--output", str(tmp_path / "again")])
    assert status == 0
    again = json.loads((tmp_path / "again" / "audit.json").read_text())
    assert again["matrix"] == facts["matrix"]
    for entry, first in zip(again["checkpoints"], facts["checkpoints"], strict=True):
        assert (tmp_path / "again" / entry.pop("result")).samefile(out / first.pop("result"))
        assert entry == first


def test_results_are_reused_and_mixed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    out = tmp_path / "out"
    tail = ["--tasks", "multirc", "webq", "--targets", "webq", "--limit", "4", "--output", str(out)]
    assert call(models, "base", "lora", *tail) == 0
    paths = {path: path.stat().st_mtime_ns for path in sorted((out / "results").iterdir())}
    first = (out / "audit.json").read_text()
    assert call(models, "base", "lora", *tail) == 0
    assert {path: path.stat().st_mtime_ns for path in sorted((out / "results").iterdir())} == paths
    assert (out / "audit.json").read_text() == first
    base = next(str(path) for path in paths if path.name.startswith("base-"))
    assert call(models, base, "siamese", "lora", *tail) == 0
    assert capsys.readouterr().out.count("harmonic mean") == 3
    tail = ["--tasks", "webq", "--targets", "webq", "--limit", "3", "--output", str(tmp_path / "other")]
    assert call(models, base, "lora", *tail) == 2
    assert "base and lora were asked different records of 'webq'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["base", "lora", "--targets", "webq"], "name with --tasks what to evaluate"),
        (
            ["base", "lora", "--tasks", "multirc", "--targets", "webq"],
            "target 'webq' is not among the tasks; there are",
        ),
        (["base", "lora", "--tasks", "nonsense", "--targets", "webq"], "unknown task 'nonsense'"),
        (
            ["base", "lora", "--tasks", "webq", "kept_webq", "--targets", "kept_webq"],
            "'kept_webq' measures what was kept",
        ),
        (["base", "base", "--tasks", "webq", "--targets", "webq"], "base is given twice"),
        (["base", "nowhere.json", "--tasks", "webq", "--targets", "webq"], "nowhere.json cannot be read"),
        (["base", "narrow", "--tasks", "webq", "--targets", "webq"], "differ in hidden_size 16 and 8"),
        (["full", "lora", "--tasks", "webq", "--targets", "webq"], "lora was trained on "),
        (
            ["lora", "base", "--tasks", "webq", "--targets", "webq"],
            "BASE must be the model before training, and lora is a peft checkpoint; name",
        ),
        (
            ["base", "lora", "--tasks", "webq", "--targets", "webq", "--batch-size", "0"],
            "--batch-size must be a positive",
        ),
    ],
)
def test_clear_errors(
    models: Path,
    tmp_path: Path,
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(models)
    assert call(models, *argv, "--output", str(tmp_path / "out"), "--limit", "2") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["base", "nowhere", "--tasks", "webq"], "'nowhere' is neither a folder"),
        (["base", "lora@gate=2", "--tasks", "webq"], "@gate must be a number from 0"),
        (["base", "lora", "--tasks", "webq", "kept_cola"], "no file .*cola/test.jsonl, which task 'kept_cola' needs"),
    ],
)
def test_what_is_missing_shows_before_the_base_is_run(
    models: Path,
    tmp_path: Path,
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert call(models, *argv, "--targets", "webq", "--output", str(tmp_path / "out")) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["base", "./nowhere@gate=1"], "checkpoint './nowhere' is not a folder"),
        (["org/name", "./nowhere"], "checkpoint './nowhere' is not a folder"),
        (["./nowhere", "org/name"], "checkpoint './nowhere' is not a folder"),
        (["base", "lora", "--base", "./nowhere"], "base model './nowhere' is not a folder"),
    ],
)
def test_a_missing_folder_shows_before_data_are_looked_for(
    models: Path,
    tmp_path: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tasks = ["--tasks", "banking77", "--targets", "banking77"]
    assert imsm_cli.main(["audit", *more, *tasks, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"imsm: {message}\n"
    assert not (tmp_path / "out").exists()


def test_output_is_a_file(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    assert call(models, "a", "b", "--tasks", "webq", "--targets", "webq", "--output", str(path)) == 2
    assert f"--output {path} is a file; name a folder" in capsys.readouterr().err
    assert path.read_text() == "mine"
