"""Target against retained: a point a method, a line a dial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.forgetting.report import Group

#: Colour by method, and marker by round of the colours; the gate's variants share a colour, and the default has a star.
OURS, OTHERS = "#00798c", ("#d1495b", "#edae49", "#66a182", "#8d96a3", "#5f4b8b", "#c98a1b", "#2e4057", "#a05195")


def draw(by_model: dict[str, list[Group]], path: Path) -> None:
    """A panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(by_model), figsize=(7.2 * len(by_model), 6.4), dpi=120, layout="constrained", squeeze=False
    )
    for panel, (model, found) in zip(axes[0], by_model.items(), strict=True):
        points(panel, [group for group in found if not group.varied])
        for name in dict.fromkeys(group.name for group in found if group.varied):
            dial(panel, [group for group in found if group.name == name])
        panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.05), title=model)
        panel.set_xlabel("plasticity: share of the room on the target that was used")
        panel.set_ylabel("retention: share of the base's score kept on the rest")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    figure.savefig(path)
    plt.close(figure)


def points(panel: Any, found: Sequence[Group]) -> None:
    """One a method; the base in black."""
    variants = [group for group in found if group.name.startswith("imsm-")]
    others = [group for group in found if group.name != "base" and not group.name.startswith("imsm")]
    for group in found:
        if group.name == "base":
            colour, marker = "black", "x"
        elif group.name.startswith("imsm"):
            colour, marker = OURS, "*" if group.name == "imsm" else "PXvdhp<>"[variants.index(group) % 8]
        else:
            place = others.index(group)
            colour, marker = OTHERS[place % len(OTHERS)], "os^D"[place // len(OTHERS) % 4]
        at = group.balance("plasticity"), group.balance("retention")
        panel.scatter(
            *at, s=150 if group.name == "imsm" else 55, color=colour, marker=marker, label=group.title, zorder=3
        )


def dial(panel: Any, found: Sequence[Group]) -> None:
    """The points of a sweep, joined in the order of retention."""
    line = sorted((group.balance("retention"), group.balance("plasticity")) for group in found)
    what = next(group.varied for group in found if group.varied).partition("=")[0]
    colour = OURS if found[0].name.startswith("imsm") else OTHERS[0]
    panel.plot(
        [x for _, x in line], [y for y, _ in line], ":", color=colour, linewidth=1, label=f"{found[0].title}, {what}"
    )
