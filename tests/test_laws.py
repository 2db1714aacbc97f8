"""The laws that any gate variant on any architecture with any PEFT method must keep."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from oracle import Oracle, answer_queries, assert_same, marked_queries, running_queries
from prompts import Batch, padded, random_prompts
from torch import Tensor
from zoo import ARCHITECTURES, METHODS, tiny_base, tiny_siamese

from imsm import GATES, InputError, SiameseForCausalLM

Combination = tuple[str, str, str]

#: What peft cannot do, by architecture and method, and what the refusal must say.
REFUSED: dict[tuple[str, str], str] = {
    ("gpt2", "oft"): "Conv1D.* is not supported",
    ("gpt2", "loha"): "Conv1D.* not supported",
    ("gpt2", "lokr"): "Conv1D.* not supported",
    ("falcon", "prefix_tuning"): "PREFIX_TUNING does not run on FalconForCausalLM",
    ("lfm2", "prefix_tuning"): "PREFIX_TUNING does not run on Lfm2ForCausalLM",
}
#: peft puts the prefix before the padding, and a sliding window counts places: padding pushes the prefix out of it.
PADDING_MATTERS = {("gemma3", "prefix_tuning"), ("mistral", "prefix_tuning")}

CROSS: list[Combination] = list(product(GATES, METHODS, ARCHITECTURES))


def covering() -> list[Combination]:
    """Every pair of variant, method and architecture at least once, and every variant with LoRA on Llama."""
    variants = list(GATES)
    chosen = [
        (variants[(m + a) % len(variants)], method, architecture)
        for m, method in enumerate(METHODS)
        for a, architecture in enumerate(ARCHITECTURES)
    ]
    chosen += [c for c in product(GATES, ["lora"], ["llama"]) if c not in chosen]
    # Where what peft refuses has left a pair out, the first combination that has it.
    there = {pair for c in chosen if c[:0:-1] not in REFUSED for pair in pairs(c)}
    for c in CROSS:
        if c[:0:-1] not in REFUSED and not pairs(c) <= there:
            there |= pairs(c)
            chosen.append(c)
    return chosen


def pairs(c: Combination) -> set[tuple[int, int, str, str]]:
    return {(i, j, c[i], c[j]) for i, j in ((0, 1), (0, 2), (1, 2))}


def test_every_pair_is_covered() -> None:
    chosen = [c for c in covering() if c[:0:-1] not in REFUSED]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        possible = {(c[i], c[j]) for c in CROSS if c[:0:-1] not in REFUSED}
        assert {(c[i], c[j]) for c in chosen} == possible


def combinations(refused: bool) -> list[object]:
    quick = set(covering())
    return [
        pytest.param(c, id="-".join(c), marks=[] if c in quick else [pytest.mark.slow])
        for c in CROSS
        if (c[:0:-1] in REFUSED) == refused
    ]


class Pair:
    """A siamese model, its base built anew, and what the laws ask of them more than once."""

    def __init__(self, variant: str, method: str, architecture: str) -> None:
        self.model: SiameseForCausalLM = tiny_siamese(architecture, method, variant)
        self.base = tiny_base(architecture)
        self.oracle = Oracle(self.model, self.base)
        self.padding_matters = (architecture, method) in PADDING_MATTERS


@pytest.fixture(scope="module", params=combinations(refused=False))
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(*request.param)


@pytest.fixture(params=["shared", "two"])
def passes(request: pytest.FixtureRequest, pair: Pair) -> Iterator[str]:
    """Both ways to run both streams; a model has one of them alone only where the adapter lengthens the sequence."""
    if request.param == "shared" and pair.model.streams.prefix_length:
        with pytest.raises(InputError, match="puts a prefix before"):
            pair.model.passes = "shared"
        assert pair.model.passes == "two"
        yield "two"
        return
    pair.model.passes = request.param
    yield request.param
    if not pair.model.streams.prefix_length:
        pair.model.passes = "shared"


PROMPTS = random_prompts()
LEFT, RIGHT = padded(PROMPTS), padded(PROMPTS, "right")


def forward(model: torch.nn.Module, batch: Batch = LEFT, **kwargs: object) -> Tensor:
    """Logits of the attended positions, one row after the other, (N, V)."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    if "position_ids" not in inspect.signature(tiny_forward(model)).parameters:
        del inputs["position_ids"]
    with torch.no_grad():
        return torch.cat(batch.rows(model(**inputs, **kwargs).logits))


