"""Records as tables: a row a cell, a column a system, medians and their ratio to the peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import train
from benchmarks.measure import medians
from benchmarks.systems import SYSTEMS
from benchmarks.targets import verdicts

TITLES = {**{name: system.title for name, system in SYSTEMS.items()}, **train.TITLES, "memory": "this machine's memory"}
#: The system that a verb's ratios are to.
PEERS = {"train": "trainer", "decode": "peft", "memory": "peft", "scaling": "peft", "saturated": "base"}


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.3f} s"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB" if value < 2**30 else f"{value / 2**20:,.0f} MiB"


def bandwidth(value: float) -> str:
    return f"{value / 1e9:.1f} GB/s"


def rate(value: float) -> str:
    return f"{value:,.1f}"


def share(value: float) -> str:
    return f"{value:.0%}"


#: By verb: a metric, its name, how it is written.
METRICS: dict[str, list[tuple[str, str, Callable[[float], str]]]] = {
    "train": [
        ("seconds", "Seconds", seconds),
        ("peak_bytes", "Peak memory", mebibytes),
        ("loss", "Last loss", "{:.3f}".format),
    ],
    "decode": [("tokens_per_second", "Tokens per second", rate), ("prefill_seconds", "Prefill", seconds)],
    "memory": [
        ("weight_bytes", "Weights", mebibytes),
        ("cache_bytes", "KV cache", mebibytes),
        ("peak_bytes", "Peak memory", mebibytes),
    ],
    "saturated": [("tokens_per_second", "Tokens per second", rate), ("prefill_seconds", "Prefill", seconds)],
    "scaling": [("prefill_seconds", "Prefill", seconds), ("tokens_per_second", "Tokens per second", rate)],
    "limit": [
        ("tokens_per_second", "Tokens per second", rate),
        ("allowed_per_second", "Tokens per second that the memory allows", rate),
        ("share", "Share of it reached", share),
        ("read_bytes_per_second", "Read bandwidth", bandwidth),
        ("copied_bytes_per_second", "Copy bandwidth", bandwidth),
    ],
}


@dataclass(frozen=True)
class Table:
    """A title, the headings, and rows of texts."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """In Markdown, numbers to the right."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def show(self) -> None:
        """On the terminal."""
        from rich.console import Console
        from rich.table import Table as RichTable

        made = RichTable(title=self.title)
        for place, heading in enumerate(self.head):
            made.add_column(heading, justify="right" if place else "left")
        for row in self.rows:
            made.add_row(*row)
        Console(markup=False, highlight=False, width=max(Console().width, 120)).print(made)


def tables(record: dict[str, Any]) -> list[Table]:
    """A table for each metric of a record, and that of the targets."""
    verb = record["benchmark"]
    values = {name: medians(cell["rounds"]) for name, cell in record["cells"].items() if cell["rounds"]}
    made = []
    for metric, title, write in METRICS[verb]:
        found = {system: None for cell in values.values() for system in cell if metric in cell[system]}
        columns = list(found)
        if not columns:
            continue
        rows = []
        for name, cell in values.items():
            peer = cell.get(PEERS.get(verb, ""), {}).get(metric)
            texts = []
            for system in columns:
                value = cell.get(system, {}).get(metric)
                if value is None:
                    texts.append("–")
                    continue
                texts.append(write(value) + (f" ({value / peer:.2f})" if peer and system != PEERS[verb] else ""))
            rows.append([name, *texts])
        made.append(Table(f"{title}, {record['model']}", ["", *(TITLES[system] for system in columns)], rows))
    return [*made, *target_table(record)]


def target_table(record: dict[str, Any]) -> list[Table]:
    """The targets that the record has measurements for; no table if there are none."""
    names = {metric: title for metric, title, _ in METRICS[record["benchmark"]]}
    rows = [
        [
            verdict.cell,
            f"{names[verdict.target.metric]}: {TITLES[verdict.target.system]} / {TITLES[verdict.target.peer]}",
            f"{verdict.ratio:.3f}",
            f"{verdict.target.sense} {verdict.target.bound:.2f}",
            "met" if verdict.met else "**not met**",
        ]
        for verdict in verdicts(record)
    ]
    return [Table(f"Targets, {record['model']}", ["", "ratio of", "measured", "target", ""], rows)] if rows else []


def unmet(record: dict[str, Any]) -> list[str]:
    """A line for each target that is not met."""
    return [
        f"{record['benchmark']}, {record['model']}, {verdict.cell}: {verdict.target.metric.replace('_', ' ')} of "
        f"{TITLES[verdict.target.system]} is {verdict.ratio:.3f} × that of {TITLES[verdict.target.peer]} "
        f"({verdict.target.sense} {verdict.target.bound:.2f} is wanted)"
        for verdict in verdicts(record)
        if not verdict.met
    ]
