"""An adapter that was trained elsewhere becomes a siamese model: it stays as it is, and learns nothing but its limits.

Both streams are constants then. What is fitted is the relevance head and, if it has something to learn, the gate.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from imsm.building import ADAPTER, ADAPTER_CONFIG, fetch_adapter, refuse_unembedded
from imsm.config import DEFAULT_TASK
from imsm.data import Example, ExampleSet, load_examples
from imsm.dreams import dream
from imsm.errors import InputError
from imsm.folders import staged
from imsm.model import SiameseForCausalLM
from imsm.samples import Sample
from imsm.settings import DreamsConfig, TrainConfig
from imsm.training.dreaming import Dreams, dreams_of, learn_from_dreams
from imsm.training.ends import learn_end
from imsm.training.models import load_base, refuse_unreadable
from imsm.training.progress import build_bar
from imsm.training.run import join_processes, load_tokenizer, record, refuse_folder

#: What of a run's settings an adoption has a use for, beside `model`, `output_dir`, `data` and `dreams`.
SETTINGS = (
    "revision",
    "trust_remote_code",
    "dtype",
    "task",
    "gate",
    "gate_rank",
    "gate_dropout",
    "gate_learning_rate",
    "batch_size",
    "eval_batch_size",
    "bf16",
    "seed",
    "progress",
)
#: Settings of dreams that are about training the adapter.
FIXED = ("mode", "phases")


@dataclass
class Adopted:
    """An adopted adapter.

    model: in eval mode.
    tokenizer: its tokenizer: the one in the adapter's folder, or else the base model's.
    folder: the checkpoint.
    metrics: what the fit came to, and the seconds of it and of its dreams.
    held_out: records of the task that the fit has not seen.
    dreams: what is not the task, unseen as well.
    """

    model: SiameseForCausalLM
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    metrics: dict[str, float]
    held_out: list[Example]
    dreams: list[Sample]


def adopt(
    adapter: str | os.PathLike[str],
    config: TrainConfig,
    *,
    held_out: int = 0,
    held_out_dreams: int = 0,
    check: Callable[[list[Example], PreTrainedTokenizerBase], object] | None = None,
) -> Adopted:
    """Makes a siamese checkpoint of a trained adapter in `config.output_dir`; peft's two files in it are the adapter's own.

    Args:
        adapter: folder or Hub name of an adapter in peft's format.
        config: base model, data of the task, gate, dreams; the settings that are about training an adapter do nothing.
        held_out: records to set aside, of `config.data.eval` if that is given, else of `config.data.train`.
        held_out_dreams: further dreams to have, that the fit does not see.
        check: called with the records set aside and the tokenizer, to refuse them before anything takes its time.

    Raises:
        InputError: settings, adapter, data or model that cannot work; nothing has been written then.
    """
    _refuse_settings(config)
    for name, value in (("held_out", held_out), ("held_out_dreams", held_out_dreams)):
        if value < 0:
            raise InputError(f"{name} must not be negative, got {value}")
    processes = join_processes()
    if processes.num_processes > 1:
        raise InputError(
            f"an adapter is adopted in one process, got {processes.num_processes}; start it without torchrun"
        )
    folder, source = Path(config.output_dir), fetch_adapter(adapter)
    refuse_folder(folder, config, "an adoption is made whole or not at all, so delete it, or give")
    if folder.resolve() == source.resolve():
        raise InputError(f"output_dir {folder} is the adapter's own folder, which stays as it is; give another")
    tokenizer = load_tokenizer(config, source)
    records, aside = _records(config, tokenizer, held_out)
    if check is not None:
        check(aside, tokenizer)
    set_seed(config.seed)
    base: Any = load_base(config)
    rows = int(base.get_input_embeddings().weight.shape[0])
    refuse_unembedded(tokenizer, rows, source, lambda: load_tokenizer(config))
    refuse_unreadable(base, tokenizer, records)
    base.to(processes.device)
    dreams = dreams_of(config, base, tokenizer, build_bar(config, "dreams", "texts"))
    others = _others(config, base, tokenizer, dreams, held_out_dreams)
    began = time.monotonic()
    model = SiameseForCausalLM.from_base(
        base,
        source,
        gate=config.gate_name,
        gate_rank=config.gate_rank,
        gate_dropout=config.gate_dropout,
        task=config.task or DEFAULT_TASK,
    )
    model.config.base_revision = config.revision or model.config.base_revision
    learn_end(model.generation_config, records.examples, tokenizer)
    metrics = learn_from_dreams(
        config, model, tokenizer, records.examples, dreams, build_bar(config, "adopt", "prompts")
    )
    model.eval()
    metrics["seconds"] = round(dreams.seconds + time.monotonic() - began, 1)
    model.config.training = _record(config, adapter, records, metrics)
    model.save_pretrained(folder)
    with staged(folder) as stage:
        tokenizer.save_pretrained(stage)
        for name in (ADAPTER_CONFIG, ADAPTER):
            shutil.copyfile(source / name, stage / name)  # as it came, whatever peft would write today
    return Adopted(model, tokenizer, folder, metrics, aside, others)


def _refuse_settings(config: TrainConfig) -> None:
    """Raises `InputError` for settings under which there is nothing to adopt."""
    if not config.two_phases:
        raise InputError(
            "an adapter is adopted by dreams, after its training: method: imsm, dreams.mode: on and dreams.phases: two, got "
            f"method: {config.method}, dreams.mode: {config.dreams.mode} and dreams.phases: {config.dreams.phases}"
        )
    if config.continue_from is not None:
        raise InputError(
            "an adapter is adopted by itself; leave out continue_from, and add what comes of it: imsm task import"
        )
    if config.resume:
        raise InputError("an adoption cannot be resumed; leave out resume")


def _records(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, held_out: int
) -> tuple[ExampleSet, list[Example]]:
    """The records to fit to, and those set aside.

    Raises:
        InputError: see `load_examples`; or too few are left to fit to.
    """
    found = load_examples(config.data, tokenizer, split="train")
    other = load_examples(config.data, tokenizer, split="eval") if config.data.eval else None
    for part in (found, other):
        if part is not None and part.problems:
            print(part.report(), file=sys.stderr)
    order = random.Random(config.seed)
    if other is not None:
        return found, order.sample(other.examples, min(held_out, len(other)))
    if 2 * held_out > len(found):
        raise InputError(
            f"at most half of the {len(found)} records of {found.source} can be held out, got {held_out}; hold out fewer "
            "(--held-out), or give records apart (--eval)"
        )
    places = set(order.sample(range(len(found)), held_out))
    kept = [example for place, example in enumerate(found.examples) if place not in places]
    return replace(found, examples=kept), [found.examples[place] for place in sorted(places)]


def _others(
    config: TrainConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dreams: Dreams, count: int
) -> list[Sample]:
    """Dreams of another seed, those left out that the fit sees."""
    if not count:
        return []
    seen = {tuple(sample.prompt_ids) for sample in dreams.samples}
    found = dream(
        base,
        tokenizer,
        count,
        (config.seed + 1) % 2**32,
        prompt_tokens=config.dreams.prompt_tokens,
        answers=False,
        report=build_bar(config, "held-out dreams", "texts"),
    )
    return [sample for sample in found if tuple(sample.prompt_ids) not in seen]


def _record(
    config: TrainConfig, adapter: str | os.PathLike[str], records: ExampleSet, metrics: dict[str, float]
) -> dict[str, Any]:
    """What the checkpoint says of its making: as of a run, without the settings that had nothing to do with it."""
    found = record(config, records, metrics)
    dreams = {f"dreams.{name}" for name in DreamsConfig.__dataclass_fields__ if name not in FIXED}
    used = {name: value for name, value in found["settings"].items() if name in {"model", *SETTINGS, *dreams}}
    name = Path(adapter).resolve().name if Path(adapter).is_dir() else os.fspath(adapter)
    return {**found, "settings": {"adopted": name, **used}}
