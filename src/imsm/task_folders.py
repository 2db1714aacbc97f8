"""The tasks of a checkpoint on the disk: listed, removed, renamed, exported, imported, without the base model.

Adapters, gates, heads and queries are copied byte for byte; only the router is fitted anew, to the queries that are there.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imsm.building import ADAPTER, ADAPTER_CONFIG, read_adapter_config, saved_tensors
from imsm.checkpoint import (
    GATE,
    GENERATION,
    QUERIES,
    READS,
    RELEVANCE,
    REQUIRED,
    ROUTER,
    TASKS,
    drop_stale,
    numbered,
    read_config,
    read_queries,
    read_settings,
    save_part,
    write_settings,
)
from imsm.config import SiameseConfig
from imsm.ends import joined
from imsm.errors import InputError, first_line
from imsm.folders import staged
from imsm.names import refuse_name, refuse_new, refuse_part
from imsm.routing import fit_router
from imsm.tasks import OWN

#: What a run leaves in a checkpoint's folder that tells of that run, not of one of its tasks.
OF_THE_RUN = ("settings.yaml", "log.jsonl", "README.md")
#: What tells one base model from another.
SHAPE = ("base_model_type", "hidden_size", "vocab_size", "num_hidden_layers")


@dataclass(frozen=True)
class Entry:
    """A task of a checkpoint.

    name: what it is called.
    folder: where its files are.
    settings: those of `OWN`.
    """

    name: str
    folder: Path
    settings: dict[str, Any]

    @property
    def whole(self) -> bool:
        """Whether queries can find it: it has a head and stored queries."""
        return bool(self.settings["relevance"]) and (self.folder / QUERIES).is_file()

    def refuse_unfinished(self) -> None:
        """Raises `InputError` unless it is whole."""
        if not self.whole:
            raise InputError(
                f"task {self.name!r} in {self.folder} has no relevance head or no stored queries, so that another could not be "
                "told from it; train it with dreams on, or make its checkpoint anew of its adapter: imsm adopt ADAPTER --data "
                "FILE --output DIR"
            )


def entries(name: str | os.PathLike[str]) -> tuple[Path, SiameseConfig, list[Entry]]:
    """The folder of a checkpoint, its config, and its tasks.

    Raises:
        InputError: there is no such checkpoint, or it is incomplete.
    """
    folder, config = read_config(name, {})
    first, *further = config.tasks
    found = [Entry(first, folder, {key: getattr(config, key) for key in OWN})]
    for task in further:
        place = folder / TASKS / task
        settings = read_settings(place)
        found.append(Entry(task, place, {key: settings[key] for key in OWN}))
    for entry in found:
        missing = [file for file in (ADAPTER_CONFIG, ADAPTER, GATE) if not (entry.folder / file).is_file()]
        if missing:
            raise InputError(f"{entry.folder} is not a complete task: {', '.join(missing)} missing")
    return folder, config, found


def entry_of(found: list[Entry], name: str) -> Entry:
    """The task of that name.

    Raises:
        InputError: there is none.
    """
    for entry in found:
        if entry.name == name:
            return entry
    raise InputError(f"there is no task {name!r}; there are {', '.join(entry.name for entry in found)}")


def tensors(found: list[Entry]) -> list[str]:
    """The names of the tensors of the tasks' adapters.

    Raises:
        InputError: a file is damaged.
    """
    return sorted(set().union(*(saved_tensors(entry.folder) for entry in found)))


def remove(checkpoint: str | os.PathLike[str], name: str) -> None:
    """Takes a task out of a checkpoint's folder; of the first one the next takes the place.

    Raises:
        InputError: there is no such task, or no other.
    """
    folder, config, found = entries(own_folder(checkpoint))
    gone = entry_of(found, name)
    left = [entry for entry in found if entry is not gone]
    if not left:
        raise InputError(f"{name!r} is the only task of {folder}; delete the folder instead")
    rewrite(folder, config, left)


def rename(checkpoint: str | os.PathLike[str], name: str, new: str) -> None:
    """Gives a task of a checkpoint's folder another name.

    Raises:
        InputError: there is no such task, or the new name cannot be used.
    """
    folder, config, found = entries(own_folder(checkpoint))
    old = entry_of(found, name)
    refuse_name(new, read_adapter_config(old.folder), [entry.name for entry in found])
    refuse_new(new, tensors(found))
    rewrite(folder, config, [Entry(new, e.folder, e.settings) if e is old else e for e in found])


def export(checkpoint: str | os.PathLike[str], name: str, target: str | os.PathLike[str]) -> Path:
    """Makes a checkpoint of one task alone in a new folder, with the tokenizer's files; gives the folder.

    Raises:
        InputError: there is no such task, or `target` holds something.
    """
    folder, config, found = entries(checkpoint)
    entry, into = entry_of(found, name), Path(target)
    if into.is_dir() and any(into.iterdir()):
        raise InputError(f"{into} is not empty; give a new folder to export into")
    ours = {*REQUIRED, RELEVANCE, QUERIES, ROUTER, *OF_THE_RUN}

    def besides(stage: Path) -> None:
        for path in folder.iterdir():
            if path.is_file() and path.name not in ours:
                shutil.copyfile(path, stage / path.name)

    rewrite(into, config, [entry], besides)
    return into


def bring(
    checkpoint: str | os.PathLike[str],
    other: str | os.PathLike[str],
    name: str | None = None,
    new: str | None = None,
    *,
    same_base: bool = False,
) -> str:
    """Puts a task of another checkpoint of the same base into a checkpoint's folder; gives the task's name there.

    Answers end then where those of either checkpoint do.

    Args:
        checkpoint: the folder that is added to.
        other: folder or Hub name of the one that it comes from, which stays as it is.
        name: of the task there; its only or first one unless given.
        new: what it is to be called here; as there unless given.
        same_base: both base models are the same although their names or revisions differ.

    Raises:
        InputError: the bases differ, the name is taken, one of the tasks cannot be told from others, or generation settings
            are damaged.
    """
    folder, config, found = entries(own_folder(checkpoint))
    source, other_config, theirs = entries(other)
    entry = theirs[0] if name is None else entry_of(theirs, name)
    refuse_other(config, other_config, source, same_base)
    adapter = read_adapter_config(entry.folder)
    new = entry.name if new is None else new
    refuse_name(new, adapter, [mine.name for mine in found])
    kind = read_adapter_config(folder).peft_type
    if adapter.peft_type != kind:
        raise InputError(
            f"adapters of one model are of one kind: {folder} has {getattr(kind, 'value', kind)}, {entry.folder} has "
            f"{getattr(adapter.peft_type, 'value', adapter.peft_type)}"
        )
    for part in (*found, entry):
        part.refuse_unfinished()
    paths = tensors([*found, entry])
    refuse_new(new, paths)
    for mine in found:
        refuse_part(mine.name, paths)
    settings = joined_generation(folder / GENERATION, source / GENERATION)

    def besides(stage: Path) -> None:
        if settings:
            (stage / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    rewrite(folder, config, [*found, Entry(new, entry.folder, entry.settings)], besides)
    return new


def joined_generation(ours: Path, theirs: Path) -> dict[str, Any]:
    """The first file's generation settings, by which answers end where they do by the second one's as well.

    All of the second one's if there is no first; empty if there is none to read.

    Raises:
        InputError: a file is damaged.
    """
    held = []
    for path in (ours, theirs):
        try:
            held.append(dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {})
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be read: {first_line(error)}; save its checkpoint anew") from error
    mine, other = held
    if not mine or not other:
        return mine or other
    ends = joined(mine.get("eos_token_id"), other.get("eos_token_id"))
    return mine if ends is None else {**mine, "eos_token_id": ends}


def refuse_other(config: SiameseConfig, other: SiameseConfig, source: Path, same_base: bool) -> None:
    """Raises `InputError` if checkpoints are of different base models, or their heads read different things."""
    named = ("base_model", "base_revision") if not same_base else ()
    for field in (*SHAPE, *named):
        ours, theirs = getattr(config, field), getattr(other, field)
        if ours != theirs and (field in SHAPE or (ours and theirs)):
            remedy = "" if field in SHAPE else "; if both are the same model all the same, say --same-base"
            raise InputError(f"{source} is of another base: {field} {theirs!r}, here {ours!r}{remedy}")
    for field in READS:
        if getattr(config, field) != getattr(other, field):
            raise InputError(
                f"the head in {source} reads other things: {field} {getattr(other, field)}, here {getattr(config, field)}; make "
                "its checkpoint anew of its adapter: imsm adopt ADAPTER --data FILE --output DIR"
            )


def own_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The folder that is to be changed.

    Raises:
        InputError: it is none here.
    """
    if not Path(checkpoint).is_dir():
        raise InputError(f"{os.fspath(checkpoint)!r} must be a checkpoint's folder on this disk, which is changed")
    return Path(checkpoint)


