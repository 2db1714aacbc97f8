"""Every gate against the equations, and how it starts, drops out and is refused."""

from __future__ import annotations

import pytest
import torch
from oracle import mix, running_queries
from prompts import padded, random_prompts
from torch import Tensor, nn
from zoo import METHODS, disturb, tiny_base, tiny_siamese

from imsm import GATES, InputError, SiameseForCausalLM
from imsm.gates import build_gate, interweave

WIDTH, RANK = 32, 4
#: Columns of W_A by variant; nothing to learn without.
INPUTS = {"query_aware": 4, "token": 2, "residual": 2, "projected": 2, "query_blended": 2}


def made(name: str, dropout: float = 0.1) -> nn.Module:
    gate = build_gate(name, WIDTH, RANK, dropout).eval()
    disturb(gate, scale=0.5)
    return gate


def memories(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """h, h' of 2 rows of 5 tokens, and q̄, q̄' of a row."""
    generator = torch.Generator().manual_seed(3)
    h, tuned = torch.randn(2, 2, 5, WIDTH, generator=generator).to(dtype)
    q, tuned_q = torch.randn(2, 2, 1, WIDTH, generator=generator)
    return [h, tuned, q, tuned_q]


def expected(name: str, gate: nn.Module, h: Tensor, tuned: Tensor, q: Tensor, tuned_q: Tensor) -> Tensor:
    return mix(name, dict(gate.named_parameters()), h, tuned, q.expand(2, 5, -1), tuned_q.expand(2, 5, -1))


def test_the_variants_are_the_papers_and_the_tuned_memory_alone() -> None:
    assert set(GATES) == {"query_aware", "token", "average", "residual", "projected", "query_blended", "tuned"}


@pytest.mark.parametrize("name", GATES)
def test_gate_is_its_equation(name: str) -> None:
    gate, (h, tuned, q, tuned_q) = made(name), memories()
    torch.testing.assert_close(gate(h, tuned, q, tuned_q).memory, expected(name, gate, h, tuned, q, tuned_q))
    # A query of its own for every position gives the same as one for all.
    per_position = gate(h, tuned, q.expand(2, 5, -1), tuned_q.expand(2, 5, -1))
    torch.testing.assert_close(per_position.memory, gate(h, tuned, q, tuned_q).memory)


@pytest.mark.parametrize("name", [name for name in GATES if name != "projected"])
def test_mix_gate_is_the_weight_of_the_frozen_memory(name: str) -> None:
    h, tuned, q, tuned_q = memories()
    mixed = made(name)(h, tuned, q, tuned_q)
    assert mixed.gate.shape == h.shape
    if name == "query_blended":
        h, tuned = 0.5 * (h + q), 0.5 * (tuned + tuned_q)
    torch.testing.assert_close(mixed.memory, mixed.gate * h + (1 - mixed.gate) * tuned)


@pytest.mark.parametrize("name", GATES)
def test_query_is_used_where_the_variant_says_so(name: str) -> None:
    gate, (h, tuned, q, tuned_q) = made(name), memories()
    for other in ((q + 1, tuned_q), (q, tuned_q + 1)):
        changed = not torch.equal(gate(h, tuned, *other).memory, gate(h, tuned, q, tuned_q).memory)
        assert changed == GATES[name].uses_query == (name in ("query_aware", "query_blended"))


@pytest.mark.parametrize("name", GATES)
def test_shapes_of_the_weights(name: str) -> None:
    shapes = {key: tuple(value.shape) for key, value in build_gate(name, WIDTH, RANK, 0.1).named_parameters()}
    wanted = {}
    if name in INPUTS:
        wanted = {"down.weight": (RANK, INPUTS[name] * WIDTH), "up.weight": (WIDTH, RANK)}
    if name == "projected":
        wanted |= {"project_down.weight": (RANK, 2 * WIDTH), "project_up.weight": (WIDTH, RANK)}
    assert shapes == wanted


def test_parameters_are_those_of_table_1() -> None:
    with torch.device("meta"):
        gate = build_gate("query_aware", 4096, 8, 0.1)
    assert sum(parameter.numel() for parameter in gate.parameters()) == 5 * 4096 * 8 == 163_840


@pytest.mark.parametrize("name", [name for name in GATES if name != "tuned"])
def test_gate_starts_at_one_half(name: str) -> None:
    h, tuned, q, tuned_q = memories()
    gate = build_gate(name, WIDTH, RANK, 0.1)(h, tuned, q, tuned_q).gate
    # `residual` keeps half of the frozen memory beside the token mix.
    assert torch.equal(gate, torch.full_like(gate, 0.75 if name == "residual" else 0.5))


@pytest.mark.parametrize("name", list(INPUTS))
def test_dropout_acts_in_training_only(name: str) -> None:
    inputs = memories()
    gate = made(name, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(gate(*inputs).memory, gate(*inputs).memory)
    gate.train()
    assert not torch.equal(gate(*inputs).memory, gate(*inputs).memory)
    without = made(name, dropout=0.0).train()
    assert torch.equal(without(*inputs).memory, without(*inputs).memory)


def test_dropout_follows_both_maps() -> None:
    h, tuned, q, tuned_q = memories()
    gate = made("token", dropout=0.5).train()
    torch.manual_seed(0)
    value = gate(h, tuned, None, None).gate
    # A dropped output of W_B leaves sigmoid(0); a dropped output of W_A alone would change the others' size only.
    dropped = value == 0.5
    assert 0.3 < dropped.float().mean() < 0.7
    kept = torch.logit(value[~dropped])
    plain = torch.logit(gate.eval()(h, tuned, None, None).gate[~dropped])
    assert not torch.allclose(kept, 2 * plain, rtol=1e-2)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_memories_are_mixed_in_float32(name: str, dtype: torch.dtype) -> None:
    gate, (h, tuned, q, tuned_q) = made(name), memories(dtype)
    mixed = gate(h, tuned, q, tuned_q)
    assert (mixed.gate.dtype, mixed.memory.dtype) == (torch.float32, dtype)
    wanted = expected(name, gate, h, tuned, q, tuned_q)
    torch.testing.assert_close(mixed.memory, wanted.to(dtype), rtol=0, atol=0.02)
    torch.testing.assert_close(mixed.gate, gate(h.float(), tuned.float(), q, tuned_q).gate, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", GATES)
def test_autocast_leaves_the_gate_alone(name: str) -> None:
    gate, inputs = made(name), memories()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gate(*inputs)
    assert mixed.gate.dtype == torch.float32
    assert torch.equal(mixed.gate, gate(*inputs).gate)
    assert torch.equal(mixed.memory, gate(*inputs).memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_is_float32_on_a_half_precision_base(dtype: torch.dtype) -> None:
    base = tiny_base("llama").to(dtype)
    model = SiameseForCausalLM.from_base(base, METHODS["lora"](base), gate_rank=RANK).eval()
    disturb(model)
    ids = torch.tensor(random_prompts([7]))
    output = model(ids, output_gate=True, output_memories=True)
    assert {parameter.dtype for parameter in model.gate.parameters()} == {torch.float32}
    assert (output.gate.dtype, output.logits.dtype, output.base_memory.dtype) == (torch.float32, dtype, dtype)
    means = [
        running_means(memory.float(), torch.ones_like(ids)) for memory in (output.base_memory, output.tuned_memory)
    ]
    mixed = model.gate(output.base_memory, output.tuned_memory, *means)
    torch.testing.assert_close(output.gate, mixed.gate)
    torch.testing.assert_close(output.logits, model.get_output_embeddings()(mixed.memory))


def test_model_cast_as_a_whole_still_mixes_in_float32() -> None:
    model = tiny_siamese("llama", "lora").to(torch.bfloat16)
    output = model(torch.tensor(random_prompts([7])), output_gate=True)
    assert (output.gate.dtype, output.logits.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", GATES)
def test_output_gate_is_what_was_used(name: str) -> None:
    model = tiny_siamese("llama", "lora", name)
    batch = padded(random_prompts())
    output = model(batch.ids, batch.mask, output_gate=True, output_memories=True)
    means = [running_means(memory, batch.mask) for memory in (output.base_memory, output.tuned_memory)]
    torch.testing.assert_close(output.gate, model.gate(output.base_memory, output.tuned_memory, *means).gate)
    assert model(batch.ids, batch.mask).gate is None
    assert model(batch.ids, batch.mask).base_memory is None


def running_means(memory: Tensor, mask: Tensor) -> Tensor:
    means = torch.zeros_like(memory)
    for row, positions in enumerate(running_queries(mask)):
        for position, tokens in enumerate(positions):
            if tokens:
                means[row, position] = memory[row, tokens].mean(dim=0)
    return means


def test_interweave_at_the_ends_is_exact() -> None:
    h, tuned = memories(torch.bfloat16)[:2]
    assert torch.equal(interweave(h, tuned, 1.0), h)
    assert torch.equal(interweave(h, tuned, 0.0), tuned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("querry", WIDTH, RANK, 0.1), "gate must be one of query_aware, token, average.*, got 'querry'"),
        (("token", WIDTH, 0, 0.1), "gate_rank must be a positive integer below the hidden size 32, got 0"),
        (("token", WIDTH, -2, 0.1), "gate_rank must be .*, got -2"),
        (("token", WIDTH, WIDTH, 0.1), "gate_rank must be .* 32, got 32"),
        (("token", WIDTH, 2.0, 0.1), "gate_rank must be .*, got 2.0"),
        (("token", WIDTH, True, 0.1), "gate_rank must be .*, got True"),
        (("token", WIDTH, RANK, 1.0), r"gate_dropout must be a number in \[0, 1\), got 1.0"),
        (("token", WIDTH, RANK, -0.1), "gate_dropout must be .*, got -0.1"),
        (("token", WIDTH, RANK, "a"), "gate_dropout must be .*, got 'a'"),
    ],
)
def test_bad_settings_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_gate(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gate": "x"}, "gate must be one of"), ({"gate_rank": 32}, "gate_rank"), ({"gate_dropout": 2}, "gate_dropout")],
)
def test_bad_settings_leave_the_base_untouched(settings: dict[str, object], message: str) -> None:
    base = tiny_base("llama")
    modules = [type(module) for module in base.modules()]
    with pytest.raises(InputError, match=message):
        SiameseForCausalLM.from_base(base, METHODS["lora"](base), **settings)
    assert [type(module) for module in base.modules()] == modules
