"""Texts that a language model gives of itself, without any data: prompts that it samples, and its greedy answers.

A chat model is given its template's opened user turn and goes on as the user would (Xu et al. 2024, "Magpie", arXiv
2406.08464); a base model goes on from openings that say next to nothing. Texts come in rounds, each of which depends on
model, tokenizer, settings, seed and its number alone. So more of them can be had later, and the first stay the same.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from imsm.data.records import read_records
from imsm.errors import InputError
from imsm.fingerprint import fingerprint
from imsm.folders import cache_folder
from imsm.generation import continuations, prompt_ids, trim

#: Raised with every change of what a round gives.
FORMAT = 1
#: How base models begin; the first is nothing but the token that begins a text, where there is one.
OPENINGS = ("", "The", "A", "In", "I", "How", "What", "Why", "Question:", "To", "When", "There")
#: What stands in the user's turn while its place in a chat template is looked for.
MARK = "imsm7c1content"
#: Rounds in a row that may bring nothing new before a model is taken to have no more to say.
IDLE_ROUNDS = 8
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
GREEDY = {"do_sample": False}

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Sample:
    """A prompt and the model's own greedy answer to it.

    prompt_ids: as generation would get it, chat template included, (P,).
    answer_ids: with the end-of-sequence token if it was reached, (A,), A > 0.
    """

    prompt_ids: list[int]
    answer_ids: list[int]


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
    source: _Sampler | _Given
    if prompts is None:
        source = _Sampler(model, tokenizer, seed, prompt_tokens, batch_size)
    else:
        source = _Given(prompts, seed, batch_size)
    ends = _eos(model, tokenizer)
    facts = {"format": FORMAT, "seed": seed, "answer_tokens": answer_tokens, "batch_size": batch_size, "ends": ends}
    key = fingerprint(model, [], {**facts, "source": source.facts(), "tokenizer": tokenizer_facts(tokenizer)})
    path = (cache_folder("samples") if folder is None else folder) / f"{key}.jsonl"
    rows = _read(path)
    seen = {tuple(sample.prompt_ids) for _, sample in rows}
    with _plain_decoding(model):
        number, idle = (rows[-1][0] + 1 if rows else 0), 0
        while len(rows) < count and idle < IDLE_ROUNDS and (found := source.round(number)) is not None:
            fresh = list({tuple(ids): ids for ids in found if tuple(ids) not in seen}.values())
            seen |= {tuple(ids) for ids in fresh}
            answered = list(_answered(model, tokenizer, fresh, answer_tokens, ends))
            if answered:
                rows += [(number, sample) for sample in answered]
                _write(path, rows, tokenizer)
            idle = 0 if answered else idle + 1
            number += 1
            if report is not None:
                report(min(len(rows), count), count)
    if not rows:
        raise InputError(
            "the base model gave no text that can be used (all were empty, repetitive or alike); give general prompts of "
            "your own by retain.prompts"
        )
    return [sample for _, sample in rows[:count]]


def read_prompts(source: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of the prompts in a file (or Hub data set): `prompt` or `input`, or `messages` up to the last user turn.

    Raises:
        InputError: the file cannot be read, or a record has none of these.
    """
    read = read_records(source, "train")
    found = []
    for record in read.records:
        value = next((record.fields[key] for key in ("messages", "prompt", "input") if key in record.fields), None)
        if isinstance(value, list):
            while value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
                value = value[:-1]
        if not value or not isinstance(value, (str, list)):
            keys = ", ".join(map(repr, record.fields)) or "none"
            raise InputError(
                f"{source}, {read.unit} {record.line}: a prompt is expected as 'prompt' or 'input' (a text) or 'messages' (a "
                f"list), keys found: {keys}"
            )
        try:
            found.append(prompt_ids(tokenizer, value))
        except (InputError, TemplateError, TypeError, KeyError) as error:
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


class _Given:
    """Rounds of given prompts, in an order drawn by the seed."""

    def __init__(self, prompts: Sequence[list[int]], seed: int, batch_size: int) -> None:
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        self.prompts = [prompts[index] for index in order]
        self.batch_size = batch_size

    def facts(self) -> dict[str, Any]:
        return {"prompts": self.prompts}

    def round(self, number: int) -> list[list[int]] | None:
        start = number * self.batch_size
        return self.prompts[start : start + self.batch_size] if start < len(self.prompts) else None


