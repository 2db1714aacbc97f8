"""Putting an adapter into a base model, and refusing what cannot make a siamese model of the two."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from imsm.config import DEFAULT_TASK
from imsm.errors import InputError, first_line
from imsm.folders import fetch
from imsm.names import model_paths, refuse_lost, refuse_name, refuse_new, tensor_names
from imsm.probe import probe, probe_inputs, reference_memory
from imsm.shared import without_adapter
from imsm.streams import Streams, head_shape, output_head

#: peft's own two files.
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
#: What a tokenizer is saved as.
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt")
#: Initialisations that move a part of the base weights into the adapter. The probe would find them too, but only after
#: the weights in memory are changed.
REWRITING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_base(
    base: PreTrainedModel | str | os.PathLike[str], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, str | None]:
    """The base model, loaded if a name or folder is given, and its revision if known.

    Raises:
        InputError: it cannot be found, is no causal language model, or has an adapter in it.
    """
    if not isinstance(base, (str, os.PathLike)):
        output_head(base)
        if kwargs:
            raise InputError(
                f"{', '.join(kwargs)} can only be given with a base's name or folder, not with a loaded model"
            )
        if _adapted(base):
            raise InputError(
                "base already carries an adapter (merged or not); give the plain base model, and the adapter's folder as "
                "peft_config"
            )
        return base, getattr(base.config, "_commit_hash", None)
    try:
        model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"base model {os.fspath(base)!r} cannot be loaded as a causal language model: {first}"
        ) from error
    if _adapted(model):
        raise InputError(
            f"{os.fspath(base)!r} holds an adapter, where the plain base model that it was trained on is needed; give that (imsm "
            "adopt makes a siamese checkpoint of an adapter)"
        )
    return model, kwargs.get("revision") or getattr(model.config, "_commit_hash", None)


def _adapted(model: nn.Module) -> bool:
    """Whether there is an adapter in a model, merged or not."""
    return isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules())


def attach_adapter(
    base: PreTrainedModel,
    peft_config: PeftConfig | str | os.PathLike[str],
    name: str = DEFAULT_TASK,
    *,
    new: bool = True,
) -> Streams:
    """Puts an adapter into `base` (in place), checks that both streams work, and finds out whether they share passes.

    Args:
        base: the plain base model.
        peft_config: a peft configuration, or the folder or Hub name of a trained adapter.
        name: what peft is to call it.
        new: the name is not one of a checkpoint, so it can be refused for what might come to be saved beside it.

    Raises:
        InputError: with the reason why base and adapter cannot make a siamese model; the base is as it was then, unless the
            adapter changed its weights.
    """
    output_head(base)
    folder = None
    if isinstance(peft_config, (str, os.PathLike)):
        folder = fetch_adapter(peft_config)
        peft_config = read_adapter_config(folder)
    refuse_settings(peft_config, loaded=folder is not None)
    refuse_name(name, peft_config)
    if new:
        refuse_new(name, model_paths(base))
    own = {id(parameter) for parameter in base.parameters()}
    reference = None if _on_meta(base) else reference_memory(base)
    was_training = base.training
    with _given_back(base, reference):
        if folder is not None:
            # peft refuses to load these for training; their prompt is made trainable below.
            peft_model = load_adapter(base, folder, trainable=not peft_config.is_prompt_learning, name=name)
        else:
            with _refusals(base):
                peft_model = get_peft_model(base, peft_config, adapter_name=name)  # type: ignore[assignment]
        if not isinstance(peft_model, PeftModel):
            raise InputError(f"mixed adapters are not supported, got a {type(peft_model).__name__}")
        if new:
            refuse_new(name, tensor_names(peft_model, name))
        if folder is not None:
            refuse_other_tensors(peft_model, folder, name)
            if peft_config.is_prompt_learning:
                for parameter in peft_model.parameters():
                    parameter.requires_grad_(id(parameter) not in own)
        _refuse_trained_base(peft_model, own)
        streams = Streams(peft_model)
        if reference is not None:
            try:
                probe(streams, own, reference)
            except InputError:
                streams.tap.remove()
                raise
            streams.train(was_training)
    return streams


@contextmanager
def _given_back(base: PreTrainedModel, reference: Tensor | None) -> Iterator[None]:
    """Within: what peft puts into `base` is taken out again on an `InputError`.

    Not peft's `unload`: where peft itself fails half-way there is nothing yet to call it on. What changed base weights stays
    in, so that the model is not taken for the plain base the next time.
    """
    learning, was_training = {id(p) for p in base.parameters() if p.requires_grad}, base.training
    attributes = set(vars(base))
    try:
        yield
    except InputError:
        put = [
            (parent, name, layer, bare)
            for parent in base.modules()
            for name, layer in parent._modules.items()
            if layer is not None and (bare := without_adapter(layer)) is not None
        ]
        for parent, name, _, bare in put:
            setattr(parent, name, bare)
        for name in set(vars(base)) - attributes:
            delattr(base, name)
        for parameter in base.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        base.train(was_training)
        if reference is not None and not torch.equal(reference_memory(base), reference):
            for parent, name, layer, _ in put:
                setattr(parent, name, layer)
        raise


def add_adapter(
    streams: Streams, peft_config: PeftConfig | str | os.PathLike[str], name: str, *, new: bool = True
) -> None:
    """Puts a further adapter beside those that are there, and checks it alike. It is the active one then, and alone learns.

    Args:
        streams: whose adapters are left as they are, and learn no more.
        peft_config: a peft configuration, or the folder or Hub name of a trained adapter.
        name: what peft is to call it.
        new: as for `attach_adapter`.

    Raises:
        InputError: with the reason why it cannot be put there; it is not there then.
    """
    peft_model: Any = streams.peft_model
    folder = None
    if isinstance(peft_config, (str, os.PathLike)):
        folder = fetch_adapter(peft_config)
        peft_config = read_adapter_config(folder)
    refuse_settings(peft_config, loaded=folder is not None)
    refuse_name(name, peft_config, list(peft_model.peft_config))
    if new:
        refuse_new(name, model_paths(peft_model))
    if streams.prefix_length or peft_config.is_prompt_learning:
        raise InputError(
            f"a model of several tasks needs adapters in its layers, got {getattr(peft_config.peft_type, 'value', '')}; "
            "use LoRA or the like for every task"
        )
    own = {id(parameter) for parameter in peft_model.parameters()}
    before, learning = peft_model.active_adapter, [p for p in peft_model.parameters() if p.requires_grad]
    was_training, once, why = streams.training, streams.once, streams.why_two
    streams.eval()
    reference = None
    if not _on_meta(streams.base):
        streams.frozen(probe_inputs(streams.base), None)
        reference = streams.tap.memory
    try:
        with _refusals(streams.base), _without_alarms():
            if folder is not None:
                peft_model.load_adapter(os.fspath(folder), name, is_trainable=True)
            else:
                peft_model.add_adapter(name, peft_config)
            peft_model.set_adapter(name)
        for parameter in peft_model.parameters():
            parameter.requires_grad_(id(parameter) not in own and parameter.is_floating_point())
        streams.adapters_changed()
        for one in peft_model.peft_config:
            refuse_lost(peft_model, one)
        if folder is not None:
            refuse_other_tensors(peft_model, folder, name)
        head = streams.base.get_output_embeddings()
        if any(id(parameter) not in own for parameter in head.parameters()):
            raise InputError(
                "the adapter changes the output head, which all tasks share; leave it out of target_modules"
            )
        if reference is not None:
            probe(streams, own, reference)
    except InputError:
        if name in peft_model.peft_config:
            peft_model.set_adapter(before)
            peft_model.delete_adapter(name)
        if (bare := without_adapter(streams.base.get_output_embeddings())) is not None:
            streams.base.set_output_embeddings(bare)
        for parameter in peft_model.parameters():
            parameter.requires_grad_(False)
        for parameter in learning:
            parameter.requires_grad_(True)
        streams.adapters_changed()
        streams.once, streams.why_two = once, why
        raise
    finally:
        streams.train(was_training)


def load_adapter(base: PreTrainedModel, folder: Path, trainable: bool = False, name: str = DEFAULT_TASK) -> PeftModel:
    """`base` with the adapter of a folder put into it, in place.

    Raises:
        InputError: peft cannot do it.
    """
    with _refusals(base), _without_alarms():
        return PeftModel.from_pretrained(base, os.fspath(folder), name, is_trainable=trainable)


@contextmanager
def _without_alarms() -> Iterator[None]:
    """Within, what peft warns of while it loads without need."""
    with warnings.catch_warnings():
        # It only warns of missing tensors; `refuse_other_tensors` looks itself.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        # AdaLoRA's final ranks are by tensor, which peft takes for modules that are not there, and uses all the same.
        warnings.filterwarnings("ignore", message=r"The following rank_pattern keys did not match .*\['[^']*lora_E'")
        yield


@contextmanager
def _refusals(base: PreTrainedModel) -> Iterator[None]:
    """Whatever peft raises within, as an `InputError`."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        AttributeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise InputError(f"peft cannot put this adapter into {type(base).__name__}: {first_line(error)}") from error


