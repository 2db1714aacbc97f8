"""A checkpoint of any kind, ready to be evaluated: siamese model, peft adapter, LoRAMoE, or a whole model."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from imsm import building
from imsm.building import (
    ADAPTER,
    ADAPTER_CONFIG,
    TOKENIZER,
    base_shape,
    fetch_adapter,
    has_tokenizer,
    load_adapter,
    read_adapter_config,
    refuse_unembedded,
)
from imsm.checkpoint import CONFIG, GATE, LORAMOE
from imsm.config import SiameseConfig
from imsm.errors import InputError, first_line
from imsm.evaluation.loading import Loading, load_siamese
from imsm.evaluation.passes import Pass
from imsm.evaluation.references import References
from imsm.evaluation.strength import sample_logits, set_strength, switched_off
from imsm.fingerprint import add_values
from imsm.folders import fetch
from imsm.model import SiameseForCausalLM

#: What tells the kind of a checkpoint, and its tokenizer.
FACTS = (CONFIG, ADAPTER_CONFIG, LORAMOE, *TOKENIZER)

CandidateKind = Literal["base", "siamese", "peft", "loramoe", "full"]


@dataclass
class Candidate:
    """A loaded checkpoint.

    spec: as it was given.
    kind: what it is; `base` is a plain model that is its own base, `full` a merged or fully tuned one.
    model: in eval mode, on its device.
    tokenizer: the checkpoint's own, or else its base's.
    base: of its base model: `name`, and the fields of `building.base_shape`.
    generate_kwargs: what `generate` and `forward` are called with besides.
    base_pass: gives a context in which the base model itself can be run; its weights are loaded apart only where the
        checkpoint does not hold them, at the first use.
    references: where the base model's answers are kept for other checkpoints of it, if they are.
    """

    spec: str
    kind: CandidateKind
    model: Any
    tokenizer: PreTrainedTokenizerBase
    base: dict[str, Any]
    generate_kwargs: dict[str, Any]
    base_pass: Callable[[], AbstractContextManager[Pass]]
    references: References | None = None

    @property
    def own(self) -> Pass:
        """The checkpoint as it is evaluated."""
        return Pass(self.model, self.tokenizer, self.generate_kwargs)

    @property
    def longest(self) -> int | None:
        """Tokens that the model can read at once, if it says."""
        return longest_input(self.model)

    @property
    def dtype(self) -> str:
        """Name of the base weights' dtype."""
        return str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")

    def fingerprint(self) -> str:
        """Hash of every weight, as 32 hexadecimal digits."""
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            add_values(digest, tensor)
        return digest.hexdigest()


def longest_input(model: Any) -> int | None:
    """Tokens that a model of any kind can read at once, if it says."""
    return building.longest_input(model.base if isinstance(model, SiameseForCausalLM) else model)


