"""The frozen model's features of every set of prompts, on the disk: each set is computed once.

From three depths (a third of the layers, two thirds, and the memory, which is what reaches the output head), the mean
over the prompt's tokens, the last token's, and with a chat template that of the last token said, (N, d) float32 each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.models import model_folder, title
from benchmarks.relevance.sets import prompt_sets, task_rows
from benchmarks.relevance.turning import turning
from imsm.data.dresses import KINDS, dresses
from imsm.data.formats import Pair
from imsm.data.rendering import Renderer
from imsm.data.turns import turn_closer
from imsm.dreams import dream
from imsm.fingerprint import fingerprint
from imsm.folders import write_text
from imsm.generation import Prompt, padding_id, prompt_ids
from imsm.samples import Sample
from imsm.streams import HeadTap, nothing, output_head
from imsm.training.divergence import sampled_example

LAYERS = ("third", "two_thirds", "memory")
POOLINGS = ("mean", "last", "said")
INDEX = "index.json"
#: Conversations from a dream to the task, and from the task to a dream.
CONVERSATIONS = 80
#: Most tokens that are sampled for a dream, by what the set of them is called.
LONGEST = {"": 48, "short-": 32}
#: Tokens of a batch, padding counted.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Encoded:
    """A prompt's tokens, and the first one that is judged."""

    ids: list[int]
    start: int = 0


def run(model_name: str, data_root: Path, work: Path, dreams: int, test: bool) -> Path:
    """Computes what is not there yet for one model; returns its folder in `work`.

    Raises:
        InputError: the model or the data root is not there, or lacks a file.
    """
    judged = list(prompt_sets(data_root, test))
    reader = Reader(model_name, work)
    tokenizer = reader.tokenizer
    sets = [
        (
            found.split,
            found.name,
            found.wanted,
            [encode(tokenizer, prompt, found.last_turn) for prompt in found.prompts],
        )
        for found in judged
        if not found.chat or tokenizer.chat_template
    ]
    fit = fitted(reader.model, tokenizer, task_rows(data_root)[1], dreams, work / "dreams")
    index: list[dict[str, Any]] = []
    for split, name, wanted, prompts in [*(("fit", name, "fit", prompts) for name, prompts in fit.items()), *sets]:
        reader.read(split, name, prompts)
        index.append({"name": name, "split": split, "wanted": wanted, "count": len(prompts)})
    content = {"model": title(model_name), "layers": reader.numbers, "sets": index}
    write_text(reader.folder / INDEX, json.dumps(content, indent=1) + "\n")
    return reader.folder


class Reader:
    """A frozen model that reads each set of prompts once.

    Args:
        model_name: as `model_folder` takes it.
        work: the features are in a folder of the model's name in it.

    Raises:
        InputError: the model is not there.
    """

    def __init__(self, model_name: str, work: Path) -> None:
        folder = model_folder(model_name)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.folder = work / Path(model_name).name
        self.numbers = layer_numbers(self.model)
        self.closer = turn_closer(self.tokenizer)
        self._facts = fingerprint(self.model, [], {"layers": self.numbers, "closer": self.closer, "features": 2})

    def read(self, split: str, name: str, prompts: Sequence[Encoded]) -> Path:
        """The file with the features of a set's prompts, which are computed unless they are there."""
        path = self.folder / split / f"{name}.safetensors"
        key = fingerprint_of(self._facts, prompts)
        if not is_there(path, key):
            began = time.monotonic()
            keep(compute(self.model, prompts, self.numbers, padding_id(self.tokenizer) or 0, self.closer), path, key)
            tokens = sum(len(prompt.ids) for prompt in prompts)
            say(f"{split} {name}: {len(prompts)} prompts, {tokens} tokens, {time.monotonic() - began:.1f} s")
        return path


# -- tokens ----------------------------------------------------------------------------------------------------------


def fitted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    dreams: int,
    folder: Path,
) -> dict[str, list[Encoded]]:
    """What heads are fitted to, by name: the task in every kind of dress, dreams of both kinds, as questions and in
    forms, conversations that turn.

    Those that this tokenizer cannot have are left out.
    """
    renderer = Renderer(tokenizer, add_eos=True)
    examples = [renderer.render(Pair(row["input"], row["output"]), line) for line, row in enumerate(rows, 1)]
    dressed = dresses(examples, tokenizer, kinds=tuple(KINDS))
    samples = {
        name: dream(model, tokenizer, dreams, prompt_tokens=longest, answers=False, folder=folder)
        for name, longest in LONGEST.items()
    }
    answered = dream(model, tokenizer, min(CONVERSATIONS, dreams), folder=folder)
    to_task, to_dream = turning(examples[:CONVERSATIONS], answered, tokenizer)
    found = {
        **{f"task-{kind}": [dress.prompt_ids for dress in dressed if dress.kind == kind] for kind in KINDS},
        "task-turned": to_task,
        **{
            f"dreams-{name}{kind}": [sample.prompt_ids for sample in made if sample.kind == kind]
            for name, made in samples.items()
            for kind in ("plain", "chat")
        },
        **{f"dreams-{kind}": ids for kind, ids in dressed_again(samples[""], tokenizer).items()},
        "dreams-turned": to_dream,
    }
    return {name: [Encoded(ids) for ids in prompts] for name, prompts in found.items() if prompts}


