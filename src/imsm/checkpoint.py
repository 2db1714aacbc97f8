"""The checkpoint folder: config, peft's own adapter files, the gate, a model card; never the base weights.

config.json                 base model, gate settings, layout version, how it was trained
adapter_config.json         peft's own two files, so that peft alone can load the adapter
adapter_model.safetensors
gate.safetensors            the gate's weights, float32
relevance.safetensors       those of the relevance head, if there is one
queries.safetensors         the task's stored queries, float16, if it has a head
tasks/NAME/                 of several tasks every one but the first: the files above, task.json in the place of config.json
router.safetensors          which of several tasks a query goes to
generation_config.json, README.md
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from imsm import building, card
from imsm.building import ADAPTER, ADAPTER_CONFIG, TOKENIZER
from imsm.config import FORMAT_VERSION, ONE_TASK, SiameseConfig
from imsm.errors import InputError, first_line
from imsm.folders import fetch, staged
from imsm.gates import build_gate
from imsm.names import refuse_lost
from imsm.relevance import build_head
from imsm.routing import Router
from imsm.tasks import OWN, Task

if TYPE_CHECKING:
    from imsm.model import SiameseForCausalLM

CONFIG, GATE, RELEVANCE, CARD = "config.json", "gate.safetensors", "relevance.safetensors", "README.md"
#: transformers' own, of how answers are made and where they end.
GENERATION = "generation_config.json"
#: Of a task's stored queries; of several tasks; of the folder of those but the first, and their settings.
QUERIES, ROUTER, TASKS, TASK = "queries.safetensors", "router.safetensors", "tasks", "task.json"
#: What every task's settings hold as the model's do.
READS = ("relevance_turn", "relevance_close")
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
        InputError: `folder` is a file, or the model has adapters that are no tasks.
    """
    adapters = list(model.peft_model.peft_config)
    if sorted(adapters) != sorted(model.tasks):
        raise InputError(
            f"a checkpoint holds one adapter, the model has {len(adapters)}: {', '.join(adapters)}; delete all but the "
            f"active one"
            if len(model.tasks) == 1
            else f"a checkpoint holds an adapter for each of the tasks {', '.join(model.tasks)}, the model has "
            f"{', '.join(adapters)}; add and remove them by add_task and remove_task"
        )
    if is_main_process:
        with staged(Path(folder)) as stage:
            for place, name in enumerate(model.tasks):
                write_task(model, name, stage / TASKS / name if place else stage)
            if model.router is not None:
                save_part(model.router, stage / ROUTER)
            model.config.architectures = [type(model).__name__]
            root_config(model).save_pretrained(stage)
            model.generation_config.save_pretrained(stage)
            (stage / CARD).write_text(card.render(model), encoding="utf-8")
            made = {path.name for path in stage.iterdir()}
        drop_stale(Path(folder), made)
    if push_to_hub:
        push(model, repo_id or Path(folder).name, **kwargs)


def root_config(model: SiameseForCausalLM) -> SiameseConfig:
    """The model's config as the folder has it, with the first task's settings."""
    config: SiameseConfig = copy.deepcopy(model.config)
    for key, value in model.part(model.tasks[0]).settings.items():
        setattr(config, key, value)
    return numbered(config)


def numbered(config: SiameseConfig) -> SiameseConfig:
    """The config with the layout's version that its tasks need."""
    config.format_version = min(config.format_version, ONE_TASK) if len(config.tasks) == 1 else FORMAT_VERSION
    return config


def write_task(model: SiameseForCausalLM, name: str, folder: Path) -> None:
    """Writes a task's adapter, gate, head and queries; its settings too, unless `folder` has the model's."""
    folder.mkdir(parents=True, exist_ok=True)
    part = model.part(name)
    write_adapter(model, name, folder)
    for file, module in parts(part).items():
        save_part(module, folder / file)
    if part.queries is not None:
        save_file({"queries": part.queries}, folder / QUERIES, metadata={"format": "pt"})
    if folder.parent.name == TASKS:
        write_settings({**part.settings, **{key: getattr(model.config, key) for key in READS}}, folder)


def write_adapter(model: SiameseForCausalLM, name: str, folder: Path, *, with_card: bool = False) -> None:
    """Writes peft's two files of one adapter, and its model card if asked for, right into a folder that is there.

    It does not matter what peft calls the adapter.

    Raises:
        InputError: peft left out some of its weights; nothing is written then.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # "auto" would ask the Hub whether the embeddings were resized; base weights are never saved here.
        model.peft_model.save_pretrained(temporary, save_embedding_layers=False, selected_adapters=[name])
        (written,) = Path(temporary).rglob(ADAPTER_CONFIG)
        refuse_lost(model.peft_model, name, building.saved_tensors(written.parent))
        for file in (ADAPTER_CONFIG, ADAPTER):
            os.replace(written.with_name(file), folder / file)
        if with_card:
            os.replace(Path(temporary) / CARD, folder / CARD)


def write_settings(settings: dict[str, Any], folder: Path) -> None:
    """Writes the settings of a task that is not the first."""
    (folder / TASK).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_part(part: nn.Module, path: Path) -> None:
    """Writes a module's weights."""
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in part.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


