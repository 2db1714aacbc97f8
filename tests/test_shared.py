"""Both streams in one pass: what is run for it, and that it gives what two passes give."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from oracle import assert_same
from prompts import padded, random_prompts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CompileConfig, DynamicCache, StaticCache
from zoo import METHODS, disturb, tiny_base, tiny_siamese

from imsm import InputError, SiameseForCausalLM, TwinCache
from imsm.attention import FOLDED, folded_attention
from imsm.probe import prove_shared
from imsm.shared import SharedBase, TwinLayer, TwinLowRank, layers_below
from imsm.views import FewRowsLinear, PatchedForwardError, view

BATCH = padded(random_prompts())
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def upper(base: nn.Module, layer: int = 1) -> peft.PeftConfig:
    """LoRA on the layers from `layer` on."""
    count = base.config.num_hidden_layers
    return peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=list(range(layer, count)))


def siamese(config: peft.PeftConfig, architecture: str = "llama") -> SiameseForCausalLM:
    model = SiameseForCausalLM.from_base(tiny_base(architecture), config, gate_rank=4)
    disturb(model)
    return model.eval()


def memories(model: SiameseForCausalLM, passes: str) -> Tensor:
    model.passes = passes
    with torch.no_grad():
        output = model(*BATCH, output_memories=True)
    return torch.cat(BATCH.rows(torch.cat([output.base_memory, output.tuned_memory], dim=-1)))


def calls(model: SiameseForCausalLM, **kwargs: Any) -> list[int]:
    """Rows that each call of the first and last layer's norm had; norms are in every view and not adapted."""
    seen: list[int] = []
    layers = model.base.model.layers
    handles = [
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
        for layer in (layers[0], layers[-1])
    ]
    with torch.no_grad():
        model(*BATCH, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def test_weights_are_read_once() -> None:
    model = tiny_siamese("llama", "lora")
    assert model.passes == "shared"
    assert calls(model) == [6, 6]
    model.passes = "two"
    assert calls(model) == [3, 3, 3, 3]


@pytest.mark.parametrize(("gate", "rows"), [(1, [3, 3]), (0, [3, 3]), (0.5, [6, 6])])
def test_an_ignored_stream_is_not_run(gate: float, rows: list[int]) -> None:
    assert calls(tiny_siamese("llama", "lora"), force_gate=gate) == rows


def test_training_and_gradients_take_two_passes() -> None:
    model = tiny_siamese("llama", "lora")
    output = model(*BATCH)
    assert output.past_key_values.shared is None and output.logits.requires_grad
    with torch.no_grad():
        assert model.train()(*BATCH, use_cache=True).past_key_values.shared is None
        assert model.eval()(*BATCH).past_key_values.shared is not None


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2", "mixtral"])
def test_layers_below_the_adapter_are_computed_once(architecture: str) -> None:
    base = tiny_base(architecture)
    names = ["q_proj"] if architecture == "mixtral" else ["q_proj", "up_proj"]
    config = peft.LoraConfig(r=4, target_modules=names, layers_to_transform=[base.config.num_hidden_layers - 1])
    model = siamese(config, architecture)
    assert model.streams.once == layers_below(model.base) == model.config.num_hidden_layers - 1
    assert_same(memories(model, "shared"), memories(model, "two"), 1e-4)
    with torch.no_grad():
        cache = model(*BATCH).past_key_values
    model.passes = "shared"
    with torch.no_grad():
        cache = model(*BATCH).past_key_values
    assert [layer.keys.shape[0] for layer in cache.shared.layers] == [3] * model.streams.once + [6]


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select", "split to base", "split to tuned"])
def test_a_cache_with_layers_of_both_sizes_moves_as_one(operation: str) -> None:
    model = siamese(upper(tiny_base("llama")))
    prompt = {
        "input_ids": BATCH.ids[:, :7],
        "attention_mask": BATCH.mask[:, :7],
        "position_ids": BATCH.positions[:, :7],
    }
    with torch.no_grad():
        cache = model(**prompt).past_key_values
    rows = torch.arange(3)
    if operation == "reorder":
        rows = torch.tensor([2, 0, 0])
        cache.reorder_cache(rows)
    elif operation == "select":
        rows = torch.tensor([2, 1])
        cache.batch_select_indices(rows)
    elif operation == "repeat":
        rows = rows.repeat_interleave(2)
        cache.batch_repeat_interleave(2)
    gate = {"force_gate": int(operation == "split to base")} if operation.startswith("split") else {}
    with torch.no_grad():
        after = model(
            BATCH.ids[rows, 7:], BATCH.mask[rows], BATCH.positions[rows, 7:], past_key_values=cache, **gate
        ).logits
        expected = model(BATCH.ids[rows], BATCH.mask[rows], BATCH.positions[rows], use_cache=False, **gate).logits
    assert_same(after, expected[:, 7:])
    assert (cache.shared is None) == operation.startswith("split")


def kv_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_weights_and_cache_take_what_was_promised() -> None:
    model = siamese(METHODS["lora"](tiny_base("llama")))
    with torch.no_grad():
        model(*BATCH)  # views are made
        plain = model.peft_model(*BATCH, use_cache=True).past_key_values
        assert kv_bytes(model(*BATCH).past_key_values) == 2 * kv_bytes(plain)
        half = siamese(upper(tiny_base("llama")))
        assert kv_bytes(half(*BATCH).past_key_values) == 1.5 * kv_bytes(plain)
    shared = model.streams._view("shared")
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in shared.parameters()} <= own