def open_candidate(
    spec: str, base: str | None = None, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> Candidate:
    """Loads a checkpoint of any kind.

    Args:
        spec: folder or Hub name of a siamese checkpoint, a peft adapter, a LoRAMoE or a plain model. At its end
            `@gate=0.25` fixes a siamese model's gate (1 is the base, 0 the adapter), `@recall=1.5` turns its dial (0 is as
            trained), `@scale=0.5` sets the strength of a siamese or peft model's adapter (0 is the base, 1 the adapter).
        base: folder or Hub name of the base model, if not the one that the checkpoint names. A plain model does not
            name one; without `base` it counts as its own.
        dtype: "auto" (as the base was saved) or a dtype's name.
        device: such as cuda:1; None for a GPU if there is one.
        trust_remote_code: run code that the base model's repository brings.

    Raises:
        InputError: there is no checkpoint, it cannot be loaded, or the suffix does not fit it.
    """
    name, dials = read_spec(spec)
    folder = fetch(name, FACTS, "checkpoint", {})
    kind = kind_of(folder)
    allowed = {"siamese": {"gate", "recall", "scale"}, "peft": {"scale"}}.get(kind, set())
    for dial in dials:
        if dial not in allowed:
            raise InputError(
                f"{spec}: @{dial}=… needs a {'siamese or peft' if dial == 'scale' else 'siamese'} checkpoint, and {name} "
                f"is {'a plain model' if kind == 'plain' else kind}"
            )
    loading = Loading(dtype, device, trust_remote_code)
    candidate = OPENERS[kind](spec, name, folder, base, loading)
    if "gate" in dials:
        candidate.generate_kwargs["force_gate"] = dials["gate"]
    if "recall" in dials:
        candidate.generate_kwargs["recall"] = dials["recall"]
    if "scale" in dials:
        model = candidate.model
        if isinstance(model, SiameseForCausalLM) and len(model.tasks) > 1:
            raise InputError(
                f"@scale is for one adapter, and {name} has several tasks; imsm task export one of them first"
            )
        with candidate.base_pass() as frozen:
            base_logits = sample_logits(frozen.model, **frozen.kwargs)
        adapted = model.peft_model if isinstance(model, SiameseForCausalLM) else model
        set_strength(adapted, dials["scale"], base_logits)
    return candidate


def read_spec(spec: str) -> tuple[str, dict[str, float]]:
    """A checkpoint's name, and the values of its suffixes.

    Raises:
        InputError: an unknown suffix, or a value out of range.
    """
    name, dials = spec, dict[str, float]()
    while not Path(name).exists() and (match := re.fullmatch(r"(.+)@([^@=/]*)=([^@/]*)", name)):
        name, dial, text = match.groups()
        if dial not in ("gate", "recall", "scale"):
            raise InputError(f"{spec}: unknown suffix '@{dial}'; there are @gate=…, @recall=… and @scale=…")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if dial == "gate" and not 0 <= value <= 1:
            raise InputError(f"{spec}: @gate must be a number from 0 (the adapter) to 1 (the base model), got {text!r}")
        if dial == "recall" and math.isnan(value):
            raise InputError(
                f"{spec}: @recall must be a number, inf (the base model) or -inf (the adapter), got {text!r}"
            )
        if dial == "scale" and not 0 <= value < math.inf:
            raise InputError(f"{spec}: @scale must be a number from 0 (the base model), 1 is the adapter, got {text!r}")
        if dial in dials:
            raise InputError(f"{spec}: @{dial} is given twice")
        if {dial, *dials} >= {"gate", "recall"}:
            raise InputError(f"{spec}: @gate leaves @recall nothing to turn; give one of them")
        dials[dial] = value
    return name, dials


def find_kind(spec: str) -> str:
    """What kind a checkpoint of a folder or the Hub is, see `kind_of`; its weights are not fetched.

    Raises:
        InputError: there is no checkpoint, or a suffix is wrong.
    """
    return kind_of(fetch(read_spec(spec)[0], FACTS, "checkpoint", {}))


def kind_of(folder: Path) -> str:
    """What a folder holds: siamese, loramoe, peft or plain.

    Raises:
        InputError: none of them.
    """
    config = {}
    if (folder / CONFIG).is_file():
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / CONFIG} cannot be read: {first_line(error)}") from error
    if config.get("model_type") == SiameseConfig.model_type or (folder / GATE).is_file():
        return "siamese"
    if (folder / LORAMOE).is_file():
        return "loramoe"
    if (folder / ADAPTER_CONFIG).is_file():
        return "peft"
    if config:
        return "plain"
    raise InputError(f"{folder} holds no checkpoint: none of {CONFIG}, {ADAPTER_CONFIG} and {LORAMOE} is in it")


def _siamese(spec: str, name: str, folder: Path, base: str | None, loading: Loading) -> Candidate:
    model, tokenizer, base_name = load_siamese(name, base, loading)
    frozen = Pass(model, tokenizer, {"force_gate": 1.0})
    described = {"name": base_name, **base_shape(model.base)}
    return Candidate(spec, "siamese", model, tokenizer, described, {}, lambda: nullcontext(frozen))


