"""Texts that a model gives of itself: reproducible, kept on disk, different from each other, answered greedily."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, Day
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from zoo import tiny_base

from imsm import InputError, samples
from imsm.dates import Dates, one_date
from imsm.generation import continuations, prompt_ids
from imsm.samples import Sample, degenerate, lead_cache, plain_decoding, read_prompts, sample_texts

SHORT: dict[str, Any] = {"prompt_tokens": 8, "answer_tokens": 6, "batch_size": 4}


@pytest.fixture(scope="module")
def model(base_folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base_folder)


def test_a_chat_model_opens_the_user_s_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = sample_texts(model, tokenizer, 6, folder=tmp_path, **SHORT)
    assert len(found) == 6 and len({tuple(sample.prompt_ids) for sample in found}) == 6
    for sample in found:
        text = tokenizer.decode(sample.prompt_ids)
        assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>") == 2
        content = text.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0]
        assert content == content.strip() and any(c.isalnum() for c in content)


def test_a_base_model_goes_on_from_several_openings(
    model: PreTrainedModel, plain_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    found = sample_texts(model, plain_tokenizer, 12, folder=tmp_path, **{**SHORT, "batch_size": 12})
    texts = [plain_tokenizer.decode(sample.prompt_ids) for sample in found]
    assert sum(text.startswith("Question:") for text in texts) == 1
    assert sum(text.startswith("How") for text in texts) >= 1
    assert len({text[:2] for text in texts}) > 4


DATED = "<|im_start|>system\n{{ strftime_now('%d %b') }}\n{{ messages[0].system }}<|im_end|>\n" + CHATML


@pytest.mark.parametrize("given", [False, True])
def test_samples_are_kept_once_for_all_days(
    given: bool, model: PreTrainedModel, with_template: Callable[[str], Any], tmp_path: Path, day: Day
) -> None:
    dated, found = with_template(DATED), []
    (tmp_path / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": text, "system": who}]}) + "\n"
            for text, who in (("yes", "You are no one."), ("no, no", ""))
        )
    )
    for date in ("03 May", "14 May"):
        day(date)
        prompts = read_prompts(str(tmp_path / "prompts.jsonl"), dated) if given else None
        found.append(sample_texts(model, dated, 2, prompts=prompts, folder=tmp_path / "kept", **SHORT))
        if prompts is not None:
            assert sorted(prompts) == sorted(sample.prompt_ids for sample in found[-1])
    assert len(list((tmp_path / "kept").iterdir())) == 1
    first, second = ([dated.decode(sample.prompt_ids) for sample in day] for day in found)
    assert [text.replace("03 May", "14 May") for text in first] == second != first


def test_the_date_of_a_template_is_its_own_again(with_template: Callable[[str], Any], day: Day) -> None:
    dated, asked = with_template(DATED), [{"role": "user", "content": "yes"}]
    day("03 May")
    today = dated.apply_chat_template(asked, tokenize=False)
    with pytest.raises(ZeroDivisionError), one_date(dated):
        assert dated.apply_chat_template(asked, tokenize=False) == today.replace("03 May", "26 Jul")
        raise ZeroDivisionError
    assert dated.apply_chat_template(asked, tokenize=False) == today


def test_prompts_without_a_date_are_kept_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "26 Jul"}])
    assert Dates(tokenizer).keep(ids) == Dates(tokenizer).renew(ids) == ids


def test_answers_are_the_greedy_ones(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """One by one, without padding and without a cache."""
    for sample in sample_texts(model, tokenizer, 3, folder=tmp_path, **SHORT):
        ids = list(sample.prompt_ids)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert ids == sample.prompt_ids + sample.answer_ids


def test_seed_and_count(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The seed decides; what is there first stays first as more are asked for; the random state is left alone."""
    torch.manual_seed(5)
    few = sample_texts(model, tokenizer, 3, 1, folder=tmp_path / "a", **SHORT)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    more = sample_texts(model, tokenizer, 9, 1, folder=tmp_path / "a", **SHORT)
    at_once = sample_texts(model, tokenizer, 9, 1, folder=tmp_path / "b", **SHORT)
    assert more[:3] == few and more == at_once
    assert sample_texts(model, tokenizer, 3, 2, folder=tmp_path / "a", **SHORT) != few


