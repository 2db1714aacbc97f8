"""The tasks: records of public data sets as questions with short answers, no text in two of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imsm.data.records import read_records
from imsm.errors import InputError
from imsm.evaluation.task import Task

Row = dict[str, str]
#: Domains of CLINC150 whose intents are one task; the others but `out_of_scope` are themselves the labels of another.
EVERYDAY = ("travel", "kitchen_and_dining", "home", "utility")
#: Where the texts of each kind are, and the line of a record that holds one: its beginning, or "" for a field of its own.
KINDS = {
    "maths problem": ("gsm8k/train.jsonl", None),
    "trivia question": ("freebaseqa/test.jsonl", "Question:"),
    "news sentence": ("mrpc/train.jsonl", "Sentence1:"),
    "grammar example": ("cola/train.jsonl", "Sentence:"),
    "encyclopedia sentence": ("wiki/sentences.jsonl", ""),
}
#: Texts of each kind; the scarcest has some more than that.
OF_A_KIND = 300


@dataclass(frozen=True)
class Set:
    """One task.

    title: what tables call it.
    rows: from the data root to its records, `input` and `output`, in a fixed order.
    labels: how many answers there are.
    """

    title: str
    rows: Callable[[Path], list[Row]]
    labels: int


def read(root: Path, file: str) -> list[dict[str, Any]]:
    """The rows of a file of the data root.

    Raises:
        InputError: it is missing or cannot be read.
    """
    if not (root / file).is_file():
        raise InputError(f"--data-root {root} has no {file}")
    return [record.fields for record in read_records(str(root / file), "train").records]


def banking(root: Path) -> list[Row]:
    """Banking77: the intent of a bank customer's message."""
    rows = [row for part in ("train", "test") for row in read(root, f"banking77/{part}.jsonl")]
    return [{"input": row["input"], "output": row["output"]} for row in rows]


def everyday(root: Path) -> list[Row]:
    """CLINC150: the intent of a request, of four domains."""
    return [
        {"input": f"What is this request about?\nRequest: {row['text']}\nTopic:", "output": plain(row["intent"])}
        for row in read(root, "clinc150/test.jsonl")
        if row["domain"] in EVERYDAY
    ]


def desks(root: Path) -> list[Row]:
    """CLINC150: the domain of a request, of the six others."""
    return [
        {"input": f"Which desk takes this call?\nCaller: {row['text']}\nDesk:", "output": plain(row["domain"])}
        for row in read(root, "clinc150/test.jsonl")
        if row["domain"] not in (*EVERYDAY, "out_of_scope")
    ]


def kinds(root: Path) -> list[Row]:
    """Which kind of text a text is."""
    found = []
    for kind, (file, start) in KINDS.items():
        texts = [text for row in read(root, file) if (text := text_of(row, start))]
        for text in texts[:OF_A_KIND]:
            found.append({"input": f"Say what kind of text this is.\n{text.lower()}\nKind:", "output": kind})
    return found


def text_of(row: dict[str, Any], start: str | None) -> str:
    """The text in a record: its field `text`, the line that begins so, or the last line."""
    if start == "":
        return str(row["text"]).strip()
    lines = [line.strip() for line in str(row["input"]).splitlines() if line.strip()]
    if start is None:
        return lines[-1]
    return next((line.removeprefix(start).strip() for line in lines if line.startswith(start)), "")


def plain(label: str) -> str:
    """A label in words."""
    return label.replace("_", " ")


SETS = {
    "banking": Set("Banking77 intents", banking, 77),
    "everyday": Set("CLINC150 intents", everyday, 60),
    "desks": Set("CLINC150 domains", desks, 6),
    "kinds": Set("kinds of text", kinds, 5),
}


def drawn(name: str, root: Path, training: int, test: int) -> tuple[list[Row], list[Row]]:
    """Training and test records of a task, always the same ones; no text is in both. Fewer for training if there are fewer.

    Raises:
        InputError: there are not enough to train on as many as to test on.
    """
    rows = list({row["input"]: row for row in SETS[name].rows(root)}.values())
    random.Random(0).shuffle(rows)
    if len(rows) < 2 * test:
        raise InputError(f"task {name} has {len(rows)} records, too few for a test on {test}; set a lower test_records")
    return rows[test : test + training], rows[:test]


def task(name: str) -> Task:
    """The task as `imsm eval` runs it, on the file that the benchmark wrote."""
    found = SETS[name]
    return Task(
        name=name,
        title=found.title,
        kind="answer",
        file=f"{name}/test.jsonl",
        metrics=("exact_match",),
        max_new_tokens=12,
        chance=1 / found.labels,
    )
