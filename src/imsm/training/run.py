"""One training run from its settings: data, model, `SiameseTrainer`, and the checkpoint with what it was made from."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from imsm import checkpoint, task_folders
from imsm.building import has_tokenizer, read_adapter_config
from imsm.data import AnswerCollator, ExampleSet, load_examples
from imsm.dates import Dates
from imsm.errors import InputError, first_line
from imsm.folders import staged, write_text
from imsm.model import SiameseForCausalLM
from imsm.names import refuse_name, refuse_new, refuse_part
from imsm.packing import refuse_unpackable
from imsm.samples import Sample
from imsm.settings import TrainConfig, read_yaml, to_yaml
from imsm.training.banking import plan_bank
from imsm.training.dreaming import Dreams, dreams_of, learn_from_dreams
from imsm.training.ends import learn_end
from imsm.training.models import adapter_config, build_model, load_base, make_trainer, refuse_unreadable
from imsm.training.plain import AnswerLM
from imsm.training.plan import Plan
from imsm.training.progress import build_bar
from imsm.training.retained import Replayed, base_texts, replay_count, texts_needed, with_replay

SETTINGS = "settings.yaml"
#: Settings that may differ between a run and its resumption.
FREE_ON_RESUME = {
    "resume",
    "progress",
    "tensorboard",
    "output_dir",
    "save_total_limit",
    "eval_batch_size",
    "memory_bank",
    "memory_bank_dir",
}


@dataclass
class TrainResult:
    """A finished run.

    model: the trained model, in eval mode: siamese; peft's for `method: peft`; the transformers model for the others.
    tokenizer: its tokenizer.
    folder: the checkpoint.
    metrics: steps, seconds of training, loss of the last step, and what else the method logs; evaluation loss if there was
        evaluation data; with dreams `false_recall`, `dreams_kept` and `others_left` of `training.border.Border`, and
        `dreams_seconds`, which are not among the seconds.
    log: the trainer's log entries.
    """

    model: SiameseForCausalLM | PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    metrics: dict[str, float]
    log: list[dict[str, float]]


def train(config: TrainConfig) -> TrainResult:
    """Trains as `config` says and leaves the checkpoint in `config.output_dir`.

    The folder gets the model's checkpoint, the tokenizer, `settings.yaml`, `log.jsonl`, TensorBoard's `runs/` and the
    trainer's `checkpoint-N/` for `resume`.

    Raises:
        InputError: settings, data or model that cannot work; nothing has been written then.
    """
    folder = Path(config.output_dir)
    processes = join_processes()
    refuse_folder(folder, config)
    tokenizer = load_tokenizer(config, None if config.continue_from is None else refuse_continuation(config))
    train_set = load_examples(config.data, tokenizer, split="train")
    eval_set = load_examples(config.data, tokenizer, split="eval") if config.data.eval else None
    for found in (train_set, eval_set):
        if found is not None and found.problems and processes.is_main_process:
            print(found.report(), file=sys.stderr)
    records = len(train_set.examples)
    # Refused before texts are sampled; what is sampled may then come out fewer than planned.
    planned = records + (replay_count(config.retain.share, records) if config.retain.kind == "replay" else 0)
    adapter = adapter_config(config.adapter, steps(config, planned, processes.num_processes))
    if config.task is not None:
        assert isinstance(adapter, PeftConfig)
        refuse_name(config.task, adapter)
    set_seed(config.seed)
    base = load_base(config)
    for found in (train_set, eval_set):
        if found is not None:
            refuse_unreadable(base, tokenizer, found)
    samples = own_texts(config, base, tokenizer, records, processes)
    if config.retain.kind == "replay":
        train_set = with_replay(train_set, samples, config.retain.share)
    dreams = sampled_dreams(config, base, tokenizer, processes) if config.dreaming else None
    total_steps = steps(config, len(train_set.examples), processes.num_processes)
    plan = Plan.of(total_steps, processes.num_processes, train_set.examples, Dates(tokenizer).keep)
    last = get_last_checkpoint(config.output_dir) if config.resume else None
    done = 0 if last is None else plan.steps_done(Path(last))
    model = build_model(config, base, adapter_config(config.adapter, total_steps), samples)
    learn_end((model.lm if isinstance(model, AnswerLM) else model).generation_config, train_set.examples, tokenizer)
    if config.packing:
        assert isinstance(model, SiameseForCausalLM)
        refuse_unpackable(model)
    collator = AnswerCollator(tokenizer, row_length=config.data.max_length if config.packing else None)
    bank, decision = None, ""
    if isinstance(model, SiameseForCausalLM):
        bank, decision = plan_bank(config, model, train_set.examples, collator, processes.num_processes)
    if not all(gather_object([bank is not None])):  # a disk of one of the machines is full
        bank = None
    if config.method == "imsm" and processes.is_main_process:
        print(decision, file=sys.stderr)

    processes.wait_for_everyone()  # none looks at the folder any more
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / SETTINGS, to_yaml(replace(config, resume=False)))
    processes.wait_for_everyone()
    trainer = make_trainer(config, model, collator, train_set, eval_set, samples)
    trainer.plan = plan
    if bank is not None and done < plan.steps:
        label = f"memory bank: {len(bank)} examples, {bank.bytes / 1e6:.3g} MB"
        bank.build(build_bar(config, label, "tokens"))
        trainer.train_dataset = bank
    began = time.monotonic()
    if last is not None and done >= plan.steps:
        trainer.restore(Path(last))
    else:
        trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - began

    log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    metrics = {"steps": float(trainer.state.global_step), "seconds": round(seconds, 1)}
    for key in ("loss", "gate", "kl", "eval_loss"):
        if values := [entry[key] for entry in log if key in entry]:
            metrics[key] = values[-1]
    trainer.finish()
    model.eval()
    if dreams is not None:
        assert isinstance(model, SiameseForCausalLM)
        began = time.monotonic()
        own = [example for example in train_set.examples if not isinstance(example, Replayed)]
        bar = build_bar(config, "dreams", "prompts")
        metrics |= learn_from_dreams(config, model, tokenizer, own, dreams, bar)
        metrics["dreams_seconds"] = round(dreams.seconds + time.monotonic() - began, 1)
    if isinstance(model, SiameseForCausalLM):
        model.task = None
        model.config.training = record(config, train_set, metrics)
    if trainer.is_world_process_zero():
        if isinstance(model, SiameseForCausalLM) and config.method == "imsm":
            model.save_pretrained(folder)
        else:
            trainer.save_portable(folder)
        with staged(folder) as stage:
            tokenizer.save_pretrained(stage)
    trained = model.lm if isinstance(model, AnswerLM) else model if config.method == "imsm" else model.peft_model
    return TrainResult(trained, tokenizer, folder, metrics, log)


def sampled_dreams(
    config: TrainConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, processes: PartialState
) -> Dreams:
    """The base model's dreams; one process of a machine makes them, all read them.

    Raises:
        InputError: there are none, or the anchors cannot be read.
    """
    base.to(processes.device)
    with processes.local_main_process_first():
        bar = build_bar(config, "dreams", "texts")
        return dreams_of(config, base, tokenizer, bar)


def own_texts(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: int,
    processes: PartialState,
) -> list[Sample]:
    """The base model's own texts that a run on so many records uses; one process of a machine makes them, all read them.

    Raises:
        InputError: there are none.
    """
    count = texts_needed(config, records)
    if count == 0:
        return []
    base.to(processes.device)
    with processes.local_main_process_first():
        bar = build_bar(config, "retain", "texts")
        found = base_texts(config, base, tokenizer, count, bar)
    if processes.is_main_process:
        few = "" if len(found) == count else f", of {count} wanted: there are no more that differ"
        print(f"retain: {len(found)} texts of the base model{few}", file=sys.stderr)
    return found


def refuse_folder(folder: Path, config: TrainConfig, remedy: str = "continue it with --resume, or give") -> None:
    """Raises `InputError` if training into `folder` would overwrite a run, or resume it under other settings.

    `remedy`: what there is to do beside another folder.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; give a folder")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(
            f"output_dir {folder} cannot be made, as {there} is no folder that can be written to; give another"
        )
    before = folder / SETTINGS
    if not config.resume:
        if before.exists() or (folder / checkpoint.CONFIG).exists():
            raise InputError(f"output_dir {folder} already holds a run; {remedy} another folder")
        return
    if not before.is_file():
        raise InputError(f"there is no run to resume in {folder}: {SETTINGS} is missing")
    try:
        old, new = asdict(read_yaml(before)), asdict(config)
    except InputError as error:
        raise InputError(
            f"the run in {folder} cannot be resumed, its {SETTINGS} is not of this version: {error}; start anew in another folder"
        ) from error
    # What a free setting has put out of use may differ, too.
    changed = [key for key in new if key not in FREE_ON_RESUME and new[key] != old[key] and config.reads(key)]
    if changed:
        raise InputError(
            f"the run in {folder} has other settings: "
            + "; ".join(f"{key} was {old[key]!r}, now {new[key]!r}" for key in changed)
            + "; resume with the same ones, or give another output_dir"
        )


