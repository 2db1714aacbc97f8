"""What the paper reports, from `paper.json`: every figure of its tables by model, row and column."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

ColumnKind = Literal["score", "average", "ahead", "parameters", "speed", "speed_ratio", "memory", "memory_ratio"]

#: The task of columns that stand for whatever a row was trained on.
TARGET = "target"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    title: as tables print it.
    kind: score of a task, average of the row's scores, how far that is ahead of the baseline's, millions of learnt
        parameters, tokens decoded a second, GB at the peak of training, and the last two as a share of the baseline's.
    task: of a score; `TARGET` is what the row was trained on.
    metric: of a score; None for the task's own.
    """

    title: str
    kind: ColumnKind
    task: str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Part:
    """Rows that were trained on one task.

    trained_on: the task; None where each column's own task was trained on.
    figures: by model and row, a figure a column, None where the paper has none.
    """

    trained_on: str | None
    figures: dict[str, dict[str, list[float | None]]]


@dataclass(frozen=True)
class PaperTable:
    """A table or figure of the paper.

    name: what `imsm reproduce` calls it.
    title: what it is about.
    columns, parts: see there.
    note: what is to be known of it.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    parts: tuple[Part, ...]
    note: str = ""

    def model(self, wanted: str | None) -> str | None:
        """The model whose figures are held against ours: the one wanted if the table has it, or else its first."""
        models = list(dict.fromkeys(model for part in self.parts for model in part.figures))
        return wanted if wanted in models else models[0] if models else None

    def figure(self, model: str | None, part: int, row: str, column: int) -> float | None:
        """One figure, None if the paper has none."""
        row_figures = self.parts[part].figures.get(model or "", {}).get(row)
        return None if row_figures is None else row_figures[column]


@cache
def paper_tables() -> dict[str, PaperTable]:
    """The paper's tables and figures by name."""
    content: dict[str, Any] = json.loads(files("imsm").joinpath("reproduce/paper.json").read_text(encoding="utf-8"))
    return {
        name: PaperTable(
            name,
            table["title"],
            tuple(Column(**column) for column in table["columns"]),
            tuple(Part(**part) for part in table["parts"]),
            table.get("note", ""),
        )
        for name, table in content["tables"].items()
    }
