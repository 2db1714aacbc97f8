"""Names of tasks. peft finds an adapter's weights by its name in their paths, so that it must stand for nothing else there.

Otherwise peft takes weights of all other adapters for that one's, and leaves them out when it saves those.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from imsm.errors import InputError

REMEDY = "give it another name (in a checkpoint: imsm task rename CHECKPOINT NAME NEW)"


def refuse_name(name: str, config: PeftConfig, taken: Sequence[str] = ()) -> None:
    """Raises `InputError` for what cannot be the name of a task: of its folder, and of its adapter in peft."""
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)
        or hasattr(nn.ModuleDict, name)
    ):
        raise InputError(f"a task's name must be letters, digits, - and _, and no word of torch's, got {name!r}")
    if name in taken:
        raise InputError(f"there is a task {name!r} already; give another name, or remove that one first")
    kind: Any = config.peft_type
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(kind) or ""
    if name in prefix:
        raise InputError(f"a task's name must not be a part of {prefix!r}, by which peft finds weights, got {name!r}")


def refuse_new(name: str, paths: Iterable[str]) -> None:
    """Raises `InputError` for a name that is a part of `paths`, or a number, as the layers of any model are."""
    if name.isdigit():
        raise InputError(f"a task's name must not be a number, as those of layers are, got {name!r}; {REMEDY}")
    refuse_part(name, paths)


def refuse_part(name: str, paths: Iterable[str]) -> None:
    """Raises `InputError` for a name that is a part of `paths`, those of modules or of the tensors of adapters."""
    found = next((path for path in paths if name in path.split(".")), None)
    if found is not None:
        raise InputError(
            f"a task's name must not be a part of a path in the model, or weights of other tasks would be lost when they are "
            f"saved, got {name!r}, which is one of {found}; {REMEDY}"
        )


def model_paths(model: nn.Module) -> list[str]:
    """The paths of all modules and parameters."""
    return [*dict(model.named_modules()), *dict(model.named_parameters())]


def tensor_names(peft_model: PeftModel, name: str) -> set[str]:
    """What peft calls the tensors of an adapter in the file that it saves."""
    return set(get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False))


def refuse_lost(peft_model: PeftModel, name: str, saved: set[str] | None = None) -> None:
    """Raises `InputError` if an adapter's file would lack weights that it would have if there were no other adapters.

    Args:
        peft_model: with any adapters.
        name: the adapter.
        saved: the tensors in its file; those that peft would save now unless given.
    """
    others = [other for other in peft_model.peft_config if other != name]
    if not others:
        return
    lost = sorted(_names_alone(peft_model, name, others) - (tensor_names(peft_model, name) if saved is None else saved))
    if lost:
        by = next((other for other in others if other in lost[0].split(".")), None)
        raise InputError(
            f"peft would leave out {len(lost)} tensors of task {name!r} when it saves them, such as {lost[0]}"
            + ("" if by is None else f", because another task's name is a part of that: {by!r}; {REMEDY}")
        )


def _names_alone(peft_model: Any, name: str, others: list[str]) -> set[str]:
    """`tensor_names`, were the adapter the only one: what is others' is told by the containers that it lies in."""
    alone, tuner = copy.copy(peft_model), copy.copy(peft_model.base_model)
    alone._modules = {**peft_model._modules, "base_model": tuner}
    alone.active_adapter, tuner.peft_config = name, {name: peft_model.peft_config[name]}
    theirs = {
        f"{path}.{other}"
        for path, module in peft_model.named_modules(remove_duplicate=False)
        if hasattr(module, "keys")
        for other in others
        if other in module.keys()  # noqa: SIM118 (not all of peft's containers can be asked otherwise)
    }

    def is_own(key: str) -> bool:
        parts = key.split(".")
        return parts[-1] not in others and not any(".".join(parts[:end]) in theirs for end in range(1, len(parts) + 1))

    state = {key: tensor for key, tensor in peft_model.state_dict().items() if is_own(key)}
    found = get_peft_model_state_dict(alone, state_dict=state, adapter_name=name, save_embedding_layers=False)
    return {key for key in found if is_own(key)}
