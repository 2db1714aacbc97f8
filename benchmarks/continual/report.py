"""The records as tables in Markdown: what each method comes to, its matrix, and what a query costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imsm.errors import InputError


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every record under a folder.

    Raises:
        InputError: there is none.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))]
    if not found:
        raise InputError(f"there are no records in {folder}; make some first: python -m benchmarks.continual run")
    return found


def page(found: list[dict[str, Any]]) -> str:
    """All tables, by model."""
    lines: list[str] = []
    for model in dict.fromkeys(record["model"] for record in found):
        own = [record for record in found if record["model"] == model]
        lines += [f"## {model}", "", *summary(own), ""]
        for record in own:
            lines += [f"### {record['title']}, seed {record['seed']}", "", *matrix(record), ""]
            if record["cost"]:
                lines += [*cost(record), ""]
    return "\n".join(lines)


def summary(found: list[dict[str, Any]]) -> list[str]:
    """A row a record."""
    bounds = {record["seed"]: record["average"] for record in found if record["method"] == "all"}
    lines = [
        "| method | seed | average | of the LoRA on all tasks | backward transfer | forward transfer |",
        "|---|---|---|---|---|---|",
    ]
    for record in found:
        bound = bounds.get(record["seed"])
        share = f"{record['average'] / bound:.3f}" if bound else "–"
        lines.append(
            f"| {record['title']} | {record['seed']} | {record['average']:.3f} | {share} | {signed(record['backward'])} | "
            f"{signed(record['forward'])} |"
        )
    return lines


def matrix(record: dict[str, Any]) -> list[str]:
    """The base's scores, and those after each task."""
    tasks = record["tasks"]
    after = tasks if len(record["matrix"]) == len(tasks) else ["all at once"]
    lines = ["| after | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name, row in zip(["nothing", *after], [record["base"], *record["matrix"]], strict=True):
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    return lines


def cost(record: dict[str, Any]) -> list[str]:
    """What a query costs with one task and with all."""
    found, tasks = record["cost"], len(record["tasks"])
    lines = [f"| query | goes to | tokens | seconds, 1 task | {tasks} tasks | ratio |", "|---" * 6 + "|"]
    for place, (kind, words) in enumerate((("own", "the first task's"), ("other", "no task's"))):
        seconds, tokens = found[kind], f"{found['tokens'][place]} + {found['tokens'][2]}"
        whose = found["finds"][place] or "base"
        lines.append(
            f"| {words} | {whose} | {tokens} | {seconds['one']:.2f} | {seconds['all']:.2f} | {seconds['ratio']:.3f} |"
        )
    return lines


def signed(value: float | None) -> str:
    """A difference of scores."""
    return "–" if value is None else f"{value:+.3f}"
