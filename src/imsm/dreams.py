"""Dreams: prompts that the base model makes up, which tell a gate what is not its task.

A chat model's are user turns and plain texts, so that markup says nothing of whether a prompt is the task's; a base
model's are plain texts. Some are a few words long and some a few sentences, as real prompts are. Users write as they like,
so user turns are of many sorts, and laid out in many ways, that the head may not take manners for the task. The first `n`
of a model and seed are the same however many are asked for, and of the same mixture.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imsm.data.wording import unmarked, whole_shape
from imsm.dates import Dates
from imsm.errors import InputError
from imsm.fingerprint import fingerprint
from imsm.folders import cache_folder
from imsm.generation import answer_ends
from imsm.samples import (
    Opening,
    Report,
    Sample,
    Sampler,
    chat_opening,
    greedy_answers,
    of_today,
    plain_decoding,
    plain_openings,
    read_prompts,
    read_rows,
    rounds,
    tokenizer_facts,
    write_rows,
)

#: Raised with every change of what is dreamt.
FORMAT = 2
#: Of so many dreams, how many are of each kind. More user turns are thrown away, as they must come to an end.
SHARES = {"chat": 2, "plain": 3}
#: Texts in a row that may bring nothing new before a model is taken to have no more to say.
IDLE = 500
#: How plain dreams begin: statements, questions, instructions, forms of tasks, headings, dialogues, lists, code.
PLAIN = (
    "The",
    "Question:",
    "What",
    "Write",
    "I",
    "Sentence:",
    "How do",
    "1.",
    "In",
    "Q:",
    "Explain",
    "User:",
    "#",
    "Is",
    "Text:",
    "Can you",
    "Title:",
    "When",
    "def",
    "Read the",
    "A",
    "Hi,",
    "Why",
    "Translate",
    "-",
)
#: What is said already in the opened user turn: nothing, or how users begin who want something, as they would type it.
CHAT = (
    "",
    "can you",
    "My",
    "What",
    "i need",
    "How do I",
    "what",
    "Please",
    "Write",
    "I want to",
    "is",
    "",
    "my",
    "Could you",
    "how",
    "Tell me",
    "I",
    "Where",
    "do you",
    "I have a",
    "which",
    "",
    "Can I",
    "who",
    "The",
    "please",
    "Is there",
    "why",
    "when",
    "Find",
    "i",
)
#: The most tokens of a dream, as shares of the longest. Their number divides that of neither kind's openings, nor 2, so
#: that each opening is met with every length.
LENGTHS = (1 / 4, 1 / 2, 1)
#: Tokens less likely than this are not sampled; a large vocabulary need not be sorted for it.
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 1.0, "top_k": 0, "epsilon_cutoff": 2e-3}
#: Leads to a plain text where nothing does, as models write oddly behind a sequence's very first token.
LEAD = "\n\n"
#: Where a text that the limit cut may end: behind a sentence, a line, or a line's label that asks for what comes next.
END = re.compile(r"[.!?…。？！][\"”’')\]]*(?=\s|$)|(?<=\S)(?=\n)|(?<=\n)\w+ ?:(?=\s)")
#: Markup of web pages, which is taken out of a text.
TAG = re.compile(r"</?(?:[abipu]|br|code|div|em|h[1-6]|li|ol|span|strong|su[bp]|td|tr|ul|blockquote)\b[^<>]*(?:>|$)")
#: Markup of chat templates, of which no text is taken.
MARKUP = re.compile(r"<[|｜]|[|｜]>|</?s>|</?(?:start|end)_of_\w+>|\[/?INST\]|<</?SYS>>")


def dream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int = 0,
    *,
    prompt_tokens: int = 48,
    answer_tokens: int = 16,
    answers: bool = True,
    batch_size: int = 252,
    folder: Path | None = None,
    report: Report | None = None,
) -> list[Sample]:
    """The first `count` dreams of a model, from the disk as far as they are there; fewer if it has no more to say.

    No two are alike; empty and repetitive ones are left out. Torch's random state is left as it was. `Sample.kind` is
    "chat" or "plain", both in the shares of `SHARES` if the tokenizer has a chat template.

    Args:
        model: a plain causal language model, without an adapter.
        tokenizer: its tokenizer.
        count: dreams wanted.
        seed: of the sampling.
        prompt_tokens: longest sampled part of a prompt.
        answer_tokens: longest answer.
        answers: whether greedy answers are needed; without them dreams have empty ones, and they can be had later.
        batch_size: prompts of a round, and answers decoded together.
        folder: where dreams are kept; `imsm/dreams` in the user's cache folder unless given.
        report: called with the prompts and answers there are and those wanted.

    Raises:
        InputError: the model dreams nothing that can be used.
    """
    openings = _openings(tokenizer)
    limits = [max(round(share * prompt_tokens), 1) for share in LENGTHS]
    sampler = Sampler(model, tokenizer, seed, openings, limits, batch_size, SAMPLED, finished)
    ends = answer_ends(model, tokenizer)
    facts = {"dreams": FORMAT, "seed": seed, "answer_tokens": answer_tokens, "batch_size": batch_size, "ends": ends}
    key = fingerprint(model, [], {**facts, "source": sampler.facts(), "tokenizer": tokenizer_facts(tokenizer)})
    path = (cache_folder("dreams") if folder is None else folder) / f"{key}.jsonl"
    kinds = list(dict.fromkeys(opening.kind for opening in openings))
    rows = read_rows(path)
    steps = 2 * count if answers else count
    with plain_decoding(model):
        there, idle, coming = len(_mixed(rows, kinds)), batch_size * _idle(rows, kinds), rounds(sampler, rows)
        while there < count and idle < IDLE:
            number, fresh = next(coming)
            rows += [(number, sample) for sample in fresh]
            before, there = there, len(_mixed(rows, kinds))
            idle = idle + batch_size if there == before else 0
            if fresh:
                write_rows(path, rows, tokenizer)
            if report is not None:
                report(min(there, count), steps)
        if count and not rows:
            raise InputError(
                "the base model dreamt nothing that can be used (all texts were empty, repetitive or alike); turn dreams "
                "off, or use a model that can write"
            )
        chosen = _first(rows, kinds, count)
        if not answers:
            return of_today([replace(sample, answer_ids=[]) for sample in chosen], Dates(tokenizer))
        missing = sorted((sample.prompt_ids for sample in chosen if not sample.answer_ids), key=len)
        for start in range(0, len(missing), batch_size):
            asked = missing[start : start + batch_size]
            said = greedy_answers(model, tokenizer, asked, answer_tokens, ends)
            new = dict(zip(map(tuple, asked), said, strict=True))
            rows = [(n, replace(s, answer_ids=new.get(tuple(s.prompt_ids), s.answer_ids))) for n, s in rows]
            write_rows(path, rows, tokenizer)
            if report is not None:
                report(steps - len(missing) + start + len(asked), steps)
    return of_today(_first(rows, kinds, count), Dates(tokenizer))


def read_anchors(source: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of a user's own prompts that must stay as they are: `prompt`, `input`, `messages`, or a plain `text`.

    Raises:
        InputError: the file (or Hub data set) cannot be read, or a record has none of these.
    """
    return read_prompts(source, tokenizer, texts=True)