def test_texts_are_read_back_from_the_disk(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sample_texts(model, tokenizer, 4, folder=tmp_path, **SHORT)
    (path,) = tmp_path.iterdir()
    line = json.loads(path.read_text().splitlines()[0])
    assert line["prompt"] == tokenizer.decode(first[0].prompt_ids)
    with monkeypatch.context() as patch:
        patch.setattr(samples, "continuations", None)
        assert sample_texts(model, tokenizer, 4, folder=tmp_path, **SHORT) == first
    path.write_text("damaged")
    assert sample_texts(model, tokenizer, 4, folder=tmp_path, **SHORT) == first


def test_another_model_tokenizer_or_setting_is_another_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    with_template: Callable[[str], PreTrainedTokenizerBase],
    base_folder: str,
    tmp_path: Path,
) -> None:
    changed = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        changed.lm_head.weight[5, 5] += 1
    ending = AutoModelForCausalLM.from_pretrained(base_folder)
    ending.generation_config.eos_token_id = 9
    half = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    other = with_template(tokenizer.chat_template.replace("assistant", "bot"))  # the user's turn opens alike
    for given in (
        (model, tokenizer, {}),
        (changed, tokenizer, {}),
        (ending, tokenizer, {}),
        (half, tokenizer, {}),
        (model, other, {}),
        (model, tokenizer, {"seed": 1}),
        (model, tokenizer, {"prompts": [[5, 6]]}),
        (ending, tokenizer, {"prompts": [[5, 6]]}),
    ):
        sample_texts(given[0], given[1], 1, folder=tmp_path, **given[2], **SHORT)
    assert len(list(tmp_path.iterdir())) == 8


def test_the_model_s_own_generation_settings_do_not_count(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base_folder: str, tmp_path: Path
) -> None:
    expected = sample_texts(model, tokenizer, 4, folder=tmp_path / "a", **SHORT)
    odd = AutoModelForCausalLM.from_pretrained(base_folder)
    odd.generation_config.update(no_repeat_ngram_size=1, min_new_tokens=8, min_p=0.9, do_sample=True)
    assert sample_texts(odd, tokenizer, 4, folder=tmp_path / "b", **SHORT) == expected
    assert odd.generation_config.no_repeat_ngram_size == 1


