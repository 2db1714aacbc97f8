"""A user's own task: a YAML file of a few lines."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

from imsm.data.records import SUFFIXES
from imsm.errors import InputError
from imsm.evaluation.metrics import DEFAULT_METRICS, METRICS
from imsm.evaluation.prompts import prompt_fields
from imsm.evaluation.task import Kind, Task
from imsm.settings import nearest
from imsm.settings.mapping import read_mapping

KINDS: tuple[Kind, ...] = get_args(Kind)
KEYS = [field.name for field in fields(Task) if field.name != "hub"]


def read_task(path: Path) -> Task:
    """The task in a YAML file: the keys of `Task` but `hub`, all but `file` optional.

    The name is the file's own by default, the title the name, the kind `answer`. `file` is looked for beside the YAML
    file first, then in the data root. `metrics` is a name or a list of names.

    Raises:
        InputError: the file cannot be read; a key or metric is unknown; a value has the wrong type, is out of range, or
            has no place in a task of this kind.
    """
    content = read_mapping(path, "task", "a task as 'key: value', such as 'file: shop.jsonl'")
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}; known are {', '.join(KEYS)}{nearest(str(key), KEYS)}")
    for key in ("prompt", "chat"):
        if content.get("messages") is not None and key in content:
            raise InputError(f"{path}: messages are asked as they are, so {key} has no place beside it; leave one out")
    given = _Given(path, content)
    kind = given.kind()
    if kind != "answer" and content.get("reference") is not None:
        raise InputError(f"{path}: a task of kind {kind} has no reference; leave it out")
    name = given.text("name", path.stem)
    task = Task(
        name=name,
        title=given.text("title", name),
        kind=kind,
        file=given.file(),
        metrics=given.metrics(kind),
        prompt=given.text("prompt", "{text}" if kind == "text" else "{input}"),
        reference=given.text("reference", "output") if kind == "answer" else None,
        max_new_tokens=given.whole("max_new_tokens", 16 if kind == "kept" else 32),
        chance=given.share("chance"),
        chat=given.chat(),
        messages=given.text("messages", "messages") if content.get("messages") is not None else None,
        limit=given.whole("limit", 1) if content.get("limit") is not None else None,
    )
    try:
        prompt_fields(task.prompt)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return task


class _Given:
    """A YAML file's values, each checked for its type."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    def wrong(self, key: str, expected: str) -> InputError:
        return InputError(f"{self.path}: {key} must be {expected}, got {self.content.get(key)!r}")

    def text(self, key: str, default: str) -> str:
        value = self.content.get(key, default)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(key, "a text that is not empty")
        return value

    def kind(self) -> Kind:
        value = self.text("kind", "answer")
        for kind in KINDS:
            if value == kind:
                return kind
        raise InputError(f"{self.path}: kind must be one of {', '.join(KINDS)}; got {value!r}{nearest(value, KINDS)}")

    def file(self) -> str:
        if self.content.get("file") is None:
            raise InputError(
                f"{self.path}: the key file is missing; it names the task's .jsonl, .json or .parquet file"
            )
        value = self.text("file", "")
        if not value.endswith(SUFFIXES):
            raise self.wrong("file", f"a {', '.join(SUFFIXES)} file")
        beside = self.path.parent / Path(value).expanduser()
        return str(beside.resolve()) if beside.exists() else value

    def metrics(self, kind: Kind) -> tuple[str, ...]:
        value = self.content.get("metrics", list(DEFAULT_METRICS[kind]))
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise self.wrong("metrics", "a metric's name or a list of names")
        fitting = [name for name, metric in METRICS.items() if metric.kind == kind]
        for name in names:
            if name not in METRICS:
                raise InputError(
                    f"{self.path}: unknown metric {name!r}; those of a task of kind {kind} are {', '.join(fitting)}"
                    f"{nearest(name, fitting)}"
                )
            if name not in fitting:
                raise InputError(
                    f"{self.path}: the metric {name} is for tasks of kind {METRICS[name].kind}, not {kind}; those of "
                    f"{kind} are {', '.join(fitting)}"
                )
        return tuple(dict.fromkeys(names))

    def whole(self, key: str, default: int) -> int:
        value = self.content.get(key, default)
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def share(self, key: str) -> float | None:
        value = self.content.get(key)
        if value is not None and (type(value) not in (int, float) or not 0 <= value < 1):
            raise self.wrong(key, "a number from 0 to below 1, or null")
        return None if value is None else float(value)

    def chat(self) -> bool | Literal["auto"]:
        value = self.content.get("chat", False)
        if value == "auto":
            return "auto"
        if not isinstance(value, bool):
            raise self.wrong("chat", "true, false or auto")
        return value
