"""The pooled query: which tokens it holds, by labels, prompt mask, prompt length, or none of them."""

from __future__ import annotations

import pytest
import torch
from oracle import IGNORE, Oracle, answer_queries, assert_same, marked_queries, mean_memories, running_queries
from prompts import LENGTHS, padded, random_prompts
from torch import Tensor
from zoo import tiny_base, tiny_siamese

from imsm import InputError, SiameseForCausalLM, TwinCache
from imsm.query import answer_boundaries, ends, pool

QUERY_GATES = ["query_aware", "query_blended"]

# Rows as drawn: q query, A and B answers, . padding, and for every position the last token of its query.
HAND_MADE = [
    ("qqqAA", [2, 2, 2, 2, 2]),
    ("..qqA", [3, 3, 3, 3, 3]),
    ("qAA..", [0, 0, 0, 0, 0]),
    ("qqAqqB", [1, 1, 4, 4, 4, 4]),
    ("qAqBq", [0, 2, 2, 2, 2]),
    ("qqqq", [0, 1, 2, 3]),
    ("AAqB", [0, 2, 2, 2]),
    ("AAAA", [0, 1, 2, 3]),
    ("..AA", [0, 1, 2, 3]),
    ("....", [0, 1, 2, 3]),
    ("A", [0]),
    ("q", [0]),
]


def drawn(row: str) -> tuple[Tensor, Tensor]:
    """Labels and mask, each (1, T), of a drawn row."""
    labels = torch.tensor([[7 if c in "AB" else IGNORE for c in row]])
    return labels, torch.tensor([[c != "." for c in row]])


@pytest.mark.parametrize(("row", "boundaries"), HAND_MADE)
def test_boundaries_of_hand_made_rows(row: str, boundaries: list[int]) -> None:
    assert answer_boundaries(*drawn(row)).tolist() == [boundaries]


def random_case(seed: int, least: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, mask and memories of four rows: padding on either side, answers anywhere, some rows with none."""
    generator = torch.Generator().manual_seed(seed)
    width = int(torch.randint(least, 12, (), generator=generator))
    labels = torch.full((4, width), IGNORE)
    mask = torch.zeros(4, width, dtype=torch.bool)
    for row in range(4):
        left, right = sorted(torch.randint(0, width + 1, (2,), generator=generator).tolist())
        mask[row, left:right] = True
        share = float(torch.rand((), generator=generator))
        answered = mask[row] & (torch.rand(width, generator=generator) < share) & (row > 0)
        labels[row, answered] = 5
    return labels, mask, torch.randn(4, width, 3, generator=generator)


@pytest.mark.parametrize("seed", range(60))
def test_boundaries_and_means_are_the_loops(seed: int) -> None:
    labels, mask, memory = random_case(seed)
    boundary = answer_boundaries(labels, mask)
    expected = mean_memories(memory, answer_queries(mask, labels))
    torch.testing.assert_close(pool(memory, mask, boundary, None, None), expected)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_means_go_on_over_what_is_cached(seed: int, cut: int) -> None:
    """The second half with the first half's sums is the second half of the whole."""
    labels, mask, memory = random_case(seed, least=6)
    labels[:, :cut] = IGNORE
    held = mask[:, :cut].float()
    count = held.sum(dim=1, keepdim=True)
    total = (memory[:, :cut] * held[..., None]).sum(dim=1)
    boundary = answer_boundaries(labels[:, cut:], mask[:, cut:], count)
    expected = mean_memories(memory, answer_queries(mask, labels))[:, cut:]
    torch.testing.assert_close(pool(memory[:, cut:], mask[:, cut:], boundary, total, count), expected)


@pytest.mark.parametrize("last", [0, 2, 4])
def test_one_boundary_for_all_is_the_same_as_one_each(last: int) -> None:
    _, mask, memory = random_case(7, least=6)
    boundary = torch.full((4, 1), last)
    alone = pool(memory, mask, boundary, None, None)
    each = pool(memory, mask, boundary.expand(-1, memory.shape[1]), None, None)
    torch.testing.assert_close(alone.expand_as(each), each)


def test_the_last_token_of_a_query_is_found_behind_padding_and_in_the_cache() -> None:
    memory = torch.arange(12.0).view(2, 6, 1)
    attended = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0]]).bool()
    boundary = torch.tensor([[5, 2, 1, -1], [5, 1, 0, -1]])
    assert ends(memory, attended, boundary)[..., 0].tolist() == [[5, 2, 0, 0], [8, 6, 6, 0]]
    past = torch.tensor([[[-3.0], [-1.0]], [[-4.0], [-2.0]]])
    assert ends(memory, attended, boundary, past=past)[..., 0].tolist() == [[5, 2, -1, -1], [8, 6, 6, -2]]
    assert ends(memory, attended, boundary - 1, past=past)[..., 0].tolist() == [[4, -1, -1, -3], [8, 6, -2, -4]]
    # Of packed examples, each has its own.
    first = torch.tensor([[3, 0, 0, 0], [4, 1, 0, 0]])
    assert ends(memory, attended, boundary, first)[..., 0].tolist() == [[5, 2, 0, 0], [0, 0, 6, 0]]