def drop_stale(folder: Path, made: set[str]) -> None:
    """Takes away what a save of several tasks, or of one with a head, left in a folder and one that `made` less did not."""
    for name in {RELEVANCE, QUERIES, ROUTER} - made:
        (folder / name).unlink(missing_ok=True)
    if TASKS not in made:
        shutil.rmtree(folder / TASKS, ignore_errors=True)


def export_adapter(name: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Puts peft's own two files of a siamese checkpoint into a folder, byte for byte; gives the folder.

    Args:
        name: folder or Hub name of the checkpoint.
        folder: a new or empty folder.

    Raises:
        InputError: there is no such checkpoint, it has several tasks, or `folder` holds something.
    """
    source, config = read_config(name, {})
    if len(config.tasks) > 1:
        raise InputError(
            f"{source} has the adapters of several tasks, {', '.join(config.tasks)}; imsm task export {source} NAME first"
        )
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; give a new folder to export into")
    with staged(target) as stage:
        for file in (ADAPTER_CONFIG, ADAPTER):
            shutil.copyfile(source / file, stage / file)
    return target


def write_recall(folder: Path, recall: float) -> None:
    """Makes a value of the recall dial the default of a checkpoint on the disk.

    Raises:
        InputError: see `read_config`.
    """
    _, config = read_config(folder, {})
    config.recall = recall
    with staged(folder) as stage:
        config.save_pretrained(stage)


def parts(task: Task | SiameseForCausalLM) -> dict[str, nn.Module]:
    """What a task has beside base and adapter, by the file that it is kept in."""
    return {GATE: task.gate} | ({RELEVANCE: task.relevance} if task.relevance is not None else {})


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
    folder = fetch(
        name,
        (*REQUIRED, RELEVANCE, QUERIES, ROUTER, f"{TASKS}/*", GENERATION, LORAMOE, *TOKENIZER),
        "checkpoint",
        hub,
    )
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
    remedy = ""
    if (folder / LORAMOE).is_file():
        found, loader = "a LoRAMoE checkpoint", "imsm.loramoe.load"
    elif (folder / GATE).is_file():
        return ""
    elif (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        found, loader = "a peft adapter", "peft's PeftModel.from_pretrained"
        remedy = f"; to make a siamese checkpoint of it: imsm adopt {folder} --data FILE --output DIR"
    elif (folder / CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        found, loader = "a plain model", "transformers' AutoModelForCausalLM.from_pretrained"
    else:
        return ""
    return f"; it holds {found}, which {loader} loads and imsm eval and audit read{remedy}"


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
    first, *further = config.tasks
    config.tasks = [first]
    model = cls(config, building.attach_adapter(base_model, folder, first, new=False))
    for file, part in parts(model).items():
        load_part(part, folder / file)
    model.queries = read_queries(folder)
    for name in further:
        model.place_task(name, folder / TASKS / name, read_task(folder / TASKS / name, config), new=False)
    if further:
        model.activate(first)
        if len(model.rivals) > 1:
            # The first task may have no head any more.
            stores = [model.part(name).queries for name in model.rivals]
            width = max(stored.shape[1] for stored in stores if stored is not None)
            model.router = Router(width, len(model.rivals))
            load_part(model.router, folder / ROUTER)
            model.router.to(next(model.get_output_embeddings().parameters()).device)
    if (folder / GENERATION).is_file():
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


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a task that is not the first.

    Raises:
        InputError: they are missing or damaged.
    """
    try:
        values = json.loads((folder / TASK).read_text(encoding="utf-8"))
        return {key: values[key] for key in (*OWN, *READS)}
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a complete task of a siamese checkpoint: {TASK} missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / TASK} cannot be read: {first_line(error)}") from error


def read_task(folder: Path, config: SiameseConfig) -> Task:
    """What a task that is not the first has beside its adapter.

    Raises:
        InputError: the folder is incomplete, damaged, or does not go with the model's config.
    """
    settings = read_settings(folder)
    if other := [key for key in READS if settings.pop(key) != getattr(config, key)]:
        raise InputError(f"{folder / TASK} does not go with {CONFIG}: it has another {' and '.join(other)}")
    gate = build_gate(settings["gate"], config.hidden_size, settings["gate_rank"], settings["gate_dropout"])
    head = build_head(settings["relevance"], config.hidden_size, config.relevance_close)
    task = Task(gate, head, read_queries(folder), settings)
    for file, part in parts(task).items():
        load_part(part, folder / file)
    return task


def read_queries(folder: Path) -> Tensor | None:
    """A task's stored queries, (N, F) float16; None if there are none, as of old.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / QUERIES
    if not path.is_file():
        return None
    try:
        return load_file(path)["queries"]
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from error


def load_part(part: nn.Module, path: Path) -> None:
    """Reads the weights of gate, relevance head or router.

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