def finished(text: str, kind: str, ended: bool, place: int = 0) -> str | None:
    """A dream's text, back to its last sentence's end if a limit cut it; None if it is no text that one could give.

    A user's turn must have come to an end; a plain text may stop behind any word. User turns are laid out by their `place`
    among all: a third as they are, a third in small letters and without a mark at their end, a third in some other way.
    """
    text = TAG.sub("", text).strip()
    if not ended:
        cut = _cut(text)
        if cut is None and kind == "chat":
            return None
        text = cut or text.rpartition(" ")[0]
    words = re.findall(r"\w+", text)
    letters = sum(c.isalpha() for c in text)
    # Some languages put no space between words.
    if letters < 4 or (len(words) < 2 and text.isascii()) or 2 * letters < len("".join(text.split())):
        return None
    if (
        text in PLAIN
        or text in CHAT
        or MARKUP.search(text)
        or "\ufffd" in text
        or 2 * len({word.casefold() for word in words}) < len(words)
    ):
        return None
    return text if kind != "chat" else _laid_out(text, random.Random(place))


def _laid_out(text: str, rng: random.Random) -> str:
    """A text as it is, in small letters and without a mark at its end, or in some other way, each as often."""
    drawn = rng.randrange(3)
    return text if drawn == 0 else unmarked(text) if drawn == 1 else whole_shape(text, rng)


def _cut(text: str) -> str | None:
    """Up to the last end of a sentence, if there is one that leaves at least a third."""
    ends = [found.end() for found in END.finditer(text) if 3 * found.end() >= len(text)]
    return text[: ends[-1]].strip() if ends else None


def _openings(tokenizer: PreTrainedTokenizerBase) -> list[Opening]:
    """A user turn and a plain text by turns, or plain texts alone; every other plain text is what a user would say."""
    lead = [] if tokenizer("")["input_ids"] else list(tokenizer(LEAD)["input_ids"])
    plain = [Opening(lead + opening.ids, len(lead)) for opening in plain_openings(tokenizer, PLAIN)]
    chat = [opening for text in CHAT if (opening := chat_opening(tokenizer, text)) is not None]
    if not chat:
        return plain
    said = [replace(opening, kind="plain") for text in PLAIN if (opening := chat_opening(tokenizer, text)) is not None]
    size = len(chat) * len(plain) * 2
    return [
        opening for i in range(size) for opening in (chat[i % len(chat)], (said if i % 2 else plain)[i % len(plain)])
    ]


def _mixed(rows: Sequence[tuple[int, Sample]], kinds: Sequence[str]) -> list[Sample]:
    """So many of each kind after another as their shares say, up to the first that is not there."""
    left = {kind: iter([sample for _, sample in rows if sample.kind == kind]) for kind in kinds}
    turns = cycle([kind for kind in kinds for _ in range(SHARES[kind])])
    found: list[Sample] = []
    while (sample := next(left[next(turns)], None)) is not None:
        found.append(sample)
    return found


def _idle(rows: Sequence[tuple[int, Sample]], kinds: Sequence[str]) -> int:
    """Rounds on the disk behind the last one that brought something new, so that who gave up gives up again."""
    whole = len(_mixed(rows, kinds))
    # The round before the first one brought nothing either.
    numbers = [-1, *sorted({number for number, _ in rows})]
    last = next(n for n in numbers if len(_mixed([row for row in rows if row[0] <= n], kinds)) == whole)
    return numbers[-1] - last


def _first(rows: Sequence[tuple[int, Sample]], kinds: Sequence[str], count: int) -> list[Sample]:
    """The first dreams of the mixture, and behind them those of one kind if there are no more of another."""
    found = _mixed(rows, kinds)
    if len(found) < count:
        taken = {tuple(sample.prompt_ids) for sample in found}
        found += [sample for _, sample in rows if tuple(sample.prompt_ids) not in taken]
    return found[:count]
