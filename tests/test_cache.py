"""The twin cache: whatever is done to it, going on from it is computing anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same
from prompts import Batch, padded, random_prompts
from torch import Tensor
from transformers import DynamicCache
from zoo import tiny_siamese

from imsm import InputError, SiameseForCausalLM, TwinCache
from imsm.relevance import RelevanceHead

KINDS = [("llama", "lora"), ("llama", "prefix_tuning"), ("gemma3", "lora"), ("lfm2", "lora")]
BATCH = padded(random_prompts())
READ = 7


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request: pytest.FixtureRequest) -> SiameseForCausalLM:
    return tiny_siamese(*request.param)


@pytest.fixture(scope="module")
def llama() -> SiameseForCausalLM:
    return tiny_siamese("llama", "lora")


def read(model: SiameseForCausalLM, batch: Batch = BATCH, stop: int = READ, **kwargs: Any) -> TwinCache:
    """The cache after the first `stop` tokens."""
    return model(batch.ids[:, :stop], batch.mask[:, :stop], batch.positions[:, :stop], **kwargs).past_key_values


def go_on(model: SiameseForCausalLM, cache: TwinCache, batch: Batch, start: int = READ, **kwargs: Any) -> Tensor:
    """Logits of the tokens from `start` on."""
    return model(batch.ids[:, start:], batch.mask, batch.positions[:, start:], past_key_values=cache, **kwargs).logits


def anew(model: SiameseForCausalLM, batch: Batch, start: int = READ, **kwargs: Any) -> Tensor:
    return model(*batch, use_cache=False, **kwargs).logits[:, start:]


def rows(batch: Batch, chosen: Tensor) -> Batch:
    return Batch(*(values[chosen] for values in batch))


OPERATIONS: dict[str, tuple[Callable[[TwinCache], None], list[int]]] = {
    "nothing": (lambda cache: None, [0, 1, 2]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
}


@pytest.mark.parametrize("query", [{}, {"prompt_length": READ}], ids=["running query", "fixed query"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_move_together(model: SiameseForCausalLM, operation: str, query: dict[str, int]) -> None:
    operate, chosen = OPERATIONS[operation]
    cache = read(model, **query)
    if operation in ("repeat", "select") and not all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
        with pytest.raises(AttributeError, match="batch_"):  # transformers' linear attention layers cannot
            operate(cache)
        return
    operate(cache)
    moved = rows(BATCH, torch.tensor(chosen))
    assert_same(go_on(model, cache, moved), anew(model, moved, **query))
    assert cache.batch_size == len(chosen)
    assert cache.get_seq_length() == cache.seen == BATCH.ids.shape[1]


@pytest.mark.parametrize("query", [{}, {"prompt_length": READ}], ids=["running query", "fixed query"])
@pytest.mark.parametrize("removed", [0, 1, 2])
def test_crop_takes_back_tokens(model: SiameseForCausalLM, removed: int, query: dict[str, int]) -> None:
    """Tokens tried and taken back, as in assisted decoding, leave no trace."""
    cache = read(model, stop=5)
    cache.activate_past_recording()
    wrong = (BATCH.ids[:, 5:] + 9) % 60 + 1
    kept = 4 - removed
    tried = torch.cat([BATCH.ids[:, 5 : 5 + kept], wrong[:, kept:]], dim=1)
    model(tried, BATCH.mask, BATCH.positions[:, 5:], past_key_values=cache)
    cache.crop(-removed)
    assert cache.seen == 5 + kept
    if removed:
        logits = go_on(model, cache, BATCH, start=5 + kept)
        assert_same(logits, anew(model, BATCH, start=5 + kept))


def test_the_last_tokens_go_on_and_back() -> None:
    """Of each row, what the frozen stream's memory was at its last tokens that are not padding."""
    cache = TwinCache()
    memory = torch.arange(1.0, 13.0).view(2, 6, 1)
    attended = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]]).bool()

    def recent() -> list[list[float]]:
        running = cache.past_sums()
        assert running is not None and running.recent is not None
        return running.recent[..., 0].tolist()

    cache.record(memory[:, :3], None, attended[:, :3], recent=3)
    assert recent() == [[0, 2, 3], [0, 7, 8]]
    cache.record(memory[:, 3:], None, attended[:, 3:], recent=3)
    assert recent() == [[4, 5, 6], [7, 8, 10]]
    cache.crop(-2)
    assert recent() == [[2, 3, 4], [7, 8, 10]]
    cache.crop(-1)
    assert recent() == [[0, 2, 3], [0, 7, 8]]
    cache.batch_select_indices(torch.tensor([1]))
    assert recent() == [[0, 7, 8]]