def tiny_forward(model: torch.nn.Module) -> object:
    """The forward whose arguments count: peft's takes anything."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).forward


@pytest.mark.parametrize("combination", combinations(refused=True))
def test_refused(combination: Combination) -> None:
    variant, method, architecture = combination
    with pytest.raises(InputError, match=REFUSED[architecture, method]):
        tiny_siamese(architecture, method, variant)


def test_the_adapter_matters(pair: Pair) -> None:
    """Without this the other laws would hold for an adapter that does nothing."""
    difference = forward(pair.model.peft_model) - forward(pair.base)
    assert difference.abs().max() > 0.03 * forward(pair.base).abs().max()


@pytest.mark.parametrize("gate", [0, 1])
def test_gate_at_its_ends_is_peft_and_the_base_model(pair: Pair, gate: int, passes: str) -> None:
    """Bit for bit, unless both streams share a pass, whose products have other shapes."""
    expected = forward(pair.base if gate == 1 else pair.model.peft_model)
    assert torch.equal(forward(pair.model, force_gate=gate), expected)
    both_run = forward(pair.model, force_gate=gate, output_memories=True)
    if passes == "two":
        assert torch.equal(both_run, expected)
    else:
        assert_same(both_run, expected, 1e-4)


def test_forward_is_the_oracle(pair: Pair, passes: str) -> None:
    prompt = LEFT.mask * (torch.arange(LEFT.ids.shape[1]) < 7)
    labels = LEFT.ids.where(LEFT.mask * (1 - prompt) > 0, -100)
    labels[2, 3:5] = LEFT.ids[2, 3:5]  # an answer earlier on
    for arguments, queries in (
        ({}, running_queries(LEFT.mask)),
        ({"prompt_mask": prompt}, marked_queries(LEFT.mask, prompt)),
        ({"labels": labels, "output_logits": True}, answer_queries(LEFT.mask, labels)),
    ):
        with torch.no_grad():
            expected = pair.oracle.logits(LEFT.ids, queries, LEFT.mask, LEFT.positions)
        assert_same(forward(pair.model, **arguments), torch.cat(LEFT.rows(expected)))


def test_cached_is_uncached(pair: Pair, passes: str) -> None:
    cache, logits = None, []
    for start, stop in ((0, 5), (5, 8), (8, 9)):
        with torch.no_grad():
            output = pair.model(
                LEFT.ids[:, start:stop], LEFT.mask[:, :stop], LEFT.positions[:, start:stop], past_key_values=cache
            )
        cache = output.past_key_values
        logits.append(output.logits)
    assert_same(torch.cat(LEFT.rows(torch.cat(logits, dim=1))), forward(pair.model))


def test_a_shared_pass_is_two_passes(pair: Pair) -> None:
    """Memories and logits to 1e-4, of a prompt and of the steps after it."""
    if pair.model.streams.prefix_length:
        assert pair.model.passes == "two"
        return
    found = []
    for passes in ("two", "shared"):
        pair.model.passes = passes
        cache, parts = None, []
        for start, stop in ((0, 6), (6, 7), (7, 9)):
            with torch.no_grad():
                output = pair.model(
                    LEFT.ids[:, start:stop],
                    LEFT.mask[:, :stop],
                    LEFT.positions[:, start:stop],
                    past_key_values=cache,
                    output_memories=True,
                )
            cache = output.past_key_values
            parts.append(torch.cat([output.base_memory, output.tuned_memory, output.logits], dim=-1))
        assert (cache.shared is not None) == (passes == "shared")
        found.append(torch.cat(LEFT.rows(torch.cat(parts, dim=1))))
    assert_same(found[1], found[0], 1e-4)


def test_padding_and_neighbours_do_not_matter(pair: Pair) -> None:
    alone = torch.cat([forward(pair.model, padded([prompt])) for prompt in PROMPTS])
    assert_same(forward(pair.model, RIGHT), alone)
    if pair.padding_matters:
        assert (forward(pair.model, LEFT) - alone).abs().max() > 0.01
    else:
        assert_same(forward(pair.model, LEFT), alone)


def test_greedy_generation_is_the_oracle(pair: Pair) -> None:
    batches = [padded([prompt]) for prompt in PROMPTS] if pair.padding_matters else [LEFT]
    answers = []
    for batch in batches:
        tokens = pair.model.generate(
            batch.ids, attention_mask=batch.mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        answers += tokens[:, batch.ids.shape[1] :].tolist()
    expected = [pair.oracle.greedy(prompt, 8) for prompt in PROMPTS]
    assert [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)] == expected
