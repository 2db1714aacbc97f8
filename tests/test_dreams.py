"""Dreams: both kinds by turns, of all lengths, reproducible, kept on disk, answered when answers are asked for."""

from __future__ import annotations

import copy
import json
from collections import Counter
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, SPECIAL, Day
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from zoo import tiny_chat

from imsm import InputError, dreams, samples
from imsm.dreams import CHAT, LENGTHS, PLAIN, dream, finished, read_anchors
from imsm.samples import Sampler

SHORT: dict[str, Any] = {"prompt_tokens": 12, "answer_tokens": 5, "batch_size": 12}
CORPUS = [
    *PLAIN,
    *CHAT,
    "the quick brown fox jumps over a lazy dog while zebras vex bold knights",
    "How do I open an account? Yes, you can. No, it is not so!\nuser assistant system",
]


@pytest.fixture(scope="module")
def plain_words() -> PreTrainedTokenizerFast:
    """A tokenizer of a few English words and letters, so that a random model's texts are legible."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        CORPUS * 5, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|eos|>", extra_special_tokens=SPECIAL[1:3]
    )


@pytest.fixture
def words(plain_words: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a ChatML template."""
    made = copy.deepcopy(plain_words)
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def model(plain_words: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_chat(plain_words)


HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_model_dreams_turns_and_plain_texts(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = dream(model, words, 13, folder=tmp_path, **SHORT)
    assert [sample.kind for sample in found] == (["chat"] * 2 + ["plain"] * 3) * 2 + ["chat"] * 2 + ["plain"]
    assert len({tuple(sample.prompt_ids) for sample in found}) == 13
    for sample in found:
        text = words.decode(sample.prompt_ids)
        assert (text.startswith(HEAD) and text.endswith(TAIL)) is (sample.kind == "chat")
        said = text.removeprefix(HEAD).removesuffix(TAIL)
        assert "<|" not in said and said == (said.strip() if sample.kind == "plain" else said.lstrip())
        assert 0 < len(sample.answer_ids) <= 5
    plain = [words.decode(sample.prompt_ids) for sample in found if sample.kind == "plain"]
    assert all(any(text.startswith(opening) for opening in PLAIN) for text in plain)


def test_a_template_that_writes_the_date_makes_one_file_for_all_days(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path, day: Day
) -> None:
    """And gives the dreams of the day's date, which the task's prompts have too."""
    words.chat_template = "<|im_start|>system\n{{ strftime_now('%b') }}<|im_end|>\n" + CHATML
    found = []
    for date in ("May", "Apr"):
        day(f"03 {date}")
        found.append(dream(model, words, 10, folder=tmp_path, **SHORT))
        leads = {
            words.decode(sample.prompt_ids).split("<|im_end|>")[0] for sample in found[-1] if sample.kind == "chat"
        }
        assert leads == {f"<|im_start|>system\n{date}"}
        again = dream(model, words, 10, folder=tmp_path, answers=False, **SHORT)
        assert [sample.prompt_ids for sample in again] == [sample.prompt_ids for sample in found[-1]]
    assert len(list(tmp_path.iterdir())) == 1
    for first, second in zip(*found, strict=True):
        texts = [words.decode(sample.prompt_ids) for sample in (first, second)]
        assert texts[0].replace("May", "Apr") == texts[1] and first.answer_ids == second.answer_ids
        assert (texts[0] != texts[1]) == (first.kind == "chat")


def test_a_base_model_dreams_plain_texts_from_many_openings(
    model: PreTrainedModel, plain_words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = dream(model, plain_words, 30, folder=tmp_path, answers=False, **SHORT)
    assert {sample.kind for sample in found} == {"plain"}
    texts = [plain_words.decode(sample.prompt_ids) for sample in found]
    assert not any("<|" in text for text in texts)
    assert len({opening for opening in PLAIN for text in texts if text.startswith(opening)}) > 15


def test_lengths_vary(model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = dream(model, words, 80, folder=tmp_path, answers=False, prompt_tokens=24, batch_size=24)
    for kind, frame in (("chat", len(words(HEAD + TAIL)["input_ids"])), ("plain", 0)):
        lengths = [len(sample.prompt_ids) - frame for sample in found if sample.kind == kind]
        assert sum(length <= 8 for length in lengths) >= 3
        assert sum(length >= 16 for length in lengths) >= 3


def test_every_opening_is_met_with_every_length() -> None:
    assert all(gcd(len(LENGTHS), other) == 1 for other in (2, len(PLAIN), len(CHAT)))
    assert gcd(len(PLAIN), len(CHAT)) == 1 and len(set(PLAIN)) == len(PLAIN)
    assert len(set(CHAT)) == len(CHAT) - CHAT.count("") + 1


def test_seed_count_and_random_state(model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    few = dream(model, words, 5, 1, folder=tmp_path / "a", **SHORT)
    assert torch.equal(torch.rand(1), expected)
    more = dream(model, words, 20, 1, folder=tmp_path / "a", **SHORT)
    assert len(more) == 20 and more[:5] == few
    assert more == dream(model, words, 20, 1, folder=tmp_path / "b", **SHORT)
    assert few != dream(model, words, 5, 2, folder=tmp_path / "a", **SHORT)


def test_answers_are_added_to_the_same_prompts(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = dream(model, words, 6, folder=tmp_path, answers=False, **SHORT)
    assert not any(sample.answer_ids for sample in prompts)
    monkeypatch.setattr(Sampler, "round", None)
    answered = dream(model, words, 6, folder=tmp_path, **SHORT)
    assert [sample.prompt_ids for sample in answered] == [sample.prompt_ids for sample in prompts]
    # One by one, without padding and without a cache.
    for sample in answered:
        ids = list(sample.prompt_ids)
        for _ in sample.answer_ids:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids == sample.prompt_ids + sample.answer_ids
        assert len(sample.answer_ids) == 5 or sample.answer_ids[-1] == words.eos_token_id
    assert dream(model, words, 6, folder=tmp_path, answers=False, **SHORT) == prompts


def test_dreams_are_read_back_from_the_disk(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dream(model, words, 6, folder=tmp_path, **SHORT)
    (path,) = tmp_path.iterdir()
    assert {json.loads(line)["kind"] for line in path.read_text().splitlines()} == {"chat", "plain"}
    monkeypatch.setattr(samples, "continuations", None)
    assert dream(model, words, 6, folder=tmp_path, **SHORT) == first
    assert dream(model, words, 3, folder=tmp_path, **SHORT) == first[:3]


def test_another_seed_or_setting_is_another_file(
    model: PreTrainedModel,
    words: PreTrainedTokenizerFast,
    plain_words: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    dream(model, words, 2, folder=tmp_path, **SHORT)
    dream(model, words, 4, folder=tmp_path, answers=False, **SHORT)
    assert len(list(tmp_path.iterdir())) == 1
    dream(model, words, 2, 1, folder=tmp_path, **SHORT)
    dream(model, words, 2, folder=tmp_path, **{**SHORT, "prompt_tokens": 9})
    dream(model, plain_words, 2, folder=tmp_path, **SHORT)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_is_there_is_reported(model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    dream(model, words, 20, folder=tmp_path, report=lambda *numbers: told.append(numbers), **SHORT)
    assert told[-1] == (40, 40) and told == sorted(told)
    assert (20, 40) in told and told[0][0] < 20


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_if_there_are_no_more_of_one_kind_there_are_more_of_the_other(
    kind: str,
    model: PreTrainedModel,
    words: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dreams, "finished", lambda text, its, ended, place: text if its == kind else None)
    found = dream(model, words, 6, folder=tmp_path, answers=False, **SHORT)
    assert [sample.kind for sample in found] == [kind] * 6


def test_a_template_that_hides_the_text_leaves_plain_dreams(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    words.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    found = dream(model, words, 4, folder=tmp_path, answers=False, **SHORT)
    assert [sample.kind for sample in found] == ["plain"] * 4


def test_a_model_that_dreams_nothing_is_refused(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "continuations", lambda model, rows, pad, **_: [[pad] for _ in rows])
    with pytest.raises(InputError, match="dreamt nothing that can be used .* turn dreams off"):
        dream(model, words, 4, folder=tmp_path, **SHORT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "ended", "kept"),
    [
        ("Who was the first? He was not the", False, "Who was the first?"),
        ("Who was the first? He was not the", True, "Who was the first? He was not the"),
        ("Yes. It is a long way that we have to go from he", False, "Yes. It is a long way that we have to go from"),
        ("Question: Is it so?\nAnswer: It was onc", False, "Question: Is it so?\nAnswer:"),
        ('He said "no." Then he wen', False, 'He said "no."'),
        ("A good title\nand then there wa", False, "A good title"),
        ("12.5 is a number of the sort tha", False, "12.5 is a number of the sort"),
        ("你好，今天天气怎么样？", True, "你好，今天天气怎么样？"),
        ("A <b>bold</b> word and <em>another<br> one", True, "A bold word and another one"),
        ("#include <vector> and more", True, "#include <vector> and more"),
        ("Hello", True, None),
        ("Read the", True, None),
        ("1. 2. 3. 4. 5. 6. ab cd", True, None),
        ("one two one two one two one", True, None),
        ("a text <|im_start|> with markup", True, None),
        ("a text [/INST] with markup", True, None),
        ("broken \ufffd\ufffd text here", True, None),
        ("", True, None),
    ],
)
def test_texts_are_brought_to_an_end_or_left_out(text: str, ended: bool, kept: str | None) -> None:
    assert finished(text, "plain", ended) == kept


def test_a_turn_that_the_limit_cut_is_left_out() -> None:
    said = {finished("Is it so? I do not kno", "chat", False, place) for place in range(60)}
    assert said == {"Is it so?", "is it so", "is it so?", "Is it so", "Is it so?\n", '"Is it so?"'}
    assert finished("I do not kno", "chat", False) is None


def test_a_third_of_the_turns_are_laid_out_as_they_are_and_a_third_in_small_letters() -> None:
    found = Counter(finished("Who was the first?", "chat", True, place) for place in range(600))
    assert 170 < found["Who was the first?"] < 230 and 170 < found["who was the first"] < 230
    assert {finished("Who was the first?", "plain", True, place) for place in range(60)} == {"Who was the first?"}


def test_anchors(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "anchors.jsonl"
    records = [{"text": "the fox"}, {"input": "a dog", "text": "?"}, {"messages": [{"role": "user", "content": "you"}]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [words.decode(ids) for ids in read_anchors(str(path), words)] == [
        "the fox",
        "a dog",
        f"{HEAD}you{TAIL}",
    ]
    path.write_text(json.dumps({"words": "the fox"}))
    with pytest.raises(InputError) as caught:
        read_anchors(str(path), words)
    assert "line 1: a prompt is expected as 'prompt', 'input' or 'text' (a text) or 'messages'" in str(caught.value)


def test_who_has_given_up_gives_up_again(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that seldom ends a user's turn has the same dreams at every call, however many are asked for."""
    monkeypatch.setattr(dreams, "IDLE", 24)
    monkeypatch.setattr(
        dreams, "finished", lambda text, kind, ended, place=0: None if kind == "chat" else finished(text, kind, ended)
    )
    found = dream(model, words, 400, folder=tmp_path, answers=False, **SHORT)
    assert 0 < len(found) < 400 and {sample.kind for sample in found} == {"plain"}
    assert dream(model, words, 400, folder=tmp_path, answers=False, **SHORT) == found
    assert dream(model, words, 5, folder=tmp_path, answers=False, **SHORT) == found[:5]
