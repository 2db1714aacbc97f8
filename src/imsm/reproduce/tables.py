"""The comparison with the paper as a table: in the terminal, as Markdown, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imsm.evaluation.tasks import TASKS
from imsm.folders import write_text
from imsm.reproduce.comparison import Cell, Comparison
from imsm.reproduce.paper import TARGET
from imsm.reproduce.plans import Plan

SIGNIFICANT = 0.05
#: Decimals of the kinds of columns that have not two.
DECIMALS = {"parameters": 3}


def cell_text(cell: Cell, decimals: int, between: str = " ") -> str:
    """Such as `87.13* (87.40)`."""
    ours = "–" if cell.ours is None else f"{cell.ours:.{decimals}f}"
    star = "*" if cell.ours is not None and cell.p is not None and cell.p < SIGNIFICANT else ""
    return ours + star + ("" if cell.paper is None else f"{between}({cell.paper:.{decimals}f})")


def _rows(comparison: Comparison, plan: Plan, between: str = " ") -> list[list[str]]:
    several = len(plan.trained_on) > 1
    decimals = [DECIMALS.get(column.kind, 2) for column in plan.table.columns]
    return [
        [f"{line.label}, on {line.trained_on}" if several else line.label]
        + [cell_text(cell, places, between) for cell, places in zip(line.cells, decimals, strict=True)]
        for line in comparison.lines
    ]


def _titles(comparison: Comparison, plan: Plan) -> list[str]:
    """Column titles, with the task's name where a target is one."""
    task = plan.trained_on[0] if len(plan.trained_on) == 1 else None
    return ["", *(TASKS[task].title if task and title == TARGET else title for title in comparison.columns)]


def markdown(comparison: Comparison, plan: Plan) -> str:
    """The table in Markdown."""
    titles = _titles(comparison, plan)
    lines = [
        f"## {comparison.heading}",
        "",
        "| " + " | ".join(titles) + " |",
        "|---|" + "---:|" * (len(titles) - 1),
        *("| " + " | ".join(row) + " |" for row in _rows(comparison, plan)),
        "",
        comparison.legend,
    ]
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The table for machines."""
    return {**asdict(comparison), "heading": comparison.heading}


def write(comparison: Comparison, plan: Plan, folder: Path) -> None:
    """Writes NAME.md and NAME.json."""
    texts = {
        ".md": markdown(comparison, plan),
        ".json": json.dumps(as_json(comparison), ensure_ascii=False, indent=1) + "\n",
    }
    for suffix, text in texts.items():
        write_text(folder / f"{comparison.name}{suffix}", text)


def show(comparison: Comparison, plan: Plan, console: Console) -> None:
    """Prints it, the paper's figures below ours."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for place, title in enumerate(_titles(comparison, plan)):
        table.add_column(Text(title), justify="right" if place else "left", overflow="fold", no_wrap=not place)
    for row in _rows(comparison, plan, between="\n"):
        table.add_row(*map(Text, row))  # as `Text`, since rich would read square brackets as markup
    for part in (Text(comparison.heading), table, Text(comparison.legend + "\n")):
        console.print(part)
