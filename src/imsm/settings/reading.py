"""Settings to and from YAML, with overrides from the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from imsm.errors import InputError
from imsm.settings.mapping import EXPONENT, parse_yaml, read_mapping
from imsm.settings.schema import TrainConfig, nearest, type_in_words, wrong_value
from imsm.settings.uses import without_unread

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

REQUIRED = ("model", "output_dir", "data.train")


def to_yaml(config: TrainConfig) -> str:
    """The settings that the run reads, as YAML; `read_yaml` gives back an equal `TrainConfig`."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes texts like '1e3', which `parse_yaml` would read as numbers."""

    Dumper.add_implicit_resolver(*EXPONENT)
    values = without_unread(config, asdict(config))
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> TrainConfig:
    """The settings in a YAML file.

    Raises:
        InputError: see `load`.
    """
    return load(path)


def load(path: str | Path | None = None, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """The settings in a YAML file, if one is given, and over them `overrides`: dotted keys and their values as text.

    `adapter.KEY` overrides add to the adapter's settings; an `adapter.peft_type` that names another method drops the
    settings of the one before, and a group that is switched `off` as a whole all that the file says of it.

    Raises:
        InputError: the file cannot be read, a key is unknown or missing, a value has the wrong type or is out of range.
    """
    values = _flatten(read_mapping(Path(path), "settings", "settings as 'key: value'")) if path is not None else {}
    texts = dict(overrides or {})
    for group, kind in groups().items():
        if texts.get(group) in ("on", "off") and switched(texts[group], kind) != texts[group]:
            texts[f"{group}.mode"] = word = texts.pop(group)
            if word == "off":  # in place of the whole group, of which nothing would be read
                values = {key: value for key, value in values.items() if not key.startswith(f"{group}.")}
    known = setting_types()
    for key in texts:
        if key not in known and not re.fullmatch(r"adapter\..+", key):
            raise InputError(f"unknown setting {key!r}{nearest(key, known)}")
    adapter = _adapter(values.get("adapter"), texts)
    if adapter is not None:
        values["adapter"] = adapter
    texts = {key: text for key, text in texts.items() if not key.startswith("adapter")}
    for key in REQUIRED:
        if key not in values and key not in texts:
            raise InputError(
                f"the setting {key} is missing: put it into the settings file, or give it as --{key} VALUE"
            )
    values |= _typed(texts)
    run = {key: value for key, value in values.items() if "." not in key}
    for group, kind in groups().items():
        own = {key: value for key, value in values.items() if key.startswith(group + ".")}
        run[group] = kind(**{key.removeprefix(group + "."): value for key, value in own.items()})
    return TrainConfig(**run)


def _typed(texts: Mapping[str, str]) -> dict[str, Any]:
    """Overrides by dotted key, from text to the setting's type."""
    from jsonargparse import ArgumentError

    types = setting_types()
    # Texts are taken as they are (jsonargparse would read '1e3' as a number even there), all else is parsed.
    values: dict[str, Any] = {key: text for key, text in texts.items() if types[key] is str}
    values |= {key: None if text == "null" else text for key, text in texts.items() if types[key] == str | None}
    arguments = [f"--{key}={text}" for key, text in texts.items() if key not in values]
    parser = argument_parser()
    parser.set_defaults(dict.fromkeys(REQUIRED, "given elsewhere"))
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        found = re.search(r'Parser key "([\w.]+)"', str(error))
        if found is None or found[1] not in texts:
            raise InputError(" ".join(str(error).split())) from error
        raise wrong_value(found[1], type_in_words(types[found[1]]), texts[found[1]]) from error
    return values | {key: parsed[key] for key in texts if key not in values}


def argument_parser() -> ArgumentParser:
    """jsonargparse's parser of all settings; also the source of `imsm train --help`."""
    import argparse

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="imsm train", exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    for action in parser._actions:
        if action.dest in groups():  # the group as one value; its settings are listed one by one
            action.help = argparse.SUPPRESS
    return parser


def groups() -> dict[str, Any]:
    """The settings that are groups of others, and their dataclasses."""
    return {key: hint for key, hint in get_type_hints(TrainConfig).items() if is_dataclass(hint)}


def setting_types() -> dict[str, Any]:
    """Every setting's dotted key and its type."""
    types = {key: hint for key, hint in get_type_hints(TrainConfig).items() if key not in groups()}
    for group, kind in groups().items():
        types |= {f"{group}.{key}": hint for key, hint in get_type_hints(kind).items()}
    return types


def _flatten(content: dict[Any, Any]) -> dict[str, Any]:
    """Dotted keys from the file's nested mapping; unknown ones raise."""
    content = {key: switched(value, groups()[key]) if key in groups() else value for key, value in content.items()}
    flat = {str(key): value for key, value in content.items() if key not in groups()}
    for group, kind in groups().items():
        values = content.get(group, {})
        if not isinstance(values, dict):
            first = fields(kind)[0].name
            raise wrong_value(group, f"a group of settings ('{first}: …' and so on)", values)
        flat |= {f"{group}.{key}": value for key, value in values.items()}
    known = setting_types()
    for key in flat:
        group, _, name = key.partition(".")
        if group in groups() and key in content:
            raise InputError(f"{key!r} must be written as {name!r} below '{group}:'")
        if key not in known:
            raise InputError(f"unknown setting {key!r}{nearest(key, known)}")
    return flat


def switched(value: Any, group: Any) -> Any:
    """`on` or `off` in place of a group that has a mode, as the group; anything else as it is."""
    if "mode" not in {f.name for f in fields(group)} or not (isinstance(value, bool) or value in ("on", "off")):
        return value
    return {"mode": value}


def _adapter(base: Any, texts: dict[str, str]) -> dict[str, Any] | None:
    """The adapter's settings: the file's or the default ones, with the overrides; None without either."""
    import yaml

    given: dict[str, Any] = {}
    for key, text in texts.items():
        if key.split(".")[0] == "adapter":
            try:
                given[key.removeprefix("adapter").removeprefix(".")] = parse_yaml(text)
            except yaml.YAMLError as error:
                raise InputError(f"{key} must be a YAML value, got {text!r}; quote it") from error
    adapter = given.pop("", base)
    if adapter is not None and not isinstance(adapter, dict):
        raise wrong_value("adapter", type_in_words(dict[str, Any]), adapter)
    if not given:
        return adapter
    if adapter is None:
        default = next(f for f in fields(TrainConfig) if f.name == "adapter").default_factory
        assert default is not MISSING
        adapter = default()
    if given.get("peft_type", adapter.get("peft_type", "LORA")) != adapter.get("peft_type", "LORA"):
        adapter = {}
    return {**adapter, **given}
