"""Texts that a language model gives of itself, without any data: prompts that it samples, and its greedy answers.

A chat model is given its template's opened user turn and goes on as the user would (Xu et al. 2024, "Magpie", arXiv
2406.08464); a base model goes on from openings that say next to nothing. Texts come in rounds, each of which depends on
model, tokenizer, settings, seed and its number alone. So more of them can be had later, and the first stay the same. A
chat template that writes the date writes one for all days in what is kept, and the day's in what is given back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from imsm.data.formats import RecordError, read_messages, refuse_half_characters
from imsm.data.records import read_records
from imsm.data.turns import user_turn
from imsm.dates import Dates, one_date
from imsm.errors import InputError
from imsm.fingerprint import fingerprint
from imsm.folders import cache_folder, write_text
from imsm.generation import answer_ends, continuations, prompt_ids, trim

#: Raised with every change of what a round gives.
FORMAT = 2
#: How base models begin; the first is nothing but the token that begins a text, where there is one.
OPENINGS = ("", "The", "A", "In", "I", "How", "What", "Why", "Question:", "To", "When", "There")
#: Rounds in a row that may bring nothing new before a model is taken to have no more to say.
IDLE_ROUNDS = 8
#: Leads of no more tokens are run with every row.
SHORT_LEAD = 8
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
GREEDY = {"do_sample": False}

Report = Callable[[int, int], None]
#: What is kept of a sampled text of a kind, told whether it came to its own end, and its place among all; None if nothing is.
Finish = Callable[[str, str, bool, int], str | None]


@dataclass(frozen=True)
class Sample:
    """A prompt and the model's own greedy answer to it.

    prompt_ids: as generation would get it, chat template included, (P,).
    answer_ids: with the end-of-sequence token if it was reached, (A,); none if it was not asked for.
    kind: "chat" or "plain" if the model sampled the prompt, "given" if not.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    kind: str = "given"


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int = 0,
    *,
    prompt_tokens: int = 64,
    answer_tokens: int = 64,
    batch_size: int = 32,
    prompts: Sequence[list[int]] | None = None,
    folder: Path | None = None,
    report: Report | None = None,
) -> list[Sample]:
    """The first `count` texts of a model, from the disk as far as they are there; fewer if it has no more to say.

    Sampling is at temperature 1 and top-p 0.95, whatever the model's own generation settings are, and leaves torch's
    random state as it was. No two prompts are alike; empty and repetitive ones and empty answers are left out. Each round
    is kept as soon as it is there.

    Args:
        model: a plain causal language model, without an adapter.
        tokenizer: its tokenizer.
        count: texts wanted.
        seed: of the sampling, or of the order of `prompts`.
        prompt_tokens: longest sampled part of a prompt.
        answer_tokens: longest answer.
        batch_size: texts of a round, decoded together.
        prompts: tokens of prompts to answer instead of sampled ones.
        folder: where texts are kept; `imsm/samples` in the user's cache folder unless given.
        report: called after each round with the texts there are and those wanted.

    Raises:
        InputError: the model gives nothing that can be used, or its tokenizer gives nothing to begin with.
    """
    source: Source
    dates = Dates(tokenizer)
    if prompts is None:
        source = Sampler(model, tokenizer, seed, _openings(tokenizer), [prompt_tokens], batch_size)
    else:
        source = _Given([dates.keep(ids) for ids in prompts], seed, batch_size)
    ends = answer_ends(model, tokenizer)
    facts = {"format": FORMAT, "seed": seed, "answer_tokens": answer_tokens, "batch_size": batch_size, "ends": ends}
    key = fingerprint(model, [], {**facts, "source": source.facts(), "tokenizer": tokenizer_facts(tokenizer)})
    path = (cache_folder("samples") if folder is None else folder) / f"{key}.jsonl"
    rows = read_rows(path)
    with plain_decoding(model):
        idle, coming = 0, rounds(source, rows)
        while len(rows) < count and idle < IDLE_ROUNDS and (found := next(coming, None)) is not None:
            number, fresh = found
            said = greedy_answers(model, tokenizer, [sample.prompt_ids for sample in fresh], answer_tokens, ends)
            answered = [
                replace(sample, answer_ids=ids)
                for sample, ids in zip(fresh, said, strict=True)
                if str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            ]
            if answered:
                rows += [(number, sample) for sample in answered]
                write_rows(path, rows, tokenizer)
            idle = 0 if answered else idle + 1
            if report is not None:
                report(min(len(rows), count), count)
    if not rows:
        raise InputError(
            "the base model gave no text that can be used (all were empty, repetitive or alike); give general prompts of "
            "your own by retain.prompts"
        )
    return of_today([sample for _, sample in rows[:count]], dates)