def refuse_continuation(config: TrainConfig) -> Path:
    """The folder of `continue_from`.

    Raises:
        InputError: a task cannot be added to it; before anything is sampled or trained.
    """
    assert config.continue_from is not None and config.task is not None
    source, its, found = task_folders.entries(config.continue_from)
    if Path(config.output_dir).resolve() == source.resolve():
        raise InputError(
            f"output_dir {config.output_dir} is the checkpoint to continue from, which stays as it is; give another"
        )
    same = (its.base_model, os.path.realpath(its.base_model or ""))
    if its.base_model and config.model not in same and os.path.realpath(config.model) not in same:
        raise InputError(f"model must be the base of {source}, {its.base_model!r}, got {config.model!r}")
    refuse_name(config.task, read_adapter_config(found[0].folder), [entry.name for entry in found])
    paths = task_folders.tensors(found)
    refuse_new(config.task, paths)
    for entry in found:
        entry.refuse_unfinished()
        refuse_part(entry.name, paths)
    return source


def load_tokenizer(config: TrainConfig, trained: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of what was trained, where there is one, or else the base model's; with a padding token.

    Raises:
        InputError: it cannot be loaded.
    """
    name, revision, source = config.model, config.revision, f"model {config.model!r}"
    if trained is not None and has_tokenizer(trained):
        name, revision, source = str(trained), None, repr(str(trained))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer of {source} cannot be loaded: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def join_processes() -> PartialState:
    """The processes of a distributed run (started by torchrun or `accelerate launch`), or this one alone."""
    return PartialState(cpu=not torch.accelerator.is_available())


def steps(config: TrainConfig, examples: int, processes: int = 1) -> int:
    """Optimizer steps of the whole run."""
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(math.ceil(examples / config.batch_size) / processes)
    return max(math.ceil(math.ceil(batches / config.gradient_accumulation) * config.epochs), 1)


def record(config: TrainConfig, train_set: ExampleSet, metrics: dict[str, float]) -> dict[str, Any]:
    """What a checkpoint says about its training: data, settings, results, and where it was made."""
    settings = asdict(config)
    data = settings.pop("data")
    groups = {name: settings.pop(name) for name in ("adapter", "retain", "dreams")}
    for key in ("continue_from", "output_dir", "resume", "progress", "tensorboard", "memory_bank_dir"):
        settings.pop(key)
    replayed = sum(isinstance(example, Replayed) for example in train_set.examples)
    return {
        "data": {
            **data,
            "train": Path(data["train"]).name,
            "records": len(train_set.examples) - replayed,
            "replayed": replayed,
        },
        "settings": {
            **settings,
            **{f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()},
        },
        "results": metrics,
        "where": {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
            "versions": {name: version(name) for name in ("imsm", "torch", "transformers", "peft")},
        },
    }
