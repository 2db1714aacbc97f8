"""The settings of a run: their dataclasses, and their way to and from YAML and the command line."""

from imsm.settings.reading import argument_parser, load, read_yaml, setting_types, to_yaml
from imsm.settings.schema import DataConfig, DreamsConfig, RetainConfig, TrainConfig, nearest

__all__ = [
    "DataConfig",
    "DreamsConfig",
    "RetainConfig",
    "TrainConfig",
    "argument_parser",
    "load",
    "nearest",
    "read_yaml",
    "setting_types",
    "to_yaml",
]
