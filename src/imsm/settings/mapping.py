"""YAML files of keys and values, as users write them: settings, tasks, recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from imsm.errors import InputError

#: Tag, pattern and first characters of the numbers that YAML 1.1 takes for texts.
EXPONENT = ("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """What a YAML text says; `1e-3` is a number, as in YAML 1.2. Raises `yaml.YAMLError`."""
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's, with a resolver of its own."""

    Loader.add_implicit_resolver(*EXPONENT)
    return yaml.load(text, Loader=Loader)


def read_mapping(path: Path, what: str, holds: str) -> dict[Any, Any]:
    """The keys and values in a YAML file.

    Args:
        path: the file.
        what: such as `settings`, for messages about the file.
        holds: what it must hold, such as `settings as 'key: value'`.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    import yaml

    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {what} file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the {what} file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        given = "nothing" if content is None else f"a {type(content).__name__}"
        raise InputError(f"{path} must hold {holds}, got {given}")
    return content
