"""A checkpoint along the recall dial, as a table on the terminal and as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from imsm.errors import InputError
from imsm.evaluation.figures import interval, percent, score
from imsm.evaluation.metrics import METRICS
from imsm.evaluation.recall import Dialled


def table(dialled: Dialled) -> Table:
    """A row a stand of the dial, the pick marked."""
    made = Table(title="along the recall dial", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    headings = ("recall", METRICS[dialled.metric].title, "95 %", "left to the base", "answers kept", "mean", "")
    rows = [
        [
            value(stand.recall),
            score(stand.target.value),
            interval(stand.target),
            percent(stand.left),
            percent(stand.retained),
            percent(stand.mean),
            "◀ pick" if stand is dialled.pick else "",
        ]
        for stand in dialled.stands
    ]
    for place, heading in enumerate(headings):
        width = max(len(row[place]) for row in rows)
        made.add_column(heading, justify="right" if heading else "left", min_width=width)
    for row in rows:
        made.add_row(*row)
    return made


def value(recall: float) -> str:
    """A stand of the dial, as it is read."""
    sign = "−" if recall < 0 else "+" if recall > 0 else ""
    return sign + ("∞" if math.isinf(recall) else f"{abs(recall):g}")


def draw(dialled: Dialled, path: Path) -> None:
    """Target, retained and their mean over the dial, whose values stand at equal distances.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("the picture needs matplotlib: pip install 'imsm[pictures]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stands = dialled.stands
    places = list(range(len(stands)))
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    title = METRICS[dialled.metric].title
    curves = (
        (f"target ({title})", "#d1495b", [stand.target.value for stand in stands]),
        ("retained: the base's answers kept", "#00798c", [stand.retained for stand in stands]),
        ("harmonic mean (target as a share of its best)", "#777777", [stand.mean for stand in stands]),
    )
    for label, colour, heights in curves:
        axes.plot(places, heights, marker="o", markersize=4, color=colour, label=label)
    axes.fill_between(
        places,
        [stand.target.low for stand in stands],
        [stand.target.high for stand in stands],
        color="#d1495b",
        alpha=0.12,
        linewidth=0,
    )
    axes.axvline(
        stands.index(dialled.pick), color="#777777", linestyle=":", label=f"pick: {value(dialled.pick.recall)}"
    )
    axes.set_xticks(places, [value(stand.recall) for stand in stands])
    axes.set(xlabel="recall: −∞ the adapter alone … +∞ the base model", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="best")
    figure.savefig(path)
    plt.close(figure)
