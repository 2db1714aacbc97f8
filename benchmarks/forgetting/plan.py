"""The plan as runs: which method, at which rate, with which seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.commands import plan_content, refuse_keys
from imsm.errors import InputError

PLAN = Path(__file__).resolve().parent / "plan.yaml"


@dataclass(frozen=True)
class Method:
    """One method.

    name, title, source: how it is called here and in tables, and where it comes from.
    train: its settings over the common ones.
    learning_rates: those that are tried; the best on the validation records is used for all seeds.
    seeds: seeds that are run.
    rate_of: the method whose rate is taken instead of a search.
    adopts: the method whose adapter is adopted, of the same seed and rate, instead of one that is trained.
    sweep: what is varied in evaluation alone, as `open_candidate` takes it: `scale` or `gate` and its values.
    """

    name: str
    title: str
    source: str
    train: dict[str, Any]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...] = ()
    rate_of: str | None = None
    adopts: str | None = None
    sweep: dict[str, list[float]] = field(default_factory=dict)

    @property
    def suffixes(self) -> list[str]:
        """What is put behind the checkpoint's name for each point of the sweep."""
        return [f"@{what}={value:g}" for what, values in self.sweep.items() for value in values]


#: The keys of a method in the plan, beside its name.
OPTIONAL = tuple(one.name for one in fields(Method) if (one.default, one.default_factory) != (MISSING, MISSING))
NEEDED = tuple(one.name for one in fields(Method) if one.name not in ("name", *OPTIONAL))


@dataclass(frozen=True)
class Plan:
    """The whole plan for one model.

    target: the task that is learnt, one of `TASKS`.
    reworded: the target with prompts that are not trained on.
    retained: what should stay. Tasks as `find_tasks` takes them, files by their whole path.
    limit, limits: test records of a task at most, and of those that have a limit of their own, by name.
    """

    target: str
    reworded: tuple[str, ...]
    retained: tuple[str, ...]
    training_records: int
    validation_records: int
    limit: int
    limits: dict[str, int]
    train: dict[str, Any]
    methods: dict[str, Method]

    @property
    def tasks(self) -> list[str]:
        """All that every record holds."""
        return [self.target, *self.reworded, *self.retained]

    @property
    def settings(self) -> dict[str, Any]:
        """What every result of the plan has in common."""
        return {
            "target": self.target,
            "reworded": task_names(self.reworded),
            "retained": task_names(self.retained),
            "training_records": self.training_records,
            "validation_records": self.validation_records,
            "limit": self.limit,
            "limits": self.limits,
            "train": self.train,
        }


def task_names(tasks: Sequence[str]) -> list[str]:
    """What the tasks of `find_tasks` are called in results."""
    from imsm.evaluation.tasks import find_tasks

    return [task.name for task in find_tasks(tasks)] if tasks else []


def train_config(settings: dict[str, Any], **own: Any) -> Any:
    """The `TrainConfig` of settings as the plan has them, and of what a run adds."""
    from imsm.settings import DreamsConfig, RetainConfig, TrainConfig

    groups = {"retain": RetainConfig, "dreams": DreamsConfig}
    made = {name: kind(**settings.get(name, {})) for name, kind in groups.items()}
    return TrainConfig(**{**settings, **own, **made})


def read_plan(model: str, path: Path = PLAN) -> Plan:
    """The plan for a model: all methods, or those that the plan names for it. Task files are looked for beside it.

    Raises:
        InputError: the file cannot be read, or a method is named that it has not.
    """
    common = ("target", "training_records", "validation_records", "limit", "train")
    content = plan_content(path, {*common, "methods", "models"}, {"reworded", "retained", "limits"})
    methods: dict[str, Method] = {}
    for name, values in content["methods"].items():
        settings: dict[str, Any] = {k: tuple(v) if k in ("seeds", "learning_rates") else v for k, v in values.items()}
        refuse_keys(f"the plan {path}: method {name}", settings, NEEDED, OPTIONAL)
        methods[name] = Method(name, **settings)
    own = content["models"].get(model, {})
    for name in own.get("methods", ()):
        if name not in methods:
            raise InputError(f"{path} names method {name!r} for {model}, but has none of that name")
    if "methods" in own:
        methods = {name: methods[name] for name in own["methods"]}
    if "seeds" in own:
        methods = {name: replace(method, seeds=method.seeds[: own["seeds"]]) for name, method in methods.items()}
    tasks: dict[str, Any] = {
        group: tuple(
            str((path.parent / name).resolve()) if name.endswith((".yaml", ".yml")) else name
            for name in content.get(group, ())
        )
        for group in ("reworded", "retained")
    }
    limits = content.get("limits", {})
    return Plan(**{key: content[key] for key in common}, **tasks, limits=limits, methods=methods)
