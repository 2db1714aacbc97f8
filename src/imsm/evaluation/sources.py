"""A task's records: from a file of the data root, or from the Hub."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imsm.data.formats import RecordError, read_messages, refuse_half_characters
from imsm.data.records import SUFFIXES, Record, RecordSet, read_records, type_name
from imsm.errors import InputError, first_line
from imsm.evaluation.metrics import METRICS
from imsm.evaluation.prompts import fill, prompt_fields
from imsm.evaluation.task import HubSource, Task, TaskRecord


def load_records(task: Task, data_root: Path | None, limit: int | None, seed: int) -> list[TaskRecord]:
    """The task's records: all, or `limit` of them (the task's own limit, if that is less) drawn with `seed`, in their
    order; the same ones for every model.

    With a data root, or where the task brings its own file, nothing is fetched. `mrpc/test.jsonl` may be a .json or
    .parquet file as well.

    Raises:
        InputError: the data root, the file or the data set is not there or cannot be read; it holds no records; a
            record lacks a field, or has one of a type or content that the task has no use for; `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit of records must be positive, got {limit}")
    if data_root is None and not Path(task.file).is_absolute():
        records = _from_hub(task)
    else:
        records = _from_file(task, data_root)
    count = min(bound for bound in (limit, task.limit, len(records)) if bound is not None)
    if count == len(records):
        return records
    return [records[index] for index in sorted(random.Random(seed).sample(range(len(records)), count))]


# -- files -----------------------------------------------------------------------------------------------------------


def _from_file(task: Task, data_root: Path | None) -> list[TaskRecord]:
    found = read_records(_find(task, data_root), "test")
    if found.problems:
        problem, more = found.problems[0], len(found.problems) - 1
        others = f", and {more} more" if more else ""
        raise InputError(f"{found.source} {found.unit} {problem.line}: {problem.reason}{others}; correct it")
    if not found.records:
        raise InputError(f"{found.source} has no records; task {task.name!r} needs at least one")
    return [_record(task, found, record) for record in found.records]


def _find(task: Task, data_root: Path | None) -> Path:
    root = Path() if data_root is None else data_root.expanduser()
    path = root / task.file
    if not Path(task.file).is_absolute() and not root.is_dir():
        raise InputError(f"there is no folder {root}; the data root of task {task.name!r} must hold {task.file}")
    for candidate in (path, *(path.with_suffix(suffix) for suffix in SUFFIXES)):
        if candidate.is_file():
            return candidate
    remedy = f", or none to fetch {task.hub.name} from the Hub" if task.hub else ""
    raise InputError(f"there is no file {path}, which task {task.name!r} needs; give another data root{remedy}")


def _record(task: Task, found: RecordSet, record: Record) -> TaskRecord:
    where = f"{found.source} {found.unit} {record.line}"
    turns: tuple[tuple[str, str], ...] = ()
    if task.messages is not None:
        turns = _turns(_field(record.fields, task.messages, where), task.messages, where)
        said = "\n".join(f"{role}: {content}" for role, content in turns)
        prompt = turns[0][1] if len(turns) == 1 else said
    else:
        prompt = fill(task.prompt, {name: _text(record.fields, name, where) for name in prompt_fields(task.prompt)})
    if not prompt.strip():
        raise InputError(f"{where}: the prompt is empty")
    _refuse_half_characters((prompt,), where)
    if task.reference is None:
        return TaskRecord(prompt, turns=turns)
    references = _references(_field(record.fields, task.reference, where), task.reference, where)
    _refuse_half_characters(references, where)
    _check(task, references, where)
    return TaskRecord(prompt, references, turns)


def _refuse_half_characters(texts: Iterable[str], where: str) -> None:
    for text in texts:
        try:
            refuse_half_characters(text, "text")
        except RecordError as error:
            raise InputError(f"{where}: {error}") from error


def _turns(value: Any, name: str, where: str) -> tuple[tuple[str, str], ...]:
    """A conversation up to the assistant's turn that ends it, which is what is asked for."""
    try:
        messages = read_messages(value, name)
    except RecordError as error:
        raise InputError(f"{where}: {error}") from error
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise InputError(f"{where}: {name!r} must end in a user's turn, or in one and the assistant's answer to it")
    return tuple((message["role"], message["content"]) for message in messages)


def _field(fields: dict[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        has = ", ".join(map(repr, fields)) or "none"
        raise InputError(f"{where}: there is no field {name!r}; the record's fields are {has}")
    return fields[name]


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    value = _field(fields, name, where)
    if not _is_plain(value):
        raise InputError(f"{where}: {name!r} must be a text or a number to stand in a prompt, got {type_name(value)}")
    return str(value)


def _references(value: Any, name: str, where: str) -> tuple[str, ...]:
    references = value if isinstance(value, list) else [value]
    for reference in references:
        if not _is_plain(reference):
            part = "a list with " if references is value else ""
            raise InputError(
                f"{where}: {name!r} must be a text, a number or a list of them, got {part}{type_name(reference)}"
            )
    if not references:
        raise InputError(f"{where}: {name!r} is an empty list; at least one answer must count")
    return tuple(map(str, references))


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _check(task: Task, references: tuple[str, ...], where: str) -> None:
    """Every reference can be scored by every metric."""
    for name in task.metrics:
        for reference in references:
            if not METRICS[name].accepts(reference):
                expected = METRICS[name].expects
                raise InputError(f"{where}: the metric {name} needs {expected} as reference, got {reference!r}")


# -- the Hub ---------------------------------------------------------------------------------------------------------


def _from_hub(task: Task) -> list[TaskRecord]:
    hub, remedy = task.hub, f"give a folder that holds {task.file} with --data-root"
    if hub is None:
        raise InputError(
            f"task {task.name!r} has no public data set, and no {task.file} beside its .yaml file; put it there, or {remedy}"
        )
    records: list[TaskRecord] = []
    for number, row in enumerate(_rows(hub, remedy), 1):
        where = f"{hub.name} {hub.split} row {number}"
        try:
            converted = hub.convert(row)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where} is not as expected ({first_line(error)}); {remedy}") from error
        for record in converted:
            if task.reference is None:
                record = TaskRecord(record.prompt)
            _check(task, record.references, where)
            records.append(record)
    if not records:
        raise InputError(f"the {hub.split} split of {hub.name} has no records for task {task.name!r}; {remedy}")
    return records


def _rows(hub: HubSource, remedy: str) -> list[dict[str, Any]]:
    """All rows; a label's number becomes its name, as the data set has it."""
    import datasets

    try:
        loaded = datasets.load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision)
    except Exception as error:  # the network, the Hub and the set's own files each fail in ways of their own
        raise InputError(f"{hub.name} cannot be loaded from the Hub ({first_line(error)}); {remedy}") from error
    names = {key: feature.names for key, feature in loaded.features.items() if isinstance(feature, datasets.ClassLabel)}
    return [{key: _named(value, names.get(key)) for key, value in row.items()} for row in loaded]


def _named(value: Any, names: list[str] | None) -> Any:
    """A label's name; None for the -1 of labels that are not public."""
    if names is None:
        return value
    return None if value is None or value < 0 else names[value]
