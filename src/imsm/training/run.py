"""One training run from its settings: data, model, `SiameseTrainer`, and the checkpoint with what it was made from."""

from __future__ import annotations

import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from imsm import building, checkpoint
from imsm.data import AnswerCollator, ExampleSet, load_examples
from imsm.errors import InputError, first_line
from imsm.folders import staged
from imsm.memory_bank import RecallingCollator
from imsm.model import SiameseForCausalLM
from imsm.packing import refuse_unpackable
from imsm.settings import TrainConfig, nearest, read_yaml, to_yaml
from imsm.training.progress import BuildBar, LogFile, ProgressBar
from imsm.training.recall import plan_bank
from imsm.training.trainer import SiameseTrainer

SETTINGS, LOG = "settings.yaml", "log.jsonl"
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

    model: the trained model, in eval mode (siamese, or peft's for `method: peft`).
    tokenizer: its tokenizer.
    folder: the checkpoint.
    metrics: loss of the last step, evaluation loss if there was evaluation data, seconds, steps.
    log: the trainer's log entries.
    """

    model: SiameseForCausalLM | PeftModel
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
    tokenizer = load_tokenizer(config)
    train_set = load_examples(config.data, tokenizer, split="train")
    eval_set = load_examples(config.data, tokenizer, split="eval") if config.data.eval else None
    for found in (train_set, eval_set):
        if found is not None and found.problems and processes.is_main_process:
            print(found.report(), file=sys.stderr)
    total_steps = steps(config, len(train_set.examples), processes.num_processes)
    set_seed(config.seed)
    adapter = adapter_config(config.adapter, total_steps)
    model = build_model(config, adapter)
    if config.packing:
        refuse_unpackable(model)
    collator = AnswerCollator(tokenizer, row_length=config.data.max_length if config.packing else None)
    bank, decision = plan_bank(config, model, train_set.examples, collator, processes.num_processes)
    if not all(gather_object([bank is not None])):  # a disk of one of the machines is full
        bank = None
    if config.method == "imsm" and processes.is_main_process:
        print(decision, file=sys.stderr)

    processes.wait_for_everyone()  # none looks at the folder any more
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / SETTINGS, to_yaml(replace(config, resume=False)))
    processes.wait_for_everyone()
    trainer = make_trainer(config, model, collator, train_set, eval_set)
    if bank is not None:
        bank.build(BuildBar(bank) if config.progress and processes.is_main_process else None)
        trainer.train_dataset = bank
    last = trainer.last_checkpoint() if config.resume else None
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - began

    log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    metrics = {"steps": float(trainer.state.global_step), "seconds": round(seconds, 1)}
    for key in ("loss", "gate", "eval_loss"):
        if values := [entry[key] for entry in log if key in entry]:
            metrics[key] = values[-1]
    trainer.gate_meter.remove()
    model.eval()
    model.config.training = record(config, train_set, metrics)
    if trainer.is_world_process_zero():
        trainer.save_portable(folder)
        with staged(folder) as stage:
            tokenizer.save_pretrained(stage)
    return TrainResult(model if config.method == "imsm" else model.peft_model, tokenizer, folder, metrics, log)


def refuse_folder(folder: Path, config: TrainConfig) -> None:
    """Raises `InputError` if training into `folder` would overwrite a run, or resume it under other settings."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; give a folder")
    before = folder / SETTINGS
    if not config.resume:
        if before.exists() or (folder / checkpoint.CONFIG).exists():
            raise InputError(
                f"output_dir {folder} already holds a run; continue it with --resume, or give another folder"
            )
        return
    if not before.is_file():
        raise InputError(f"there is no run to resume in {folder}: {SETTINGS} is missing")
    old, new = asdict(read_yaml(before)), asdict(config)
    changed = [key for key in new if key not in FREE_ON_RESUME and new[key] != old[key]]
    if changed:
        raise InputError(
            f"the run in {folder} has other settings: "
            + "; ".join(f"{key} was {old[key]!r}, now {new[key]!r}" for key in changed)
            + "; resume with the same ones, or give another output_dir"
        )


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer of model {config.model!r} cannot be loaded: {first_line(error)}") from error
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


def adapter_config(settings: dict[str, Any], total_steps: int) -> PeftConfig:
    """peft's configuration object from `adapter` settings: `peft_type` and that method's own arguments.

    Raises:
        InputError: an unknown method or argument, or values that peft refuses.
    """
    settings = dict(settings)
    kind = str(settings.pop("peft_type", "LORA")).upper()
    known = {str(peft_type.value): cls for peft_type, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise InputError(f"adapter.peft_type must be one of peft's methods, got {kind!r}{nearest(kind, known)}")
    names = {field.name for field in fields(known[kind])}
    for key in settings:
        if key not in names:
            raise InputError(f"unknown setting 'adapter.{key}' for {kind}{nearest(key, names)}")
    settings.setdefault("task_type", "CAUSAL_LM")
    if "total_step" in names:
        settings.setdefault("total_step", total_steps)
    try:
        return known[kind](**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"peft refuses the adapter settings: {first_line(error)}") from error


def build_model(config: TrainConfig, adapter: PeftConfig) -> SiameseForCausalLM:
    """The model to train; for the baseline `method: peft` its gate has nothing to learn."""
    base, _ = building.load_base(
        config.model,
        {"revision": config.revision, "trust_remote_code": config.trust_remote_code, "dtype": config.dtype},
    )
    model = SiameseForCausalLM.from_base(
        base,
        adapter,
        gate=config.gate if config.method == "imsm" else "average",
        gate_rank=config.gate_rank,
        gate_dropout=config.gate_dropout,
    )
    model.config.base_revision = config.revision or model.config.base_revision
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def make_trainer(
    config: TrainConfig,
    model: SiameseForCausalLM,
    collator: AnswerCollator,
    train_set: ExampleSet,
    eval_set: ExampleSet | None,
) -> SiameseTrainer:
    """The trainer with its callbacks, ready to run."""
    evaluate = "no" if eval_set is None else "epoch" if config.eval_steps is None else "steps"
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        optim="adamw_torch" if config.optimizer == "adamw" else "adafactor",
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        use_cpu=not torch.accelerator.is_available(),  # else bfloat16 is refused on CPU
        eval_strategy=evaluate,
        eval_steps=config.eval_steps,
        save_strategy="epoch" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=config.save_total_limit,
        logging_strategy="steps",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if config.tensorboard else [],
        seed=config.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = SiameseTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=RecallingCollator(collator),
        gate_learning_rate=config.gate_learning_rate,
        adapter_only=config.method == "peft",
        group_by_length=config.group_by_length,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogFile(Path(config.output_dir) / LOG))
    if config.progress and trainer.is_world_process_zero():
        trainer.add_callback(ProgressBar(trainer, config.method))
    return trainer


def record(config: TrainConfig, train_set: ExampleSet, metrics: dict[str, float]) -> dict[str, Any]:
    """What a checkpoint says about its training: data, settings, results, and where it was made."""
    settings = asdict(config)
    data = settings.pop("data")
    adapter = settings.pop("adapter")
    for key in ("output_dir", "resume", "progress", "tensorboard", "memory_bank_dir"):
        settings.pop(key)
    return {
        "data": {**data, "train": Path(data["train"]).name, "records": len(train_set.examples)},
        "settings": {**settings, **{f"adapter.{key}": value for key, value in adapter.items()}},
        "results": metrics,
        "where": {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
            "versions": {name: version(name) for name in ("imsm", "torch", "transformers", "peft")},
        },
    }


def write(path: Path, text: str) -> None:
    """Writes beside and renames."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
