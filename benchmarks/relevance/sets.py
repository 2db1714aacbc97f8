"""Prompts of every kind that a relevance head must judge, and what it should say of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.forgetting.plan import read_plan
from imsm.data.records import read_records
from imsm.errors import InputError
from imsm.evaluation.prompts import fill
from imsm.generation import Prompt

#: Ours: wordings, questions and conversations.
SETS = Path(__file__).resolve().parent / "sets"
TRAINED = "Name the intent of this bank customer's message.\nMessage: {text}\nIntent:"
#: Sets of the data root that are no part of the task, and the file that validation prompts come from.
ELSEWHERE = {
    "webq": "test",
    "freebaseqa": "test",
    "multirc": "test",
    "cola": "train",
    "mrpc": "train",
    "gsm8k": "train",
}
#: Fewer of those that take long.
LONG = {"multirc": 30}
#: CLINC150's domains that are the task's or may be.
NEAR = ("banking", "credit_cards", "out_of_scope")
FIT, VALIDATION, EACH, CONVERSATIONS = 160, 120, 60, 40

#: open: either answer would do.
Wanted = Literal["task", "base", "open"]
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind.

    name: unique within its split.
    split: for what it may be used; choices are made on `validation`.
    wanted: who should answer.
    prompts: texts, or conversations that end in a user's turn.
    last_turn: judge by the last turn's tokens alone.
    """

    name: str
    split: Split
    wanted: Wanted
    prompts: tuple[Prompt, ...]
    last_turn: bool = False

    @property
    def chat(self) -> bool:
        """Whether the prompts are a task's or a question's text as a chat turn, which needs a chat template."""
        return self.name.endswith("-chat")


def prompt_sets(data_root: Path, test: bool = False) -> Iterator[PromptSet]:
    """All sets of validation, and with `test` those of test.

    MultiRC has too few records for the forgetting benchmark and for this one: its validation prompts are test prompts
    there, of which the answers are not looked at here. All others are not.

    Raises:
        InputError: the data root lacks a file.
    """
    yield from judged("validation", task_rows(data_root)[0], data_root)
    if test:
        yield from judged("test", shuffled(read(data_root / "banking77" / "test.jsonl"), seed=1), data_root)


