"""The experiment with gates behind layers: the mix against hand computation, caches, gradients, and the runner."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import METHODS, disturb, tiny_base

from benchmarks.forgetting import records
from benchmarks.forgetting.plan import train_config
from benchmarks.inside.__main__ import main
from benchmarks.inside.cache import InsideCache
from benchmarks.inside.gates import LayerGates
from benchmarks.inside.job import LayerMeters, build, open_inside
from benchmarks.inside.model import LAYER_GATES, InsideForCausalLM
from benchmarks.inside.plan import make_plan
from imsm import DataConfig, SiameseForCausalLM, TwinCache
from imsm.errors import InputError

IDS = torch.tensor([[5, 9, 33, 2, 61, 17, 4, 8], [8, 8, 21, 40, 3, 50, 0, 0]])
MASK = (IDS != 0).long()
PROMPTS = (4, 3)
LABELS = torch.where(torch.arange(8) < torch.tensor(PROMPTS)[:, None], -100, IDS).masked_fill(MASK == 0, -100)
BATCH: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def inside(*layers: int, final: str = "query_aware", dropout: float = 0.0) -> InsideForCausalLM:
    """A tiny Llama with gates behind the layers, adapter and gates disturbed, in eval mode."""
    base = tiny_base("llama")
    model = InsideForCausalLM.from_base(base, METHODS["lora"](base), gate_rank=4, gate_dropout=dropout)
    assert isinstance(model, InsideForCausalLM)
    model.set_final(final)
    model.gate_inside(layers)
    disturb(model)
    for gate in (model.gate, model.layer_gates):
        assert gate is not None
        disturb(gate, scale=0.5)
    return model.eval()


# -- by hand ---------------------------------------------------------------------------------------------------------


def normalised(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def mixed_by_hand(weights: dict[str, Tensor], h: Tensor, tuned: Tensor, prompt: int) -> Tensor:
    """The equations for one row (T, d), token by token: `prompt` tokens are the query."""
    found = []
    for t in range(len(h)):
        until = min(t + 1, prompt)
        q, tuned_q = (normalised(x)[:until].mean(dim=0) for x in (h, tuned))
        x = torch.cat([q, normalised(h[t]), normalised(tuned[t]), tuned_q])
        gate = torch.sigmoid(weights["up.weight"] @ (weights["down.weight"] @ x))
        found.append(gate * h[t] + (1 - gate) * tuned[t])
    return torch.stack(found)


def memory_by_hand(model: InsideForCausalLM, row: Tensor, prompt: int) -> Tensor:
    """The tuned memory (T, d) of one row, layer by layer; the frozen stream is a base that never met an adapter."""
    ids = row[None]
    frozen = tiny_base("llama")(input_ids=ids, output_hidden_states=True).hidden_states
    decoder = model.base.model
    states = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(states, position_ids=torch.arange(len(row))[None])
    for number, layer in enumerate(decoder.layers):
        # Outside of a call of the model the hook does nothing.
        states = layer(states, attention_mask=None, position_embeddings=rotary)
        assert model.layer_gates is not None
        if str(number) in model.layer_gates.gates:
            # The last of transformers' hidden states is behind the norm: the layer's own is had by running it.
            h = frozen[number + 1] if number + 1 < len(decoder.layers) else behind_the_last(ids)
            weights = dict(model.layer_gates.gates[str(number)].named_parameters())
            states = mixed_by_hand(weights, h[0], states[0], prompt)[None]
    return decoder.norm(states)[0]


def behind_the_last(ids: Tensor) -> Tensor:
    base = tiny_base("llama")
    seen: list[Tensor] = []
    base.model.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    base(input_ids=ids)
    return seen[0]


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_the_mix_is_the_equations(layers: tuple[int, ...], training: bool) -> None:
    model = inside(*layers)
    model.train(training)
    with torch.enable_grad() if training else torch.no_grad():  # two passes, or one of both streams
        found = model(**BATCH, output_memories=True).tuned_memory
    for row, (length, prompt) in enumerate(zip(MASK.sum(dim=1).tolist(), PROMPTS, strict=True)):
        expected = memory_by_hand(model, IDS[row, :length], prompt)
        torch.testing.assert_close(found[row, :length], expected, rtol=0, atol=2e-5)
        other = memory_by_hand(model, IDS[row, :length], length)
        assert not torch.allclose(expected, other, atol=1e-3)  # where the query ends makes itself felt


@torch.no_grad()
def test_without_a_boundary_the_mean_runs_on() -> None:
    model = inside(0, 1)
    found = model(input_ids=IDS[:1], output_memories=True, use_cache=False).tuned_memory[0]
    torch.testing.assert_close(found, memory_by_hand(model, IDS[0], 8), rtol=0, atol=2e-5)


# -- laws ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_forced_gates_are_the_adapter_and_the_base() -> None:
    model = inside(0, 1)
    adapter = model.peft_model(input_ids=IDS, attention_mask=MASK).logits
    base = tiny_base("llama")(input_ids=IDS, attention_mask=MASK).logits
    known = MASK.bool()
    for force, expected in ((0.0, adapter), (1.0, base)):
        for more in ({}, {"output_memories": True}, {"use_cache": False}):
            logits = model(input_ids=IDS, attention_mask=MASK, force_gate=force, **more).logits
            torch.testing.assert_close(logits[known], expected[known], rtol=0, atol=2e-5)
    free = model(input_ids=IDS, attention_mask=MASK).logits
    assert all((free - other)[known].abs().max() > 1e-2 for other in (adapter, base))


@pytest.mark.parametrize(("layer", "force", "same"), [(1, 1.0, "base"), (0, 0.0, "adapter"), (0, 1.0, "neither")])
@torch.no_grad()
def test_a_layer_forced_alone(layer: int, force: float, same: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = inside(layer, final="tuned")
    assert model.layer_gates is not None
    given = model.layer_gates.mixing
    monkeypatch.setattr(model.layer_gates, "mixing", lambda query, held, forced: given(query, held, force))
    output = model(input_ids=IDS, attention_mask=MASK, output_memories=True)
    model.layer_gates = None
    alone = model(input_ids=IDS, attention_mask=MASK, output_memories=True)
    known = MASK.bool()

    def is_same(memory: Tensor) -> bool:
        return torch.allclose(output.tuned_memory[known], memory[known], rtol=0, atol=2e-5)

    torch.testing.assert_close(output.base_memory[known], alone.base_memory[known], rtol=0, atol=2e-5)
    assert [is_same(alone.base_memory), is_same(alone.tuned_memory)] == [same == "base", same == "adapter"]


@pytest.mark.parametrize("final", ["query_aware", "tuned"])
@pytest.mark.parametrize("passes", ["shared", "two"])
@torch.no_grad()
def test_cached_is_uncached(final: str, passes: str) -> None:
    model = inside(0, 1, final=final)
    model.passes = passes
    left = torch.tensor([[0, 0, 5, 9, 33], [8, 21, 40, 3, 50]])
    mask = (left != 0).long()
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    cached = model.generate(input_ids=left, attention_mask=mask, output_logits=True, **how)
    assert isinstance(cached.past_key_values, InsideCache)
    uncached = model.generate(input_ids=left, attention_mask=mask, output_logits=True, use_cache=False, **how)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=5e-5)

    tokens = cached.sequences
    for row, prompt in ((0, 3), (1, 5)):
        ids = tokens[row, 5 - prompt :][None]
        # The same as training sees it, alone and without padding, and as kept answers are scored.
        labels = torch.where(torch.arange(ids.shape[1]) < prompt, -100, ids)
        marked = (torch.arange(ids.shape[1]) < prompt).long()[None]
        for boundary in ({"labels": labels, "output_logits": True}, {"prompt_mask": marked}, {"prompt_length": prompt}):
            whole = model(input_ids=ids, use_cache=False, **boundary).logits[0, prompt - 1 : -1]
            torch.testing.assert_close(whole, torch.stack(cached.logits)[:, row], rtol=0, atol=5e-5)

    # By hand, in pieces of a prompt and of an answer, with the boundary told once.
    ids, cache, found = tokens[1:], None, []
    for start, end in ((0, 2), (2, 5), (5, 6), (6, 9), (9, 11)):
        output = model(input_ids=ids[:, start:end], past_key_values=cache, prompt_length=5 if start == 0 else None)
        cache = output.past_key_values
        found.append(output.logits[0])
    expected = model(input_ids=ids, prompt_length=5, use_cache=False).logits[0]
    torch.testing.assert_close(torch.cat(found)[4:], expected[4:], rtol=0, atol=5e-5)
    beams = {**how, "num_beams": 3, "max_new_tokens": 4}
    sequences = [model.generate(input_ids=ids[:, :5], use_cache=cached, **beams).sequences for cached in (True, False)]
    assert torch.equal(*sequences)


@torch.no_grad()
def test_nothing_later_is_seen() -> None:
    model = inside(0, 1)
    changed = IDS[:1].clone()
    changed[0, 5] = 44
    for boundary in ({}, {"prompt_length": 7}, {"labels": torch.where(torch.arange(8) < 7, -100, IDS[:1])}):
        kwargs = {**boundary, "use_cache": False, "output_memories": True}
        before, after = (model(input_ids=ids, **kwargs).tuned_memory[0] for ids in (IDS[:1], changed))
        torch.testing.assert_close(before[:5], after[:5], rtol=0, atol=1e-6)
        assert (before[5:] - after[5:]).abs().amax(dim=-1).min() > 1e-3


def test_gates_and_adapter_learn_and_nothing_else() -> None:
    model = inside(0, dropout=0.1).train()
    model(**BATCH).loss.backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert found == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"layer_gates.gates.0.down.weight", "layer_gates.gates.0.up.weight", "gate.up.weight"} <= found
    assert all("lora" in name or "gate" in name for name in found)
    assert any("layers.0" in name for name in found)


def test_it_begins_as_the_base() -> None:
    base = tiny_base("llama")
    model = InsideForCausalLM.from_base(base, METHODS["lora"](base), gate_rank=4)
    assert isinstance(model, InsideForCausalLM)
    siamese = SiameseForCausalLM.forward(model.eval(), input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, siamese, rtol=0, atol=0)  # without layers it is the product
    model.gate_inside([1])
    assert model.layer_gates is not None
    meters = LayerMeters(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, siamese, rtol=0, atol=2e-5)
    meters.on_log(None, None, None)
    assert meters.means == {"gate_1": 0.5}


def test_variants_begin_with_the_same_adapter(base_folder: str) -> None:
    settings = {"adapter": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}, "dreams": {"mode": "off"}}
    config = train_config(settings, model=base_folder, output_dir="o", data=DataConfig(train="d"), seed=3)
    made = [build(config, layers, final, 8) for layers in ([], [0]) for final in ("tuned", "query_aware")]
    adapters = [{name: p for name, p in model.named_parameters() if "lora_A" in name} for model in made]
    assert len(adapters[0]) == 14
    assert all(torch.equal(p, other[name]) for other in adapters[1:] for name, p in adapters[0].items())


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    model = inside(0, 1)
    model.save_pretrained(tmp_path)
    loaded = InsideForCausalLM.from_pretrained(tmp_path, base=tiny_base("llama"))
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-6)
    (tmp_path / LAYER_GATES).unlink()
    with pytest.raises(InputError, match=f"{LAYER_GATES} missing"):
        InsideForCausalLM.from_pretrained(tmp_path, base=tiny_base("llama"))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[2], [-1, 0], [0, 0], []])
def test_wrong_layers_are_refused(layers: list[int]) -> None:
    with pytest.raises(
        InputError, match=r"layers must be different numbers from 0 to 1, as the base model has 2 layers"
    ):
        inside(*layers)


def test_a_layer_below_the_adapter_is_refused() -> None:
    base = tiny_base("llama")
    config = METHODS["lora"](base)
    config.layers_to_transform = [1]  # type: ignore[attr-defined]
    model = InsideForCausalLM.from_base(base, config, gate_rank=4)
    with pytest.raises(InputError, match="give layers from 1 on"):
        LayerGates(model.base, [0], 4, 0.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": torch.tensor([[-100, 9, -100, 2, -100, -100, 4, 8]])}, "one answer a row"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "use_cache": False}, "packed rows"),
        ({"past_key_values": TwinCache()}, "must be an InsideCache, got TwinCache"),
        ({"base_memory": torch.zeros(1, 32)}, "leave out base_memory"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inside(0)(input_ids=IDS[:1], **given)


@torch.no_grad()
def test_a_cache_serves_one_answer() -> None:
    model = inside(0)
    cache = InsideCache()
    model.generate(input_ids=IDS[:1], past_key_values=cache, max_new_tokens=2, do_sample=False, pad_token_id=0)
    with pytest.raises(InputError, match="fresh cache for the next"):
        cache.begin_answer(12)
    with pytest.raises(InputError, match="cannot be cropped"):
        cache.crop(-1)
    cache.reset()
    assert cache.seen == 0 and not cache.inside


@torch.no_grad()
def test_rows_of_a_cache_change_places() -> None:
    model = inside(0, 1)
    cache = model(input_ids=IDS[:, :5], prompt_length=5).past_key_values
    expected = model(input_ids=IDS[:, 5:6], past_key_values=cache).logits
    cache = model(input_ids=IDS[:, :5], prompt_length=5).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = model(input_ids=IDS[:, 5:6].flip(0), past_key_values=cache).logits
    torch.testing.assert_close(swapped.flip(0), expected, rtol=0, atol=2e-5)


# -- the runner ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, base_folder: str) -> list[str]:
    """The command on a tiny model and tiny data."""
    banking = [{"input": f"w{i % 7} ask\nIntent:", "output": f"w{i % 7}", "text": f"w{i} ask"} for i in range(224)]
    for name, rows in {
        "banking77/train": banking,
        "banking77/test": banking[:4],
        "webq/test": [{"input": f"who is word{i}?", "output": [f"word{i}"]} for i in range(3)],
        "freebaseqa/test": [{"input": f"what is word{i}?", "output": [f"word{i}"]} for i in range(3)],
        "wiki/sentences": [{"text": f"word{i} word{i + 1} word3"} for i in range(3)],
    }.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = ["--data-root", str(tmp_path / "data"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    return ["run", "--model", base_folder, "--records", "24", *folders]


def test_run_is_continued_and_reported(
    jobs: list[dict[str, Any]], run: list[str], base_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*run, "--budget-minutes", "0"]) == 0
    assert not jobs and not (tmp_path / "out").exists()  # out of time at once, and nothing half-written
    assert main([*run, "--layers", "1"]) == 0
    out = tmp_path / "out" / Path(base_folder).name
    names = ["base", "both-1-seed-0", "final-seed-0", "layers-1-seed-0", "lora-seed-0"]
    assert sorted(path.stem for path in out.iterdir()) == names
    assert [task["do"] for task in jobs] == ["evaluate", *["train", "evaluate"] * 4]

    made = {name: records.read(out / f"{name}.json") for name in names}
    trained = [made[name] for name in names[1:]]
    assert all(record.training["steps"] == 3 and record.learning_rate == 1e-3 for record in trained)
    method = made["layers-1-seed-0"].settings["method"]
    assert (method["gate_layers"], method["final"], method["adapter"]["r"]) == ([1], "tuned", 16)
    assert {"gate_1", "gate"} <= set(made["both-1-seed-0"].training)
    assert not {"gate_1", "gate"} & set(made["lora-seed-0"].training)
    assert "gate" not in made["layers-1-seed-0"].training
    tasks = ["banking77", "reworded_1", "reworded_2", "reworded_3", "wiki", "kept_freebaseqa", "kept_webq"]
    assert all(list(record.tasks) == tasks for record in made.values())
    assert {"identical", "agreement", "divergence"} <= set(made["both-1-seed-0"].tasks["kept_webq"]["metrics"])
    again = open_inside(next((tmp_path / "work").rglob("both-1/*/checkpoint")), base_folder)
    assert again.model.config.gate_layers == [1] and again.model.layer_gates.gates["1"].up.weight.abs().max() > 0

    before = len(jobs)
    assert main([*run, "--layers", "1"]) == 0 and len(jobs) == before  # nothing is done twice
    (out / "both-1-seed-0.json").unlink()
    assert main([*run, "--layers", "1"]) == 0 and len(jobs) == before + 1  # the checkpoint is there still
    settings = next((tmp_path / "work").rglob("layers-1/*/settings.json"))
    settings.write_text(settings.read_text().replace("tuned", "average"))
    (out / "layers-1-seed-0.json").rename(tmp_path / "layers-1-seed-0.json")
    assert main([*run, "--layers", "1", "--variants", "layers"]) == 2 and len(jobs) == before + 1
    assert "trained under other settings" in capsys.readouterr().err

    assert main(["report", "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[4].startswith("| base model | 1 |") and len(table) == 11
    assert any(
        re.search(r"layer gates and final gate, behind 1 \|.* 1: 0\.\d+, final: 0\.\d+ \|", line) for line in table
    )
    assert table[-1] == "" and table[-2].startswith("Measured on")


def test_records_of_other_layers_lie_beside() -> None:
    plan = make_plan("smollm2", [4, 20], ["both", "lora"], 8, 3)
    assert list(plan.methods) == ["both-4-20", "lora"] and plan.methods["both-4-20"].seeds == (3,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--layers", "2"], "layers must be different numbers from 0 to 1"),
        (["--variants", "lora", "gates"], "must be some of lora, final, both, layers, got gates"),
        (["--records", "0"], "--records must be a positive integer"),
        (["--seed", "-1"], "--seed must be"),
        (["--records", "200"], "the plan wants 400"),
    ],
)
def test_wrong_arguments_are_told(
    change: list[str], message: str, jobs: list[Any], run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*run, *change]) == 2 and not jobs
    assert message in capsys.readouterr().err


def test_a_report_without_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "python -m benchmarks.inside run" in capsys.readouterr().err
