"""`train`: seconds and peak memory of training the same adapter on the same records.

Every run is a fresh process and its seconds run from the model with its new adapter, and the records as tokens, to the
trained adapter on disk; loading libraries and model and tokenising are left out for all alike. For ours that is
`imsm.train` from the moment its model is built: building the bank, training, and saving adapter and gate are inside.
For the others it is `trainer.train()` and `save_pretrained`. Every trainer logs once an epoch and saves one checkpoint,
at the end. All train in float32 with the same LoRA, AdamW, cosine schedule, seed and batch size; ours with batches of
similar length (`group_by_length`), the others with their default order.

`sft` is TRL's `SFTTrainer` with its own defaults but for float32 (they recompute activations in the backward pass), and
`sft_plain` the same without that recomputation, which is faster here. The cells of more than three epochs, which ask only
how the bank's building is spread over epochs, leave the live run out.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import measure
from benchmarks.data import cola, write
from benchmarks.measure import Round, peak_bytes
from benchmarks.run import Cell, Options
from benchmarks.systems import load_base, lora
from imsm.errors import InputError

TITLES = {
    "trainer": "HF Trainer + peft LoRA",
    "sft": "TRL SFTTrainer + peft LoRA",
    "sft_plain": "TRL SFTTrainer + peft LoRA, no recomputation",
    "live": "ours, live",
    "bank": "ours, with the bank",
}
NAMES = tuple(TITLES)
LEARNING_RATE, SEED, MAX_LENGTH = 3e-4, 0, 1024
WARM_STEPS = 2


def settings(options: Options) -> dict[str, Any]:
    """What all cells have in common."""
    return {
        "records": 8 if options.quick else options.records,
        "batch_size": 4 if options.quick else options.batch_size,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "dtype": "float32",
        "data": "cola" if options.data_root is not None else "nyu-mll/glue cola",
    }


def cells(options: Options) -> list[Cell]:
    """One a number of epochs."""
    return [Cell(f"{epochs} epochs", {"epochs": epochs}) for epochs in ([1] if options.quick else options.epochs)]


def rounds(cell: Cell, options: Options, folder: str, missing: int) -> Iterator[dict[str, Any]]:
    """First `facts` (tokens and last loss of a short warm-up of each), then a `round` at a time.

    Raises:
        InputError: TRL is wanted and not installed, or there are no records.
    """
    names = [name for name in options.systems or NAMES if name != "live" or cell.setting["epochs"] <= 3]
    if any(name.startswith("sft") for name in names) and importlib.util.find_spec("trl") is None:
        others = " ".join(name for name in names if not name.startswith("sft"))
        raise InputError(
            f"SFTTrainer is TRL's, which is not installed: pip install trl, or leave it out: --systems {others}"
        )
    common = {**cell.setting, **settings(options), "folder": folder}
    with tempfile.TemporaryDirectory(prefix="imsm-benchmark-") as place:
        data = Path(place) / "train.jsonl"
        write(cola(options.data_root, common["records"]), data)

        def run(name: str, steps: int = -1) -> dict[str, float]:
            fresh = Path(place) / "run"
            shutil.rmtree(fresh, ignore_errors=True)
            folders = {"data": str(data), "output": str(fresh / "output"), "bank": str(fresh / "bank")}
            return measure.answer("train", {**common, **folders, "system": name, "steps": steps})

        warm = {name: run(name, WARM_STEPS) for name in names}
        tokens = {name: [int(found["tokens"]), int(found["supervised"])] for name, found in warm.items()}
        yield {"facts": {"tokens": tokens, "same_tokens": len({tuple(counts) for counts in tokens.values()}) == 1}}
        for _ in range(missing):
            found: Round = {name: run(name) for name in names}
            yield {"round": found}


def child(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One run of one system."""
    runs: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
        "trainer": run_trainer,
        "sft": run_sft,
        "sft_plain": run_sft,
        "live": run_ours,
        "bank": run_ours,
    }
    yield runs[task["system"]](task)


