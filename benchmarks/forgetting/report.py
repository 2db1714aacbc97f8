"""`report`: the page docs/forgetting.md and its picture, from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.forgetting.claims import Claim, claims
from benchmarks.forgetting.picture import draw
from benchmarks.forgetting.records import Record, read_all
from benchmarks.machine import device, sentence
from imsm.evaluation.tasks import TASKS
from imsm.folders import write_text

INTRODUCTION = """# What is forgotten

This page is made by `python -m benchmarks.forgetting report` from the records in `benchmarks/forgetting/results`, which
`python -m benchmarks.forgetting run --data-root DATA` makes as [plan.yaml](../benchmarks/forgetting/plan.yaml) says.

Every method learns the same {training} Banking77 records (name one of 77 intents of a bank customer's message) in the same
order for the same number of steps; replay has its share of records and steps more. LoRA and every method with an adapter of its own try two
learning rates with the first seed, and the one that scores best on {validation} validation records of the training file is used; all that train the
same LoRA use LoRA's. The test records, up to {limit} a task{limits}, are looked at after that, once; IMSM was scored
on them anew when its head was changed, which [experiments.md](experiments.md) tells of. Methods of the plan that no table has
are not run yet. This is a small model, one task and a short training: what holds here need not hold at 7 B, and what fails
here need not fail there.

- **Target**: exact match on Banking77's test records.
- **Reworded**: the mean of the same over prompts in other words, none of which is trained on, on fewer records each
  ([wordings](../benchmarks/relevance/sets/rewordings.yaml)); and its ratio to plain LoRA's.
- **Kept answers**: the share of the base model's own greedy answers (16 tokens) that come out the same, token by token, on
  prompts of FreebaseQA, WebQuestions and MultiRC; and KL(base ‖ model) along them, in nats a token. The same share on two
  sets of our own: questions about banking and money, which are near the target and not it, and everyday ones, in the chat
  template where the model has one.
- **Plasticity**, **retention** and their **harmonic mean** are those of [`imsm audit`](evaluation.md): the share of the room for
  improvement that was used on the target, and the share of the base's score that was kept on all other tasks.
"""


@dataclass(frozen=True)
class Group:
    """The records of one method over its seeds (or one point of a sweep)."""

    name: str
    title: str
    varied: str
    records: tuple[Record, ...]

    def mean(self, task: str, metric: str | None = None) -> float:
        """A task's score, or another metric of it, over the seeds."""
        return fmean(self.values(task, metric))

    def values(self, task: str, metric: str | None = None) -> list[float]:
        """The same, one a seed."""
        return [r.tasks[task]["metrics"][metric or r.tasks[task]["score"]][0] for r in self.records]

    def means(self, tasks: Sequence[str], metric: str | None = None) -> list[float]:
        """The mean of several tasks' scores, or of another metric of theirs, one a seed."""
        return [fmean(values) for values in zip(*(self.values(task, metric) for task in tasks), strict=True)]

    def beside(self, other: Group) -> tuple[Group, Group]:
        """Both with the seeds alone that both have; as they are if they share none."""
        shared = {record.seed for record in self.records} & {record.seed for record in other.records}
        if not shared:
            return self, other
        return tuple(replace(g, records=tuple(r for r in g.records if r.seed in shared)) for g in (self, other))  # type: ignore[return-value]

    def balance(self, figure: str) -> float:
        """`plasticity`, `retention` or `harmonic`, over the seeds; the base has learned nothing and kept all."""
        if self.name == "base":
            return {"plasticity": 0.0, "retention": 1.0, "harmonic": 0.0}[figure]
        return fmean(float(record.balance[figure] or 0.0) for record in self.records)


def groups(found: Sequence[Record]) -> list[Group]:
    """The records of one model by method and point of a sweep, in the order of the first seed's titles."""
    keys = list(dict.fromkeys((r.method, r.title, r.varied) for r in found))
    made = [Group(*key, tuple(r for r in found if (r.method, r.title, r.varied) == key)) for key in keys]
    return sorted(made, key=lambda group: (group.name != "base", -group.balance("harmonic")))


def write(results: Path, docs: Path) -> Path:
    """Remakes page and picture; returns the page's path.

    Raises:
        InputError: there are no records, or one is damaged.
    """
    found = read_all(results)
    models = list(dict.fromkeys(record.model for record in found))
    by_model = {model: groups([r for r in found if r.model == model]) for model in sorted(models, reverse=True)}
    docs.mkdir(parents=True, exist_ok=True)
    draw(by_model, docs / "forgetting.png")
    page = docs / "forgetting.md"
    write_text(page, text(by_model))
    return page


def text(by_model: dict[str, list[Group]]) -> str:
    """The page."""
    settings = next(iter(by_model.values()))[0].records[0].settings
    parts = [
        INTRODUCTION.format(
            training=f"{settings['training_records']:,}",
            validation=settings["validation_records"],
            limit=settings["limit"],
            limits=f" ({', '.join(f'{count} of {name}' for name, count in settings['limits'].items())})"
            if settings["limits"]
            else "",
        ),
        "![target against retained](forgetting.png)\n",
    ]
    for model, found in by_model.items():
        lora = next((group for group in found if group.name == "lora" and not group.varied), None)
        last = max((r for group in found for r in group.records), key=lambda r: len(r.tasks))
        parts += [
            f"## {model}\n",
            " ".join(filter(None, (sentence(vars(last)), machines(found), commits(found)))) + "\n",
        ]
        parts += ["### What holds and what does not\n", claim_list(claims(found))]
        parts += ["### Every method\n", table([group for group in found if not group.varied], settings, lora)]
        if any(group.varied for group in found):
            parts += [
                "### Dials that need no training\n",
                "`@scale` multiplies the adapter's strength, `@gate` fixes the gate for every token "
                "(1 is the base, 0 the adapter).\n",
                table([group for group in found if group.varied], settings, lora),
            ]
        parts += [
            "### Learning rates\n",
            "Where the highest rate tried is used, a higher one might do better.\n",
            rates(found),
        ]
    return "\n".join(parts)


def commits(found: Sequence[Group]) -> str:
    """Which methods were measured at which commits."""
    return listed("By commit: ", by(found, lambda record: record.commit[:7]))


def machines(found: Sequence[Group]) -> str:
    """Which methods were measured on which machines; on another one the same seed trains to somewhat other weights."""
    made = listed("By machine: ", by(found, lambda record: device(record.machine) + ":"))
    return made and f"{made} Another machine trains the same seed to somewhat other weights."


def by(found: Sequence[Group], key: Callable[[Record], str]) -> dict[str, list[str]]:
    """The titles of the groups of the records with each key."""
    made: dict[str, list[str]] = {}
    for group in found:
        for record in group.records:
            made.setdefault(key(record), []).append(f"{group.title}{' ' if group.varied else ''}{group.varied}")
    return made


def listed(what: str, made: dict[str, list[str]]) -> str:
    """Nothing where all have one key."""
    if len(made) == 1:
        return ""
    return what + "; ".join(f"{name} {', '.join(dict.fromkeys(titles))}" for name, titles in made.items()) + "."


def claim_list(found: Sequence[Claim]) -> str:
    """A line a claim."""
    return "".join(f"- **{'Holds' if claim.holds else 'Does not hold'}**: {claim.text}\n" for claim in found)


def table(found: Sequence[Group], settings: dict[str, Any], peer: Group | None) -> str:
    """A row a method, in Markdown; `peer` is what reworded scores are held against."""
    target, reworded = settings["target"], settings["reworded"]
    tasks = found[0].records[0].tasks
    kept = [name for name in settings["retained"] if tasks[name]["kind"] == "kept"]
    plain = [name for name in settings["retained"] if name not in kept]
    built_in, own = [name for name in kept if name in TASKS], [name for name in kept if name not in TASKS]
    head = ["", "seeds", tasks[target]["title"], *(["reworded", "of LoRA's"] if reworded else [])]
    head += [tasks[name]["title"] for name in plain]
    head += ["kept answers", "KL, nats a token"] if built_in else []
    head += [tasks[name]["title"] for name in own]
    head += ["plasticity", "retention", "harmonic mean"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for group in found:
        line = [f"{group.title} {group.varied}".rstrip(), str(len(group.records)), spread(group.values(target))]
        if reworded:
            line += [spread(group.means(reworded)), share(group, peer, reworded)]
        line += [spread(group.values(name)) for name in plain]
        if built_in:
            line += [spread(group.means(built_in, metric)) for metric in ("identical", "divergence")]
        line += [spread(group.values(name, "identical")) for name in own]
        line += [f"{group.balance(figure):.3f}" for figure in ("plasticity", "retention", "harmonic")]
        lines.append(line)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def share(group: Group, peer: Group | None, tasks: Sequence[str]) -> str:
    """The group's mean score over tasks and the seeds that both have as a multiple of the peer's."""
    if peer is not None:
        group, peer = group.beside(peer)
    of = fmean(peer.means(tasks)) if peer is not None else 0.0
    return f"{fmean(group.means(tasks)) / of:.2f}" if of else "–"


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds if there are several."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def rates(found: Sequence[Group]) -> str:
    """What each learning rate scored on the validation records."""
    lines = ["| | tried: exact match on validation | used |\n", "| --- | --- | ---: |\n"]
    searched = next((group.records[0] for group in found if group.name == "lora" and group.records[0].tried), None)
    for group in found:
        record = group.records[0]
        if group.varied or record.learning_rate is None:
            continue
        tried = ", ".join(f"{rate}: {score:.3f}" for rate, score in record.tried.items())
        if not tried:
            tried = "LoRA's" if searched and searched.learning_rate == record.learning_rate else "not searched"
        lines.append(f"| {group.title} | {tried} | {record.learning_rate:g} |\n")
    return "".join(lines)
