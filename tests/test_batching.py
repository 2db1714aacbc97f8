"""Which records share a batch and a row: by length, and packed without touching each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory_bank import examples, learn, run_settings, with_bank
from test_training import losses
from transformers import PreTrainedTokenizerBase
from zoo import METHODS, tiny_base, tiny_siamese

from imsm import GATES, InputError, SiameseForCausalLM, TrainConfig, train
from imsm.data import IGNORED, AnswerCollator, Example
from imsm.packing import refuse_unpackable
from imsm.query import answer_boundaries, example_starts
from imsm.training.batching import LengthSampler

KEEP_APART = ["llama", "gemma3", "gpt2", "mistral", "mixtral", "phi", "granite"]
LEAK = ["bloom", "lfm2", "opt", "falcon"]


def padded_share(lengths: Sequence[int], order: Sequence[int], size: int) -> float:
    """Share of a run's tokens that are padding."""
    batches = [[lengths[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def sampler(lengths: Sequence[int], size: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return list(LengthSampler(lengths, size, seed, lambda: epoch))


# -- batches by length -----------------------------------------------------------------------------------------------


def test_batches_by_length_pad_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (1000,), generator=generator).tolist()
    order = sampler(lengths, 8)
    assert sorted(order) == list(range(1000))
    by_chance = torch.randperm(1000, generator=generator).tolist()
    assert padded_share(lengths, order, 8) < 0.2 * padded_share(lengths, by_chance, 8)
    # In no order of length: the first half of the batches is as long as the second.
    assert sum(lengths[i] for i in order[:500]) == pytest.approx(sum(lengths) / 2, rel=0.1)


def test_the_order_is_one_s_own_and_new_in_each_epoch() -> None:
    lengths = [length % 17 + 3 for length in range(101)]
    assert sampler(lengths, 4, 7, 2) == sampler(lengths, 4, 7, 2)
    orders = {tuple(sampler(lengths, 4, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampler(lengths, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_few_records_and_a_rest() -> None:
    assert sorted(sampler([5, 3, 9], 8)) == [0, 1, 2]
    last = {sampler(list(range(10)), 4, epoch=epoch)[-1] for epoch in range(20)}
    assert len(last) > 3  # what is left over is not always the longest


@pytest.mark.parametrize("group", [True, False])
def test_the_setting_decides(group: bool, base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = SiameseForCausalLM.forward

    def forward(model: SiameseForCausalLM, **batch: Any) -> Any:
        seen.append(int((batch["attention_mask"] == 0).sum()))
        return real(model, **batch)

    monkeypatch.setattr(SiameseForCausalLM, "forward", forward)
    settings = run_settings(base_folder, tmp_path) | {"batch_size": 4, "max_steps": 6}
    train(TrainConfig(**{**settings, "group_by_length": group}, output_dir=str(tmp_path / "run")))
    assert (sum(seen) < 60) == group


# -- packing ---------------------------------------------------------------------------------------------------------


def test_rows_are_few_and_hold_every_example_once(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    records = [
        Example([number + 1] * length, [IGNORED, *[7] * (length - 1)], number)
        for number, length in enumerate((5, 3, 9, 2, 4))
    ]
    collator = AnswerCollator(plain_tokenizer, row_length=12)
    rows = collator.rows(records)
    assert [[example.line for example in row] for row in rows] == [[2, 1], [0, 4, 3]]
    batch = collator(records)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[3] * 9 + [2] * 3, [1] * 5 + [5] * 4 + [4] * 2 + [collator.pad]]
    assert batch["position_ids"].tolist() == [[*range(9), *range(3)], [*range(5), *range(4), *range(2), 0]]
    firsts = batch["labels"][batch["position_ids"] == 0]
    assert (firsts == IGNORED).all() and (batch["labels"] != IGNORED).sum() == 23 - 5
    # An example longer than a row has one of its own length.
    assert AnswerCollator(plain_tokenizer, row_length=4)(records)["input_ids"].shape == (3, 9)
    with pytest.raises(InputError, match="row_length must be a positive integer, got 0"):
        AnswerCollator(plain_tokenizer, row_length=0)


def test_starts_of_packed_examples() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [4, 5, 6, 0, 0, 1]])
    assert example_starts(positions).tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6, [0, 0, 0, 3, 4, 4]]


def test_an_answer_never_has_a_query_in_the_example_before() -> None:
    """The second example is learnt from its first token on, so its query is what precedes a position, as in a row alone."""
    labels = torch.tensor([[IGNORED, 5, 6, 7, 8, 9]])
    first = torch.tensor([[0, 0, 0, 3, 3, 3]])
    attended = torch.ones_like(labels, dtype=torch.bool)
    packed = answer_boundaries(labels, attended, None, first)
    alone = [answer_boundaries(part, attended[:, :3]) for part in labels.split(3, dim=1)]
    expected = torch.cat([alone[0], alone[1] + 3], dim=1)
    within = [0, 1, 3, 4, 5]  # what the last token of the first example predicts is in the second
    assert packed[0, within].tolist() == expected[0, within].tolist() == [0, 0, 3, 4, 5]


@pytest.mark.parametrize(
    ("gate", "architecture"),
    [*((gate, "llama") for gate in GATES), *(("query_aware", name) for name in KEEP_APART[1:])],
)
def test_packed_loss_and_gradients_are_those_of_rows_of_their_own(
    gate: str, architecture: str, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_siamese(architecture, "lora", gate)
    refuse_unpackable(model)
    records = [example for example in examples() if example.line != 4]  # its first token is learnt
    alone, expected = learn(model, AnswerCollator(plain_tokenizer)(records))
    batch = AnswerCollator(plain_tokenizer, row_length=40)(records)
    assert batch["input_ids"].shape[0] < len(records) / 2
    packed, found = learn(model, batch)
    assert packed == pytest.approx(alone, abs=1e-5)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=2e-5 * max(1.0, float(gradient.abs().max()))), name


def test_packed_and_without_labels_no_example_sees_another() -> None:
    model = tiny_siamese("llama", "lora")
    ids = torch.arange(1, 11)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(part, use_cache=False).logits for part in ids.split((4, 6), dim=1)], dim=1)
    assert torch.allclose(packed, apart, atol=1e-4)
    with pytest.raises(InputError, match="prompt_mask cannot be given with packed examples"):
        model(ids, position_ids=positions, use_cache=False, prompt_mask=torch.ones_like(ids))


@pytest.mark.parametrize("architecture", LEAK)
def test_models_that_mix_packed_examples_are_refused(architecture: str) -> None:
    model = tiny_siamese(architecture, "lora").train()
    with pytest.raises(
        InputError, match=r"packing is on, but \w+ as loaded.* does not keep the examples .* packing: false"
    ):
        refuse_unpackable(model)
    assert model.training and model.streams.tap.memory is None


def test_adapters_that_mix_packed_examples_are_refused() -> None:
    with pytest.raises(InputError, match="packing is on"):
        refuse_unpackable(tiny_siamese("llama", "prefix_tuning"))


def test_half_precision_is_no_leak() -> None:
    base = tiny_base("llama").to(torch.bfloat16)
    refuse_unpackable(SiameseForCausalLM.from_base(base, METHODS["lora"](base)))


def test_a_packed_run_is_the_run_without(base_folder: str, tmp_path: Path) -> None:
    """Same batches, same steps, same losses; with dropout off, since its draws depend on the layout."""
    settings = with_bank(run_settings(base_folder, tmp_path), "off") | {"gate_dropout": 0.0}
    settings["adapter"] = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
    curves = []
    for packing in (False, True):
        folder = tmp_path / str(packing)
        train(TrainConfig(**settings, packing=packing, gradient_accumulation=2, output_dir=str(folder)))
        curves.append(losses(folder))
    assert len(curves[0]) == 6 and curves[1] == pytest.approx(curves[0], abs=1e-4)