def test_mean_of_an_empty_query_is_zero() -> None:
    mask = torch.tensor([[False, False, True]])
    means = pool(torch.ones(1, 3, 2), mask, torch.tensor([[0, 1, 2]]), None, None)
    assert means[0, :, 0].tolist() == [0, 0, 1]


def test_means_of_half_precision_memories_are_float32() -> None:
    memory = torch.full((1, 3000, 1), 1.01, dtype=torch.bfloat16)
    mean = pool(memory, torch.ones(1, 3000, dtype=torch.bool), torch.tensor([[2999]]), None, None)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean[0, 0], memory[0, 0].float())


@pytest.fixture(params=QUERY_GATES)
def model(request: pytest.FixtureRequest) -> SiameseForCausalLM:
    return tiny_siamese("llama", "lora", request.param)


@pytest.fixture
def oracle(model: SiameseForCausalLM) -> Oracle:
    return Oracle(model, tiny_base("llama"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_mask_marks_the_query(model: SiameseForCausalLM, oracle: Oracle, side: str) -> None:
    batch = padded(random_prompts(), side)
    marks = (torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5).long()
    expected = oracle.logits(batch.ids, marked_queries(batch.mask, marks), batch.mask, batch.positions)
    logits = model(batch.ids, batch.mask, batch.positions, prompt_mask=marks).logits
    assert_same(torch.cat(batch.rows(logits)), torch.cat(batch.rows(expected)))


def test_prompt_mask_may_be_shorter_than_the_tokens(model: SiameseForCausalLM) -> None:
    ids = torch.tensor(random_prompts([8]))
    whole = (torch.arange(8) < 5).long()[None]
    assert torch.equal(model(ids, prompt_mask=whole[:, :5]).logits, model(ids, prompt_mask=whole).logits)
    assert torch.equal(model(ids, prompt_length=5).logits, model(ids, prompt_mask=whole).logits)


def test_prompt_mask_wins_over_labels(model: SiameseForCausalLM) -> None:
    ids = torch.tensor(random_prompts([8]))
    marks, labels = (torch.arange(8) < 2).long()[None], ids.clone()
    labels[:, :6] = IGNORE
    logits = model(ids, prompt_mask=marks, labels=labels, output_logits=True).logits
    assert_same(logits, model(ids, prompt_mask=marks).logits)


def test_without_a_boundary_no_token_sees_later_ones(model: SiameseForCausalLM) -> None:
    ids = torch.tensor(random_prompts([8, 8]))
    changed = ids.clone()
    changed[:, 5:] = changed[:, 5:] % 60 + 1
    before, after = model(ids).logits, model(changed).logits
    assert_same(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_two_answers_in_one_sequence_are_each_alone(model: SiameseForCausalLM) -> None:
    """Training on a conversation is what generation does: an answer's query is the prompt it is given then."""
    ids = torch.tensor(random_prompts([12]))
    labels = torch.full_like(ids, IGNORE)
    labels[:, 3:5], labels[:, 8:11] = ids[:, 3:5], ids[:, 8:11]
    together = model(ids, labels=labels, output_logits=True).logits
    for start, stop in ((3, 5), (8, 11)):
        alone = model(ids[:, :stop], prompt_length=start).logits
        assert_same(together[:, start - 1 : stop - 1], alone[:, start - 1 : stop - 1])
    # and not the query of the other answer
    assert not torch.allclose(together[:, 8:10], model(ids, prompt_length=3).logits[:, 8:10], atol=1e-3)


def test_conversations_of_different_shape_share_a_batch(model: SiameseForCausalLM, oracle: Oracle) -> None:
    batch = padded(random_prompts([9, 12, 5]))
    labels = torch.full_like(batch.ids, IGNORE)
    labels[0, 5:7], labels[1, 2:4], labels[1, 8:], labels[2, 10:] = 5, 6, 7, 8
    labels = labels.where(labels == IGNORE, batch.ids)
    expected = oracle.logits(batch.ids, answer_queries(batch.mask, labels), batch.mask, batch.positions)
    logits = model(batch.ids, batch.mask, batch.positions, labels=labels, output_logits=True).logits
    assert_same(torch.cat(batch.rows(logits)), torch.cat(batch.rows(expected)))


def test_labels_after_a_cached_prompt(model: SiameseForCausalLM) -> None:
    """Answers scored on a prompt read once: the query reaches into the cache."""
    batch = padded(random_prompts([9, 6]))
    labels = batch.ids.clone()
    labels[:, :5] = IGNORE
    whole = model(batch.ids, batch.mask, batch.positions, labels=labels, output_logits=True).logits
    for cut in (3, 5):
        cache = model(batch.ids[:, :cut], batch.mask[:, :cut], batch.positions[:, :cut]).past_key_values
        rest = model(
            batch.ids[:, cut:],
            batch.mask,
            batch.positions[:, cut:],
            labels=labels[:, cut:],
            output_logits=True,
            past_key_values=cache,
        )
        assert_same(rest.logits, whole[:, cut:])


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4, 2])], ids=["last", "last three", "chosen"])
def test_kept_positions_have_their_own_query(model: SiameseForCausalLM, kept: int | Tensor) -> None:
    batch = padded(random_prompts())
    inputs = (batch.ids, batch.mask, batch.positions)
    chosen = slice(-kept, None) if isinstance(kept, int) else kept
    for query in ({}, {"prompt_length": 7}, {"prompt_mask": (torch.arange(9) < 7).expand(3, -1)}):
        output = model(*inputs, logits_to_keep=kept, output_gate=True, output_memories=True, **query)
        whole = model(*inputs, output_gate=True, output_memories=True, **query)
        for name in ("logits", "gate", "base_memory", "tuned_memory"):
            assert_same(output[name], whole[name][:, chosen])


