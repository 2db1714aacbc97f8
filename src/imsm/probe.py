"""The probe: a few tokens on which both streams are proved to be what they should be, and to share passes where they can.

What cannot work is found by running it, not by the names of architectures or PEFT methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from imsm.errors import InputError, first_line
from imsm.shared import layers_below
from imsm.streams import HeadTap, Streams, head_shape, output_head


def probe_inputs(base: nn.Module) -> dict[str, Tensor]:
    """The probe's tokens, (2, 6) int64, as the base model takes them."""
    _, vocabulary = head_shape(base)
    device = base.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = (torch.arange(2 * 6, device=device) * 7 % (vocabulary - 1) + 1).view(2, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}  # type: ignore[dict-item]


def reference_memory(base: PreTrainedModel) -> Tensor:
    """Memories (2, 6, d) of the untouched base model on the probe's tokens.

    Raises:
        InputError: it does not call its output head, or is not causal.
    """
    inputs = probe_inputs(base)
    was_training = base.training
    base.eval()
    tap = HeadTap(output_head(base))
    try:
        with torch.no_grad(), tap.replacing(lambda memory: memory):
            base(**inputs)
            memory = tap.memory
            if memory is None:
                raise InputError(
                    f"{type(base).__name__} makes its logits without calling its output head, so memories cannot be mixed "
                    "before it"
                )
            changed = inputs["input_ids"].clone()
            changed[:, -1] = changed[:, 0]
            base(**{**inputs, "input_ids": changed})
            after = tap.memory
            assert after is not None
            if not _same(after[:, :-1], memory[:, :-1], 1e-5 if memory.dtype == torch.float32 else 1e-2):
                raise InputError(
                    f"{type(base).__name__} is not causal: a later token changes an earlier memory (is_decoder=True missing?)"
                )
    finally:
        tap.remove()
        base.train(was_training)
    return memory


def probe(streams: Streams, own: set[int], reference: Tensor) -> None:
    """Runs both streams on a few tokens with a disturbed adapter; says whether they share passes, see `prove_shared`.

    Args:
        streams: left in eval mode.
        own: ids of the parameters that are not the adapter's.
        reference: (2, 6, d), `reference_memory` of the base model.

    Raises:
        InputError: the frozen stream is not the base model, or the streams do not line up.
    """
    peft_model = streams.peft_model
    kind = getattr(peft_model.active_peft_config.peft_type, "value", peft_model.active_peft_config.peft_type)
    inputs: dict[str, Any] = probe_inputs(streams.base)
    streams.eval()
    try:
        streams.frozen(inputs, None)
        if not _same(streams.tap.memory, reference):  # type: ignore[arg-type]
            raise InputError(
                f"{kind} as configured changes base weights when it is created, so the frozen stream is not the base model "
                "any more; choose another initialisation and load the base again"
            )
        with _noisy(peft_model, own):
            streams.frozen(inputs, None)
            frozen = streams.tap.memory
            with torch.no_grad():
                streams.tuned(inputs, None)
            tuned = streams.tap.memory
            prove_shared(streams)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"peft's {kind} does not run on {type(streams.base).__name__}: {first_line(error)}") from error
    assert frozen is not None and tuned is not None
    if not _same(frozen, reference):
        raise InputError(f"{kind} stays on when switched off, so the frozen stream would not be the base model")
    if tuned.shape != frozen.shape:
        raise InputError(
            f"{kind} changes the sequence's length from {frozen.shape[1]} to {tuned.shape[1]} positions, so the two streams' "
            "memories do not line up; use a method that leaves the length alone"
        )
    if _same(tuned, frozen):
        raise InputError(
            f"{kind} as configured has no effect on the memories; check target_modules and the layers chosen"
        )


@torch.no_grad()
def prove_shared(streams: Streams) -> None:
    """Lets the streams share their passes if that gives what two passes give, for a padded prompt and a cached step.

    The adapter must be disturbed and the model in eval mode. Sets `once` and `why_two` of `streams`.
    """
    streams.once, streams.why_two = None, "the adapter puts a prefix before the tuned stream's tokens"
    if streams.prefix_length:
        return
    prompt: dict[str, Any] = probe_inputs(streams.base)
    prompt["attention_mask"][0, :2] = 0
    prompt["use_cache"] = True
    step = {
        "input_ids": prompt["input_ids"][:, -1:],
        "attention_mask": torch.nn.functional.pad(prompt["attention_mask"], (0, 1), value=1),
        "use_cache": True,
    }
    attended = prompt["attention_mask"].bool()

    def memories(run: Callable[..., Any]) -> list[Tensor]:
        cache = streams.cache_of(run(prompt, None))
        first = streams.tap.memory
        if cache is None:
            raise InputError("the model returns no cache")
        run(step, cache)
        last = streams.tap.memory
        assert first is not None and last is not None
        return [part[rows] for part, rows in ((first, attended.repeat(len(first) // 2, 1)), (last, slice(None)))]

    try:
        frozen, tuned = memories(streams.frozen), memories(streams.tuned)
    except Exception as error:
        streams.why_two = f"they cannot be run with a cache: {first_line(error)}"
        return
    expected = [torch.cat(pair) for pair in zip(frozen, tuned, strict=True)]
    for once in sorted({layers_below(streams.base), 0}, reverse=True):
        streams.once = once
        try:
            found = memories(streams.both)
        except Exception as error:
            streams.why_two = f"a pass of both fails: {type(error).__name__}: {first_line(error)}"
        else:
            if all(_alike(a, b) for a, b in zip(found, expected, strict=True)):
                streams.why_two = ""
                return
            streams.why_two = "a pass of both does not give what two passes give"
    streams.once = None


def _same(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    scale = b.float().abs().max().clamp(min=1e-6)
    return a.shape == b.shape and bool(((a.float() - b.float()).abs().max() / scale) < tolerance)


def _alike(a: Tensor, b: Tensor) -> bool:
    """`_same`, but for half precision, where a disturbed adapter magnifies rounding: then alike on average."""
    if b.dtype not in (torch.bfloat16, torch.float16):
        return _same(a, b)
    return a.shape == b.shape and bool((a - b).float().abs().mean() < 0.2 * b.float().abs().mean())


@contextmanager
def _noisy(peft_model: PeftModel, own: set[int]) -> Iterator[None]:
    """Adapter weights with noise on them: as a trained adapter, it must change the tuned stream and nothing else."""
    kept = [
        (parameter, parameter.detach().clone())
        for parameter in peft_model.parameters()
        if id(parameter) not in own and parameter.is_floating_point()
    ]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter, _ in kept:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.3 * noise).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