def fetch_adapter(name: str | os.PathLike[str]) -> Path:
    """The folder of a trained adapter; from the Hub its two files, and its tokenizer's, alone are fetched.

    Raises:
        InputError: it is missing, incomplete, or its weights are pickled.
    """
    folder = fetch(name, (ADAPTER_CONFIG, ADAPTER, *TOKENIZER), "adapter", {})
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{folder} holds no adapter: {ADAPTER_CONFIG} is missing")
    if not (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} holds no weights that can be read safely: {ADAPTER} is missing (pickles are not read)"
        )
    return folder


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter or checkpoint brings a tokenizer, which then takes the place of its base's."""
    return (folder / "tokenizer_config.json").is_file()


def longest_input(base: PreTrainedModel) -> int | None:
    """Tokens that a model reads at once, if its configuration says."""
    return getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)


def refuse_unembedded(
    tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path, own: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Raises `InputError` if the tokenizer in an adapter's folder has tokens beyond the base model's `rows` embeddings.

    `own` loads the base's tokenizer: what that has beyond the embeddings, such as those of pictures, may be there.
    """
    more = {token for token, place in tokenizer.get_vocab().items() if place >= rows}
    if more and (more := more - set(own().get_vocab())):
        raise InputError(
            f"the tokenizer in {folder} has tokens that the base model does not embed: {len(more)} beyond its {rows}, such "
            f"as {min(more)!r}; give the base model that the adapter was trained on, or take the tokenizer's files out of "
            "the folder to use the base's"
        )


def read_adapter_config(folder: Path) -> PeftConfig:
    """The peft configuration in an adapter's folder.

    Raises:
        InputError: it is damaged, or of a method or version that the installed peft does not know.
    """
    try:
        return PeftConfig.from_pretrained(os.fspath(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / ADAPTER_CONFIG} cannot be read: {first_line(error)}") from error


def saved_tensors(folder: Path) -> set[str]:
    """The names of the tensors in an adapter's file.

    Raises:
        InputError: it is damaged.
    """
    try:
        with safe_open(folder / ADAPTER, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / ADAPTER} is damaged: {first_line(error)}") from error


def refuse_other_tensors(peft_model: PeftModel, folder: Path, name: str = DEFAULT_TASK) -> None:
    """Raises `InputError` if the adapter's file lacks tensors that the model has, or the other way round."""
    saved, own = saved_tensors(folder), tensor_names(peft_model, name)
    if saved != own:
        example = sorted(saved ^ own)[0]
        raise InputError(
            f"the tensors in {folder / ADAPTER} do not fit this base model: {len(own - saved)} are missing and "
            f"{len(saved - own)} too many, such as {example}"
        )


def refuse_settings(config: PeftConfig, loaded: bool) -> None:
    """Settings known to break the frozen stream.

    Raises:
        InputError: naming the setting and the remedy.
    """
    if not isinstance(config, PeftConfig):
        raise InputError(f"peft_config must be a peft PeftConfig or an adapter's folder, got {type(config).__name__}")
    if (bias := getattr(config, "bias", "none")) != "none":
        raise InputError(
            f"bias must be 'none', got {bias!r}: trained biases are base weights and stay on when the adapter is off"
        )
    initialisation = getattr(config, "init_lora_weights", None)
    if isinstance(initialisation, str) and not loaded and initialisation.lower().startswith(REWRITING_INITIALISATIONS):
        raise InputError(
            f"init_lora_weights={initialisation!r} rewrites base weights, so that the frozen stream would no longer be the "
            "base model; use True or 'gaussian'"
        )


def enable_checkpointing(base: Any, settings: dict[str, Any] | None = None, *args: Any, **kwargs: Any) -> None:
    """Recompute activations of `base` in the backward pass (non-reentrant, unless `settings` say otherwise)."""
    settings = {"use_reentrant": False, **(settings or {})}
    if settings["use_reentrant"]:
        base.enable_input_require_grads()
    # transformers 5.21 renamed it.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable(settings, *args, **kwargs)


def base_shape(base: PreTrainedModel) -> dict[str, Any]:
    """What tells one base model from another, by the names of `SiameseConfig`."""
    hidden, vocabulary = head_shape(base)
    return {
        "base_model_type": base.config.model_type,
        "hidden_size": hidden,
        "vocab_size": vocabulary,
        "num_hidden_layers": int(base.config.get_text_config(decoder=True).num_hidden_layers),
    }


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def _refuse_trained_base(peft_model: PeftModel, own: set[int]) -> None:
    for name, parameter in peft_model.named_parameters():
        if id(parameter) in own and parameter.requires_grad:
            raise InputError(
                f"the adapter trains the base weight {name}; base weights must stay frozen, so leave out what trains them"
            )
    base: Any = peft_model.get_base_model()
    head = base.get_output_embeddings()
    if any(id(parameter) not in own for parameter in head.parameters()):
        raise InputError(
            "the adapter changes the output head, which both streams share; leave it out of target_modules and "
            "modules_to_save"
        )
