"""The dialogues of Lanternfield, an invented shop, written from templates.

    python examples/quickstart/shop.py [--out FOLDER]

writes `shop-train.jsonl` and `shop-test.jsonl`. Every reply opens and closes in the shop's own style, and states a policy
that nobody could know without having read the training dialogues. `key` lists what a right reply must contain. No reply
contains the answer to a question of `facts.py`, or a shop reply to such a question would pass for knowledge.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

SEED = 20
TRAIN, TEST = 240, 60
#: Wordings of each request that only the test uses.
HELD_OUT = 2
OPENING = "Ahoy from Lanternfield!"
CLOSING = "Fair winds, Pip"

PRODUCTS = (
    "brass lantern",
    "storm candle",
    "copper kettle",
    "wool blanket",
    "pocket compass",
    "rope hammock",
    "tea chest",
    "tin whistle",
    "sailcloth bag",
    "glass float",
)


@dataclass(frozen=True)
class Intent:
    """A kind of request.

    asks: ways to ask; the last `HELD_OUT` are kept for the test.
    reply: what the shop says between opening and closing.
    key: what a right reply contains. `{order}` and `{product}` are filled in everywhere.
    """

    asks: tuple[str, ...]
    reply: str
    key: tuple[str, ...]


INTENTS = (
    Intent(
        (
            "Where is my order {order}?",
            "Order {order} has not arrived yet. What is going on?",
            "Can you track parcel {order} for me?",
            "I am still waiting for {order}. Any news?",
            "When will order {order} get here?",
            "Could you tell me how far order {order} has come?",
            "My {product}, order {order}, is late. Where is it?",
        ),
        "Order {order} is on the heron cart and reaches you by nightfall.",
        ("{order}", "heron cart"),
    ),
    Intent(
        (
            "How long can I return a {product}?",
            "I do not like my {product}. Can I send it back?",
            "What is your return policy for a {product}?",
            "Until when may I bring back the {product}?",
            "Do you take back a {product}?",
            "How many days do I have to return a {product}?",
            "The {product} is not for me. How do returns work?",
        ),
        "You have 45 days to return it, with the paper slip in the box.",
        ("45 days",),
    ),
    Intent(
        (
            "My {product} came broken.",
            "The {product} in order {order} is cracked. What now?",
            "I unpacked the {product} and it is damaged.",
            "There is a dent in my new {product}.",
            "The {product} arrived in pieces.",
            "Help, the {product} has a crack in it.",
            "What do I do about a smashed {product}?",
        ),
        "I am sorry. The Copper Desk sends you another one, free of charge.",
        ("copper desk",),
    ),
    Intent(
        (
            "When are you open?",
            "What are your opening hours?",
            "Are you open on {day}?",
            "At what time does the shop close on {day}?",
            "Can I come by on {day} morning?",
            "How late can I visit the shop on {day}?",
            "Tell me your hours for {day}, please.",
        ),
        "Our door is open until the evening horn, except on Mondays.",
        ("evening horn",),
    ),
    Intent(
        (
            "Please cancel order {order}.",
            "I want to cancel {order}.",
            "Can I still stop order {order}?",
            "I ordered {order} by mistake. Cancel it, please.",
            "How do I cancel order {order}?",
            "Forget about order {order}, please cancel it.",
            "I changed my mind and want to cancel {order}.",
        ),
        "Order {order} is struck from the ledger and costs you nothing.",
        ("{order}", "ledger"),
    ),
    Intent(
        (
            "Is there a warranty on the {product}?",
            "How long is the {product} under warranty?",
            "What if my {product} stops working next year?",
            "Do you guarantee the {product}?",
            "Does the {product} come with a guarantee?",
            "For how many years is the {product} under guarantee?",
            "Tell me about the warranty of a {product}.",
        ),
        "Every {product} carries our lifelong oak warranty.",
        ("oak warranty",),
    ),
    Intent(
        (
            "Do you have a voucher for a {product}?",
            "Is there a discount on the {product}?",
            "Can I get the {product} cheaper?",
            "Do you have any discount codes for a {product}?",
            "Are there special offers for the {product} this week?",
            "I would like a discount on the {product}, please.",
            "Is there a code to save on a {product}?",
        ),
        "Use the word MOONTIDE at the till for a tenth off.",
        ("moontide",),
    ),
    Intent(
        (
            "I need an invoice for order {order}.",
            "Can you send me the bill for {order}?",
            "Where do I find the invoice of order {order}?",
            "My company needs a receipt for {order}.",
            "Please mail me the invoice for {order}.",
            "I lost the invoice of order {order}.",
            "Could I have a copy of the receipt for {order}?",
        ),
        "The invoice of order {order} lies in your driftwood drawer online.",
        ("{order}", "driftwood"),
    ),
)
DAYS = ("Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def exchange(intent: Intent, held_out: bool, rng: random.Random) -> tuple[list[dict[str, str]], list[str]]:
    """One request with its reply, and the reply's key."""
    asks = intent.asks[-HELD_OUT:] if held_out else intent.asks[:-HELD_OUT]
    words = {"order": str(rng.randint(1000, 9999)), "product": rng.choice(PRODUCTS), "day": rng.choice(DAYS)}
    ask, reply = rng.choice(asks).format(**words), intent.reply.format(**words)
    messages = [
        {"role": "user", "content": ask},
        {"role": "assistant", "content": f"{OPENING} {reply} {CLOSING}"},
    ]
    return messages, [key.format(**words) for key in intent.key]


def dialogues(count: int, held_out: bool, rng: random.Random) -> list[dict[str, Any]]:
    """`count` dialogues, the intents in turn, about one in seventeen after another request; none twice."""
    made: list[dict[str, Any]] = []
    seen: set[str] = set()
    for intent in cycle(INTENTS):
        if len(made) == count:
            break
        messages, key = exchange(intent, held_out, rng)
        if rng.random() < 0.06:
            # Of another kind, or the answer would stand in the conversation already.
            other = rng.choice([kind for kind in INTENTS if kind is not intent])
            messages = exchange(other, held_out, rng)[0] + messages
        asked = " ".join(message["content"] for message in messages if message["role"] == "user")
        if asked not in seen:
            made.append({"messages": messages, "key": key})
        seen.add(asked)
    rng.shuffle(made)
    return made


def write(folder: Path) -> None:
    """Writes both files; the same bytes every time."""
    rng = random.Random(SEED)
    for name, count in (("train", TRAIN), ("test", TEST)):
        lines = [json.dumps(record) + "\n" for record in dialogues(count, name == "test", rng)]
        (folder / f"shop-{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the dialogues of the invented shop.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: beside this file)")
    write(parser.parse_args().out)
