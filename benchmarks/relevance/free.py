"""What is read and dreamt, penalty, border and number of prompts do to heads of tasks in free writing and in other templates."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks import machine
from benchmarks.models import title
from benchmarks.relevance.bank import DEPTHS, FEATURES, Choice, joined
from benchmarks.relevance.features import Encoded, Reader, dressed_again, encode, say
from benchmarks.relevance.free_tasks import NEAR, Exchange, FreeTask, free_tasks, other_sets
from benchmarks.relevance.line import Line
from benchmarks.relevance.sets import conversation
from imsm.data.dresses import dresses
from imsm.data.formats import Conversation, Pair
from imsm.data.rendering import Renderer
from imsm.dreams import dream
from imsm.folders import write_text
from imsm.relevance import BORDER
from imsm.training.border import anchor_times
from imsm.training.dreaming import DRESSED, FRAMED

#: What is varied, and what training does.
VARIED: dict[str, tuple[Any, ...]] = {
    "pooling": ("mean, last", "mean, last, said"),
    "framed": (0.0, 0.2, FRAMED, 1.0),
    "penalty": (0.1, 0.3, 1.0),
    "prompts": (80, 160),
    "border": (0.25, 1 / 3, BORDER, 0.5),
}
DEFAULT = {
    "pooling": Choice.pooling,
    "framed": Choice.framed,
    "penalty": Choice.penalty,
    "prompts": Choice.prompts,
    "border": BORDER,
}
DREAMS = Choice.dreams
#: What the task's own set is called.
OWN = "held out"
#: Of a task under one choice, over all folds and seeds: the mean share of its held-out prompts that the adapter keeps, the
#: least, and the mean share of the other sets that is sent to the base.
FIGURES = ("kept", "worst", "sent")

#: How many prompts of a set are given as anchors, and whether they count as in training or as a dream each.
WEIGHED = ((0, False), (5, False), (5, True), (20, False), (20, True))
#: What is told of heads with anchors: the mean shares of the task's held-out prompts that stay with the adapter, of the
#: anchors, of the rest of their set and of all other sets that are sent to the base.
ANCHORED = ("kept", "anchors", "alike", "others")

#: Values of `VARIED`.
Values = tuple[Any, ...]
#: (N, d) features by pooling and depth.
Features = dict[str, Tensor]
#: Of a fold, the features of what a head is fitted to, by the number of prompts at most, and of the held-out prompts.
FoldRows = tuple[dict[int, Features], Features]
#: The share of each set that one head sends to the base.
Sent = dict[str, float]


def run(model_name: str, data_root: Path, work: Path, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Fits a head for every task, fold, seed of dreams and choice, writes `out/MODEL-free.json`, and gives its content.

    A model without a chat template has the tasks that are plain texts.

    Raises:
        InputError: the model or the data root is not there or lacks a file.
    """
    tasks, others = free_tasks(data_root), list(other_sets(data_root))
    reader = Reader(model_name, work)
    if not reader.tokenizer.chat_template:
        others = [found for found in others if isinstance(found.prompts[0], str)]
        there = {found.name for found in others}
        tasks = [replace(t, others=tuple(n for n in t.others if n in there)) for t in tasks if not t.chat]
    dreams, counts = {}, {}
    for seed in seeds:
        samples = dream(reader.model, reader.tokenizer, DREAMS, seed, answers=False, folder=work / "dreams")
        counts[seed] = len(samples)
        again = dressed_again(samples, reader.tokenizer)
        prompts = [sample.prompt_ids for sample in samples] + again["asked"]
        rows = loaded(reader, "free", f"dreams-{seed}", prompts + again["framed"])
        dreams[seed] = {
            share: {name: values[: len(prompts) + round(share * len(again["framed"]))] for name, values in rows.items()}
            for share in VARIED["framed"]
        }
    away = {}
    for found in others:
        ids = [encode(reader.tokenizer, prompt).ids for prompt in found.prompts]
        away[found.name] = loaded(reader, found.split, found.name, ids)
    parts = {task.name: folds(reader, task) for task in tasks}
    heads = {task.name: judged(task, parts[task.name], list(dreams.values()), away) for task in tasks}
    content: dict[str, Any] = {
        "model": title(model_name),
        "layers": reader.numbers,
        "dreams": counts,
        "tasks": {
            task.name: {
                "folds": len(task.folds),
                "fit": min(len(fold.fit) for fold in task.folds),
                "held_out": sum(len(fold.held_out) for fold in task.folds),
            }
            for task in tasks
        },
        "sets": {name: len(rows["mean.memory"]) for name, rows in away.items()},
        "default": DEFAULT,
        "figures": FIGURES,
        "choices": [
            {**dict(zip(VARIED, choice, strict=True)), **{name: figures(made[choice]) for name, made in heads.items()}}
            for choice in choices()
        ],
        "sent": {name: mean_sent(made[tuple(DEFAULT.values())]) for name, made in heads.items()},
        "anchored": ANCHORED,
        "anchors": anchored(tasks, parts, [made[DEFAULT["framed"]] for made in dreams.values()], away),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "machine": machine.machine(),
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    write_text(out / f"{reader.folder.name}-free.json", text + "\n")
    return content


def choices() -> Iterator[Values]:
    """All choices."""
    return itertools.product(*VARIED.values())


# -- heads -----------------------------------------------------------------------------------------------------------


def judged(
    task: FreeTask, parts: Sequence[FoldRows], dreams: Sequence[dict[float, Features]], away: dict[str, Features]
) -> dict[Values, list[Sent]]:
    """What the heads of every fold and of each seed's dreams do under every choice.

    Args:
        task: the task.
        parts: of its folds, as `folds` gives them.
        dreams: the features of each seed's by the share of them that is in forms, too.
        away: those of the sets that are not a task, by name.
    """
    found: dict[Values, list[Sent]] = {choice: [] for choice in choices()}
    for fit, held_out in parts:
        sets = {OWN: held_out, **{name: away[name] for name in task.others}}
        for other, pooling, framed, penalty, prompts in itertools.product(dreams, *list(VARIED.values())[:-1]):
            line = Line(read(fit[prompts], pooling), read(other[framed], pooling), penalty)
            logits = {name: line.logits(read(features, pooling)) for name, features in sets.items()}
            for place in VARIED["border"]:
                border = line.border(place)
                sent = {name: float((own > border).double().mean()) for name, own in logits.items()}
                found[pooling, framed, penalty, prompts, place].append(sent)
    say(f"{task.name}: {len(found) * len(parts) * len(dreams)} heads and borders")
    return found


def figures(heads: Sequence[Sent]) -> list[float]:
    """`FIGURES` of heads."""
    kept = [1 - sent[OWN] for sent in heads]
    away = [fmean(share for name, share in sent.items() if name != OWN) for sent in heads]
    return [round(figure, 3) for figure in (fmean(kept), min(kept), fmean(away))]


def mean_sent(heads: Sequence[Sent]) -> Sent:
    """The mean over heads."""
    return {name: round(fmean(sent[name] for sent in heads), 3) for name in heads[0]}


def anchored(
    tasks: Sequence[FreeTask],
    parts: dict[str, list[FoldRows]],
    dreams: Sequence[Features],
    away: dict[str, Features],
) -> list[dict[str, Any]]:
    """What a few anchors do to the default heads, by task, set and number: as a dream each, and as in training."""
    sets = {name: read(features, Choice.pooling) for name, features in away.items()}
    found = []
    for task, near in ((task, near) for task in tasks for name, near in NEAR if name == task.name):
        others = [sets[name] for name in task.others if name != near]
        made = [
            (read(fit[Choice.prompts], Choice.pooling), read(held_out, Choice.pooling))
            for fit, held_out in parts[task.name]
        ]
        for count, weighed in WEIGHED:
            anchors, alike = sets[near].split([count, len(sets[near]) - count])
            shares = []
            for dreamt, (fit, held_out) in itertools.product((read(rows, Choice.pooling) for rows in dreams), made):
                times = anchor_times(count, len(dreamt)) if weighed else 1
                line = Line(fit, torch.cat([dreamt, anchors.repeat(times, 1)]), Choice.penalty)
                border = line.border(line.nearer(anchors) if weighed else BORDER)
                sent = [
                    float((line.logits(rows) > border).double().mean()) if len(rows) else 1.0
                    for rows in (held_out, anchors, alike, *others)
                ]
                shares.append((1 - sent[0], sent[1], sent[2], fmean(sent[3:])))
            figures = [round(fmean(share), 3) for share in zip(*shares, strict=True)]
            found.append({"task": task.name, "set": near, "count": count, "weighed": weighed, "figures": figures})
    return found


# -- features --------------------------------------------------------------------------------------------------------


def folds(reader: Reader, task: FreeTask) -> list[FoldRows]:
    """The features of every fold of a task."""
    fit = [
        {count: fitted_to(reader.tokenizer, fold.fit[:count], task.chat) for count in VARIED["prompts"]}
        for fold in task.folds
    ]
    held_out = [
        [encode(reader.tokenizer, conversation(text) if task.chat else text).ids for text in fold.held_out]
        for fold in task.folds
    ]
    parts = [*(ids for made in fit for ids in made.values()), *held_out]
    # Most prompts are those of several folds.
    place = {key: row for row, key in enumerate(dict.fromkeys(tuple(ids) for part in parts for ids in part))}
    found = loaded(reader, "free", task.name, [list(ids) for ids in place])

    def features(part: list[list[int]]) -> Features:
        rows = torch.tensor([place[tuple(ids)] for ids in part])
        return {name: values[rows] for name, values in found.items()}

    return [
        ({count: features(part) for count, part in made.items()}, features(unseen))
        for made, unseen in zip(fit, held_out, strict=True)
    ]


def fitted_to(tokenizer: PreTrainedTokenizerBase, exchanges: Sequence[Exchange], chat: bool) -> list[list[int]]:
    """The prompts in the dresses that training makes."""
    renderer = Renderer(tokenizer)
    examples = [
        renderer.render(Conversation(conversation(*exchange), 0) if chat else Pair(*exchange), line)
        for line, exchange in enumerate(exchanges, 1)
    ]
    made = dresses(examples, tokenizer, others=math.ceil(DRESSED * len(examples)))
    return [dress.prompt_ids for dress in made if dress.prompt_ids]


def loaded(reader: Reader, split: str, name: str, prompts: Sequence[list[int]]) -> Features:
    """The features of prompts."""
    return load_file(reader.read(split, name, [Encoded(ids) for ids in prompts]))


def read(features: Features, pooling: str) -> Tensor:
    """(N, F): what a head reads of them."""
    return joined(features, FEATURES[pooling], DEPTHS[Choice.layers])