def _peft(spec: str, name: str, folder: Path, base: str | None, loading: Loading) -> Candidate:
    folder = fetch_adapter(name)
    config = read_adapter_config(folder)
    base_name = base or config.base_model_name_or_path
    if not base_name:
        raise InputError(f"{folder} does not name its base model; give it with --base")
    revision = config.revision if base is None else None
    plain = loading.base(base_name, revision)
    described = {"name": base_name, **base_shape(plain)}
    embeddings: Any = plain.get_input_embeddings()
    expected = sample_logits(plain)
    model = loading.placed(load_adapter(plain, folder))
    refuse_missing_tensors(model, folder)
    tokenizer = loading.tokenizer(folder, base_name)
    if has_tokenizer(folder):
        rows = int(embeddings.weight.shape[0])
        refuse_unembedded(tokenizer, rows, folder, lambda: loading.tokenizer(Path(base_name), base_name))

    @contextmanager
    def disabled() -> Iterator[Pass]:
        with switched_off(model) as off:
            yield Pass(off, tokenizer)

    with disabled() as frozen:
        is_base = torch.equal(sample_logits(frozen.model), expected)
    apart = _apart(base_name, revision, loading, tokenizer, described)
    return Candidate(spec, "peft", model, tokenizer, described, {}, disabled if is_base else apart)


def _loramoe(spec: str, name: str, folder: Path, base: str | None, loading: Loading) -> Candidate:
    from imsm import loramoe

    model, base_name = loramoe.load(name, base=base, **loading.kwargs)
    assert base_name is not None, "a base that was loaded here has a name"
    facts = json.loads((folder / LORAMOE).read_text(encoding="utf-8"))
    revision = facts.get("base_revision") if base is None else None
    tokenizer = loading.tokenizer(folder, base_name)
    described = {"name": base_name, **base_shape(model)}
    apart = _apart(base_name, revision, loading, tokenizer, described)
    return Candidate(spec, "loramoe", loading.placed(model), tokenizer, described, {}, apart)


def _plain(spec: str, name: str, folder: Path, base: str | None, loading: Loading) -> Candidate:
    model = loading.base(name)
    tokenizer = loading.tokenizer(folder, base, name)
    if base is None or base == name or Path(base).resolve() == Path(name).resolve():
        own = Pass(model, tokenizer)
        return Candidate(
            spec, "base", model, tokenizer, {"name": name, **base_shape(model)}, {}, lambda: nullcontext(own)
        )
    described = {"name": base, **base_shape(model)}
    return Candidate(spec, "full", model, tokenizer, described, {}, _apart(base, None, loading, tokenizer, described))


OPENERS = {"siamese": _siamese, "peft": _peft, "loramoe": _loramoe, "plain": _plain}


def _apart(
    name: str, revision: str | None, loading: Loading, tokenizer: PreTrainedTokenizerBase, shape: dict[str, Any]
) -> Callable[[], AbstractContextManager[Pass]]:
    """Gives the pass of a base model that is loaded when it is first asked for."""
    loaded: list[Pass] = []

    def give() -> AbstractContextManager[Pass]:
        if not loaded:
            model = loading.base(name, revision)
            for field, value in base_shape(model).items():
                if value != shape[field]:
                    raise InputError(
                        f"the base {name} has {field} {value}, the checkpoint {shape[field]}; give its own base"
                    )
            loaded.append(Pass(model, tokenizer))
        return nullcontext(loaded[0])

    return give


def refuse_missing_tensors(model: PeftModel, folder: Path) -> None:
    """Raises `InputError` if an adapter's file lacks tensors that the model has."""
    with safe_open(folder / ADAPTER, framework="pt") as file:
        missing = sorted(set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(file.keys()))
    if missing:
        raise InputError(
            f"{folder / ADAPTER} does not fit this base model: it lacks {len(missing)} tensors, such as {missing[0]}"
        )


def release_memory() -> None:
    """Gives back what nothing holds any more: to the GPU, and to the system where its C library can (glibc).

    glibc keeps freed blocks for later, gigabytes of them after a training on long records.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
