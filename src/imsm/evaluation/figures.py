"""How figures are written, alike on the terminal and on the page: scores in points (× 100), losses as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from imsm.evaluation.comparison import Change
from imsm.evaluation.results import Estimate


def score(value: float, higher_is_better: bool = True) -> str:
    """A score in points; where less is better, the value with three decimals."""
    return _plain(f"{value * 100:.1f}" if higher_is_better else f"{value:.3f}")


def signed(value: float, higher_is_better: bool = True) -> str:
    """A change, with its sign."""
    text = score(value, higher_is_better)
    return text if text.startswith("−") or not text.strip("0.") else "+" + text


def interval(estimate: Estimate, higher_is_better: bool = True, change: bool = False) -> str:
    """An interval in brackets, of a change with signs."""
    write = signed if change else score
    return f"[{write(estimate.low, higher_is_better)}, {write(estimate.high, higher_is_better)}]"


def before_after(change: Change) -> str:
    """Both scores of a change."""
    return (
        f"{score(change.before.value, change.higher_is_better)} → {score(change.after.value, change.higher_is_better)}"
    )


def percent(share: float | None) -> str:
    """A share of 1; a dash where there is none."""
    return "–" if share is None else f"{share * 100:.1f} %"


def p_value(p: float | None) -> str:
    """A p value to three decimals; a dash where there was no test."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(number: float) -> str:
    """A number of records, which may be a fraction after adjustment."""
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def labels(checkpoints: Sequence[str]) -> list[str]:
    """Short names: as many of the last parts of each path as tell them apart; numbered where even all do not."""
    parts = [PurePath(name).parts or (name,) for name in checkpoints]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        short = [str(PurePath(*part[-depth:])) for part in parts]
        if len(set(short)) == len(short):
            return short
    return [f"{name} ({i})" for i, name in enumerate(short, 1)]


def _plain(text: str) -> str:
    """A typographic minus, and no minus before zero."""
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")