def test_rows_may_be_empty(model: SiameseForCausalLM) -> None:
    """A row of padding alone, as the last batch of a run may have, leaves the others as they are."""
    batch = padded(random_prompts([5, 4]))
    mask = torch.cat([batch.mask, torch.zeros(1, 5, dtype=torch.long)])
    ids = torch.cat([batch.ids, torch.zeros(1, 5, dtype=torch.long)])
    labels = torch.where(mask > 0, ids, IGNORE)
    labels[:, :3] = IGNORE
    output = model(ids, mask, labels=labels, output_logits=True)
    alone = model(batch.ids, batch.mask, labels=labels[:2], output_logits=True)
    assert_same(output.logits[:2], alone.logits)
    torch.testing.assert_close(output.loss, alone.loss)


def test_query_of_generation_is_fixed_by_the_prompt(model: SiameseForCausalLM) -> None:
    batch = padded(random_prompts())
    first = model(batch.ids, batch.mask, batch.positions, prompt_length=max(LENGTHS), use_cache=True)
    query = first.past_key_values.query
    expected = [
        mean_memories(memory, running_queries(batch.mask))[:, -1:]
        for memory in Oracle(model, tiny_base("llama")).memories(batch.ids, batch.mask, batch.positions)
    ]
    torch.testing.assert_close(query[0], expected[0])
    torch.testing.assert_close(query[1], expected[1])
    mask = torch.cat([batch.mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    model(batch.ids[:, -1:], mask, batch.positions[:, -1:] + 1, past_key_values=first.past_key_values)
    assert first.past_key_values.query[0] is query[0]


def test_prompt_mask_after_cached_tokens_is_refused(model: SiameseForCausalLM) -> None:
    ids = torch.tensor(random_prompts([6]))
    cache = model(ids[:, :4]).past_key_values
    with pytest.raises(InputError, match="prompt_mask must come with the sequence's first tokens.* 2 tokens after 4"):
        model(ids[:, 4:], prompt_mask=torch.ones(1, 2), past_key_values=cache)
    with pytest.raises(InputError, match="got 7 columns for 6 tokens"):
        model(ids, prompt_mask=torch.ones(1, 7))


def test_contradicting_inputs_are_refused(model: SiameseForCausalLM) -> None:
    ids = torch.tensor(random_prompts([6]))
    with pytest.raises(InputError, match="forward needs input_ids or inputs_embeds"):
        model(attention_mask=torch.ones_like(ids))
    for shape in ((1, 5), (2, 6), (1, 1, 6, 6)):
        with pytest.raises(InputError, match=r"attention_mask must be \(batch, past \+ new tokens\) = \(1, ≥ 6\)"):
            model(ids, attention_mask=torch.ones(shape))
    with pytest.raises(InputError, match="past_key_values must be a TwinCache"):
        model(ids, past_key_values=((),))
    assert model(ids, past_key_values=TwinCache()).past_key_values.seen == 6
