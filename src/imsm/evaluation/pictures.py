"""The pictures of an audit, as SVG to stand within a page; colours are the page's, by the classes s0 … s5 and base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from imsm.evaluation.audit import Audit, Entry
from imsm.evaluation.figures import before_after, percent, score, signed
from imsm.evaluation.results import Estimate

#: Series that have a colour of their own; more begin again.
COLOURS = 6
#: Estimated width of a letter, in the pictures' units.
LETTER = 7.8


@dataclass(frozen=True)
class Box:
    """A rectangle that something covers."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def shorten(text: str, letters: int) -> str:
    """A text cut in its middle to so many letters: names differ at their start or at their end."""
    if len(text) <= letters:
        return text
    start = letters // 2
    return f"{text[:start]}…{text[start + 1 - letters :]}"


# -- target against retained -----------------------------------------------------------------------------------------

WIDTH, HEIGHT = 480, 380
PLOT = Box(62, 16, 438, 326)
RADIUS = 7


def against(audit: Audit) -> Markup | None:
    """Plasticity over retention, a point a checkpoint, with lines of equal harmonic mean; None if no point has both."""
    points = [(entry, entry.balance.retention, entry.balance.plasticity) for entry in audit.entries]
    known = [(entry, x, y) for entry, x, y in points if x is not None and y is not None]
    if not known:
        return None
    left = max(0.0, math.floor((min(x for _, x, _ in known) - 0.03) * 10) / 10)
    top = min(1.0, math.ceil((max(y for _, _, y in known) + 0.03) * 10) / 10)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            PLOT.left + (x - left) / (1 - left) * (PLOT.right - PLOT.left),
            PLOT.bottom - y / top * (PLOT.bottom - PLOT.top),
        )

    said = "; ".join(f"{entry.label}: retention {percent(x)}, plasticity {percent(y)}" for entry, x, y in known)
    parts = [_open(WIDTH, HEIGHT, f"Plasticity against retention. {said}.")]
    for tick in _ticks(left, 1.0):
        x, y = place(tick, 0)
        parts += [_line("grid", x, PLOT.top, x, y), _text(x, y + 18, f"{tick * 100:.0f} %", "middle")]
    for tick in _ticks(0.0, top):
        x, y = place(left, tick)
        parts += [_line("grid", x, y, PLOT.right, y), _text(x - 7, y + 4, f"{tick * 100:.0f} %", "end")]
    parts += [
        _text((PLOT.left + PLOT.right) / 2, HEIGHT - 14, "retention: kept of the rest →", "middle"),
        Markup('<g transform="rotate(-90 14 {0})">{1}</g>').format(
            (PLOT.top + PLOT.bottom) / 2, _text(14, (PLOT.top + PLOT.bottom) / 2, "plasticity: learned →", "middle")
        ),
    ]
    for mean in (0.2, 0.4, 0.6, 0.8, 0.9):
        if mean / (2 - mean) >= top:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in _level(mean, left, top)))
        x, y = place(1.0, mean / (2 - mean))
        parts += [
            Markup('<polyline class="level" points="{}"/>').format(path),
            _text(x + 5, y + 4, f"{mean * 100:.0f}", "start", "small"),
        ]
    parts.append(_text(PLOT.right + 5, PLOT.top - 4, "mean", "start", "small"))

    marks = [("base", "base", *place(1.0, 0.0))]
    marks += [(f"s{i % COLOURS}", entry.label, *place(x, y)) for i, (entry, x, y) in _numbered(audit, known)]
    taken = [Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for _, _, x, y in marks]
    circles: list[Markup] = []
    names: list[Markup] = []
    for style, label, x, y in marks:
        circles.append(Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(style, x, y, RADIUS))
        short = shorten(label, 20)
        box = _room(x, y, len(short) * LETTER, taken)
        taken.append(box)
        if box.bottom < y or box.top > y:
            edge = box.bottom if box.bottom < y else box.top
            parts.append(_line("leader", x, y, min(max(x, box.left), box.right), edge))
        aside = box.right < x
        names.append(
            _text(box.right if aside else box.left, box.bottom - 4, short, "end" if aside else "start", "name")
        )
    parts += circles + names
    return Markup("").join([*parts, Markup("</svg>")])


