"""The model that each method trains, and its trainer."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from imsm import building, loramoe
from imsm.config import DEFAULT_TASK
from imsm.data import AnswerCollator, ExampleSet
from imsm.errors import InputError, first_line
from imsm.folders import staged
from imsm.loramoe import LoRAMoEConfig
from imsm.memory_bank import RecallingCollator
from imsm.model import SiameseForCausalLM
from imsm.names import model_paths, refuse_new
from imsm.samples import Sample
from imsm.settings import TrainConfig, nearest
from imsm.training.corda import CordaAdapter, knowledge_preserving
from imsm.training.plain import AnswerLM, PlainTrainer
from imsm.training.progress import LogFile, ProgressBar
from imsm.training.retained import OwnCollator, divergence
from imsm.training.siamese import SiameseTrainer
from imsm.training.trainer import RunTrainer

LOG = "log.jsonl"


def adapter_config(settings: dict[str, Any], total_steps: int) -> PeftConfig | LoRAMoEConfig:
    """The configuration object of `adapter` settings: `peft_type` and that method's own arguments, by peft or LoRAMoE.

    Raises:
        InputError: an unknown method or argument, or values that peft refuses.
    """
    settings = knowledge_preserving(settings)
    if settings.get("inference_mode"):
        raise InputError("adapter.inference_mode must be false, as the adapter is to learn, got true; leave it out")
    kind = str(settings.pop("peft_type", "LORA")).upper()
    if kind == "LORAMOE":
        return LoRAMoEConfig.from_settings(settings)
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
        total, first = settings["total_step"], settings.get("tinit", 0)
        if type(total) is type(first) is int and first + 1 < total:
            # Ranks that still change at the last step would be others in the checkpoint than in the model.
            settings.setdefault("tfinal", 1)
    try:
        return known[kind](**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"peft refuses the adapter settings: {first_line(error)}") from error


def refuse_unreadable(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, found: ExampleSet) -> None:
    """Raises `InputError` if the base model cannot read an example, for its length or for a token that it does not embed."""
    longest, rows = building.longest_input(base), len(cast(torch.Tensor, base.get_input_embeddings().weight))
    for example in found.examples:
        if longest is not None and len(example.input_ids) > longest:
            raise InputError(
                f"{found.source}, {found.unit} {example.line} has {len(example.input_ids)} tokens, the model reads {longest}; "
                f"shorten it, or leave it out (data.max_length: {longest} and data.bad_records: skip)"
            )
        if max(example.input_ids) >= rows:
            raise InputError(
                f"{found.source}, {found.unit} {example.line} has the token {tokenizer.convert_ids_to_tokens(max(example.input_ids))!r}, "
                f"number {max(example.input_ids)}, and the model embeds {rows}; take the tokenizer that belongs to the model, or "
                "resize the model's embeddings and save it"
            )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        raise InputError(
            f"the padding token {tokenizer.pad_token!r} is number {tokenizer.pad_token_id}, and the model embeds {rows}; name a "
            "token that the model has, such as that which ends texts, as pad_token in the tokenizer's files"
        )


def load_base(config: TrainConfig) -> PreTrainedModel:
    """The base model of a run.

    Raises:
        InputError: it cannot be loaded, or the run's task cannot be called as it is on this model.
    """
    base, _ = building.load_base(
        config.model,
        {"revision": config.revision, "trust_remote_code": config.trust_remote_code, "dtype": config.dtype},
    )
    if config.task is not None:
        refuse_new(config.task, model_paths(base))
    return base


def build_model(
    config: TrainConfig, base: PreTrainedModel, adapter: PeftConfig | LoRAMoEConfig, samples: list[Sample]
) -> SiameseForCausalLM | AnswerLM:
    """The model to train on `base`, in place; of the baseline `method: peft` the gate has nothing to learn.

    Args:
        config: the run's settings.
        base: the base model.
        adapter: what `adapter_config` made of them.
        samples: the base model's own texts, for CorDA.

    Raises:
        InputError: the method cannot work on this base.
    """
    if config.method == "full":
        return _checkpointing(config, base, _full(config, base))
    if config.method == "loramoe":
        assert isinstance(adapter, LoRAMoEConfig)
        return _checkpointing(config, base, _experts(config, base, adapter))
    assert isinstance(adapter, PeftConfig)
    if config.corda:
        assert isinstance(adapter, LoraConfig)
        _learn_in_float32(config, base, "CorDA changes base weights")
        corda = CordaAdapter(base, adapter, samples[: config.retain.samples])
        return _checkpointing(config, base, AnswerLM(corda.model, base, corda.save))
    gate: dict[str, Any] = {"gate_rank": config.gate_rank, "gate_dropout": config.gate_dropout}
    gate["gate"] = config.gate_name if config.method == "imsm" else "average"
    if config.continue_from is not None:
        assert config.task is not None
        model = SiameseForCausalLM.from_pretrained(config.continue_from, base=base)
        model.add_task(config.task, adapter, **gate)
    else:
        model = SiameseForCausalLM.from_base(base, adapter, task=config.task or DEFAULT_TASK, **gate)
        model.config.base_revision = config.revision or model.config.base_revision
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def _checkpointing(config: TrainConfig, base: PreTrainedModel, model: AnswerLM) -> AnswerLM:
    if config.gradient_checkpointing:
        building.enable_checkpointing(base)
    return model


def _learn_in_float32(config: TrainConfig, base: PreTrainedModel, why: str) -> None:
    """Base weights that change, in float32 unless `dtype` says otherwise: half precision rounds small steps away.

    Raises:
        InputError: a weight is quantised.
    """
    for name, parameter in base.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(
                f"{why}, and {name} is quantised ({parameter.dtype}); load another base model, or train another adapter with "
                "method: peft"
            )
    if config.dtype == "auto" and base.dtype != torch.float32:
        base.float()


def _full(config: TrainConfig, base: PreTrainedModel) -> AnswerLM:
    _learn_in_float32(config, base, "method: full trains all weights")
    base.requires_grad_(True)

    def save(folder: Path) -> None:
        with staged(folder) as stage:
            base.save_pretrained(stage)

    return AnswerLM(base, base, save)


def _experts(config: TrainConfig, base: PreTrainedModel, adapter: LoRAMoEConfig) -> AnswerLM:
    revision = config.revision or getattr(base.config, "_commit_hash", None)
    loramoe.attach(base, adapter)

    def save(folder: Path) -> None:
        loramoe.save(base, adapter, folder, base=config.model, revision=revision)

    def penalty(attention_mask: Tensor, own: Tensor) -> Tensor:
        return adapter.balance * loramoe.balancing_constraint(base, attention_mask, own, adapter.delta)

    return AnswerLM(base, base, save, penalty, lambda: loramoe.recorded(base))


def make_trainer(
    config: TrainConfig,
    model: SiameseForCausalLM | AnswerLM,
    collator: AnswerCollator,
    train_set: ExampleSet,
    eval_set: ExampleSet | None,
    samples: list[Sample],
) -> RunTrainer:
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
    common: dict[str, Any] = {
        "args": arguments,
        "train_dataset": train_set,
        "eval_dataset": eval_set,
        "group_by_length": config.group_by_length,
    }
    trainer: RunTrainer
    if isinstance(model, AnswerLM):
        trainer = PlainTrainer(model, data_collator=OwnCollator(collator), whole=config.method == "full", **common)
    else:
        trainer = SiameseTrainer(
            model=model,
            data_collator=RecallingCollator(collator),
            gate_learning_rate=config.gate_learning_rate,
            adapter_only=config.method == "peft" or config.two_phases,
            divergence=divergence(config, samples, AnswerCollator(collator.tokenizer)),
            **common,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogFile(Path(config.output_dir) / LOG))
    if config.progress and trainer.is_world_process_zero():
        trainer.add_callback(ProgressBar(trainer, config.method))
    return trainer