class _Sampler:
    """Rounds of prompts that the model samples.

    Raises:
        InputError: the chat template hides the user's text, or the tokenizer gives nothing to begin with.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, longest: int, batch_size: int
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.seed, self.longest, self.batch_size = seed, longest, batch_size
        self.chat = bool(tokenizer.chat_template)
        self.behind = ""
        special = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
        self.ends = sorted({*special, *tokenizer.all_special_ids, *_eos(model, tokenizer)})
        if self.chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
            )
            before, mark, behind = str(text).partition(MARK)
            if not mark:
                raise InputError(
                    "the tokenizer's chat template does not show the user's text as it is, so no user turn can be opened; "
                    "give general prompts of your own by retain.prompts"
                )
            # A template without special tokens ends the user's turn with a word such as [/INST].
            self.behind = (behind.split() or [""])[0]
            openings = [list(tokenizer(before, add_special_tokens=False)["input_ids"])]
        else:
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            openings = [list(tokenizer(text)["input_ids"]) or ([] if start is None else [start]) for text in OPENINGS]
        self.openings = [ids for ids in openings if ids]
        if not self.openings:
            raise InputError("the tokenizer gives no token for a text to begin with; give retain.prompts")

    def facts(self) -> dict[str, Any]:
        return {"openings": self.openings, "prompt_tokens": self.longest, "sampled": SAMPLED, "ends": self.ends}

    def round(self, number: int) -> list[list[int]]:
        device = self.model.device
        first = number * self.batch_size
        rows = [self.openings[i % len(self.openings)] for i in range(first, first + self.batch_size)]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0]
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            # Far apart, or the rounds of one seed would be those of the next.
            torch.manual_seed(self.seed * 1_000_003 + number)
            found = continuations(
                self.model,
                rows,
                pad,
                max_new_tokens=self.longest,
                eos_token_id=self.ends,
                pad_token_id=pad,
                **SAMPLED,
            )
        prompts = []
        for opening, sequence in zip(rows, found, strict=True):
            new = [token for token in trim(sequence, self.ends) if token not in self.ends]
            text = self._text(opening, new)
            if any(c.isalnum() for c in text) and not degenerate(
                self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ):
                prompts.append(prompt_ids(self.tokenizer, [{"role": "user", "content": text}] if self.chat else text))
        return prompts

    def _text(self, opening: list[int], new: list[int]) -> str:
        ids = new if self.chat else opening + new
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if self.behind:
            text = text.split(self.behind)[0]
        # A character that the limit cut in two is left out.
        return text.strip().rstrip("\ufffd").strip()


@contextmanager
def _plain_decoding(model: PreTrainedModel) -> Iterator[None]:
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


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = tokenizer.eos_token_id if eos is None else eos
    return [] if eos is None else list(eos) if isinstance(eos, list) else [eos]


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    longest: int,
    ends: list[int],
) -> Iterator[Sample]:
    """Greedy answers to the prompts, decoded together, up to one of `ends`; without empty ones."""
    if not prompts:
        return
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    found = continuations(
        model, prompts, pad, max_new_tokens=longest, eos_token_id=ends or None, pad_token_id=pad, **GREEDY
    )
    for prompt, sequence in zip(prompts, found, strict=True):
        answer = trim(sequence, ends)
        if str(tokenizer.decode(answer, skip_special_tokens=True)).strip():
            yield Sample(prompt, answer)


def _read(path: Path) -> list[tuple[int, Sample]]:
    """The round and text of each line; none if the file is missing or damaged."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(line["round"], Sample(line["prompt_ids"], line["answer_ids"])) for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write(path: Path, rows: list[tuple[int, Sample]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes beside and renames; the texts stand there too, for the eye."""
    lines = [
        json.dumps(
            {
                "round": number,
                "prompt": tokenizer.decode(sample.prompt_ids),
                "answer": tokenizer.decode(sample.answer_ids),
                "prompt_ids": sample.prompt_ids,
                "answer_ids": sample.answer_ids,
            },
            ensure_ascii=False,
        )
        for number, sample in rows
    ]
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"the sampled texts cannot be kept in {path.parent}: {error}; make room there") from error
    finally:
        if beside is not None and os.path.exists(beside):
            os.unlink(beside)
