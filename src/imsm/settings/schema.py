"""The settings of a training run: YAML keys and command-line flags derive from these dataclasses alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from imsm.errors import InputError
from imsm.settings.uses import obstacle, refuse_unread


@dataclass
class DataConfig:
    """What a run reads.

    Attributes:
        train: A .jsonl, .json or .parquet file, or a Hub data set as NAME or NAME:CONFIGURATION.
        eval: Held-out data for evaluation during training, given like train.
        split: Split of train, if that is a Hub data set.
        eval_split: Split of eval, if that is a Hub data set.
        max_length: Longest prompt and answer together, in tokens; a longer record is a problem, never cut.
        bad_records: What records that cannot be used do: stop the run (error), or be reported and left out (skip).
        add_eos: End answers with the tokenizer's end-of-sequence token, where the chat template brings no end.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    train: str
    eval: str | None = None
    split: str = "train"
    eval_split: str = "test"
    max_length: int = 1024
    bad_records: Literal["error", "skip"] = "error"
    add_eos: bool = True

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        for name in ("train", "eval", "split", "eval_split"):
            _require(getattr(self, name) != "", f"data.{name}", "a text that is not empty", "")
        _require(self.max_length > 1, "data.max_length", "an integer above 1", self.max_length)


@dataclass
class RetainConfig:
    """What a run does, beside its method, to keep what the base model knows.

    Attributes:
        kind: none; kl_prompts adds the KL divergence from the base model at the training prompts; kl_samples adds it on
            texts that the base model sampled, kl_dreams on dreams (which a siamese model's relevance head is fitted to by
            default); replay mixes the base model's own answers to general prompts into the training records.
        weight: Weight of the KL divergence, in mean nats a token, beside the cross-entropy.
        samples: Texts that the base model samples, for kl_samples, kl_dreams and CorDA.
        share: Share of the training records that replay makes the base model's own answers.
        prompts: A file of general prompts (prompt, input or messages) that the base model answers; null lets it sample
            prompts of its own.
        sample_tokens: Longest sampled prompt, and longest answer, in tokens.
        batch_size: Sampled texts a device and forward pass, for kl_samples and kl_dreams.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    kind: Literal["none", "kl_prompts", "kl_samples", "kl_dreams", "replay"] = "none"
    weight: float = 1.0
    samples: int = 200
    share: float = 0.05
    prompts: str | None = None
    sample_tokens: int = 64
    batch_size: int = 4

    def __post_init__(self) -> None:
        _check_types(self, "retain.")
        _require(self.weight > 0, "retain.weight", "a positive number", self.weight)
        for name in ("samples", "sample_tokens", "batch_size"):
            _require(getattr(self, name) > 0, f"retain.{name}", "a positive integer", getattr(self, name))
        _require(0 < self.share < 1, "retain.share", "a number between 0 and 1", self.share)
        _require(self.prompts != "", "retain.prompts", "a text that is not empty, or null", "")


@dataclass
class DreamsConfig:
    """How a siamese model learns what is not its task: by dreams, prompts that the base model itself samples.

    Attributes:
        mode: on, or off, which is the paper's training. `dreams: off` stands for the group with this alone.
        phases: two trains the adapter at full strength and then head and gate for it as it is; joint trains adapter and
            gate together, as the paper does, and then the head.
        count: Dreams.
        prompt_tokens: Longest of them, in tokens.
        answer_tokens: Longest answer of the base model to one, which gates with something to learn are held to.
        weight: Weight of the gate's divergence from the base model on dreams, in nats a token, beside the cross-entropy.
        gate_steps: Steps of the gate's own fit, in two phases.
        task_prompts: Training prompts that the head is fitted to; half of them are seen in other words too.
        false_recall: Share of the task's prompts that may be left to the base model.
        anchors: A file of texts or prompts of your own (text, prompt, input or messages) that must be answered as before.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    mode: Literal["on", "off"] = "on"
    phases: Literal["two", "joint"] = "two"
    count: int = 200
    prompt_tokens: int = 48
    answer_tokens: int = 16
    weight: float = 4.0
    gate_steps: int = 400
    task_prompts: int = 80
    false_recall: float = 0.01
    anchors: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.mode, bool):  # what YAML reads on and off as
            self.mode = "on" if self.mode else "off"
        _check_types(self, "dreams.")
        for name in ("count", "prompt_tokens", "answer_tokens", "gate_steps", "task_prompts"):
            _require(getattr(self, name) > 0, f"dreams.{name}", "a positive integer", getattr(self, name))
        _require(self.weight >= 0, "dreams.weight", "a number that is not negative", self.weight)
        _require(0 <= self.false_recall < 1, "dreams.false_recall", "a number from 0 to below 1", self.false_recall)
        _require(self.anchors != "", "dreams.anchors", "a text that is not empty, or null", "")


