"""Text from prompts: one primitive for answers in batches, one for a stream of text, both over `generate`."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from imsm.dispatch import DIAL
from imsm.ends import listed
from imsm.errors import InputError

#: A plain text, or chat messages that the tokenizer's template turns into one.
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a model says to a prompt.

    index: the prompt's place in the list given.
    text: the answer without the prompt and without special tokens.
    token_ids: the answer's tokens, end-of-sequence token included if it was reached.
    """

    index: int
    text: str
    token_ids: list[int]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """A prompt's tokens: a text as it is, messages by the chat template with the assistant's turn opened.

    Raises:
        InputError: messages, and a tokenizer without a chat template; or an empty prompt.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        if not tokenizer.chat_template:
            raise InputError("this tokenizer has no chat template; give prompts as plain text")
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise InputError("a prompt must not be empty")
    return ids


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands where a sequence has none: the padding token, or else that of the end."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def answer_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those that the model's settings name, or else the tokenizer's, which training appends."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = tokenizer.eos_token_id if eos is None else eos
    return listed(eos)


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    **generate_kwargs: Any,
) -> Iterator[Answer]:
    """Answers to `prompts` by any causal language model, in batches of similar length, yielded as each batch ends.

    Args:
        model: a siamese, peft or plain transformers model.
        tokenizer: its tokenizer.
        prompts: texts or chat messages.
        batch_size: prompts decoded together.
        max_new_tokens: longest answer.
        generate_kwargs: for `model.generate`; greedy decoding unless they say otherwise. Of a tensor with a value for each
            prompt, such as `recall`, each batch gets its own.

    Raises:
        InputError: a prompt that cannot be tokenised.
    """
    tokens = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    pad, ends = padding_id(tokenizer), answer_ends(model, tokenizer) or None
    each = [
        name for name in DIAL if len(tokens) > 1 and getattr(generate_kwargs.get(name), "shape", None) == (len(tokens),)
    ]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        own = {name: value[chosen] if name in each else value for name, value in generate_kwargs.items()}
        settings = {"do_sample": False, "pad_token_id": pad, "eos_token_id": ends, **own}
        found = continuations(model, [tokens[i] for i in chosen], pad, max_new_tokens=max_new_tokens, **settings)
        repeats = len(found) // len(chosen)
        for row, sequence in enumerate(found):
            new = trim(sequence, settings["eos_token_id"])
            yield Answer(chosen[row // repeats], str(tokenizer.decode(new, skip_special_tokens=True)).strip(), new)


def continuations(
    model: Any, prompts: Sequence[Sequence[int]], pad: int | None, shared: int = 0, **generate_kwargs: Any
) -> list[list[int]]:
    """The new tokens that `model.generate` gives to each of several prompts decoded together, padding behind them.

    `shared`: tokens that all prompts begin with, and that a cache among the arguments holds already; each prompt has more.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), 0 if pad is None else pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        rest = prompt[shared:]
        ids[row, :shared] = torch.tensor(prompt[:shared], dtype=torch.long)
        ids[row, width - len(rest) :] = torch.tensor(rest, dtype=torch.long)
        mask[row, :shared] = 1
        mask[row, width - len(rest) :] = 1
    with torch.inference_mode():
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **generate_kwargs)
    return list(out[:, width:].tolist())


def trim(ids: list[int], eos: int | list[int] | None) -> list[int]:
    """Tokens up to and including the first end-of-sequence token; what follows is padding."""
    ends = set(eos) if isinstance(eos, list) else {eos}
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


class Stop(StoppingCriteria):
    """Ends an answer when it is told to by another thread."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.told.is_set(), device=input_ids.device)


def stream(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, max_new_tokens: int = 512, **generate_kwargs: Any
) -> Generator[str, None, None]:
    """Pieces of one answer's text as they are decoded. Arguments as for `answers`.

    The answer is decoded by a thread, which ends with the iterator: by `close()`, or when a loop over it is left. Calls
    of the model between two pieces wait until the answer is whole; its pieces can still be had then.

    Raises:
        InputError: a prompt that cannot be tokenised; or the iterator is begun within a call of the same model.
    """
    if (lock := getattr(model, "call_lock", None)) is not None and lock.held:
        raise InputError(
            "a stream cannot be read within a call of its own model (from a streamer, a stopping criterion or the like), "
            "which it would wait for; read it after the call"
        )
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = padding_id(tokenizer)
    settings = {
        "do_sample": False,
        "pad_token_id": pad,
        "eos_token_id": answer_ends(model, tokenizer) or None,
        **generate_kwargs,
    }
    stop = Stop()
    settings["stopping_criteria"] = StoppingCriteriaList([*(settings.get("stopping_criteria") or []), stop])
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    **settings,
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)

    def end() -> None:
        stop.told.set()
        if thread is not threading.current_thread():  # which may be the one that collects the iterator
            thread.join()

    thread.start()
    # An interpreter that ends while a thread computes is aborted.
    atexit.register(end)
    try:
        yield from streamer
    finally:
        end()
        atexit.unregister(end)
    if failure:
        raise failure[0]
