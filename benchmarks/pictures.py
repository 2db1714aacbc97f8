"""Records as pictures: one a benchmark, a panel (or a row of them) a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import medians
from benchmarks.table import TITLES

COLOURS = {
    "base": "#777777",
    "peft": "#d1495b",
    "merged": "#edae49",
    "peft_compiled": "#8d2b3b",
    "two": "#9fc9d1",
    "shared": "#00798c",
    "compiled": "#003d46",
    "trainer": "#d1495b",
    "sft": "#edae49",
    "sft_plain": "#c98a1b",
    "live": "#9fc9d1",
    "bank": "#00798c",
    "off_task": "#5b8e7d",
    "on_task": "#30638e",
}
#: By verb: what is drawn, and its axis.
BARS = {
    "train": ("seconds", "seconds (less is better)", 1.0),
    "decode": ("tokens_per_second", "tokens per second", 1.0),
    "memory": ("peak_bytes", "peak memory, MiB", 2.0**20),
    "saturated": ("tokens_per_second", "tokens per second", 1.0),
    "limit": ("share", "share of what the memory allows", 1.0),
}
SWEEPS = {"prompt": "prompt, tokens", "share": "adapted share of layers (upper)", "gate_rank": "gate rank"}


def picture(records: list[dict[str, Any]], path: Path) -> None:
    """Draws the records of one benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scaling = records[0]["benchmark"] == "scaling"
    columns = len(SWEEPS) if scaling else 1
    size = (4.2 * columns if scaling else 9.5, 3.6 * len(records))
    figure, axes = plt.subplots(len(records), columns, figsize=size, dpi=120, layout="constrained", squeeze=False)
    for row, record in zip(axes, records, strict=True):
        if scaling:
            for panel, sweep in zip(row, SWEEPS, strict=True):
                lines(panel, record, sweep)
        else:
            bars(row[0], record)
    for panel in axes.flat:
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    # Records may differ in the systems that they have.
    named = {
        label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def bars(panel: Any, record: dict[str, Any]) -> None:
    """A group a cell, a bar a system; batches are worlds apart, so decoding is drawn against peft's rate."""
    metric, axis, unit = BARS[record["benchmark"]]
    cells = {name: medians(cell["rounds"]) for name, cell in record["cells"].items() if cell["rounds"]}
    systems = [s for s in COLOURS if any(s in values for values in cells.values())]
    against_peer = record["benchmark"] == "decode" and "peft" in systems
    width = 0.85 / max(len(systems), 1)
    for place, system in enumerate(systems):
        measured = [(group, values) for group, values in enumerate(cells.values()) if system in values]
        heights = [
            values[system][metric] / (values["peft"][metric] if against_peer else unit) for _, values in measured
        ]
        where = [group + (place - (len(systems) - 1) / 2) * width for group, _ in measured]
        panel.bar(where, heights, width, color=COLOURS[system], label=TITLES[system])
    if against_peer:
        panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xticks(range(len(cells)), [name.replace(", ", "\n") for name in cells], fontsize=7)
    panel.set_ylabel(f"{axis} / those of peft, unmerged" if against_peer else axis, fontsize=8)
    panel.set_title(record["model"], fontsize=9)


def lines(panel: Any, record: dict[str, Any], sweep: str) -> None:
    """Prefill seconds over what one sweep varies."""
    cells = [cell for cell in record["cells"].values() if cell["setting"]["sweep"] == sweep and cell["rounds"]]
    points = sorted(((cell["setting"][sweep], medians(cell["rounds"])) for cell in cells), key=lambda point: point[0])
    for system in [s for s in (points[0][1] if points else {}) if s in COLOURS]:
        x, y = [at for at, _ in points], [values[system]["prefill_seconds"] for _, values in points]
        panel.plot(x, y, marker="o", markersize=3, color=COLOURS[system], label=TITLES[system])
    if sweep != "share":
        panel.set_xscale("log", base=2)
    if sweep == "prompt":
        panel.set_yscale("log")
    panel.set_xlabel(SWEEPS[sweep], fontsize=8)
    panel.set_ylabel("prefill seconds", fontsize=8)
    panel.set_title(record["model"], fontsize=9)
