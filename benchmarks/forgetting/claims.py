"""What a user would like to be true of IMSM, each held against the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.forgetting.report import Group


#: The task of questions that are near the target and not it.
NEAR = "kept_near_domain"


@dataclass(frozen=True)
class Claim:
    """A sentence with its figures, and whether it holds."""

    text: str
    holds: bool


def claims(found: Sequence[Group]) -> list[Claim]:
    """Those that the records can tell; two methods are held against each other on the seeds that both have."""
    plain = {group.name: group for group in found if not group.varied}
    ours = plain.get("imsm")
    if ours is None:
        return []
    made = []
    if {"base", "lora"} <= plain.keys():
        made += promises(ours, plain["lora"], plain["base"], plain.get("imsm-paper"))
    if "lora" in plain:
        made += [more(ours, plain["lora"], "plasticity", "learns at least as much of the target as")]
        made += [more(ours, plain["lora"], "retention", "retains at least as much as")]
    for what in ("@gate", "@scale"):
        dialled = [group for group in found if group.varied.startswith(what)]
        if dialled:
            made.append(undominated(ours, dialled))
        if what == "@gate" and dialled and dialled[0].name in plain:
            made += [beats_constants(plain[dialled[0].name], dialled, figure) for figure in ("plasticity", "harmonic")]
    for name, peer in plain.items():
        if name not in ("base", "imsm", "lora") and not name.startswith("imsm-"):
            made.append(more(ours, peer, "harmonic", "balances learning and keeping at least as well as"))
    variants = [group for name, group in plain.items() if name.startswith("imsm-")]
    if variants:
        best = max(variants, key=lambda group: group.balance("harmonic"))
        made.append(more(ours, best, "harmonic", "balances them at least as well as its best variant,"))
    return made


def promises(ours: Group, lora: Group, base: Group, paper: Group | None) -> list[Claim]:
    """What training with dreams is to come to: the adapter's score on the task, the base model's answers on the rest."""
    settings, tasks = ours.records[0].settings, ours.records[0].tasks
    target, reworded = settings["target"], settings["reworded"]
    same, lora = ours.beside(lora)
    mine, theirs = same.mean(target), lora.mean(target)
    made = [
        Claim(
            f"IMSM's exact match on the target is at least LoRA's less 0.005 ({mine:.3f} against {theirs:.3f}).",
            mine >= theirs - 0.005,
        )
    ]
    if paper is not None:
        same_too, paper = ours.beside(paper)
        own, other = same_too.mean(target), paper.mean(target)
        said = "It is at least that of the gate as published, trained together with the adapter"
        made.append(Claim(f"{said} ({own:.3f} against {other:.3f}).", own >= other))
    if reworded:
        share = fmean(same.means(reworded)) / max(fmean(lora.means(reworded)), 1e-9)
        said = f"On prompts in other words IMSM scores at least 0.97 times what LoRA does ({share:.3f} times)."
        made.append(Claim(said, share >= 0.97))
    kept = [name for name in settings["retained"] if tasks[name]["kind"] == "kept"]
    off = [name for name in kept if name != NEAR]
    if off:
        alike, worst = fmean(ours.means(off)), max(ours.mean(name, "divergence") for name in off)
        said = f"Off the task at least 98 % of the base model's answers come out the same ({100 * alike:.1f} %)."
        made.append(Claim(said, alike >= 0.98))
        said = f"There KL(base ‖ IMSM) is at most 0.005 nats a token on every task ({worst:.4f} on the worst)."
        made.append(Claim(said, worst <= 0.005))
    if NEAR in kept:
        alike = ours.mean(NEAR)
        said = f"Of the questions near the task at least 90 % are answered as the base does ({100 * alike:.1f} %)."
        made.append(Claim(said, alike >= 0.9))
    for name in settings["retained"]:
        kind, mine, before = tasks[name]["kind"], ours.mean(name), base.mean(name)
        if kind == "text":
            said = f"{tasks[name]['title']}: cross-entropy rises by at most 0.005 nats a token ({mine - before:+.4f})."
            made.append(Claim(said, mine - before <= 0.005))
        elif kind == "answer" and before > 0:
            said = f"{tasks[name]['title']}: at least 0.99 times the base's score ({mine:.3f} against {before:.3f})."
            made.append(Claim(said, mine >= 0.99 * before))
    return made


def more(ours: Group, peer: Group, figure: str, words: str) -> Claim:
    """Our figure is at least the peer's."""
    return at_least(ours, peer, figure, f"IMSM {words} {peer.title}")


def beats_constants(learned: Group, dialled: Sequence[Group], figure: str) -> Claim:
    """A gate that learned has at least the figure of the best of its constant values."""
    best = max(dialled, key=lambda group: group.balance(figure))
    said = (
        f"{learned.title}: the gate that learned does at least as well as the best constant in its place, {best.varied}"
    )
    return at_least(learned, best, figure, said)


def at_least(group: Group, peer: Group, figure: str, said: str) -> Claim:
    """What is said, with the figures of both on the seeds that both have: the group's is at least the peer's."""
    group, peer = group.beside(peer)
    mine, theirs = group.balance(figure), peer.balance(figure)
    name = "harmonic mean" if figure == "harmonic" else figure
    return Claim(f"{said} ({name} {mine:.3f} against {theirs:.3f}).", mine >= theirs)


def undominated(ours: Group, dialled: Sequence[Group]) -> Claim:
    """No point of a sweep is at least as good in learning and in keeping."""
    ours, _ = ours.beside(dialled[0])
    mine = ours.balance("plasticity"), ours.balance("retention")
    better = [
        group for group in dialled if group.balance("plasticity") >= mine[0] and group.balance("retention") >= mine[1]
    ]
    stands = ", ".join(sorted(group.varied for group in dialled))
    said = (
        f"IMSM (plasticity {mine[0]:.3f}, retention {mine[1]:.3f}) is not matched in both by {dialled[0].title} at any stand of "
        f"its dial that was measured ({stands})"
    )
    if better:
        best = max(better, key=lambda group: group.balance("harmonic"))
        said += f": {best.varied} has {best.balance('plasticity'):.3f} and {best.balance('retention'):.3f}"
    return Claim(said + ".", not better)
