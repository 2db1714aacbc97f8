"""Which features, dreams, penalty and border make a head that sends each set where it should go."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import machine
from benchmarks.relevance.features import INDEX, LAYERS
from imsm.data.dresses import USUAL
from imsm.errors import InputError
from imsm.folders import write_text
from imsm.relevance import BORDER, STRAY_DREAMS, fit_relevance

#: What the head is fitted to: the task in these dresses, and these dreams. `turned`: conversations that turn to either.
DRESSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "trained, plain dreams": (("trained",), ("plain",)),
    "trained, chat dreams": (("trained",), ("chat",)),
    "trained": (("trained",), ("plain", "chat")),
    "moved": (("trained", "moved"), ("plain", "chat")),
    "usual": (USUAL, ("plain", "chat")),
    "usual, short dreams": (USUAL, ("short-plain", "short-chat")),
    "usual, bare": ((*USUAL, "bare"), ("plain", "chat")),
    "usual, framed": ((*USUAL, "framed"), ("plain", "chat")),
    "usual, turned": ((*USUAL, "turned"), ("plain", "chat", "turned")),
    "all": ((*USUAL, "bare", "framed", "turned"), ("plain", "chat", "turned")),
}
FEATURES = {"mean": ("mean",), "last": ("last",), "both": ("mean", "last")}
DEPTHS = {**{layer: (layer,) for layer in LAYERS}, "all": LAYERS}
DREAMS = (40, 120, 160, 200, 270)
#: Prompts of the task in each dress, at most.
PROMPTS = (40, 80, 160)
PENALTIES = (0.03, 0.1, 0.2, 0.3, 1.0)
#: How often a head is fitted anew to prompts and dreams drawn at random, and for which of the values above.
DRAWS = 6
DRAWN = tuple(itertools.product(("mean", "both"), (0.1, 0.2), (40, 80, 160)))
#: Share of the task's prompts that may be left to the base model.
FALSE_RECALL = 0.01


#: Where the border is drawn between the task's prompts, 0, and the dreams, 1.
RULES = {"at the task": 0.0, "tenth": 0.1, "fifth": BORDER, "quarter": 0.25, "third": 1 / 3, "half way": 0.5}
DEFAULT_RULE = "fifth"


@dataclass(frozen=True)
class Choice:
    """How a head is made, as training does it unless told otherwise: keys of `DRESSES`, `FEATURES` and `DEPTHS`, the dreams
    and the task's prompts at most, and the fit's penalty. `draw`: the seed by which they are drawn; 0 takes the first ones."""

    dress: str
    pooling: str = "both"
    layers: str = "all"
    dreams: int = 200
    prompts: int = 80
    penalty: float = 0.2
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
            if all(sets) and sets not in list(found.values())[:place]
        ]

    def of(self, split: str, name: str, choice: Choice) -> Tensor:
        """(N, F) features of a set, joined as the choice has them."""
        found = self._found[split, name]
        return torch.cat(
            [found[f"{pooling}.{layer}"] for pooling in FEATURES[choice.pooling] for layer in DEPTHS[choice.layers]], 1
        )

    def judged(self, split: str) -> list[dict[str, Any]]:
        """The index's entries of a split."""
        return [found for found in self.sets if found["split"] == split]


