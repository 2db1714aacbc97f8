"""The file that an evaluation keeps beside its result while it runs, so that a cut run goes on where it was.

JSON Lines: first a header with everything that the records depend on, then a line a finished record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any

from imsm.errors import InputError
from imsm.evaluation.results import RecordResult

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Partial:
    """Finished records of a run, on disk as they come; a context.

    Args:
        path: the file; it is made, or read and gone on with.
        header: what must agree, as JSON values.
        fresh: throw away what is there.

    Attributes:
        records: by task and place in it.
        seconds: time that a task's records took, by task.

    Raises:
        InputError: the file is of another run, which may still be going on, damaged, or cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.records: dict[str, dict[int, RecordResult]] = {}
        self.seconds: dict[str, float] = {}
        if path.parent.exists() and not path.parent.is_dir():
            raise InputError(f"{path.parent} is a file; give an --output in a folder")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a full disk is noticed once, where it is written to.
            self._file = path.open("a+b", buffering=0)
            try:
                lock(self._file, path)
                whole = 0 if fresh else self._read(header)
                # A line that was being written when the run was cut is gone.
                if self._file.seek(0, SEEK_END) != whole:
                    self._file.truncate(whole)
                if not whole:
                    self._write([header])
            except (OSError, InputError):
                self._file.close()
                raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, task: str, results: list[RecordResult], seconds: float) -> None:
        """Writes records of a task that took so many seconds together."""
        share = seconds / max(len(results), 1)
        lines = [{"task": task, "seconds": round(share, 4), **asdict(result)} for result in results]
        with writing(self.path):
            self._write(lines)
        for line in lines:
            self._take(dict(line))

    def _write(self, lines: list[dict[str, Any]]) -> None:
        rest = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        while rest:
            rest = rest[self._file.write(rest) :]

    def _read(self, header: dict[str, Any]) -> int:
        """Takes over the records there are; returns the bytes of whole lines."""
        content = self.path.read_bytes()
        lines = content.split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    refuse_other(self.path, entry, header)
                else:
                    self._take(entry)
            except (ValueError, TypeError, KeyError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"{self.path} is damaged in line {number}; delete it, or start anew with --fresh"
                ) from error
        return sum(len(line) + 1 for line in lines)

    def _take(self, entry: dict[str, Any]) -> None:
        task, seconds = entry.pop("task"), entry.pop("seconds")
        result = RecordResult(**entry)
        self.records.setdefault(task, {})[result.index] = result
        self.seconds[task] = self.seconds.get(task, 0.0) + seconds


def lock(file: FileIO, path: Path) -> None:
    """Holds a file for this process until it is closed, where the system can do so.

    Raises:
        InputError: another process holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{path} is being written by another evaluation; wait until it has ended, or give another --output"
        ) from None
    except OSError:
        pass  # a file system without locks


def refuse_other(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises `InputError` if two headers differ, naming where."""
    changed = _differences(found, wanted)
    if changed:
        raise InputError(
            f"{path} is of another evaluation: {'; '.join(changed)}; give another --output, delete it, or start anew with "
            "--fresh"
        )


def _differences(found: Any, wanted: dict[str, Any]) -> list[str]:
    """Every value that is another, in words; of tasks only their names."""
    if not isinstance(found, dict):
        return ["it says nothing of itself"]
    changed: list[str] = []
    for key, now in wanted.items():
        was = found.get(key)
        if was == now:
            continue
        if key == "asked":
            # It follows from most of the others.
            if not changed:
                changed.append("the prompts' tokens, what ends an answer, or where the dial stands is another")
        elif key == "tasks" and isinstance(was, dict):
            if was.keys() != now.keys():
                changed.append(f"tasks were {', '.join(was)}, now {', '.join(now)}")
            elif "settings" not in found or found["settings"].get("limit") == wanted["settings"].get("limit"):
                others = [name for name in now if was[name] != now[name]]
                changed.append(f"records, prompts or metrics are others in {', '.join(others)}")
        elif isinstance(was, dict) and isinstance(now, dict):
            changed += _differences(was, now)
        else:
            changed.append(f"{key} was {was!r}, now {now!r}")
    return changed


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within: what the system says against writing `path` becomes an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}; make room or give another --output. What is finished "
            "is kept, and the same command goes on from there"
        ) from error