def _numbered(
    audit: Audit, known: Sequence[tuple[Entry, float, float]]
) -> Iterator[tuple[int, tuple[Entry, float, float]]]:
    """Points with the place of their checkpoint in the audit, which gives the colour."""
    places = {entry.label: i for i, entry in enumerate(audit.entries)}
    return ((places[point[0].label], point) for point in known)


def _ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (0.05, 0.1, 0.2) if (high - low) / step <= 6 or step == 0.2)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _level(mean: float, left: float, top: float) -> list[tuple[float, float]]:
    """Points (retention, plasticity) whose harmonic mean is `mean`, within the plot."""
    # Where plasticity leaves the plot at the top, retention is this.
    start = max(left, mean * top / (2 * top - mean)) if 2 * top > mean else left
    xs = [start + (1 - start) * i / 24 for i in range(25)]
    return [(x, mean * x / (2 * x - mean)) for x in xs if 2 * x > mean]


def _room(x: float, y: float, width: float, taken: Sequence[Box]) -> Box:
    """Where a name of that width fits beside its point: the first place that is free and within the picture."""
    half, gap, height = width / 2, RADIUS + 4, 16
    places = [(x + gap, y - 8), (x - gap - width, y - 8)]
    for distance in range(6):
        above, below = y - gap - height * (1 + distance), y + gap + height * distance
        places += [(left, top) for top in (above, below) for left in (x - half, x - gap - width, x + gap)]
    boxes = [Box(left, top, left + width, top + height) for left, top in places]
    for box in boxes:
        inside = box.left >= PLOT.left and box.right <= PLOT.right and box.top >= 0 and box.bottom <= PLOT.bottom + 2
        if inside and not any(box.meets(other) for other in taken):
            return box
    return boxes[1] if x > (PLOT.left + PLOT.right) / 2 else boxes[0]


# -- bars of a task --------------------------------------------------------------------------------------------------

BARS = 400
BAR_LEFT, BAR_RIGHT = 138, 340
ROW = 26


def bars(audit: Audit, name: str) -> Markup:
    """A task's score for the base and every checkpoint, with 95 % intervals, on a scale of the task's own."""
    task = audit.task(name)
    higher = task.score.higher_is_better
    rows: list[tuple[str, str, Estimate, str]] = [("base", "base", task.score.before, "")]
    said = []
    for i, entry in enumerate(audit.entries):
        change = entry.comparison.tasks[name].score
        rows.append((f"s{i % COLOURS}", entry.label, change.after, signed(change.change.value, higher)))
        said.append(f"{entry.label}: {before_after(change)}")
    low = min(0.0, *(estimate.low for _, _, estimate, _ in rows))
    high = max(0.0, *(estimate.high for _, _, estimate, _ in rows))
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return BAR_LEFT + (value - low) / span * (BAR_RIGHT - BAR_LEFT)

    height = len(rows) * ROW + 4
    parts = [_open(BARS, height, f"{task.title}, before and after. {'; '.join(said)}.")]
    for i, (style, label, estimate, _) in enumerate(rows):
        top = 4 + i * ROW
        left, right = sorted((place(0.0), place(estimate.value)))
        parts += [
            _text(BAR_LEFT - 8, top + 15, shorten(label, 16), "end"),
            Markup('<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(
                style, left, top, right - left, ROW - 6
            ),
            _line("whisker", place(estimate.low), top + 10, place(estimate.high), top + 10),
            *(_line("whisker", place(end), top + 6, place(end), top + 14) for end in (estimate.low, estimate.high)),
            _text(BAR_RIGHT + 10, top + 15, score(estimate.value, higher), "start", "name"),
        ]
    if task.chance and low <= task.chance <= high:
        parts.append(_line("chance", place(task.chance), 0, place(task.chance), height))
    parts.append(_line("axis", place(0.0), 0, place(0.0), height))
    return Markup("").join([*parts, Markup("</svg>")])


# -- marks -----------------------------------------------------------------------------------------------------------


def _open(width: int, height: int, said: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, escape(said))


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(style, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str, style: str = "label") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(style, x, y, anchor, text)
