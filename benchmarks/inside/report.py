"""`report`: a table of the variants for each model, in Markdown, from the records alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks.forgetting.records import Record, read_all
from benchmarks.forgetting.report import Group, groups, spread
from benchmarks.machine import sentence
from imsm.errors import InputError

HEAD = (
    "",
    "seeds",
    "target",
    "reworded",
    "identical",
    "agreement",
    "KL, nats a token",
    "plain text, nats a token",
    "plasticity",
    "retention",
    "harmonic mean",
    "mean gate",
    "training, s",
)


def text(results: Path) -> str:
    """All tables.

    Raises:
        InputError: there are no records, or one is damaged.
    """
    if not any(results.rglob("*.json")):
        raise InputError(f"there are no records in {results}; make some first: python -m benchmarks.inside run")
    found = read_all(results)
    by_model: dict[str, list[Record]] = {}
    for record in found:
        by_model.setdefault(record.model, []).append(record)
    return "\n".join(
        f"## {model}\n\n{table(records)}\n{sentence(vars(records[-1]))}\n" for model, records in by_model.items()
    )


def table(records: list[Record]) -> str:
    """A row a variant, the base first and then as well as they balance learning and keeping."""
    lines = [list(HEAD), ["---", *["---:"] * (len(HEAD) - 1)], *(row(group) for group in groups(records))]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def row(group: Group) -> list[str]:
    """One variant: scores as the forgetting benchmark has them, kept answers over all tasks of theirs."""
    settings = group.records[0].settings
    tasks = group.records[0].tasks
    kept = [name for name in settings["retained"] if tasks[name]["kind"] == "kept"]
    plain = [name for name in settings["retained"] if tasks[name]["kind"] == "text"]
    training = [record.training for record in group.records]
    gates = sorted(
        {key for found in training for key in found if key.startswith("gate_")}, key=lambda key: int(key[5:])
    )
    names = [*gates, *(["gate"] if any("gate" in found for found in training) else [])]
    means = [f"{key.removeprefix('gate_')}: {spread([found[key] for found in training])}" for key in names]
    return [
        group.title,
        str(len(group.records)),
        spread(group.values(settings["target"])),
        spread(group.means(settings["reworded"])),
        *(spread(group.means(kept, metric)) for metric in ("identical", "agreement", "divergence")),
        spread(group.means(plain)),
        *(f"{group.balance(figure):.3f}" for figure in ("plasticity", "retention", "harmonic")),
        ", ".join(means).replace("gate:", "final:") or "–",
        spread([found["seconds"] for found in training]) if all(training) else "–",
    ]