def arguments(task: dict[str, Any]) -> dict[str, Any]:
    """What the trainers of the others are told; the rest is their defaults."""
    import torch

    return {
        "output_dir": task["output"],
        "num_train_epochs": task["epochs"],
        "max_steps": task["steps"],
        "per_device_train_batch_size": task["batch_size"],
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "seed": task["seed"],
        "bf16": False,
        "use_cpu": not torch.accelerator.is_available(),
        "logging_strategy": "steps",
        "logging_steps": logging_steps(task),
        "save_strategy": "steps",
        "save_steps": 10**6,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def logging_steps(task: dict[str, Any]) -> int:
    """Optimizer steps an epoch, or those of a shorter run."""
    epoch = -(-task["records"] // task["batch_size"])
    return epoch if task["steps"] < 0 else min(epoch, task["steps"])


def fit(trainer: Any, output: str) -> dict[str, float]:
    """Trains and saves with somebody else's trainer."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    trainer.model.save_pretrained(output)
    return {
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak_bytes(),
        "loss": last_loss(trainer.state.log_history),
    }


def last_loss(log: list[dict[str, Any]]) -> float:
    """The loss of the last log entry: the mean over its epoch."""
    return [float(entry["loss"]) for entry in log if "loss" in entry][-1]


def examples(task: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """The tokenizer, the records as this library tokenises them, and their counts of tokens."""
    from transformers import AutoTokenizer

    from imsm import DataConfig
    from imsm.data import load_examples

    tokenizer = AutoTokenizer.from_pretrained(task["folder"])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = load_examples(DataConfig(train=task["data"], max_length=MAX_LENGTH), tokenizer).examples
    return tokenizer, found, counts([e.input_ids for e in found], [e.labels for e in found])


def counts(ids: list[list[int]], labels: list[list[int]]) -> dict[str, float]:
    """Tokens read and tokens scored in an epoch."""
    return {"tokens": sum(map(len, ids)), "supervised": sum(label != -100 for row in labels for label in row)}


def run_trainer(task: dict[str, Any]) -> dict[str, float]:
    """`Trainer` on peft's model, with transformers' collator and defaults."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    tokenizer, found, tokens = examples(task)
    set_seed(task["seed"])
    base = load_base(task["folder"], task["dtype"])
    trainer = Trainer(
        model=get_peft_model(base, lora(base)),
        args=TrainingArguments(**arguments(task)),
        train_dataset=[{"input_ids": e.input_ids, "labels": e.labels} for e in found],  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return {**fit(trainer, task["output"]), **tokens}


def run_sft(task: dict[str, Any]) -> dict[str, float]:
    """TRL's `SFTTrainer`, which tokenises the records itself."""
    import json

    from datasets import Dataset
    from transformers import AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    lines = Path(task["data"]).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    set_seed(task["seed"])
    base = load_base(task["folder"], task["dtype"])
    own: dict[str, Any] = {"gradient_checkpointing": False} if task["system"] == "sft_plain" else {}
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(**arguments(task), **own),
        train_dataset=Dataset.from_list([{"prompt": r["input"], "completion": r["output"]} for r in records]),
        processing_class=AutoTokenizer.from_pretrained(task["folder"]),
        peft_config=lora(base),
    )
    rows: Any = trainer.train_dataset
    return {**fit(trainer, task["output"]), **counts(rows["input_ids"], rows["labels"])}


def run_ours(task: dict[str, Any]) -> dict[str, float]:
    """`imsm.train`, timed from the moment its model is built."""
    from imsm import DataConfig, DreamsConfig, TrainConfig
    from imsm.training import run

    *_, tokens = examples(task)
    build, built = run.build_model, []

    def build_and_note(*args: Any) -> Any:
        model = build(*args)
        built.append(time.perf_counter())
        return model

    with patch.object(run, "build_model", build_and_note):
        result = run.train(
            TrainConfig(
                model=task["folder"],
                output_dir=task["output"],
                data=DataConfig(train=task["data"], max_length=MAX_LENGTH),
                adapter=adapter_settings(task),
                dreams=DreamsConfig("off"),
                dtype=task["dtype"],
                epochs=task["epochs"],
                max_steps=task["steps"],
                batch_size=task["batch_size"],
                group_by_length=True,
                learning_rate=task["learning_rate"],
                seed=task["seed"],
                logging_steps=logging_steps(task),
                save_steps=10**6,
                tensorboard=False,
                progress=False,
                **bank_settings(task),
            )
        )
    seconds = time.perf_counter() - built[0]
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "loss": last_loss(result.log),
        **tokens,
    }


def bank_settings(task: dict[str, Any]) -> dict[str, Any]:
    """Without the bank, or with a new one in a folder of this run."""
    if task["system"] == "live":
        return {"memory_bank": "off"}
    return {"memory_bank": "on", "memory_bank_dir": task["bank"]}


def adapter_settings(task: dict[str, Any]) -> dict[str, Any]:
    """The adapter as `TrainConfig` has it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(task["folder"]))
    config = lora(skeleton)
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
    }
