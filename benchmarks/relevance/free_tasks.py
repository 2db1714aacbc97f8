"""Further tasks than the template of `ablate`: what people write as they like, with no wording in common, and other templates."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.continual.run import read_plan
from benchmarks.continual.sets import drawn
from benchmarks.models import quickstart
from benchmarks.relevance.sets import EACH, SETS, PromptSet, divided, other_requests, prompt_sets, read, shuffled, turns
from imsm.errors import InputError

#: What is none of these tasks, of the sets of validation.
COMMON = (
    *("near_domain-chat", "everyday-chat", "webq-chat", "everyday", "webq", "freebaseqa"),
    *("multirc", "cola", "mrpc", "gsm8k", "wiki"),
)
#: What is none of the templates either.
FORMS = ("near_domain", "clinc", "clinc-chat")
#: CLINC150's domains that are tasks here, and those that are too near to one to say whose their requests are.
DOMAINS = {"travel": ("auto_and_commute",), "kitchen_and_dining": ()}
BANKING = ("banking", "credit_cards")
#: Those that are none of the shop's business.
UNLIKE_SHOP = ("travel", "kitchen_and_dining", "auto_and_commute", "work", "banking", "utility", "small_talk")
#: How many of its wordings each task of the shop's holds out; the quickstart's test asks in two more.
SHOPS = {"shop": 1, "shop, two wordings": 2}
#: A task, and a set that is none of it and so near that some of it is taken: a few of its prompts are given as anchors.
NEAR = (
    ("shop", "near_shop"),
    ("travel", "clinc-auto_and_commute"),
    ("travel", "clinc-banking"),
    ("kitchen_and_dining", "clinc-home"),
    ("customers", "clinc-banking"),
    ("customers", "near_domain-chat"),
)
#: How often each wording of the shop's customers is filled in.
FILLINGS = 6
#: Customers of the bank, and records of a task that are held out, at most.
CUSTOMERS, HELD_OUT = 220, 60

#: Templates of `benchmarks.continual`, and the sets that are too near to each to say whose their texts are.
TEMPLATES = {
    "everyday": ("clinc", "clinc-chat"),
    "desks": ("clinc", "clinc-chat"),
    "kinds": ("wiki", "cola", "mrpc", "gsm8k", "freebaseqa"),
}
#: What a user says, and the answer.
Exchange = tuple[str, str]


@dataclass(frozen=True)
class Fold:
    """What a head is fitted to, and what of the task it has not seen."""

    fit: tuple[Exchange, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class FreeTask:
    """A task.

    name: unique.
    folds: with a head each.
    others: names of the sets that are not the task, of `other_sets`.
    chat: its prompts are user turns; otherwise plain texts.
    """

    name: str
    folds: tuple[Fold, ...]
    others: tuple[str, ...]
    chat: bool = True


def free_tasks(data_root: Path) -> list[FreeTask]:
    """All tasks.

    Raises:
        InputError: the data root lacks a file, or CLINC150's a domain.
    """
    requests = requests_by_domain(data_root)
    if missing := {*DOMAINS, *UNLIKE_SHOP} - set(requests):
        raise InputError(
            f"{data_root / 'clinc150' / 'test.jsonl'} must hold requests of all domains, but lacks "
            f"{', '.join(sorted(missing))}; give a --data-root with the whole file"
        )

    def others(*near: str) -> tuple[str, ...]:
        return (*COMMON, *(f"clinc-{domain}" for domain in requests if domain not in near))

    unlike = (*COMMON, "near_shop", *(f"clinc-{name}" for name in UNLIKE_SHOP))
    made = [FreeTask(name, tuple(shop_folds(count)), unlike) for name, count in SHOPS.items()]
    for domain, near in DOMAINS.items():
        made.append(FreeTask(domain, (last_held_out(requests[domain], "intent"),), others(domain, *near)))
    customers = divided(data_root)[2][:CUSTOMERS]
    made.append(FreeTask("customers", (last_held_out(customers, "output"),), others(*BANKING)))
    return [*made, *templates(data_root)]


def templates(data_root: Path) -> Iterator[FreeTask]:
    """Tasks of one template each, of the records that `benchmarks.continual` trains on; none of its test is read here."""
    plan = read_plan()
    for name, near in TEMPLATES.items():
        rows, _ = drawn(name, data_root, plan.training_records, plan.test_records)
        fit = tuple((row["input"], row["output"]) for row in rows[:-HELD_OUT])
        fold = Fold(fit, tuple(row["input"] for row in rows[-HELD_OUT:]))
        yield FreeTask(name, (fold,), tuple(part for part in (*COMMON, *FORMS) if part not in near), chat=False)


def other_sets(data_root: Path) -> Iterator[PromptSet]:
    """What is not the task, of one task or several.

    Raises:
        InputError: the data root lacks a file.
    """
    yield from (found for found in prompt_sets(data_root) if found.name in (*COMMON, *FORMS))
    yield PromptSet("near_shop", "validation", "base", turns([row["text"] for row in read(SETS / "near_shop.jsonl")]))
    for domain, rows in requests_by_domain(data_root).items():
        yield PromptSet(f"clinc-{domain}", "validation", "base", turns([row["text"] for row in rows][:EACH]))


def requests_by_domain(data_root: Path) -> dict[str, list[dict[str, Any]]]:
    """CLINC150's requests of each domain in an order drawn, without those that are kept for the test."""
    kept = {row["text"] for row in other_requests(data_root, "test")}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in shuffled(read(data_root / "clinc150" / "test.jsonl"), seed=3):
        if row["domain"] != "out_of_scope" and row["text"] not in kept:
            found.setdefault(row["domain"], []).append(row)
    return found


def last_held_out(rows: Sequence[dict[str, Any]], answer: str) -> Fold:
    """The last rows held out, a third at most."""
    count = len(rows) - min(HELD_OUT, len(rows) // 3)
    return Fold(tuple((row["text"], row[answer]) for row in rows[:count]), tuple(row["text"] for row in rows[count:]))


def shop_folds(held_out: int) -> list[Fold]:
    """For each so many wordings of the quickstart's training customers, a fold in which every intent's customers who use one of
    them are held out.

    A wording with nothing to fill in comes once.
    """
    shop, rng = quickstart("shop"), random.Random(0)
    made: dict[str, tuple[int, str]] = {}
    for intent in shop.INTENTS:
        for place, ask in enumerate(intent.asks[: -shop.HELD_OUT]):
            for _ in range(FILLINGS):
                words = {
                    "order": str(rng.randint(1000, 9999)),
                    "product": rng.choice(shop.PRODUCTS),
                    "day": rng.choice(shop.DAYS),
                }
                answer = f"{shop.OPENING} {intent.reply.format(**words)} {shop.CLOSING}"
                made.setdefault(ask.format(**words), (place, answer))
    rows = shuffled(list(made.items()), seed=0)
    return [
        Fold(
            tuple((text, answer) for text, (place, answer) in rows if place not in unseen),
            tuple(text for text, (place, _) in rows if place in unseen),
        )
        for unseen in itertools.combinations(sorted({place for _, (place, _) in rows}), held_out)
    ]