def read_prompts(source: str, tokenizer: PreTrainedTokenizerBase, texts: bool = False) -> list[list[int]]:
    """Tokens of the prompts in a file (or Hub data set): `prompt` or `input`, or `messages` up to the last user turn.

    With `texts`, a record may have a plain `text` instead.

    Raises:
        InputError: the file cannot be read, or a record has none of these.
    """
    read = read_records(source, "train")
    keys = ("messages", "prompt", "input", *(["text"] if texts else []))
    expected = "'prompt', 'input' or 'text'" if texts else "'prompt' or 'input'"
    found = []
    for record in read.records:
        value = next((record.fields[key] for key in keys if key in record.fields), None)
        if value is None or not isinstance(value, (str, list)) or (isinstance(value, str) and not value.strip()):
            given = ", ".join(map(repr, record.fields)) or "none"
            raise InputError(
                f"{source}, {read.unit} {record.line}: a prompt is expected as {expected} (a text) or 'messages' (a list), "
                f"keys found: {given}"
            )
        try:
            if isinstance(value, str):
                refuse_half_characters(value, "prompt")
            else:
                value = read_messages(value, "messages")
                while value and value[-1]["role"] == "assistant":
                    value = value[:-1]
                if not value or not str(value[-1].get("content") or "").strip():
                    raise RecordError(
                        "a prompt is expected to end in a user's turn with a text, and 'messages' does not"
                    )
            found.append(prompt_ids(tokenizer, value))
        except (InputError, RecordError, TemplateError, TypeError, KeyError) as error:
            raise InputError(f"{source}, {read.unit} {record.line}: {error}") from error
    if read.problems or not found:
        reason = f"{read.unit} {read.problems[0].line}: {read.problems[0].reason}" if read.problems else "no records"
        raise InputError(f"{source} cannot be used for prompts: {reason}")
    return found


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer does, as JSON values."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "vocabulary": sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
    }


def degenerate(ids: Sequence[int]) -> bool:
    """Whether the tokens of a text are none, or mostly repetitions."""
    return not ids or (len(ids) >= 8 and 3 * len(set(ids)) < len(ids))


class Source(Protocol):
    """Rounds of prompts, each of which depends on its number alone."""

    def facts(self) -> dict[str, Any]:
        """What the rounds depend on beside model and tokenizer, as JSON values."""
        ...

    def round(self, number: int) -> list[Sample] | None:
        """The prompts of a round, without answers; None if there is no such round."""
        ...


def rounds(source: Source, rows: Sequence[tuple[int, Sample]]) -> Iterator[tuple[int, list[Sample]]]:
    """Numbers and prompts of the rounds behind those of `rows`, without prompts that were there before."""
    number = rows[-1][0] + 1 if rows else 0
    seen = {tuple(sample.prompt_ids) for _, sample in rows}
    while (found := source.round(number)) is not None:
        fresh = {tuple(sample.prompt_ids): sample for sample in found if tuple(sample.prompt_ids) not in seen}
        seen |= set(fresh)
        yield number, list(fresh.values())
        number += 1


class _Given:
    """Rounds of given prompts, in an order drawn by the seed."""

    def __init__(self, prompts: Sequence[list[int]], seed: int, batch_size: int) -> None:
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        self.prompts = [prompts[index] for index in order]
        self.batch_size = batch_size

    def facts(self) -> dict[str, Any]:
        return {"prompts": self.prompts}

    def round(self, number: int) -> list[Sample] | None:
        start = number * self.batch_size
        found = [Sample(ids, []) for ids in self.prompts[start : start + self.batch_size]]
        return found or None


