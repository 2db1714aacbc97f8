"""What the measurements are held against: ratios of medians in one run, each with its bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.measure import Round, medians

Setting = dict[str, Any]


def always(setting: Setting) -> bool:
    return True


def epochs(count: int) -> Callable[[Setting], bool]:
    return lambda setting: setting["epochs"] == count


def small_batch(setting: Setting) -> bool:
    return setting["batch"] in (1, 8)


def upper_half(setting: Setting) -> bool:
    return setting["sweep"] == "share" and setting["share"] == 0.5


@dataclass(frozen=True)
class Target:
    """`metric` of `system` over that of `peer`, and its bound, in the cells that `where` names."""

    verb: str
    system: str
    peer: str
    metric: str
    sense: Literal["at most", "at least", "exactly"]
    bound: float
    where: Callable[[Setting], bool] = always

    def met(self, ratio: float) -> bool:
        """Whether a ratio keeps the bound."""
        if self.sense == "exactly":
            return ratio == self.bound
        return ratio <= self.bound if self.sense == "at most" else ratio >= self.bound


TARGETS = (
    Target("train", "bank", "trainer", "seconds", "at most", 0.90, epochs(3)),
    Target("train", "bank", "sft", "seconds", "at most", 1.20, epochs(3)),
    Target("train", "bank", "sft_plain", "seconds", "at most", 1.20, epochs(3)),
    Target("train", "bank", "sft", "seconds", "at most", 1.08, epochs(10)),
    Target("train", "bank", "sft_plain", "seconds", "at most", 1.08, epochs(10)),
    Target("train", "live", "trainer", "seconds", "at most", 1.15),
    Target("train", "bank", "trainer", "peak_bytes", "at most", 1.05),
    Target("train", "live", "trainer", "peak_bytes", "at most", 1.05),
    Target("decode", "shared", "peft", "tokens_per_second", "at least", 0.80, small_batch),
    Target("decode", "compiled", "peft", "tokens_per_second", "at least", 1.00, small_batch),
    Target("decode", "compiled", "peft_compiled", "tokens_per_second", "at least", 0.85, small_batch),
    Target("memory", "shared", "peft", "weight_bytes", "at most", 1.02),
    Target("memory", "shared", "peft", "cache_bytes", "exactly", 2.0),
    Target("memory", "compiled", "peft_compiled", "cache_bytes", "exactly", 2.0),
    Target("scaling", "shared", "peft", "prefill_seconds", "at most", 1.60, upper_half),
    Target("saturated", "off_task", "base", "tokens_per_second", "at least", 0.97, small_batch),
)


@dataclass(frozen=True)
class Verdict:
    """A target in one cell."""

    cell: str
    target: Target
    ratio: float

    @property
    def met(self) -> bool:
        """Whether the ratio keeps the target's bound."""
        return self.target.met(self.ratio)


def verdicts(record: dict[str, Any]) -> list[Verdict]:
    """Every target that a record has measurements for."""
    found = []
    for name, cell in record["cells"].items():
        values: Round = medians(cell["rounds"])
        for target in TARGETS:
            if target.verb != record["benchmark"] or not {target.system, target.peer} <= set(values):
                continue
            if target.where(cell["setting"]):
                ratio = values[target.system][target.metric] / values[target.peer][target.metric]
                found.append(Verdict(name, target, ratio))
    return found
