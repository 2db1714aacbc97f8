"""The training records: CoLA, in the prompt of the paper's authors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imsm.data.records import read_records
from imsm.errors import InputError

HUB = "nyu-mll/glue:cola"
PROMPT = " Given a sentence, judge the grammatical acceptability of the sentence with yes or no.\nSentence:{sentence}\nOutput:"


def cola(root: Path | None, count: int) -> list[dict[str, str]]:
    """The first `count` records of `root/cola/train.jsonl` or, without a root, of the Hub's data set, as input and output.

    Raises:
        InputError: there are none, or fewer.
    """
    source = str(root / "cola" / "train.jsonl") if root is not None else HUB
    try:
        rows = [record.fields for record in read_records(source, "train").records[:count]]
    except InputError as error:
        raise InputError(f"{error}; give a folder that holds cola/train.jsonl with --data-root") from error
    if len(rows) < count:
        raise InputError(f"{source} has {len(rows)} records, {count} are wanted; give fewer with --records")
    return rows if root is not None else [from_hub(row) for row in rows]


def from_hub(row: dict[str, Any]) -> dict[str, str]:
    """A row of the Hub's data set as a record."""
    return {"input": PROMPT.format(sentence=row["sentence"]), "output": "yes" if row["label"] == 1 else "no"}


def write(records: list[dict[str, str]], path: Path) -> None:
    """Records as JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