@dataclass(frozen=True)
class Opening:
    """What a sampled prompt begins with.

    ids: tokens, at least one.
    skipped: how many of them only lead the model to the text and are not of it, such as a chat template's.
    kind: "chat" or "plain".
    behind: a word that ends the text, of a template that ends a turn without special tokens.
    """

    ids: list[int]
    skipped: int = 0
    kind: str = "plain"
    behind: str = ""

    @property
    def lead(self) -> tuple[int, ...]:
        """The tokens that are skipped."""
        return tuple(self.ids[: self.skipped])


def chat_opening(tokenizer: PreTrainedTokenizerBase, text: str = "") -> Opening | None:
    """The chat template's opened user turn, in which `text` is said already; None if it does not show a user's text."""
    with one_date(tokenizer):
        turn = user_turn(tokenizer)
    if turn is None:
        return None
    before = list(tokenizer(turn.before, add_special_tokens=False)["input_ids"])
    begun = list(tokenizer(turn.before + text, add_special_tokens=False)["input_ids"])
    if begun[: len(before)] != before:
        begun = before + list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # A template without special tokens ends the user's turn with a word such as [/INST].
    return Opening(begun, len(before), "chat", (turn.behind.split() or [""])[0]) if begun else None


def plain_openings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Opening]:
    """Openings without markup; of an empty text, the token with which the tokenizer begins any, left out if there is none."""
    tokens = [list(tokenizer(text)["input_ids"]) for text in texts]
    return [Opening(ids) for ids in tokens if ids]


def _openings(tokenizer: PreTrainedTokenizerBase) -> list[Opening]:
    """The openings of a chat model's or of a base model's texts.

    Raises:
        InputError: the chat template hides the user's text, or the tokenizer gives nothing to begin with.
    """
    if tokenizer.chat_template:
        opening = chat_opening(tokenizer)
        if opening is None:
            raise InputError(
                "the tokenizer's chat template does not show the user's text as it is, so no user turn can be opened; "
                "give general prompts of your own by retain.prompts"
            )
        return [opening]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens = [list(tokenizer(text)["input_ids"]) or ([] if start is None else [start]) for text in OPENINGS]
    found = [Opening(ids) for ids in tokens if ids]
    if not found:
        raise InputError("the tokenizer gives no token for a text to begin with; give retain.prompts")
    return found