@pytest.mark.parametrize("has_head", [False, True])
def test_the_last_token_is_kept_for_a_head_alone(has_head: bool) -> None:
    model = tiny_siamese("llama", "lora")
    if has_head:
        model.set_relevance(RelevanceHead(2 * model.config.hidden_size))
    cache = read(model)
    assert (cache.past_sums().recent is not None) == has_head
    logits = go_on(model, cache, BATCH)
    cache.crop(-1)
    assert (cache.past_sums().recent is not None) == has_head
    assert_same(logits, anew(model, BATCH))
    if has_head:
        found = model(*BATCH, output_memories=True).base_memory
        last = BATCH.mask[:, :-1].cumsum(dim=1).argmax(dim=1)
        assert torch.allclose(cache.past_sums().recent[:, 0], found[torch.arange(len(last)), last], atol=1e-5)


def test_a_cache_from_before_there_was_a_head() -> None:
    model = tiny_siamese("llama", "lora")
    cache = read(model)
    model.set_relevance(RelevanceHead(2 * model.config.hidden_size))
    with pytest.raises(InputError, match="filled by a model without a relevance head"):
        go_on(model, cache, BATCH)
    assert_same(go_on(model, cache, BATCH, force_gate=1.0), anew(model, BATCH, force_gate=1.0))


def test_a_head_reads_on_after_all_is_cropped() -> None:
    model = tiny_siamese("llama", "lora")
    model.set_relevance(RelevanceHead(2 * model.config.hidden_size))
    cache = read(model, stop=4)
    cache.crop(-4)
    assert_same(go_on(model, cache, BATCH, start=0), anew(model, BATCH, start=0))


def test_crop_in_two_steps(llama: SiameseForCausalLM) -> None:
    cache = read(llama, stop=9)
    cache.crop(-1)
    cache.crop(-2)
    assert_same(go_on(llama, cache, BATCH, start=6), anew(llama, BATCH, start=6))


def test_crop_into_the_prompt_forgets_its_query(llama: SiameseForCausalLM) -> None:
    cache = read(llama, stop=8, prompt_length=7)
    cache.crop(-1)
    assert cache.query is not None
    cache.crop(-1)
    assert cache.query is None
    logits = go_on(llama, cache, BATCH, start=6, prompt_length=8)
    assert_same(logits[:, -1], anew(llama, BATCH, prompt_length=8)[:, -1])


def test_crop_beyond_the_last_step(llama: SiameseForCausalLM) -> None:
    """The mean of the query is lost, and nothing else: a gate without a query goes on."""
    batch = padded(random_prompts([9, 9]))
    for gate in ("token", "query_aware"):
        model = tiny_siamese("llama", "lora", gate)
        cache = read(model, batch, stop=6)
        model(batch.ids[:, 6:7], past_key_values=cache)
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([1, 0]))
        swapped = rows(batch, torch.tensor([1, 0]))
        if gate == "token":
            assert_same(go_on(model, cache, swapped, start=5), anew(model, swapped, start=5))
        else:
            with pytest.raises(InputError, match="cropped by more tokens than its last forward pass added"):
                go_on(model, cache, swapped, start=5)


