"""Where answers end: at the model's own ends, else the tokenizer's, and at the token that the training data end them with."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from imsm import answers
from imsm.data import IGNORED, Example
from imsm.data.formats import Conversation, Pair
from imsm.data.rendering import Renderer
from imsm.generation import answer_ends
from imsm.training.ends import learn_end


def examples(tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[Example]:
    renderer = Renderer(tokenizer, add_eos=not chat)
    if not chat:
        return [renderer.render(Pair("is it", "yes"), line) for line in (1, 2)]
    turns = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "yes"}]
    return [renderer.render(Conversation(turns, 0), line) for line in (1, 2)]


def test_a_model_learns_where_its_data_end_an_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    turn_end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    for before, after in ((7, [7, turn_end]), ([7, 8], [7, 8, turn_end]), (None, turn_end), (turn_end, turn_end)):
        generation = GenerationConfig(eos_token_id=before)
        learn_end(generation, examples(tokenizer, chat=True), tokenizer)
        assert generation.eos_token_id == after
    generation = GenerationConfig()
    learn_end(generation, examples(tokenizer, chat=False), tokenizer)
    assert generation.eos_token_id == eos


def test_what_ends_few_answers_or_is_a_word_ends_none(tokenizer: PreTrainedTokenizerBase) -> None:
    word, end = 20, tokenizer.convert_tokens_to_ids("<|im_end|>")
    open_ended = [Example([5, word], [IGNORED, word], line) for line in range(3)]
    ended = [Example([5, end], [IGNORED, end], 9)]
    generation = GenerationConfig(eos_token_id=7)
    learn_end(generation, [*open_ended, *ended], tokenizer)
    assert generation.eos_token_id == 7


def test_without_ends_of_its_own_a_model_stops_at_the_tokenizer_s(
    tokenizer: PreTrainedTokenizerBase, base_folder: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.generation_config.eos_token_id = None
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    (whole,) = answers(model, other, ["is it"], max_new_tokens=6)
    assert len(whole.token_ids) == 6 and answer_ends(model, other) == []
    other.eos_token = other.convert_ids_to_tokens(whole.token_ids[2])
    (cut,) = answers(model, other, ["is it"], max_new_tokens=6)
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[2]) + 1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_settings_of_a_sloppy_base_can_still_be_saved(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, do_sample: bool
) -> None:
    """What a base says of sampling without doing it, transformers keeps from being saved once a setting is another."""
    given = {
        "eos_token_id": 7,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 9,
        "length_penalty": 2.0,
        "do_sample": do_sample,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    generation = GenerationConfig.from_pretrained(tmp_path)
    learn_end(generation, examples(tokenizer, chat=True), tokenizer)
    generation.save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    assert read.eos_token_id == [7, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert (read.temperature, read.top_k) == ((0.7, 9) if do_sample else (None, None))
    assert bool(read.do_sample) is do_sample
