"""`imsm train`: a training run from a YAML file of settings and `--key value` overrides."""

from __future__ import annotations

from pathlib import Path

from imsm.errors import InputError
from imsm.settings import argument_parser, load, setting_types

USAGE = "imsm train [SETTINGS.yaml] [--KEY VALUE …] [--resume]"


def run(argv: list[str]) -> int:
    """Runs the verb; returns the exit status."""
    if "-h" in argv or "--help" in argv:
        parser = argument_parser()
        parser.usage = USAGE
        parser.print_help()
        return 0
    path, overrides = split_arguments(argv)
    if path is None and not overrides:
        raise InputError(f"no settings given; usage: {USAGE}")
    config = load(path, overrides)
    from imsm.training import train

    result = train(config)
    folder = result.folder
    messages = {
        "imsm": f"The checkpoint is in {folder}; use it: imsm generate {folder} 'PROMPT'",
        "peft": f"The adapter is in {folder}; load it with peft's PeftModel.from_pretrained.",
        "loramoe": f"The experts are in {folder}; load them with imsm.loramoe.load.",
        "full": f"The model is in {folder}; load it with transformers' AutoModelForCausalLM.from_pretrained.",
    }
    if config.dreaming:
        lost, kept = (100 * result.metrics[name] for name in ("false_recall", "dreams_kept"))
        print(
            f"Of prompts that are like none of the training's, about {lost:.0f} % of the task's go to the base model, and "
            f"{kept:.0f} % of what is not the task (imsm tune-recall moves the border)."
        )
    print(messages[config.method])
    return 0


def split_arguments(argv: list[str]) -> tuple[Path | None, dict[str, str]]:
    """The settings file and the overrides, by dotted key, as text. A flag without a value is true.

    Raises:
        InputError: two files, or a key without its value.
    """
    flags = {key for key, hint in setting_types().items() if hint is bool}
    paths: list[str] = []
    overrides: dict[str, str] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            paths.append(argument)
            continue
        key, has_value, value = argument.partition("=")
        key = key.lstrip("-").replace("-", "_")
        if key in flags and not has_value:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif not has_value:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"{argument} needs a value: {argument} VALUE")
            value = rest.pop(0)
        overrides[key] = value
    if len(paths) > 1:
        raise InputError(f"one settings file is expected, got {' and '.join(paths)}; settings are given as --KEY VALUE")
    return (Path(paths[0]) if paths else None), overrides