def test_repeated_rows_keep_their_query_after_a_crop(llama: SiameseForCausalLM) -> None:
    cache = read(llama, stop=6, prompt_length=5)
    llama(BATCH.ids[:, 6:7], BATCH.mask[:, :7], BATCH.positions[:, 6:7], past_key_values=cache)
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    twice = rows(BATCH, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert_same(go_on(llama, cache, twice, start=5), anew(llama, twice, start=5, prompt_length=5))


def test_reset_is_a_fresh_cache(model: SiameseForCausalLM) -> None:
    cache = read(model, prompt_length=3)
    cache.reset()
    assert (cache.seen, cache.running, cache.query, cache.prompt_length) == (0, None, None, None)
    other = padded(random_prompts(seed=2))
    assert_same(go_on(model, cache, other, start=0), anew(model, other, start=0))


@torch.no_grad()
def test_copies_go_separate_ways(model: SiameseForCausalLM) -> None:
    cache = read(model)
    twin = copy.deepcopy(cache)
    other = Batch(BATCH.ids.clone(), BATCH.mask, BATCH.positions)
    other.ids[:, READ:] = 5
    assert_same(go_on(model, cache, BATCH), anew(model, BATCH))
    assert_same(go_on(model, twin, other), anew(model, other))


def test_a_cache_of_ones_own(model: SiameseForCausalLM) -> None:
    cache = TwinCache()
    assert read(model, past_key_values=cache) is cache
    assert cache.seen == READ
    assert cache.is_initialized
    assert "seen=7" in repr(cache)
    tokens = model.generate(
        BATCH.ids, attention_mask=BATCH.mask, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    fresh = model.generate(BATCH.ids, attention_mask=BATCH.mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.tolist() == fresh.tolist()


def test_a_cache_is_returned_when_useful(llama: SiameseForCausalLM) -> None:
    ids = BATCH.ids
    assert isinstance(llama(ids).past_key_values, TwinCache)
    assert llama(ids, labels=ids).past_key_values is None
    assert llama(ids, use_cache=False).past_key_values is None
    assert isinstance(llama(ids, labels=ids, use_cache=True).past_key_values, TwinCache)
    assert copy.deepcopy(llama).train()(ids).past_key_values is None


def test_a_given_cache_is_used_whatever_use_cache_says(llama: SiameseForCausalLM) -> None:
    for use_cache in (None, False, True):
        assert_same(go_on(llama, read(llama), BATCH, use_cache=use_cache), anew(llama, BATCH))


@pytest.mark.parametrize("force_gate", [0.0, 1.0])
def test_one_stream_goes_on_alone(model: SiameseForCausalLM, force_gate: float) -> None:
    cache = read(model, force_gate=force_gate)
    assert (cache.base is None) == (force_gate == 0)
    assert (cache.tuned is None) == (force_gate == 1)
    expected = anew(model, BATCH, force_gate=force_gate)
    assert_same(go_on(model, cache, BATCH, force_gate=force_gate), expected)


@pytest.mark.parametrize("force_gate", [0.0, 1.0])
def test_a_stream_left_out_cannot_come_back(llama: SiameseForCausalLM, force_gate: float) -> None:
    with pytest.raises(InputError, match="filled with force_gate and lacks a stream"):
        go_on(llama, read(llama, force_gate=force_gate), BATCH)
    with pytest.raises(InputError, match="lacks a stream"):
        go_on(llama, read(llama, force_gate=force_gate), BATCH, force_gate=1 - force_gate)
    # also if it was there at first
    cache = read(llama, stop=5)
    llama(BATCH.ids[:, 5:7], BATCH.mask[:, :7], BATCH.positions[:, 5:7], past_key_values=cache, force_gate=force_gate)
    with pytest.raises(InputError, match="lacks a stream"):
        go_on(llama, cache, BATCH)


def test_generation_after_a_forced_gate_is_refused(llama: SiameseForCausalLM) -> None:
    cache = read(llama, force_gate=1)
    with pytest.raises(InputError, match="lacks a stream"):
        llama.generate(BATCH.ids, attention_mask=BATCH.mask, past_key_values=cache, max_new_tokens=2)


def test_other_caches_are_refused(llama: SiameseForCausalLM) -> None:
    with pytest.raises(
        InputError, match=r"must be a TwinCache \(imsm.TwinCache\(\) is an empty one\), got DynamicCache"
    ):
        llama(BATCH.ids, past_key_values=DynamicCache())
    with pytest.raises(InputError, match="must be a TwinCache"):
        llama.generate(BATCH.ids, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(InputError, match="a TwinCache belongs to a siamese model"):
        llama.base(BATCH.ids, past_key_values=read(llama))


def test_cache_says_what_it_can(llama: SiameseForCausalLM) -> None:
    cache = read(llama)
    assert len(cache) == 2
    assert len(cache.layers) == 4
    assert cache.get_max_length() == -1
    assert cache.get_mask_sizes(2, 0) == (READ + 2, 0)
    assert cache.is_croppable
    assert not cache.is_compileable