def rewrite(
    folder: Path, config: SiameseConfig, found: list[Entry], besides: Callable[[Path], None] | None = None
) -> None:
    """Writes a checkpoint of those tasks, wherever their files are; what else is in the folder stays.

    Args:
        folder: may be one that some of the files are in.
        config: of the base.
        found: the tasks, the first one first.
        besides: puts other files into the folder that is made.
    """
    config = copy.deepcopy(config)
    config.tasks = [entry.name for entry in found]
    for key, value in found[0].settings.items():
        setattr(config, key, value)
    reads = {key: getattr(config, key) for key in READS}
    with staged(folder) as stage:
        for place, entry in enumerate(found):
            target = stage / TASKS / entry.name if place else stage
            target.mkdir(parents=True, exist_ok=True)
            for file in (ADAPTER_CONFIG, ADAPTER, GATE, RELEVANCE, QUERIES):
                if (entry.folder / file).is_file():
                    shutil.copyfile(entry.folder / file, target / file)
            if place:
                write_settings({**entry.settings, **reads}, target)
        stores = [queries for e in found if e.whole and (queries := read_queries(e.folder)) is not None]
        if len(stores) > 1:
            save_part(fit_router(stores), stage / ROUTER)
        if besides is not None:
            besides(stage)
        numbered(config).save_pretrained(stage)
        made = {path.name for path in stage.iterdir()}
    drop_stale(folder, made)
