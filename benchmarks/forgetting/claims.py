"""What a user would like to be true of IMSM, each held against the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.forgetting.report import Group


@dataclass(frozen=True)
class Claim:
    """A sentence with its figures, and whether it holds."""

    text: str
    holds: bool


def claims(found: Sequence[Group]) -> list[Claim]:
    """Those that the records can tell."""
    plain = {group.name: group for group in found if not group.varied}
    ours = plain.get("imsm")
    if ours is None:
        return []
    made = []
    if "lora" in plain:
        made += [more(ours, plain["lora"], "plasticity", "learns at least as much of the target as")]
        made += [more(ours, plain["lora"], "retention", "retains at least as much as")]
    for what, title in (("@gate", "the same checkpoint at any constant gate"), ("@scale", "LoRA scaled down")):
        dialled = [group for group in found if group.varied.startswith(what)]
        if dialled:
            made.append(undominated(ours, dialled, title))
    for name, peer in plain.items():
        if name not in ("base", "imsm", "lora") and not name.startswith("imsm-"):
            made.append(more(ours, peer, "harmonic", "balances learning and keeping at least as well as"))
    variants = [group for name, group in plain.items() if name.startswith("imsm-")]
    if variants:
        best = max(variants, key=lambda group: group.balance("harmonic"))
        made.append(more(ours, best, "harmonic", "balances them at least as well as its best variant,"))
    return made


def more(ours: Group, peer: Group, figure: str, words: str) -> Claim:
    """Our figure is at least the peer's."""
    mine, theirs = ours.balance(figure), peer.balance(figure)
    name = "harmonic mean" if figure == "harmonic" else figure
    return Claim(f"IMSM {words} {peer.title} ({name} {mine:.3f} against {theirs:.3f}).", mine >= theirs)


def undominated(ours: Group, dialled: Sequence[Group], title: str) -> Claim:
    """No point of a sweep is at least as good in learning and in keeping."""
    mine = ours.balance("plasticity"), ours.balance("retention")
    better = [
        group for group in dialled if group.balance("plasticity") >= mine[0] and group.balance("retention") >= mine[1]
    ]
    said = f"IMSM's learned gate (plasticity {mine[0]:.3f}, retention {mine[1]:.3f}) is not matched in both by {title}"
    if better:
        best = max(better, key=lambda group: group.balance("harmonic"))
        said += f": {best.varied} has {best.balance('plasticity'):.3f} and {best.balance('retention'):.3f}"
    return Claim(said + ".", not better)