def task_rows(data_root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the task's training file: some for validation, and some that heads are fitted to."""
    return divided(data_root)[:2]


def divided(data_root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Both of `task_rows`, and the rows that are neither's."""
    rows = shuffled(read(data_root / "banking77" / "train.jsonl"), seed=0)
    held_out = min(VALIDATION, len(rows) // 5)
    return rows[:held_out], rows[held_out:][:FIT], rows[held_out + FIT :]


def judged(split: Split, messages: list[dict[str, Any]], data_root: Path) -> Iterator[PromptSet]:
    """Every set of validation or of test, the task's ones over the customers' messages given."""

    def both(name: str, wanted: Wanted, texts: Sequence[str]) -> Iterator[PromptSet]:
        yield PromptSet(name, split, wanted, tuple(texts))
        yield PromptSet(f"{name}-chat", split, wanted, turns(texts[:EACH]))

    texts = [row["text"] for row in messages][:EACH]
    yield from both("trained", "task", [row["input"] for row in messages][:VALIDATION])
    wordings = yaml.safe_load((SETS / "rewordings.yaml").read_text(encoding="utf-8"))[split]
    for number, wording in enumerate(wordings, 1):
        yield from both(f"reworded-{number}", "task", [fill(wording, {"text": text}) for text in texts])
    questions = {
        kind: [row["text"] for row in read(SETS / f"{kind}-{split}.jsonl")] for kind in ("near_domain", "everyday")
    }
    for kind, asked in questions.items():
        yield from both(kind, "base", asked)
    for name, file in ELSEWHERE.items():
        own = part(read(data_root / name / f"{'test' if split == 'test' else file}.jsonl"), split)
        found = [row["input"] for row in own][: LONG.get(name)]
        if name == "webq":
            yield from both(name, "base", found)
        else:
            yield PromptSet(name, split, "base", tuple(found))
    other = [row["text"] for row in other_requests(data_root, split)]
    yield from both("clinc", "base", other)
    wiki = part(read(data_root / "wiki" / "sentences.jsonl"), split)
    yield PromptSet("wiki", split, "base", tuple(row["text"] for row in wiki))
    yield from both("bare", "open", texts)
    yield PromptSet("clinc-in-prompt", split, "open", tuple(fill(TRAINED, {"text": text}) for text in other))
    away, back = conversations(split, messages, wordings, questions)
    turning: tuple[tuple[str, Wanted, list[list[dict[str, str]]]], ...] = (
        ("turns-away", "base", away),
        ("turns-back", "task", back),
    )
    for name, wanted, found in turning:
        yield PromptSet(name, split, wanted, tuple(found))
        yield PromptSet(f"{name}-last", split, wanted, tuple(found), last_turn=True)
        # As if nothing had been said before.
        yield PromptSet(f"{name}-alone", split, wanted, tuple(prompt[-1:] for prompt in found))


def other_requests(data_root: Path, split: Split) -> list[dict[str, Any]]:
    """CLINC150's records of a split, of the domains that are not the task's."""
    return part([row for row in read(data_root / "clinc150" / "test.jsonl") if row["domain"] not in NEAR], split)


def conversations(
    split: Split, messages: list[dict[str, Any]], wordings: list[str], questions: dict[str, list[str]]
) -> tuple[list[list[dict[str, str]]], list[list[dict[str, str]]]]:
    """Conversations that leave the task for a question, and that come to it from small talk.

    Every other task prompt is in the trained wording.
    """
    script = yaml.safe_load((SETS / "conversations.yaml").read_text(encoding="utf-8"))[split]
    asked = [
        question for pair in zip(questions["near_domain"], questions["everyday"], strict=True) for question in pair
    ]
    count = min(CONVERSATIONS, len(messages))
    prompts = [
        row["input"] if number % 2 == 0 else fill(wordings[number // 2 % len(wordings)], {"text": row["text"]})
        for number, row in enumerate(messages[:count])
    ]
    away, back = [], []
    for number, (row, prompt) in enumerate(zip(messages, prompts, strict=False)):
        leave = script["away"][number % len(script["away"])].replace("{question}", asked[number % len(asked)])
        away.append(conversation(prompt, row["output"], leave))
        talk = script["answered"][number % len(script["answered"])]
        come = script["back"][number % len(script["back"])].replace("{prompt}", prompt)
        back.append(conversation(talk["question"], talk["answer"], come))
    return away, back


def conversation(*contents: str) -> list[dict[str, str]]:
    """Turns of the user and the assistant, the user's first."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def turns(texts: Sequence[str]) -> tuple[Prompt, ...]:
    """Each text as a user's turn."""
    return tuple(conversation(text) for text in texts)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file.

    Raises:
        InputError: it is not there.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a --data-root that holds it")
    return [record.fields for record in read_records(path, "train").records]


def shuffled(rows: Sequence[Any], seed: int) -> list[Any]:
    """The rows in an order drawn by the seed."""
    return random.Random(seed).sample(list(rows), len(rows))


def part(rows: Sequence[Any], split: Split) -> list[Any]:
    """`EACH` rows: for test, of those that the forgetting benchmark draws from a file of as many; else, of all others.

    The two never share one.
    """
    limit = min(read_plan("smollm2").limit, len(rows))
    drawn = set(random.Random(0).sample(range(len(rows)), limit))
    order = sorted(shuffled(range(len(rows)), seed=3), key=lambda index: index in drawn)
    count = min(EACH, len(rows) // 2)
    return [rows[index] for index in (order[:count] if split == "validation" else order[len(rows) - count :])]
