"""The features of one model's sets, and which of them a head is fitted to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.relevance.features import INDEX, LAYERS
from imsm.data.dresses import USUAL
from imsm.dreams import SHARES
from imsm.errors import InputError
from imsm.training.dreaming import DRESSED, FRAMED

#: What the head is fitted to: the task in these dresses, and these dreams. `asked`: those that ask, as questions; `framed`: in
#: a form; `turned`: conversations that turn to either.
DRESSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "trained, plain dreams": (("trained",), ("plain",)),
    "trained, chat dreams": (("trained",), ("chat", "asked", "framed")),
    "trained": (("trained",), ("plain", "chat", "asked", "framed")),
    "moved": (("trained", "moved"), ("plain", "chat", "asked", "framed")),
    "usual": (USUAL, ("plain", "chat", "asked", "framed")),
    "usual, nothing asked": (USUAL, ("plain", "chat", "framed")),
    "usual, short dreams": (USUAL, ("short-plain", "short-chat")),
    "usual, bare": ((*USUAL, "bare"), ("plain", "chat", "asked", "framed")),
    "usual, framed": ((*USUAL, "framed"), ("plain", "chat", "asked", "framed")),
    "usual, turned": ((*USUAL, "turned"), ("plain", "chat", "asked", "framed", "turned")),
    "all": ((*USUAL, "bare", "framed", "turned"), ("plain", "chat", "asked", "framed", "turned")),
}
FEATURES = {
    "mean": ("mean",),
    "last": ("last",),
    "said": ("said",),
    "mean, last": ("mean", "last"),
    "mean, said": ("mean", "said"),
    "mean, last, said": ("mean", "last", "said"),
}
DEPTHS = {**{layer: (layer,) for layer in LAYERS}, "all": LAYERS}


#: The sets of those that ask and of those in a form, and the sets that they are of.
ASKED, IN_FORMS, DREAMT = "dreams-asked", "dreams-framed", ("dreams-plain", "dreams-chat")


@dataclass(frozen=True)
class Choice:
    """How a head is made, as training does it unless told otherwise.

    dress, pooling, layers: keys of `DRESSES`, `FEATURES` and `DEPTHS`.
    dreams, prompts: at most.
    dressed: share of the prompts, the first ones, in other dresses too.
    framed: share of the dreams in a form, too.
    penalty: of the fit.
    draw: the seed by which dreams and prompts are drawn; 0 takes the first ones.
    """

    dress: str
    pooling: str = "mean, last, said"
    layers: str = "memory"
    dreams: int = 200
    prompts: int = 80
    dressed: float = DRESSED
    framed: float = FRAMED
    penalty: float = 0.3
    draw: int = 0


class Bank:
    """The features of one model's sets.

    Raises:
        InputError: there are none.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX
        if not path.is_file():
            raise InputError(f"there are no features in {folder}; make some: python -m benchmarks.relevance features")
        self.content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.sets: list[dict[str, Any]] = self.content["sets"]
        self._found = {
            (found["split"], found["name"]): load_file(folder / found["split"] / f"{found['name']}.safetensors")
            for found in self.sets
        }

    def dressed(self, dress: str) -> tuple[list[str], list[str]]:
        """The sets of the task and of dreams that a dress comes to; a model without a chat template has fewer."""
        task, dreams = DRESSES[dress]
        named = [f"task-{kind}" for kind in task], [f"dreams-{kind}" for kind in dreams]
        found = [[name for name in names if ("fit", name) in self._found] for names in named]
        return found[0], found[1]

    def dresses(self) -> list[str]:
        """Those that are unlike each other for this model, and have sets of both sides."""
        found = {name: self.dressed(name) for name in DRESSES}
        return [
            name
            for place, (name, sets) in enumerate(found.items())
            if all(sets) and not set(sets[1]) <= {ASKED, IN_FORMS} and sets not in list(found.values())[:place]
        ]

    def poolings(self) -> list[str]:
        """Those of `FEATURES` that this model has; without a chat template there is no last token said."""
        there = {name.partition(".")[0] for found in self._found.values() for name in found}
        return [name for name, parts in FEATURES.items() if there.issuperset(parts)]

    def of(self, split: str, name: str, choice: Choice) -> Tensor:
        """(N, F) features of a set, joined as the choice has them."""
        return joined(self._found[split, name], FEATURES[choice.pooling], DEPTHS[choice.layers])

    def judged(self, split: str) -> list[dict[str, Any]]:
        """The index's entries of a split."""
        return [found for found in self.sets if found["split"] == split]

    def fitted_to(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """(N, F) of the task's prompts and (M, F) of dreams: as trained all of the prompts, in other dresses the first ones."""
        tasks, dreams = self.dressed(choice.dress)
        trained = some(self.of("fit", "task-trained", choice), choice.prompts, choice.draw)
        others = math.ceil(choice.dressed * len(trained))
        task = [
            trained if name == "task-trained" else some(self.of("fit", name, choice), others, choice.draw)
            for name in tasks
        ]
        other = [
            some(self.of("fit", name, choice), count, choice.draw)
            for name, count in dream_counts([n for n in dreams if n not in (ASKED, IN_FORMS)], choice.dreams).items()
        ]
        whole = sum(len(self.of("fit", name, choice)) for name in DREAMT if ("fit", name) in self._found)
        for name, share in ((ASKED, 1.0), (IN_FORMS, choice.framed)):
            if name in dreams:
                # As many of so many dreams as of all.
                again = self.of("fit", name, choice)
                other.append(some(again, round(share * len(again) * choice.dreams / whole), choice.draw))
        return torch.cat(task), torch.cat(other)


def dream_counts(names: Sequence[str], count: int) -> dict[str, int]:
    """How many of each set of dreams, of so many: in the shares in which they are dreamt.

    Conversations that turn come on top, as many as there are user turns.
    """
    kinds = {name: name.removeprefix("dreams-").removeprefix("short-") for name in names}
    whole = sum(SHARES.get(kind, 0) for kind in kinds.values())
    return {name: round(count * SHARES.get(kind, SHARES["chat"]) / whole) for name, kind in kinds.items()}


def joined(found: dict[str, Tensor], poolings: Sequence[str], layers: Sequence[str]) -> Tensor:
    """(N, F) features of these poolings, as far as there are any, and layers, beside each other."""
    names = [f"{pooling}.{layer}" for pooling in poolings for layer in layers]
    return torch.cat([found[name] for name in names if name in found], dim=1)


def some(features: Tensor, most: int, draw: int) -> Tensor:
    """The first rows, or with a seed any ones, at most so many."""
    if draw:
        features = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(draw))]
    return features[:most]