# -- kinds of layers -------------------------------------------------------------------------------------------------


def layers_of(model: SiameseForCausalLM, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.streams._view("shared").modules())


@pytest.mark.parametrize(
    ("method", "fast"), [("lora", 14), ("rslora", 14), ("dora", 0), ("ia3", 0), ("adalora", 0), ("vera", 0)]
)
def test_plain_lora_takes_the_short_way_and_others_their_own(method: str, fast: int) -> None:
    model = tiny_siamese("llama", method)
    assert layers_of(model, TwinLowRank) == fast and layers_of(model, TwinLayer) == 14 - fast


class Quantised(nn.Module):
    """Stands for any base layer that is no `nn.Linear`: eight-bit weights with a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ (self.weight.to(x.dtype) * self.scale).T


@pytest.mark.parametrize("method", ["lora", "ia3", "vera"])
def test_other_base_layers_are_called_once(method: str) -> None:
    model = tiny_siamese("llama", method)
    layers = []
    for module in model.peft_model.modules():
        if hasattr(module, "base_layer") and isinstance(module.base_layer, nn.Linear):
            module.base_layer = Quantised(module.base_layer)
            layers.append(module.base_layer)
    model.streams._views = {}
    shared = memories(model, "shared")
    counted = [module.calls for module in model.streams._view("shared").modules() if isinstance(module, Quantised)]
    assert len(counted) == len(layers) == 14 and set(counted) == {1}
    assert_same(shared, memories(model, "two"), 1e-4)


def test_a_method_that_replaces_its_base_layer() -> None:
    """LN-tuning has a norm of its own and never calls the old one."""
    model = tiny_siamese("llama", "ln_tuning")
    assert layers_of(model, SharedBase) == 5
    assert_same(memories(model, "shared"), memories(model, "two"), 1e-4)


def test_modules_to_save() -> None:
    base = tiny_base("llama")
    model = siamese(peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]))
    assert model.passes == "shared" and base is not None
    assert_same(memories(model, "shared"), memories(model, "two"), 1e-4)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_cannot_share_falls_back_to_two_passes() -> None:
    """Adapted expert weights act on whatever runs through the layer: the proof fails, and says so."""
    base = tiny_base("mixtral")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model = SiameseForCausalLM.from_base(base, config, gate_rank=4)
    disturb(model)
    assert model.eval().passes == "two"
    assert "does not give what two passes give" in model.streams.why_two or "fails" in model.streams.why_two
    with pytest.raises(InputError, match="cannot share a pass"):
        model.passes = "shared"
    assert model.generate(BATCH.ids, attention_mask=BATCH.mask, **GREEDY).shape == (3, 17)


def test_the_proof_can_fail() -> None:
    model = tiny_siamese("llama", "lora")
    whole = model.streams._view

    def wrong(name: str) -> Any:
        made = whole(name)
        if name == "shared":
            next(module for module in made.modules() if isinstance(module, TwinLowRank))._scaling = {"default": 0.0}
        return made

    model.streams._view = wrong
    prove_shared(model.streams)
    assert model.streams.once is None and "does not give" in model.streams.why_two


def test_passes_is_checked() -> None:
    with pytest.raises(InputError, match="must be 'shared' or 'two', got 'three'"):
        tiny_siamese("llama", "lora").passes = "three"


# -- views -----------------------------------------------------------------------------------------------------------


def test_views_follow_the_model() -> None:
    """Trained, cast, scaled, switched off, given another adapter: the shared pass is still two passes."""
    model = tiny_siamese("llama", "lora")
    memories(model, "shared")
    for change in (
        lambda: disturb(model, seed=5),
        lambda: model.to(torch.float64),
        lambda: [module.set_scale("default", 3.0) for module in model.modules() if hasattr(module, "set_scale")],
        lambda: model.peft_model.base_model.disable_adapter_layers(),
        lambda: model.peft_model.base_model.enable_adapter_layers(),
    ):
        before = memories(model, "two")
        change()
        shared, two = memories(model, "shared"), memories(model, "two")
        assert not torch.equal(before.to(two.dtype), two)
        assert_same(shared, two, 1e-4)


def test_another_adapter_may_reach_further_down() -> None:
    model = siamese(upper(tiny_base("llama")))
    memories(model, "shared")
    assert model.streams.once == 1
    model.peft_model.add_adapter("low", peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0]))
    model.peft_model.set_adapter("low")
    disturb(model)
    assert_same(memories(model, "shared"), memories(model, "two"), 1e-4)
    assert model.streams.once == 0


def test_a_merged_adapter_is_refused() -> None:
    model = tiny_siamese("llama", "lora")
    model.peft_model.merge_adapter()
    with torch.no_grad(), pytest.raises(InputError, match="merged into the base weights"):
        model(*BATCH)


def test_a_replaced_forward_is_run_with_the_adapter_switched_off() -> None:
    """As accelerate does it for layers on several devices; a view would run the original."""
    model = tiny_siamese("llama", "lora")
    expected = memories(model, "two")
    for layer in model.base.model.layers:
        layer.forward = layer.forward
    with pytest.raises(PatchedForwardError):
        view(model.base, lambda module, of: None)
    model.streams._views = {}
    assert torch.equal(memories(model, "two"), expected)
    prove_shared(model.streams)
    assert model.passes == "two"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 1, 24), (4, 3, 24), (80, 1, 24)])
def test_few_rows(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(24, 40, bias=bias)
    x = torch.randn(shape)
    found = FewRowsLinear.of(linear)(x)
    assert FewRowsLinear.serves(x) == (shape[0] < 64) and FewRowsLinear.serves(x.bfloat16()) == (shape[0] == 4)
    assert found.shape == (*shape[:-1], 40)
    torch.testing.assert_close(found, linear(x))


# -- generation ------------------------------------------------------------------------------------------------------


def generated(model: SiameseForCausalLM, **kwargs: Any) -> list[list[int]]:
    return model.generate(BATCH.ids, attention_mask=BATCH.mask, **(GREEDY | kwargs)).tolist()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_way_to_decode_gives_the_same(architecture: str) -> None:
    model = tiny_siamese(architecture, "lora")
    expected = generated(model)
    assert generated(model, cache_implementation="static") == expected
    model.passes = "two"
    assert generated(model) == generated(model, cache_implementation="static") == expected


def test_compiled_decoding() -> None:
    """One graph, for each of the streams and for both, that later calls use again; no C++ compiler is asked for."""
    torch._dynamo.reset()
    model = siamese(upper(tiny_base("llama")))
    config = CompileConfig(mode="default", fullgraph=True, backend="aot_eager")
    for gate in (None, 1, 0):
        torch._dynamo.utils.counters.clear()
        kwargs = {"force_gate": gate}
        compiled = generated(model, cache_implementation="static", compile_config=config, **kwargs)
        assert compiled == generated(model, **kwargs)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.utils.counters.clear()
    assert generated(model, cache_implementation="static", compile_config=config) == generated(model)
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")


def test_compiling_needs_a_static_cache() -> None:
    model = tiny_siamese("llama", "lora")
    with pytest.raises(InputError, match="compile_config needs cache_implementation='static'"):
        generated(model, compile_config=CompileConfig())


def test_a_given_cache_decides() -> None:
    """Two caches that a caller brings are filled by two passes; a cache begun shared goes on so."""
    model = tiny_siamese("llama", "lora")
    cache = TwinCache(DynamicCache(config=model.base.config), DynamicCache(config=model.base.config))
    with torch.no_grad():
        model(*BATCH, past_key_values=cache)
        assert cache.shared is None and cache.base.get_seq_length() == cache.tuned.get_seq_length() == 9
        cache = model(BATCH.ids[:, :7], BATCH.mask[:, :7], BATCH.positions[:, :7]).past_key_values
        model.passes = "two"
        after = model(BATCH.ids[:, 7:], BATCH.mask, BATCH.positions[:, 7:], past_key_values=cache).logits
    assert cache.shared is not None
    assert_same(after, model(*BATCH, use_cache=False).logits[:, 7:])


def test_a_static_cache_can_be_split() -> None:
    model = tiny_siamese("llama", "lora")
    with torch.no_grad():
        for gate in (1.0, 0.0):
            cache = TwinCache()
            cache.shared = StaticCache(config=model.base.config, max_cache_len=12)
            model(BATCH.ids[:, :7], BATCH.mask[:, :7], BATCH.positions[:, :7], past_key_values=cache)
            found = model(BATCH.ids[:, 7:], BATCH.mask, BATCH.positions[:, 7:], past_key_values=cache, force_gate=gate)
            whole = model(BATCH.ids, BATCH.mask, BATCH.positions, force_gate=gate).logits[:, 7:]
            torch.testing.assert_close(found.logits, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_attention(dtype: torch.dtype, masked: bool) -> None:
    """Against the product and softmax written out, for grouped heads; and the kinds of call left to transformers."""
    query, key, value = (torch.randn(2, heads, n, 8).to(dtype) for heads, n in ((6, 1), (3, 5), (3, 5)))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()[:, None, None] if masked else None
    module = nn.Module()
    module.num_key_value_groups = 2
    found, weights = folded_attention(module, query, key, value, mask, scaling=0.3)
    assert found.shape == (2, 1, 6, 8) and weights is None
    keys, values = (x.repeat_interleave(2, dim=1).float() for x in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * 0.3
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(dim=-1) @ values).transpose(1, 2)
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_only_the_shared_view_folds() -> None:
    model = tiny_siamese("llama", "lora")
    attention = model.streams._view("shared").model.layers[0].self_attn
    assert attention.config._attn_implementation == FOLDED
    assert model.base.config._attn_implementation == "sdpa"
    assert model.streams._view("frozen").config is model.base.config
    model.base.set_attn_implementation("eager")
    assert model.streams._view("shared").model.layers[0].self_attn.config._attn_implementation == "eager"
    assert_same(memories(model, "shared"), memories(model, "two"), 1e-4)


def test_autocast_on_few_rows() -> None:
    """In place nothing is added to what autocast has made of another dtype."""
    model = siamese(peft.LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.tensor([[5, 9, 3]])
    found = []
    for passes in ("shared", "two"):
        model.passes = passes  # type: ignore[assignment]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(model.generate(ids, **GREEDY))
            found.append(model(ids, labels=ids).loss)
    assert torch.equal(found[0], found[2])
    assert_same(found[1], found[3], 1e-2)


@pytest.mark.parametrize("passes", ["shared", "two"])
def test_layers_on_another_device_than_the_head(passes: Any) -> None:
    """What is known of a GPU's tensors without one: memories that come from there meet none of the head's as they are."""
    model = siamese(peft.LoraConfig(r=4, target_modules="all-linear"))
    model.passes = passes
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: torch.empty_like(value) for name, value in held.items() if value is not None})
        model.base.lm_head.register_forward_pre_hook(lambda head, args: (args[0].to("cuda:0"),), prepend=True)
        ids = torch.zeros(2, 6, dtype=torch.long)
        for kwargs in ({}, {"prompt_length": 6}, {"prompt_mask": ids}, {"output_memories": True, "output_gate": True}):
            with torch.no_grad():
                assert model(ids, torch.ones_like(ids), **kwargs).logits.device.type == "cpu"
