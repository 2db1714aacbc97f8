"""Records as they come: JSON objects from a file, or rows of a Parquet file or a Hub data set."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imsm.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet")
#: A Hub data set; not what has no slash but ends like a file's name.
HUB_NAME = re.compile(r"(?![^/]*\.[A-Za-z]{1,5}$)(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<configuration>[\w.-]+))?")


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used: its number in the source, from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Record:
    """A record's number in the source, from 1, and its fields."""

    line: int
    fields: dict[str, Any]


@dataclass
class RecordSet:
    """All records of a source, and those that are none.

    unit: what `line` counts: line, record or row.
    """

    source: str
    unit: str
    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_records(source: str | os.PathLike[str], hub_split: str) -> RecordSet:
    """The records of a .jsonl, .json or .parquet file, or of the split `hub_split` of a Hub data set.

    A .json file holds a list, or JSON Lines. In rows, a column that is null counts as absent.

    Raises:
        InputError: there is no such file or data set, or it cannot be read.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"{source} is a folder; give one of its {', '.join(SUFFIXES)} files")
    if not path.exists():
        hub = HUB_NAME.fullmatch(source)
        if hub is None or source.endswith(SUFFIXES):
            raise InputError(f"there is no file {source}")
        return _read_hub(source, hub["name"], hub["configuration"], hub_split)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{source} must be a {', '.join(SUFFIXES)} file; convert it to JSON Lines")
    try:
        if path.suffix == ".parquet":
            return _read_parquet(source, path)
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error}") from error
    if path.suffix == ".json" and content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return _read_list(source, content)
    return _read_lines(source, content)


def _read_lines(source: str, content: bytes) -> RecordSet:
    found = RecordSet(source, "line")
    text = content.removeprefix(b"\xef\xbb\xbf").rstrip()
    for number, line in enumerate(text.split(b"\n") if text else [], 1):
        if not line.strip():
            found.problems.append(Problem(number, "the line is empty"))
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            found.problems.append(Problem(number, f"not UTF-8 at byte {error.start + 1}"))
        except json.JSONDecodeError as error:
            found.problems.append(Problem(number, f"not JSON: {error.msg} at column {error.colno}"))
        except (ValueError, RecursionError) as error:
            found.problems.append(Problem(number, f"not readable as JSON: {error}"))
        else:
            _add(found, number, value)
    return found


def _read_list(source: str, content: bytes) -> RecordSet:
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not JSON: {error}") from error
    found = RecordSet(source, "record")
    for number, value in enumerate(values, 1):
        _add(found, number, value)
    return found


def _add(found: RecordSet, number: int, value: Any) -> None:
    if isinstance(value, dict):
        found.records.append(Record(number, value))
    else:
        found.problems.append(Problem(number, f"a JSON object is expected, got {type_name(value)}"))


def _read_parquet(source: str, path: Path) -> RecordSet:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return _rows(source, (row for batch in file.iter_batches() for row in batch.to_pylist()))
    except pyarrow.ArrowException as error:
        raise InputError(f"{source} cannot be read as Parquet: {_one_line(error)}") from error


def _read_hub(source: str, name: str, configuration: str | None, split: str) -> RecordSet:
    import datasets

    try:
        rows = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # the network, the Hub and the set's own files each fail in ways of their own
        raise InputError(
            f"{source!r} is no file here, and its split {split!r} cannot be loaded from the Hub: {_one_line(error)}"
        ) from error
    return _rows(source, rows)


def _rows(source: str, rows: Iterable[dict[str, Any]]) -> RecordSet:
    records = [
        Record(number, {key: value for key, value in row.items() if value is not None})
        for number, row in enumerate(rows, 1)
    ]
    return RecordSet(source, "row", records)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def type_name(value: Any) -> str:
    """The type of a JSON value in words."""
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
