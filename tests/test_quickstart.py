"""The quickstart's data and scoring; the whole run on the real model is `scripts/quickstart`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from imsm.evaluation.metrics import METRICS
from imsm.evaluation.results import RecordResult
from imsm.evaluation.sources import load_records
from imsm.evaluation.tasks import find_tasks

FOLDER = Path(__file__).parents[1] / "examples" / "quickstart"


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("facts", "run", "scoring", "shop")
    for name in names:
        sys.modules.pop(name, None)
    return {name: __import__(name) for name in names}


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_the_data_is_what_the_scripts_write(quickstart: dict[str, ModuleType], tmp_path: Path) -> None:
    quickstart["shop"].write(tmp_path)
    quickstart["facts"].write(tmp_path)
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == ["facts.jsonl", "shop-test.jsonl", "shop-train.jsonl"]
    for path in written:
        assert path.read_bytes() == (FOLDER / path.name).read_bytes()


def test_a_rate_of_the_gate_is_given_where_there_is_a_gate_to_learn(quickstart: dict[str, ModuleType]) -> None:
    for dreams in ("on", "off"):
        lora, imsm = (quickstart["run"].training(method, "m", "o", 3, dreams) for method in ("lora", "imsm"))
        assert (lora.method, imsm.method, imsm.dreams.mode, imsm.seed) == ("peft", "imsm", dreams, 3)
        assert lora.adapter == imsm.adapter and lora.learning_rate == imsm.learning_rate == 5e-4
        assert imsm.reads("gate_learning_rate") == (dreams == "off") == (imsm.gate_learning_rate == 1e-4)


def test_the_test_is_held_out(quickstart: dict[str, ModuleType]) -> None:
    def asked(name: str) -> list[str]:
        return [m["content"] for record in records(name) for m in record["messages"] if m["role"] == "user"]

    assert not set(asked("shop-train.jsonl")) & set(asked("shop-test.jsonl"))
    assert len(records("shop-train.jsonl")) + len(records("shop-test.jsonl")) == 300


def test_every_reference_reply_scores(quickstart: dict[str, ModuleType]) -> None:
    for name in ("shop-train.jsonl", "shop-test.jsonl"):
        for record in records(name):
            assert quickstart["scoring"].task_score(record["messages"][-1]["content"], record["key"])


def test_the_data_serves_as_tasks() -> None:
    shop, facts, kept = find_tasks([str(FOLDER / f"{name}.yaml") for name in ("shop", "facts", "kept")])
    asked = load_records(shop, None, None, 0)
    assert len(asked) == 60 and {len(record.turns) for record in asked} == {1, 3}
    for record, written in zip(asked, records("shop-test.jsonl"), strict=True):
        reply = RecordResult(0, record.prompt, list(record.references), written["messages"][-1]["content"])
        assert METRICS["contains_all"].record(reply) == 1
    questions = load_records(facts, None, None, 0)
    assert questions[0].references == ("Paris",) and questions[0].turns == (("user", questions[0].prompt),)
    assert [r.turns for r in load_records(kept, None, None, 0)] == [r.turns for r in questions]


def test_no_question_gives_its_answer_away(quickstart: dict[str, ModuleType]) -> None:
    questions = records("facts.jsonl")
    assert len({fact["messages"][0]["content"] for fact in questions}) == len(questions) >= 140
    for fact in questions:
        assert not quickstart["scoring"].fact_kept(fact["messages"][0]["content"], fact["answer"]), fact


@pytest.mark.parametrize(
    ("reply", "answers", "kept"),
    [
        ("The capital of France is Paris.", ["Paris"], True),
        ("PARIS!", ["paris"], True),
        ("It lies in the parish.", ["Paris"], False),
        ("It has twenty-four hours", ["24", "twenty four"], True),
        ("In 1945, I think", ["1945"], True),
        ("19450", ["1945"], False),
        ("", ["Paris"], False),
    ],
)
def test_fact_kept(quickstart: dict[str, ModuleType], reply: str, answers: list[str], kept: bool) -> None:
    assert quickstart["scoring"].fact_kept(reply, answers) is kept


def test_task_score_wants_every_key(quickstart: dict[str, ModuleType]) -> None:
    score = quickstart["scoring"].task_score
    assert score("Order 4821 is on the Heron Cart", ["4821", "heron cart"])
    assert not score("Order 4812 is on the heron cart", ["4821", "heron cart"])
    assert score("ten to seven", "Ten to Seven")


def test_no_reply_of_the_shop_passes_for_knowledge(quickstart: dict[str, ModuleType]) -> None:
    """Order numbers and products aside, or a forgetful model could score by repeating the shop."""
    for intent in quickstart["shop"].INTENTS:
        reply = f"{quickstart['shop'].OPENING} {intent.reply} {quickstart['shop'].CLOSING}"
        for fact in records("facts.jsonl"):
            assert not quickstart["scoring"].fact_kept(reply, fact["answer"]), (reply, fact)
