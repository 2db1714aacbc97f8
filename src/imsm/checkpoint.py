"""The checkpoint folder: config, peft's own adapter files, the gate, a model card; never the base weights.

config.json                 base model, gate settings, layout version, how it was trained
adapter_config.json         peft's own two files, so that peft alone can load the adapter
adapter_model.safetensors
gate.safetensors            the gate's weights, float32
relevance.safetensors       those of the relevance head, if there is one
generation_config.json, README.md
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from imsm import building, card
from imsm.building import ADAPTER, ADAPTER_CONFIG
from imsm.config import FORMAT_VERSION, SiameseConfig
from imsm.errors import InputError, first_line
from imsm.folders import fetch, staged

if TYPE_CHECKING:
    from imsm.model import SiameseForCausalLM

CONFIG, GATE, RELEVANCE = "config.json", "gate.safetensors", "relevance.safetensors"
#: Of another kind of checkpoint, see `imsm.loramoe`.
LORAMOE = "loramoe_config.json"
REQUIRED = (CONFIG, ADAPTER_CONFIG, ADAPTER, GATE)
#: Arguments of `from_pretrained` that say where the folder is fetched from; the rest go to the base model.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def save(
    model: SiameseForCausalLM,
    folder: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **kwargs: Any,
) -> None:
    """Writes the checkpoint folder. `kwargs` beyond these are what transformers passes along; only a push uses them.

    Raises:
        InputError: `folder` is a file, or the model has more than one adapter.
    """
    if len(model.peft_model.peft_config) != 1:
        raise InputError(
            f"a checkpoint holds one adapter, the model has {len(model.peft_model.peft_config)}: "
            f"{', '.join(model.peft_model.peft_config)}; delete all but the active one"
        )
    if is_main_process:
        with staged(Path(folder)) as stage:
            # "auto" would ask the Hub whether the embeddings were resized; base weights are never saved here.
            model.peft_model.save_pretrained(os.fspath(stage), save_embedding_layers=False)
            for extra in (path for path in stage.iterdir() if path.name not in REQUIRED):
                shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
            for file, part in parts(model).items():
                state = {name: tensor.detach().contiguous().cpu() for name, tensor in part.state_dict().items()}
                save_file(state, stage / file, metadata={"format": "pt"})
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(stage)
            model.generation_config.save_pretrained(stage)
            (stage / "README.md").write_text(card.render(model), encoding="utf-8")
    if push_to_hub:
        push(model, repo_id or Path(folder).name, **kwargs)


def parts(model: SiameseForCausalLM) -> dict[str, nn.Module]:
    """What a model has beside base and adapter, by the file that it is kept in."""
    return {GATE: model.gate} | ({RELEVANCE: model.relevance} if model.relevance is not None else {})


def push(
    model: SiameseForCausalLM,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload siamese model",
    **_: Any,
) -> str:
    """Uploads the checkpoint folder with its model card; returns the commit's address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as temporary:
        save(model, Path(temporary) / "model")
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=Path(temporary) / "model", revision=revision, commit_message=commit_message
        )
    return str(commit.commit_url)


def read_config(name: str | os.PathLike[str], hub: dict[str, Any]) -> tuple[Path, SiameseConfig]:
    """The folder of a checkpoint and its config.

    Raises:
        InputError: the folder is missing or incomplete, of another kind, or written by a newer version.
    """
    folder = fetch(name, (*REQUIRED, RELEVANCE, "generation_config.json", LORAMOE), "checkpoint", hub)
    missing = [file for file in REQUIRED if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{folder} is not a complete siamese checkpoint: {', '.join(missing)} missing{other_kind(folder)}"
        )
    try:
        values, _ = SiameseConfig.get_config_dict(os.fspath(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} cannot be read: {first_line(error)}") from error
    if values.get("model_type") != SiameseConfig.model_type:
        raise InputError(
            f"{folder / CONFIG} is of a model of type {values.get('model_type')!r}, not of a siamese model "
            f"({SiameseConfig.model_type!r})"
        )
    if not isinstance(values.get("format_version"), int) or values["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{folder} was written by a newer imsm (format {values.get('format_version')}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade imsm"
        )
    return folder, SiameseConfig.from_dict(values)


def other_kind(folder: Path) -> str:
    """What a folder without a gate holds instead of a siamese checkpoint, as the end of a message; empty if unknown."""
    if (folder / LORAMOE).is_file():
        found, loader = "a LoRAMoE checkpoint", "imsm.loramoe.load"
    elif (folder / GATE).is_file():
        return ""
    elif (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        found, loader = "a peft adapter", "peft's PeftModel.from_pretrained"
    elif (folder / CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        found, loader = "a plain model", "transformers' AutoModelForCausalLM.from_pretrained"
    else:
        return ""
    return f"; it holds {found}, which {loader} loads and imsm eval and audit read"


def load(
    cls: type[SiameseForCausalLM],
    name: str | os.PathLike[str],
    base: PreTrainedModel | str | os.PathLike[str] | None,
    kwargs: dict[str, Any],
) -> SiameseForCausalLM:
    """See `SiameseForCausalLM.from_pretrained`."""
    for of_the_auto_class in ("config", "adapter_kwargs", "_from_auto"):
        kwargs.pop(of_the_auto_class, None)
    hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
    folder, config = read_config(name, hub)
    if base is None:
        if config.base_model is None:
            raise InputError(f"{folder} does not name its base model; give it as from_pretrained(folder, base=...)")
        base = config.base_model
        kwargs.setdefault("revision", config.base_revision)
    if not isinstance(base, (str, os.PathLike)):
        kwargs = {}
    else:
        kwargs |= {key: value for key, value in hub.items() if key != "revision"}
    base_model, _ = building.load_base(base, {key: value for key, value in kwargs.items() if value is not None})
    refuse_other_base(config, base_model, folder)
    model = cls(config, building.attach_adapter(base_model, folder))
    for file, part in parts(model).items():
        load_part(part, folder / file)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = os.fspath(name)
    return model.eval()


def refuse_other_base(config: SiameseConfig, base: PreTrainedModel, folder: Path) -> None:
    """Raises `InputError` if `base` has another shape than the base that the checkpoint was made on."""
    given = building.base_shape(base)
    for field, value in given.items():
        expected = getattr(config, field)
        if expected and value != expected:
            raise InputError(
                f"{folder} was saved for a base with {field} {expected}, but "
                f"{base.config._name_or_path or type(base).__name__} has {value}; give the base it was trained on "
                f"({config.base_model or 'unnamed'})"
            )


def load_part(part: nn.Module, path: Path) -> None:
    """Reads the weights of gate or relevance head.

    Raises:
        InputError: the file is missing, damaged or does not fit.
    """
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} is not a complete siamese checkpoint: {path.name} missing") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from error
    own = {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
    held = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if held != own:
        raise InputError(f"{path} does not fit the settings in {CONFIG}: it holds {held}, expected {own}")
    part.load_state_dict(state)
