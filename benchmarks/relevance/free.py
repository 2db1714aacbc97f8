"""What is read and dreamt, penalty, border and number of prompts do to heads of tasks whose prompts have no wording in common."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
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
from benchmarks.relevance.features import Encoded, Reader, encode, questions, say
from benchmarks.relevance.free_tasks import NEAR, Exchange, FreeTask, free_tasks, other_sets
from benchmarks.relevance.line import Line
from benchmarks.relevance.sets import conversation
from imsm.data.dresses import dresses
from imsm.data.formats import Conversation
from imsm.data.rendering import Renderer
from imsm.dreams import dream
from imsm.errors import InputError
from imsm.folders import write_text
from imsm.relevance import BORDER
from imsm.training.dreaming import DRESSED, anchor_times

#: What is varied, and what training does.
VARIED: dict[str, tuple[Any, ...]] = {
    "pooling": ("mean, last", "mean, said", "mean, last, said"),
    "asked": (False, True),
    "penalty": (0.1, 0.2, 0.3),
    "prompts": (40, 80, 160),
    "border": (0.25, 1 / 3, BORDER, 0.5),
}
DEFAULT = {
    "pooling": Choice.pooling,
    "asked": True,
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

#: How many prompts of a set are given as anchors.
ANCHORS = (0, 5, 20)
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

    Raises:
        InputError: the model or the data root is not there or lacks a file, or the model has no chat template.
    """
    tasks, others = free_tasks(data_root), list(other_sets(data_root))
    reader = Reader(model_name, work)
    if not reader.tokenizer.chat_template:
        raise InputError(f"--model must have a chat template, for the tasks are user turns; {model_name} has none")
    dreams = {}
    for seed in seeds:
        samples = dream(reader.model, reader.tokenizer, DREAMS, seed, answers=False, folder=work / "dreams")
        prompts = [sample.prompt_ids for sample in samples] + questions(samples, reader.tokenizer)
        rows = loaded(reader, "free", f"dreams-{seed}", prompts)
        dreams[seed] = {False: {name: values[: len(samples)] for name, values in rows.items()}, True: rows}
    away = {}
    for found in others:
        ids = [encode(reader.tokenizer, prompt).ids for prompt in found.prompts]
        away[found.name] = loaded(reader, found.split, found.name, ids)
    parts = {task.name: folds(reader, task) for task in tasks}
    heads = {task.name: judged(task, parts[task.name], list(dreams.values()), away) for task in tasks}
    content: dict[str, Any] = {
        "model": title(model_name),
        "layers": reader.numbers,
        "dreams": {seed: len(rows[False]["mean.memory"]) for seed, rows in dreams.items()},
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
        "anchors": anchored(tasks, parts, [made[True] for made in dreams.values()], away),
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
    task: FreeTask, parts: Sequence[FoldRows], dreams: Sequence[dict[bool, Features]], away: dict[str, Features]
) -> dict[Values, list[Sent]]:
    """What the heads of every fold and of each seed's dreams do under every choice.

    Args:
        task: the task.
        parts: of its folds, as `folds` gives them.
        dreams: the features of each seed's, and by True with those that ask as questions, too.
        away: those of the sets that are not a task, by name.
    """
    found: dict[Values, list[Sent]] = {choice: [] for choice in choices()}
    for fit, held_out in parts:
        sets = {OWN: held_out, **{name: away[name] for name in task.others}}
        for other, pooling, asked, penalty, prompts in itertools.product(dreams, *list(VARIED.values())[:-1]):
            line = Line(read(fit[prompts], pooling), read(other[asked], pooling), penalty)
            logits = {name: line.logits(read(features, pooling)) for name, features in sets.items()}
            for place in VARIED["border"]:
                border = line.border(place)
                sent = {name: float((own > border).double().mean()) for name, own in logits.items()}
                found[pooling, asked, penalty, prompts, place].append(sent)
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
    """What a few anchors do to the default heads, by task, set and number: seen once each, and as often as training does."""
    sets = {name: read(features, Choice.pooling) for name, features in away.items()}
    found = []
    for task, near in ((task, near) for task in tasks for name, near in NEAR if name == task.name):
        others = [sets[name] for name in task.others if name != near]
        made = [
            (read(fit[Choice.prompts], Choice.pooling), read(held_out, Choice.pooling))
            for fit, held_out in parts[task.name]
        ]
        for count, weighed in itertools.product(ANCHORS, (False, True)):
            anchors, alike = sets[near].split([count, len(sets[near]) - count])
            shares = []
            for dreamt, (fit, held_out) in itertools.product((read(rows, Choice.pooling) for rows in dreams), made):
                times = anchor_times(count, len(dreamt)) if weighed else 1
                line = Line(fit, torch.cat([dreamt, anchors.repeat(times, 1)]), Choice.penalty)
                sent = [
                    float((line.logits(rows) > line.border(BORDER)).double().mean()) if len(rows) else 1.0
                    for rows in (held_out, anchors, alike, *others)
                ]
                shares.append((1 - sent[0], sent[1], sent[2], fmean(sent[3:])))
            figures = [round(fmean(share), 3) for share in zip(*shares, strict=True)]
            found.append({"task": task.name, "set": near, "count": count, "weighed": weighed, "figures": figures})
    return found


# -- features --------------------------------------------------------------------------------------------------------


def folds(reader: Reader, task: FreeTask) -> list[FoldRows]:
    """The features of every fold of a task."""
    fit = [{count: dressed(reader.tokenizer, fold.fit[:count]) for count in VARIED["prompts"]} for fold in task.folds]
    held_out = [[encode(reader.tokenizer, conversation(text)).ids for text in fold.held_out] for fold in task.folds]
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


def dressed(tokenizer: PreTrainedTokenizerBase, exchanges: Sequence[Exchange]) -> list[list[int]]:
    """The prompts in the dresses that training makes."""
    renderer = Renderer(tokenizer)
    examples = [
        renderer.render(Conversation(conversation(*exchange), 0), line) for line, exchange in enumerate(exchanges, 1)
    ]
    made = dresses(examples, tokenizer, others=math.ceil(DRESSED * len(examples)))
    return [dress.prompt_ids for dress in made if dress.prompt_ids]


def loaded(reader: Reader, split: str, name: str, prompts: Sequence[list[int]]) -> Features:
    """The features of prompts."""
    return load_file(reader.read(split, name, [Encoded(ids) for ids in prompts]))


def read(features: Features, pooling: str) -> Tensor:
    """(N, F): what a head reads of them."""
    return joined(features, FEATURES[pooling], DEPTHS[Choice.layers])