def ablate(folder: Path, out: Path, test: bool = False) -> dict[str, Any]:
    """Fits every choice, writes `out/MODEL.json`, and gives its content.

    Choices are weighed on the validation sets. With `test` the best and the default one are judged on the test sets too.

    Raises:
        InputError: there are no features, or with `test` none of the test sets.
    """
    bank = Bank(folder)
    if test and not bank.judged("test"):
        raise InputError(f"{folder} has no features of the test sets; give --test to features")
    made: dict[Choice, dict[str, Any]] = {}

    def add(choices: Sequence[Choice]) -> None:
        for choice in choices:
            if choice not in made:
                made[choice] = result(bank, choice, "validation")

    # What training does, and each of its parts varied; then the same around the best of these.
    centre = default = Choice("usual")
    for _ in range(2):
        add([replace(centre, dress=dress) for dress in bank.dresses()])
        add([replace(centre, pooling=pooling, layers=layers) for pooling in FEATURES for layers in DEPTHS])
        add([replace(centre, dreams=dreams, penalty=penalty) for dreams in DREAMS for penalty in PENALTIES])
        shorter = [centre.dress, "usual, short dreams"]
        add([replace(centre, dress=d, dreams=n, prompts=p) for d in shorter for n in DREAMS[1:4] for p in PROMPTS])
        centre = max(made, key=by(made))
    best = max(made, key=by(made))
    content: dict[str, Any] = {
        "model": bank.content["model"],
        "layers": bank.content["layers"],
        "sets": {found["name"]: [found["wanted"], found["count"]] for found in bank.judged("validation")},
        "fit": {found["name"]: found["count"] for found in bank.judged("fit")},
        "rules": RULES,
        "default": asdict(default),
        "best": asdict(best),
        "choices": [{**asdict(choice), **found} for choice, found in made.items()],
        "drawn": drawn(bank, default),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "machine": machine.machine(),
    }
    if test:
        content["test_sets"] = {found["name"]: [found["wanted"], found["count"]] for found in bank.judged("test")}
        content["test"] = [{**asdict(choice), **result(bank, choice, "test")} for choice in (default, best)]
    write_text(out / f"{folder.name}.json", json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    return content


def by(made: dict[Choice, dict[str, Any]]) -> Any:
    """What choices are ordered by: the share that goes where it should, under the default rule."""
    return lambda choice: (made[choice]["rules"][DEFAULT_RULE]["right"], made[choice]["auc"])


def result(bank: Bank, choice: Choice, split: str) -> dict[str, Any]:
    """What one choice comes to on a split.

    auc: chance that a prompt which the base should answer lies above one of the task, sets of one side pooled.
    worst_auc: the same for the worst pair of sets.
    rules: by name of `RULES`: `shares` that go to the base, in the order of the index; `task` and `base`, the mean share
        that is right over the sets of either side; `right`, the mean of the two.
    """
    logits, points = judge(bank, choice, split)
    judged = bank.judged(split)
    task = [logits[found["name"]] for found in judged if found["wanted"] == "task"]
    base = [logits[found["name"]] for found in judged if found["wanted"] == "base"]
    rules = {}
    for name, point in points.items():
        shares = [round(float((logits[found["name"]] > point).double().mean()), 3) for found in judged]
        sent = list(zip(judged, shares, strict=True))
        means = {
            "task": round(fmean(1 - share for found, share in sent if found["wanted"] == "task"), 4),
            "base": round(fmean(share for found, share in sent if found["wanted"] == "base"), 4),
        }
        rules[name] = {"shares": shares, **means, "right": round(fmean(means.values()), 4)}
    return {
        "auc": round(area(torch.cat(base), torch.cat(task)), 4),
        "worst_auc": round(min(area(above, below) for above in base for below in task), 4),
        "rules": rules,
    }


def judge(bank: Bank, choice: Choice, split: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Each set's logits (N,), and where each rule draws the border."""
    tasks, dreams = bank.dressed(choice.dress)
    # The same examples in every dress, and as many dreams of each kind.
    task = torch.cat([some(bank.of("fit", name, choice), choice.prompts, choice.draw) for name in tasks])
    other = torch.cat(
        [some(bank.of("fit", name, choice), choice.dreams // len(dreams), choice.draw) for name in dreams]
    )
    fitted = fit_relevance(task, other, penalty=choice.penalty, folds=0)
    with torch.no_grad():
        logits = {
            found["name"]: fitted.head(bank.of(split, found["name"], choice))[:, 0].double()
            for found in bank.judged(split)
        }
        own, seen = (fitted.head(features)[:, 0].double() for features in (task, other))
    least, most = own.quantile(1 - FALSE_RECALL), seen.quantile(STRAY_DREAMS)
    return logits, {name: float(least + place * (most - least).clamp(min=0)) for name, place in RULES.items()}


def some(features: Tensor, most: int, draw: int) -> Tensor:
    """The first rows, or with a seed any ones, at most so many."""
    if draw:
        features = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(draw))]
    return features[:most]


def drawn(bank: Bank, default: Choice) -> list[dict[str, Any]]:
    """What the values of `DRAWN` come to over `DRAWS` draws: mean and standard deviation of the share that goes right over all
    sets but conversations, and the mean of the worst set's."""
    found = []
    judged = bank.judged("validation")
    for pooling, penalty, prompts in DRAWN:
        choice = replace(default, pooling=pooling, penalty=penalty, prompts=prompts)
        rules = [
            result(bank, replace(choice, draw=draw), "validation")["rules"][DEFAULT_RULE]
            for draw in range(1, DRAWS + 1)
        ]
        entry: dict[str, Any] = {"pooling": pooling, "penalty": penalty, "prompts": prompts}
        for side, right in (("task", 0), ("base", 1)):
            places = [
                place
                for place, part in enumerate(judged)
                if part["wanted"] == side and not part["name"].startswith("turns-")
            ]
            each = [[1 - abs(rule["shares"][place] - right) for place in places] for rule in rules]
            means = [fmean(shares) for shares in each]
            entry[side] = {"mean": fmean(means), "deviation": stdev(means), "worst": fmean(map(min, each))}
        found.append(entry)
    return found


def area(above: Tensor, below: Tensor) -> float:
    """The chance that one of `above` is the larger, ties counted half."""
    order = below.sort().values
    smaller = torch.searchsorted(order, above) + torch.searchsorted(order, above, right=True)
    return float(smaller.double().mean()) / (2 * len(below))
