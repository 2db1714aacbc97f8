"""Running a benchmark cell by cell, and its record: saved after every round, continued where it was cut."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks import machine
from benchmarks.models import model_folder, title
from imsm.errors import InputError
from imsm.folders import write_text


@dataclass(frozen=True)
class Cell:
    """One setting, in which all systems are measured in turn.

    name: its name in the record.
    setting: what is particular to it.
    """

    name: str
    setting: dict[str, Any]


@dataclass
class Options:
    """What the command line says; what is None is up to the verb.

    model: a key of `models.NAMES`, or a model's folder.
    out: folder for the records.
    repetitions: rounds a cell.
    quick: tiny settings, to try things out.
    deadline: `time.monotonic()` after which no round is begun.
    """

    model: str
    out: Path
    repetitions: int = 5
    quick: bool = False
    fresh: bool = False
    deadline: float = float("inf")
    systems: list[str] | None = None
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    batches: list[int] | None = None
    lengths: list[int] | None = None
    new_tokens: int | None = None
    epochs: list[int] = field(default_factory=lambda: [3])
    batch_size: int = 16
    records: int = 512
    data_root: Path | None = None


class Verb(Protocol):
    """What a module of a benchmark offers."""

    NAMES: tuple[str, ...]

    def settings(self, options: Options) -> dict[str, Any]: ...

    def cells(self, options: Options) -> list[Cell]: ...

    def rounds(self, cell: Cell, options: Options, folder: str, missing: int) -> Iterator[dict[str, Any]]: ...


class Record:
    """The JSON file of one benchmark on one model.

    Args:
        path: the file.
        head: what a continued run must agree in: benchmark, model, settings, commit, versions, machine.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**json.loads(json.dumps(head)), "cells": {}}

    def resume(self) -> None:
        """Takes over the cells of the file, if there is one.

        Raises:
            InputError: the file was measured under other settings, at another commit or on another machine.
        """
        if not self.path.is_file():
            return
        before = read(self.path)
        differ = [key for key in self.content if key != "cells" and before.get(key) != self.content[key]]
        if differ:
            raise InputError(
                f"{self.path} was measured with another {' and '.join(differ)}: replace it with --fresh, or give another --out"
            )
        self.content["cells"] = before["cells"]

    def cell(self, cell: Cell) -> dict[str, Any]:
        """The cell's entry: setting, facts, rounds."""
        return self.content["cells"].setdefault(cell.name, {"setting": cell.setting, "facts": {}, "rounds": []})

    def save(self) -> None:
        """Writes beside and renames."""
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A record's content.

    Raises:
        InputError: the file is no record.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not a benchmark's record: {error}") from error
    if not isinstance(content, dict) or "cells" not in content:
        raise InputError(f"{path} is not a benchmark's record: it has no cells")
    return content


def execute(name: str, verb: Verb, options: Options) -> Record:
    """Measures what is missing of a benchmark, up to the deadline.

    Raises:
        InputError: unknown systems, or a record that cannot be continued.
    """
    for system in options.systems or ():
        if system not in verb.NAMES:
            raise InputError(f"--systems of {name} are {', '.join(verb.NAMES)}; got {system!r}")
    folder = model_folder(options.model)
    cells = verb.cells(options)
    head = {
        "benchmark": name,
        "model": title(options.model),
        "settings": {**verb.settings(options), "systems": options.systems or list(verb.NAMES), "quick": options.quick},
        "commit": machine.commit(),
        "versions": machine.versions(),
        "machine": machine.machine(),
    }
    record = Record(options.out / f"{name}-{Path(options.model).name}.json", head)
    if not options.fresh:
        record.resume()
    for number, cell in enumerate(cells, 1):
        entry = record.cell(cell)
        where = f"{name}, {title(options.model)}, cell {number}/{len(cells)}: {cell.name}"
        missing = options.repetitions - len(entry["rounds"])
        if missing <= 0:
            say(f"{where}: done before")
            continue
        if time.monotonic() >= options.deadline:
            break
        say(where)
        run_cell(verb, cell, options, folder, record, entry, where)
    return record


def run_cell(
    verb: Verb, cell: Cell, options: Options, folder: str, record: Record, entry: dict[str, Any], where: str
) -> None:
    """The rounds that a cell lacks; saves after each, and stops at the deadline."""
    missing = options.repetitions - len(entry["rounds"])
    began = time.monotonic()
    with closing(verb.rounds(cell, options, folder, missing)) as found:  # type: ignore[type-var]
        for item in found:
            now = time.monotonic()
            if "facts" in item:
                entry["facts"] = item["facts"]
                say(f"{where}: warm after {now - began:.0f} s")
                began = now
            else:
                entry["rounds"].append(item["round"])
                missing -= 1
                seconds = now - began
                began = now
                say(f"{where}: round of {seconds:.0f} s; {missing} to come, about {missing * seconds / 60:.0f} minutes")
            record.save()
            if missing and now >= options.deadline:
                say(f"{where}: out of time; run the same command to go on")
                return


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
