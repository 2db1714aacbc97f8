"""Recipes: the paper's settings for one model each, as YAML."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from imsm.errors import InputError
from imsm.reproduce.plans import Run
from imsm.settings import DataConfig, DreamsConfig, TrainConfig, nearest
from imsm.settings.mapping import read_mapping

#: What a recipe sets of `TrainConfig`; the plan, the command line and the run set the rest.
SETTABLE = {field.name for field in fields(TrainConfig)} - {
    *(
        "model",
        "output_dir",
        "data",
        "trust_remote_code",
        "method",
        "dreams",
        "gate",
        "gate_rank",
        "seed",
        "resume",
        "progress",
    ),
}


@dataclass(frozen=True)
class Recipe:
    """Settings for one model.

    name: as it was asked for.
    title: the model's name in tables.
    paper: the model of the paper whose figures stand beside ours.
    architecture: `model_type` of the models whose modules it names.
    settings: of every run, by the names of `TrainConfig`.
    methods: those of each method.
    model: folder or Hub name; None where one must be given.
    scaled: why it is not the paper's own; empty if it is.
    """

    name: str
    title: str
    paper: str
    architecture: str
    settings: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    model: str | None = None
    scaled: str = ""

    def config(self, run: Run, model: str, data: DataConfig, output_dir: Path, **overrides: Any) -> TrainConfig:
        """The settings of one run.

        Raises:
            InputError: the recipe does not have its method, or a setting is wrong.
        """
        if run.method not in self.methods:
            raise InputError(
                f"the recipe {self.name} has no settings for {run.method}; it has {', '.join(self.methods)}"
            )
        settings = {**self.settings, **self.methods[run.method], **overrides, "gate_rank": run.gate_rank}
        # A recipe is for plain and siamese runs alike; what is about the gate or the bank is left out where there is none.
        own = {key: value for key, value in settings.items() if key.startswith(("gate_", "memory_bank_"))}
        trainer = "imsm" if run.siamese else "loramoe" if run.method == "loramoe" else "peft"
        config = TrainConfig(
            model=model,
            output_dir=str(output_dir),
            data=data,
            method=trainer,  # type: ignore[arg-type]
            dreams=DreamsConfig("off"),
            gate=run.gate if run.siamese else "auto",
            **{key: value for key, value in settings.items() if key not in own},
        )
        return replace(config, **{key: value for key, value in own.items() if config.reads(key)})


def recipe_names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in files("imsm").joinpath("recipes").iterdir()
        if path.name.endswith(".yaml")
    )


def read_recipe(name: str) -> Recipe:
    """A shipped recipe by its name, or one in a .yaml file.

    Raises:
        InputError: there is none, or it is not a recipe.
    """
    shipped = {known.casefold(): known for known in recipe_names()}
    if name.casefold() in shipped:
        path = Path(str(files("imsm").joinpath(f"recipes/{shipped[name.casefold()]}.yaml")))
    elif name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        raise InputError(
            f"there is no recipe {name!r}; there are {', '.join(shipped.values())}. For another model give its folder or Hub "
            f"name with --model and a recipe, shipped or a .yaml file, with --recipe{nearest(name, shipped.values())}"
        )
    return _checked(name, read_mapping(path, "recipe", "a recipe as 'key: value'"))


def _checked(name: str, content: dict[Any, Any]) -> Recipe:
    needed = {"title", "paper", "architecture", "methods"}
    known = needed | {"settings", "model", "scaled"}
    if not needed <= set(content) or not isinstance(content["methods"], dict):
        raise InputError(f"the recipe {name} must be a mapping with {', '.join(sorted(needed))}; methods by name")
    for key in content:
        if key not in known:
            raise InputError(f"the recipe {name} has an unknown key {key!r}{nearest(str(key), known)}")
    groups = {"settings": content.get("settings") or {}, **content["methods"]}
    for group, settings in groups.items():
        if not isinstance(settings, dict):
            raise InputError(f"{group} in the recipe {name} must be a mapping of settings")
        for key in settings:
            if key not in SETTABLE:
                raise InputError(
                    f"{group} in the recipe {name} has an unknown key {key!r}{nearest(str(key), SETTABLE)}"
                )
    return Recipe(name=name, **{**content, "settings": groups["settings"]})