@dataclass
class TrainConfig:
    """Settings of a training run. What is not at its default and has no effect with the others is refused.

    Attributes:
        model: The base model: a folder or Hub name.
        output_dir: Folder for the checkpoint, logs and the settings.
        data: What the run reads.
        revision: Branch, tag or commit of the base model on the Hub.
        trust_remote_code: Run code that the base model's repository brings.
        dtype: Number format that the base model is loaded in; auto is that of its files, or float32 where base weights
            change (method full, and CorDA).
        method: imsm trains a siamese model; the others are baselines: peft trains the adapter alone, loramoe routed LoRA
            experts, full all weights of the model, without an adapter.
        adapter: peft's settings by peft's own names, and peft_type; as a whole in YAML, or key by key as --adapter.KEY.
            With method loramoe peft_type is LORAMOE, and the settings are those of imsm.loramoe.LoRAMoEConfig.
        retain: What is done beside the method to keep what the base model knows.
        dreams: How a siamese model learns what is not its task.
        continue_from: A checkpoint that this run adds a task to, as a folder or Hub name; its tasks stay as they are. The new
            folder holds them all.
        task: Name of the task that is learnt, needed with continue_from; null is default.
        gate: How the two memories are mixed: query_aware, token, average, tuned, residual, projected or query_blended; auto
            is query_aware, or tuned (the adapter alone answers the task) with dreams in two phases.
        gate_rank: Rank of the gate's low-rank map.
        gate_dropout: Dropout after each of the gate's linear maps.
        epochs: Passes over the training data.
        max_steps: Optimizer steps; overrides epochs unless -1.
        batch_size: Records a device and forward pass.
        eval_batch_size: The same in evaluation.
        gradient_accumulation: Forward passes an optimizer step.
        learning_rate: Highest learning rate of the adapter, or of whatever the method trains in its place.
        gate_learning_rate: Highest learning rate of the gate.
        optimizer: adamw, or adafactor, which needs less memory.
        weight_decay: Decoupled weight decay.
        schedule: Course of the learning rates after the warm-up.
        warmup: Warm-up, as a share of all steps if below 1, else as a number of steps.
        max_grad_norm: Norm to which gradients are clipped; 0 switches clipping off.
        bf16: Compute in bfloat16 autocast.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.
        memory_bank: Compute the frozen memories of the training data once and keep them on disk: on, off, or auto, which
            does so where it pays and fits.
        memory_bank_dtype: Number format they are kept in; auto is bfloat16 where they are computed in it, else float32.
        memory_bank_dir: Folder for them; null is imsm/memory_banks in the user's cache folder.
        group_by_length: Make batches of records of similar length: less is padded, batches are less mixed.
        packing: Put the records of a batch into as few rows as they fit in, kept apart from each other.
        eval_steps: Steps between evaluations; null is at the end of each epoch. Needs data.eval.
        save_steps: Steps between checkpoints; null is at the end of each epoch.
        save_total_limit: Checkpoints kept; null keeps all.
        logging_steps: Steps between log entries.
        tensorboard: Write TensorBoard logs.
        seed: Seed of initialisation, dropout and the order of records.
        resume: Continue the run in output_dir from its newest checkpoint.
        progress: Show the progress.

    Raises:
        InputError: a value of the wrong type or out of range, or settings that do not go together.
    """

    model: str
    output_dir: str
    data: DataConfig
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    method: Literal["imsm", "peft", "loramoe", "full"] = "imsm"
    adapter: dict[str, Any] = field(
        default_factory=lambda: {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    )
    retain: RetainConfig = field(default_factory=RetainConfig)
    dreams: DreamsConfig = field(default_factory=DreamsConfig)
    continue_from: str | None = None
    task: str | None = None
    gate: str = "auto"
    gate_rank: int = 8
    gate_dropout: float = 0.1
    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 8
    eval_batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 3e-4
    gate_learning_rate: float = 1e-3
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    memory_bank: Literal["auto", "on", "off"] = "auto"
    memory_bank_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_bank_dir: str | None = None
    group_by_length: bool = False
    packing: bool = False
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = 2
    logging_steps: int = 1
    tensorboard: bool = True
    seed: int = 0
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.memory_bank, bool):  # what YAML reads on and off as
            self.memory_bank = "on" if self.memory_bank else "off"
        _check_types(self)
        for name in ("model", "output_dir"):
            _require(getattr(self, name) != "", name, "a text that is not empty", "")
        for name in ("gate_rank", "batch_size", "eval_batch_size", "gradient_accumulation", "logging_steps"):
            _require(getattr(self, name) > 0, name, "a positive integer", getattr(self, name))
        for name in ("eval_steps", "save_steps", "save_total_limit"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, "a positive integer or null", value)
        for name in ("epochs", "learning_rate", "gate_learning_rate"):
            _require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        for name in ("weight_decay", "max_grad_norm"):
            _require(getattr(self, name) >= 0, name, "a number that is not negative", getattr(self, name))
        _require(0 <= self.gate_dropout < 1, "gate_dropout", "a number from 0 to below 1", self.gate_dropout)
        _require(self.max_steps == -1 or self.max_steps > 0, "max_steps", "a positive integer, or -1", self.max_steps)
        _require(0 <= self.seed < 2**32, "seed", "an integer from 0 to below 2**32", self.seed)
        whole_or_share = 0 <= self.warmup < 1 or (self.warmup >= 1 and self.warmup == int(self.warmup))
        _require(whole_or_share, "warmup", "a share from 0 to below 1, or a whole number of steps", self.warmup)
        for name in ("continue_from", "task"):
            _require(getattr(self, name) != "", name, "a text that is not empty, or null", "")
        _require(self.memory_bank_dir != "", "memory_bank_dir", "a folder or null", "")
        self.adapter = _plain({"peft_type": "LORA", **self.adapter}, "adapter")
        from imsm.gates import GATES

        if self.gate not in (known := ("auto", *GATES)):
            raise InputError(f"gate must be one of {', '.join(known)}; got {self.gate!r}{nearest(self.gate, known)}")
        refuse_unread(self)
        self._refuse_combinations()
        if self.method == "imsm" and self.gate_name == "tuned" and not self.dreaming:
            raise InputError("gate: tuned without dreams is the adapter alone; use another gate, or method: peft")

    @property
    def dreaming(self) -> bool:
        """Whether the run fits a relevance head to the base model's dreams."""
        return self.method == "imsm" and self.dreams.mode == "on"

    @property
    def two_phases(self) -> bool:
        """Whether the adapter is trained alone, and the gate after it."""
        return self.dreaming and self.dreams.phases == "two"

    @property
    def gate_name(self) -> str:
        """The gate's key in `imsm.GATES`."""
        return self.gate if self.gate != "auto" else "tuned" if self.two_phases else "query_aware"

    @property
    def corda(self) -> bool:
        """Whether the adapter starts as CorDA, which moves a part of the base weights into it."""
        return self.method == "peft" and str(self.adapter.get("init_lora_weights")).lower() == "corda"

    def reads(self, key: str) -> bool:
        """Whether the run reads the setting of this dotted key; one that is set and not read is refused."""
        return obstacle(self, key) is None

    def _refuse_combinations(self) -> None:
        """Raises `InputError` for settings that are right one by one and cannot go together."""
        experts = str(self.adapter["peft_type"]).upper() == "LORAMOE"
        if experts != (self.method == "loramoe"):
            raise InputError(
                f"method: loramoe and adapter.peft_type: LORAMOE go together, got method: {self.method} and "
                f"peft_type: {self.adapter['peft_type']}; set both or neither"
            )
        if self.continue_from is not None and (self.task is None or not self.dreaming):
            needs = (
                "a name for the new task: give task"
                if self.task is None
                else "dreams, to tell tasks apart: leave them on"
            )
            raise InputError(f"continue_from needs {needs}")
        kind = self.retain.kind
        if kind.startswith("kl_") and self.method in ("full", "loramoe"):
            raise InputError(
                f"retain.kind: {kind} compares with the base model, which method: {self.method} does not keep at hand; use "
                "method: peft, or retain.kind: replay"
            )
        if kind.startswith("kl_") and self.corda:
            raise InputError(
                f"retain.kind: {kind} compares with the base model, whose weights CorDA rewrites; use another "
                "adapter.init_lora_weights, or retain.kind: replay"
            )
        if kind == "kl_prompts" and self.method == "imsm":
            raise InputError(
                "retain.kind: kl_prompts goes with method: peft: a siamese model answers behind its prompt alone; use "
                "retain.kind: kl_samples"
            )
        if kind == "kl_prompts" and self.packing:
            raise InputError(
                "retain.kind: kl_prompts cannot tell prompts from padding in packed rows; set packing: false"
            )
        if self.packing and (self.method in ("full", "loramoe") or self.corda):
            what = "CorDA" if self.corda else f"method: {self.method}"
            raise InputError(f"packing is not for {what}; set packing: false")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean '…'?` with the known name nearest to `name`, or nothing if none is near."""
    names = list(known)
    full = {key.rsplit(".", 1)[-1].casefold(): key for key in names} | {key.casefold(): key for key in names}
    name = name.casefold()
    found = (
        [key for key in full if key == name]
        or [key for key in full if len(name) > 2 and key.startswith(name)]
        or get_close_matches(name, full, n=1)
        or get_close_matches(name.rsplit(".", 1)[-1], full, n=1, cutoff=0.75)
    )
    return f"; did you mean {full[found[0]]!r}?" if found else ""


def _check_types(config: Any, prefix: str = "") -> None:
    """Every field has its annotated type; whole numbers and paths are brought to the float or text asked for."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        allowed = get_args(hint) if type(None) in get_args(hint) else (hint,)
        if float in allowed and type(value) is int:
            value = float(value)
        if str in allowed and isinstance(value, os.PathLike):
            value = os.fspath(value)
        setattr(config, name, value)
        if get_origin(hint) is Literal:
            fits = isinstance(value, str) and value in get_args(hint)
        else:
            fits = type(value) in [get_origin(kind) or kind for kind in allowed]
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise wrong_value(prefix + name, type_in_words(hint), value)


def type_in_words(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if type(None) in get_args(hint):
        return type_in_words(get_args(hint)[0]) + " or null"
    if get_origin(hint) is dict:
        return "peft's settings as a mapping"
    return {str: "a text", int: "an integer", float: "a number", bool: "true or false"}.get(hint, f"a {hint.__name__}")


def _require(fits: bool, name: str, expected: str, value: Any) -> None:
    if not fits:
        raise wrong_value(name, expected, value)


def wrong_value(name: str, expected: str, value: Any) -> InputError:
    """The error for a setting of the wrong type or out of range."""
    return InputError(f"{name} must be {expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _plain(value: Any, name: str) -> Any:
    """`value` as YAML has it: lists for tuples and sets, and nothing but texts, numbers, lists and mappings."""
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item, name) for item in value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{name}.{key}") for key, item in value.items()}
    raise wrong_value(name, "texts, numbers, lists or mappings with texts as keys", value)
