"""Which features, dreams, penalty and border make a head that sends each set where it should go."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.relevance.bank import DEPTHS, Bank, Choice
from benchmarks.relevance.line import Line
from imsm.errors import InputError
from imsm.folders import write_text
from imsm.relevance import BORDER

DREAMS = (40, 120, 160, 200, 270)
#: Prompts of the task at most, and the share of them in other dresses.
PROMPTS = (40, 80, 160)
DRESSED = (0.25, 0.5, 1.0)
#: Share of the dreams in a form.
FRAMED = (0.0, 0.2, 0.5, 1.0)
PENALTIES = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
#: How often a head is fitted anew to prompts and dreams drawn at random, and for which of the values above.
DRAWS = 6
DRAWN = tuple(itertools.product(("mean, last", "mean, last, said"), FRAMED, (0.1, 0.3, 1.0), (80, 160)))
#: Where the border is drawn between the task's prompts, 0, and the dreams, 1.
RULES = {
    "at the task": 0.0,
    "fifth": 0.2,
    "quarter": 0.25,
    "three tenths": 0.3,
    "third": 1 / 3,
    "two fifths": BORDER,
    "half way": 0.5,
}
DEFAULT_RULE = "two fifths"
#: Those that draws are judged by.
DRAWN_RULES = ("quarter", "third", "two fifths", "half way")


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
        add([replace(centre, pooling=pooling, layers=layers) for pooling in bank.poolings() for layers in DEPTHS])
        add([replace(centre, dressed=share) for share in DRESSED])
        add([replace(centre, framed=share) for share in FRAMED])
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
    line = Line(*bank.fitted_to(choice), choice.penalty)
    logits = {found["name"]: line.logits(bank.of(split, found["name"], choice)) for found in bank.judged(split)}
    return logits, {name: line.border(place) for name, place in RULES.items()}


def drawn(bank: Bank, default: Choice) -> list[dict[str, Any]]:
    """What the values of `DRAWN` come to over `DRAWS` draws under each of `DRAWN_RULES`: mean and standard deviation of the share
    that goes right over all sets but conversations, and the mean of the worst set's."""
    found = []
    judged = list(enumerate(bank.judged("validation")))
    places = {
        side: [place for place, part in judged if part["wanted"] == side and not part["name"].startswith("turns-")]
        for side in ("task", "base")
    }
    for pooling, framed, penalty, prompts in DRAWN:
        values: dict[str, Any] = {"pooling": pooling, "framed": framed, "penalty": penalty, "prompts": prompts}
        choice = replace(default, **values)
        drawn_rules = [result(bank, replace(choice, draw=draw), "validation")["rules"] for draw in range(1, DRAWS + 1)]
        for name in DRAWN_RULES:
            entry = {**values, "border": name}
            for side, right in (("task", 0), ("base", 1)):
                each = [
                    [1 - abs(rules[name]["shares"][place] - right) for place in places[side]] for rules in drawn_rules
                ]
                means = [fmean(shares) for shares in each]
                entry[side] = {"mean": fmean(means), "deviation": stdev(means), "worst": fmean(map(min, each))}
            found.append(entry)
    return found


def area(above: Tensor, below: Tensor) -> float:
    """The chance that one of `above` is the larger, ties counted half."""
    order = below.sort().values
    smaller = torch.searchsorted(order, above) + torch.searchsorted(order, above, right=True)
    return float(smaller.double().mean()) / (2 * len(below))
