"""Which settings a run reads. What was set and is not read is refused: who varies it would compare a run with itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from imsm.errors import InputError

if TYPE_CHECKING:
    from imsm.settings.schema import TrainConfig

#: What keeps a run from reading a setting, and what to do so that it does; None if it reads it.
Obstacle = tuple[str, str] | None
When = Callable[["TrainConfig"], Obstacle]


def _adapter(config: TrainConfig) -> Obstacle:
    return ("with method: full, which trains no adapter", "use method: peft") if config.method == "full" else None


def _evaluated(config: TrainConfig) -> Obstacle:
    return ("as there is nothing to evaluate on", "give data.eval") if config.data.eval is None else None


def _siamese(config: TrainConfig) -> Obstacle:
    return None if config.method == "imsm" else (f"with method: {config.method}", "use method: imsm")


def _dreaming(config: TrainConfig) -> Obstacle:
    return _siamese(config) or (None if config.dreaming else ("with dreams: off", "leave dreams on"))


def _learnt_gate(config: TrainConfig) -> Obstacle:
    obstacle = (f"with gate: {config.gate_name}, which has nothing to learn", "use another gate, such as query_aware")
    return _siamese(config) or (None if _learns(config.gate_name) else obstacle)


def _fitted_gate(config: TrainConfig) -> Obstacle:
    """A gate that is fitted to the finished adapter."""
    joint = None if config.two_phases else ("with dreams.phases: joint", "use dreams.phases: two")
    return _dreaming(config) or joint or _learnt_gate(config)


def _frozen_stream(config: TrainConfig) -> Obstacle:
    if config.method != "imsm":
        return f"as method: {config.method} has no frozen stream", "use method: imsm"
    obstacle = ("as the first of dreams' two phases runs no frozen stream", "use dreams.phases: joint, or dreams: off")
    return obstacle if config.two_phases else None


def _bank(config: TrainConfig) -> Obstacle:
    off = ("with memory_bank: off", "use memory_bank: auto") if config.memory_bank == "off" else None
    return _frozen_stream(config) or off


def _retained(*kinds: str, corda: bool = False) -> When:
    """The kinds of `retain` that read a setting, and whether CorDA does without any."""

    def when(config: TrainConfig) -> Obstacle:
        if config.retain.kind in kinds or (corda and config.corda):
            return None
        method = "" if config.method in ("peft", "imsm") or "replay" in kinds else "method: peft and "
        return f"with retain.kind: {config.retain.kind}", f"use {method}retain.kind: {' or '.join(kinds)}"

    return when


def _dreams_or(when: When) -> When:
    """What reads a setting of dreams, or that they are retained."""
    return lambda config: None if config.retain.kind == "kl_dreams" else when(config)


#: When a run reads a setting, of those that not every run does.
USES: dict[str, When] = {
    "adapter": _adapter,
    "continue_from": _siamese,
    "task": _siamese,
    "gate": _siamese,
    "gate_rank": _learnt_gate,
    "gate_dropout": _learnt_gate,
    "gate_learning_rate": _learnt_gate,
    "memory_bank": _frozen_stream,
    "memory_bank_dtype": _bank,
    "memory_bank_dir": _bank,
    "eval_steps": _evaluated,
    "data.eval_split": _evaluated,
    "retain.weight": _retained("kl_prompts", "kl_samples", "kl_dreams"),
    "retain.samples": _retained("kl_samples", "kl_dreams", corda=True),
    "retain.share": _retained("replay"),
    "retain.prompts": _retained("kl_samples", "replay", corda=True),
    "retain.sample_tokens": _retained("kl_samples", "replay", corda=True),
    "retain.batch_size": _retained("kl_samples", "kl_dreams"),
    "dreams.phases": _dreaming,
    "dreams.count": _dreaming,
    "dreams.prompt_tokens": _dreams_or(_dreaming),
    "dreams.answer_tokens": _dreams_or(_fitted_gate),
    "dreams.weight": _fitted_gate,
    "dreams.gate_steps": _fitted_gate,
    "dreams.task_prompts": _dreaming,
    "dreams.false_recall": _dreaming,
    "dreams.anchors": _dreaming,
}
#: Values beside the default that ask for nothing, and so are never refused.
NOTHING: dict[str, tuple[Any, ...]] = {"memory_bank": ("off",)}


def obstacle(config: TrainConfig, key: str) -> Obstacle:
    """What keeps a run from reading the setting of this dotted key."""
    return USES[key](config) if key in USES else None


def refuse_unread(config: TrainConfig) -> None:
    """Raises `InputError` for a setting that is not at its default and that the run does not read."""
    for key in USES:
        value = attrgetter(key)(config)
        if value in (default(config, key), *NOTHING.get(key, ())):
            continue
        if found := obstacle(config, key):
            what, remedy = found
            raise InputError(f"{key} is set, but has no effect {what}: {remedy}, or leave {key} out")


def default(config: TrainConfig, key: str) -> Any:
    """The default of the setting of this dotted key."""
    group, _, name = key.rpartition(".")
    found: Field[Any] = next(f for f in fields(attrgetter(group)(config) if group else config) if f.name == name)
    return found.default if found.default_factory is MISSING else found.default_factory()


def without_unread(config: TrainConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The settings `values` of a run, as `asdict` has them, without the defaults that it does not read.

    Such a default would look like somebody's choice if a later version changed it.
    """
    kept = {key: dict(value) if is_dataclass(getattr(config, key)) else value for key, value in values.items()}
    for key in USES:
        group, _, name = key.rpartition(".")
        if obstacle(config, key) and attrgetter(key)(config) == default(config, key):
            del (kept[group] if group else kept)[name]
    return kept


def _learns(gate: str) -> bool:
    import torch

    from imsm.gates import GATES

    with torch.device("meta"):  # no random numbers are drawn, which would change the run
        return bool(list(GATES[gate](2, 1, 0.0).parameters()))