def test_rounds_are_kept_as_they_come(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def stop(done: int, wanted: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_texts(model, tokenizer, 9, folder=tmp_path, report=stop, **SHORT)
    (path,) = tmp_path.iterdir()
    assert 0 < len(path.read_text().splitlines()) <= 4
    whole = sample_texts(model, tokenizer, 9, folder=tmp_path / "b", **SHORT)
    assert sample_texts(model, tokenizer, 9, folder=tmp_path, **SHORT) == whole


def test_a_turn_that_ends_without_a_special_token_is_cut(
    model: PreTrainedModel,
    with_template: Callable[[str], PreTrainedTokenizerBase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = with_template("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")
    said = tokenizer("Hello you [/INST] yes")["input_ids"]
    monkeypatch.setattr(samples, "continuations", lambda model, rows, pad, **_: [said for _ in rows])
    (sample,) = sample_texts(model, tokenizer, 2, folder=tmp_path, **SHORT)
    assert tokenizer.decode(sample.prompt_ids) == "[INST] Hello you [/INST]"


def test_degenerate_texts() -> None:
    assert degenerate([]) and degenerate([1, 2] * 6)
    assert not degenerate([1]) and not degenerate([1, 1, 2]) and not degenerate(list(range(12)))


def test_a_model_that_has_nothing_to_say_is_refused(
    plain_tokenizer: PreTrainedTokenizerBase, base_folder: str, tmp_path: Path
) -> None:
    silent = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
    # All tokens are alike, so greedy answers are the first one, which is the padding.
    with pytest.raises(InputError, match="gave no text that can be used .* retain.prompts"):
        sample_texts(silent, plain_tokenizer, 4, folder=tmp_path, **SHORT)
    assert not list(tmp_path.iterdir())


def test_a_template_that_hides_the_user_s_text_is_refused(
    with_template: Callable[[str], PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    tokenizer = with_template("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(InputError, match="does not show the user's text as it is"):
        sample_texts(tiny_base("llama"), tokenizer, 1, folder=tmp_path, **SHORT)


# -- prompts of the user's -------------------------------------------------------------------------------------------


def written(folder: Path, *records: Any) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_prompts_of_a_file(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "no"}]
    path = written(tmp_path, {"prompt": "one"}, {"input": "two", "output": "x"}, {"messages": turns})
    found = read_prompts(path, tokenizer)
    assert [tokenizer.decode(ids) for ids in found] == [
        "one",
        "two",
        "<|im_start|>user\nyes?<|im_end|>\n<|im_start|>assistant\n",
    ]
    answered = sample_texts(model, tokenizer, 9, prompts=found, folder=tmp_path / "kept", **SHORT)
    assert sorted(sample.prompt_ids for sample in answered) == sorted(found)
    assert isinstance(answered[0], Sample) and 0 < len(answered[0].answer_ids) <= 6


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a"},
            "line 1: a prompt is expected as 'prompt' or 'input' (a text) or 'messages' (a list), keys found",
        ),
        ({"prompt": ""}, "line 1: a prompt is expected"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "line 1: a prompt is expected"),
        (3, "line 1: a JSON object is expected"),
        ({"prompt": " \n"}, "line 1: a prompt is expected"),
        ({"prompt": "half \ud83d"}, "line 1: 'prompt' has half of a character"),
        ({"messages": ["hi"]}, "line 1: 'messages[0]' must be an object with 'role' and 'content', got a text"),
        ({"messages": [{"content": "hi"}]}, "line 1: 'messages[0].role' must be one of"),
        ({"messages": [{"role": "user", "content": " "}]}, "line 1: a prompt is expected to end in a user's turn"),
    ],
)
def test_bad_prompts_are_refused(record: Any, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_prompts(written(tmp_path, record), tokenizer)
    assert message in str(caught.value)


def test_prompts_as_messages_need_a_template(plain_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = written(tmp_path, {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(InputError, match="line 1: this tokenizer has no chat template"):
        read_prompts(path, plain_tokenizer)


def test_the_tokenizer_of_a_folder_is_that_of_memory(base_folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert samples.tokenizer_facts(AutoTokenizer.from_pretrained(base_folder)) == samples.tokenizer_facts(tokenizer)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt"])
def test_rows_behind_a_lead_that_is_run_once_go_on_as_alone(name: str) -> None:
    model = tiny_base(name)
    lead = list(range(5, 25))
    rows = [[*lead, *rest] for rest in ([30], [31, 32, 33], [34, 35])]
    cache = lead_cache(model, lead, len(rows))
    assert cache is not None
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with plain_decoding(model):
        found = continuations(model, rows, 0, shared=len(lead), past_key_values=cache, **settings)
        alone = [continuations(model, [row], 0, **settings)[0] for row in rows]
    assert found == alone


@pytest.mark.parametrize("name", ["lfm2", "mistral", "gemma3"])
def test_a_state_that_is_not_all_keys_and_values_is_not_shared(name: str) -> None:
    assert lead_cache(tiny_base(name), list(range(5, 25)), 2) is None


def test_a_text_may_have_any_line_s_end_in_it(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Some characters end a line for some readers, and not for JSON Lines."""
    ids = tokenizer("one\u2028two\x85three", add_special_tokens=False)["input_ids"]
    rows = [(0, Sample(ids, [1, 2], "plain")), (3, Sample([4], [], "chat"))]
    samples.write_rows(tmp_path / "rows.jsonl", rows, tokenizer)
    assert samples.read_rows(tmp_path / "rows.jsonl") == rows