def dressed_again(dreams: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """The dreams that training shows to the head a second time, by kind: those that ask, and all of them in a form."""
    kinds = ("asked", "framed")
    made = dresses([sampled_example(sample) for sample in dreams], tokenizer, kinds=kinds)
    return {kind: [dress.prompt_ids for dress in made if dress.kind == kind] for kind in kinds}


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, last_turn: bool = False) -> Encoded:
    """A prompt's tokens, judged from the start or from its last turn on.

    A conversation is a transcript without names where there is no chat template.
    """
    if isinstance(prompt, str):
        return Encoded(prompt_ids(tokenizer, prompt))
    if tokenizer.chat_template:
        ids = prompt_ids(tokenizer, prompt)
        start = 0
        if last_turn and len(prompt) > 1:
            before = tokenizer.apply_chat_template(prompt[:-1], tokenize=False)
            start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    else:
        before = "".join(message["content"] + (" " if message["role"] == "user" else "\n\n") for message in prompt[:-1])
        ids = prompt_ids(tokenizer, before + prompt[-1]["content"])
        start = len(tokenizer(before)["input_ids"]) if last_turn else 0
    return Encoded(ids, min(start, len(ids) - 1))


# -- features --------------------------------------------------------------------------------------------------------


def layer_numbers(model: PreTrainedModel) -> dict[str, int]:
    """Behind which layer each of the hidden states is taken."""
    layers = model.config.num_hidden_layers
    return {"third": round(layers / 3), "two_thirds": round(2 * layers / 3)}


@torch.inference_mode()
def compute(
    model: PreTrainedModel, prompts: Sequence[Encoded], numbers: dict[str, int], pad: int, closer: Sequence[int] = ()
) -> dict[str, Tensor]:
    """`POOLING.LAYER` to (N, d) float32, in the order of the prompts; that of the last token said with a `closer` alone."""
    tap = HeadTap(output_head(model))
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids))
    poolings = [pooling for pooling in POOLINGS if closer or pooling != "said"]
    rows: dict[str, list[Tensor]] = {f"{pooling}.{layer}": [] for pooling in poolings for layer in LAYERS}
    try:
        for batch in batches([prompts[place] for place in order]):
            lengths = torch.tensor([len(prompt.ids) for prompt in batch])
            width = int(lengths.max())
            # Padding stands behind, where a causal model's earlier tokens do not see it.
            ids = torch.tensor([prompt.ids + [pad] * (width - len(prompt.ids)) for prompt in batch])
            place = torch.arange(width)
            with tap.replacing(nothing):
                found = model(
                    input_ids=ids,
                    attention_mask=(place < lengths[:, None]).long(),
                    output_hidden_states=True,
                    use_cache=False,
                )
            assert tap.memory is not None
            states = {layer: found.hidden_states[number] for layer, number in numbers.items()}
            starts = torch.tensor([prompt.start for prompt in batch])
            inside = (place >= starts[:, None]) & (place < lengths[:, None])
            share = inside.float() / inside.sum(dim=1, keepdim=True)
            for layer, state in {**states, "memory": tap.memory}.items():
                rows[f"mean.{layer}"].append(torch.bmm(share[:, None], state.float())[:, 0])
                rows[f"last.{layer}"].append(state[torch.arange(len(batch)), lengths - 1].float())
                if closer:
                    is_closed = torch.tensor([list(prompt.ids[-len(closer) :]) == list(closer) for prompt in batch])
                    said = lengths - 1 - len(closer) * is_closed
                    rows[f"said.{layer}"].append(state[torch.arange(len(batch)), said.clamp(min=0)].float())
    finally:
        tap.remove()
    back = torch.tensor(order).argsort()
    return {name: torch.cat(parts)[back].contiguous() for name, parts in rows.items()}


def batches(prompts: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    """Prompts in order of length, as many together as `BATCH_TOKENS` holds."""
    batch: list[Encoded] = []
    for prompt in prompts:
        if batch and (len(batch) + 1) * len(prompt.ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


# -- files -----------------------------------------------------------------------------------------------------------


def fingerprint_of(facts: str, prompts: Sequence[Encoded]) -> str:
    """Hash of the model's facts and the tokens."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps([facts, [[prompt.ids, prompt.start] for prompt in prompts]]).encode())


def is_there(path: Path, key: str) -> bool:
    """Whether a file holds the features of that fingerprint."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint") == key
    except (OSError, SafetensorError):
        return False


def keep(features: dict[str, Tensor], path: Path, key: str) -> None:
    """Writes beside and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    save_file(features, beside, {"fingerprint": key})
    beside.replace(path)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