class Sampler:
    """Rounds of prompts that the model samples.

    Args:
        model: in eval mode, within `plain_decoding`.
        tokenizer: its tokenizer.
        seed: of the sampling.
        openings: what the prompts begin with, taken in turn.
        limits: most tokens that are sampled behind an opening, taken in turn; those of one limit and lead are decoded
            together, and the lead is run once.
        batch_size: prompts of a round.
        sampled: settings of the sampling, for `generate`.
        finish: what is kept of a text; all of any that has a letter or digit unless given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        openings: Sequence[Opening],
        limits: Sequence[int],
        batch_size: int,
        sampled: Mapping[str, Any] = SAMPLED,
        finish: Finish | None = None,
    ) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.openings, self.limits, self.batch_size = openings, limits, batch_size
        self.sampled, self.finish = sampled, finish
        special = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
        self.ends = sorted({*special, *tokenizer.all_special_ids, *answer_ends(model, tokenizer)})

    def facts(self) -> dict[str, Any]:
        openings = [opening.ids for opening in self.openings]
        return {
            "openings": openings,
            "prompt_tokens": self.limits[0] if len(self.limits) == 1 else list(self.limits),
            "sampled": self.sampled,
            "ends": self.ends,
        }

    def round(self, number: int) -> list[Sample]:
        device = self.model.device
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        openings = [self.openings[place % len(self.openings)] for place in places]
        limits = [self.limits[place % len(self.limits)] for place in places]
        sampled: dict[int, list[int]] = {}
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            # Far apart, or the rounds of one seed would be those of the next.
            torch.manual_seed(self.seed * 1_000_003 + number)
            for limit, lead in sorted({(limit, opening.lead) for limit, opening in zip(limits, openings, strict=True)}):
                group = [row for row in range(len(openings)) if (limits[row], openings[row].lead) == (limit, lead)]
                rows = [openings[row].ids for row in group]
                sampled.update(zip(group, self._continued(rows, limit, lead), strict=True))
        found = [self._prompt(opening, sampled[row], places[row]) for row, opening in enumerate(openings)]
        return [sample for sample in found if sample is not None]

    def _continued(self, rows: list[list[int]], limit: int, lead: tuple[int, ...]) -> list[list[int]]:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0]
        settings = {"max_new_tokens": limit, "eos_token_id": self.ends, "pad_token_id": pad, **self.sampled}
        # The last of the lead's tokens is run with each row, which may have no other.
        cache = lead_cache(self.model, lead[:-1], len(rows)) if len(lead) > SHORT_LEAD else None
        shared = 0 if cache is None else len(lead) - 1
        return continuations(self.model, rows, pad, shared=shared, past_key_values=cache, **settings)

    def _prompt(self, opening: Opening, sequence: list[int], place: int) -> Sample | None:
        """The prompt that an opening and the tokens sampled behind it come to; None if it is none."""
        new = [token for token in trim(sequence, self.ends) if token not in self.ends]
        text = str(
            self.tokenizer.decode(
                opening.ids[opening.skipped :] + new, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        whole = len(text)
        if opening.behind:
            text = text.split(opening.behind)[0]
        ended = len(new) < len(sequence) or len(text) < whole
        # A character that the limit cut in two is left out.
        text = text.strip().rstrip("\ufffd").strip()
        kept = text if self.finish is None else self.finish(text, opening.kind, ended, place)
        if not kept or not any(c.isalnum() for c in kept):
            return None
        if degenerate(self.tokenizer(kept, add_special_tokens=False)["input_ids"]):
            return None
        said = [{"role": "user", "content": kept}] if opening.kind == "chat" else kept
        with one_date(self.tokenizer):
            return Sample(prompt_ids(self.tokenizer, said), [], opening.kind)


def lead_cache(model: PreTrainedModel, lead: Sequence[int], rows: int) -> DynamicCache | None:
    """The cache of tokens that so many rows begin with; None if the model keeps anything but all tokens' keys and values."""
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([list(lead)], device=model.device), use_cache=True).get("past_key_values")
    if type(found) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in found.layers):
        return None
    found.batch_repeat_interleave(rows)
    return found


@contextmanager
def plain_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Within: the model is in eval mode and has no generation settings of its own, which `generate` would add to those
    it is given."""
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    longest: int,
    ends: list[int],
) -> list[list[int]]:
    """Greedy answers to the prompts, decoded together, up to and with one of `ends`."""
    if not prompts:
        return []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    found = continuations(
        model, prompts, pad, max_new_tokens=longest, eos_token_id=ends or None, pad_token_id=pad, **GREEDY
    )
    return [trim(sequence, ends) for sequence in found]


def of_today(samples: Sequence[Sample], dates: Dates) -> list[Sample]:
    """Samples that were kept, with the day's date in their prompts; their answers are those to another day's."""
    return [replace(sample, prompt_ids=dates.renew(sample.prompt_ids)) for sample in samples]


def read_rows(path: Path) -> list[tuple[int, Sample]]:
    """The round and text of each line; none if the file is missing or damaged."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [
            (line["round"], Sample(line["prompt_ids"], line["answer_ids"], line.get("kind", "given"))) for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_rows(path: Path, rows: list[tuple[int, Sample]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes beside and renames; the texts stand there too, for the eye."""
    lines = [
        json.dumps(
            {
                "round": number,
                "kind": sample.kind,
                "prompt": tokenizer.decode(sample.prompt_ids),
                "answer": tokenizer.decode(sample.answer_ids),
                "prompt_ids": sample.prompt_ids,
                "answer_ids": sample.answer_ids,
            },
            ensure_ascii=False,
        )
        for number, sample in rows
    ]
    try:
        write_text(path, "".join(line + "\n" for line in lines))
    except OSError as error:
        raise InputError(f"the sampled texts cannot be kept in {path.parent}: {error}; make room there") from error
