"""Records to examples: reading, formats, rendering, problems, batches."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from imsm.data import (
    IGNORED,
    AnswerCollator,
    Example,
    ExampleSet,
    Problem,
    describe,
    load_examples,
    read_examples,
)
from imsm.errors import InputError
from imsm.settings import DataConfig

USER, YES = {"role": "user", "content": "question?"}, {"role": "assistant", "content": "yes, and so on"}
MORE, NO = {"role": "user", "content": "more?"}, {"role": "assistant", "content": "no"}
TURNS = [USER, YES, MORE, NO]
PAIR = {"input": "the capital of France?", "output": " Paris"}

Load = Callable[..., ExampleSet]


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Load:
    """Writes records (or lines of text) as JSON Lines and loads them."""

    def run(*records: Any, tokenizer: PreTrainedTokenizerBase = tokenizer, **settings: Any) -> ExampleSet:
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
        return load_examples(DataConfig(str(path), **settings), tokenizer)

    return run


def learnt(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


# -- plain pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [("input", "output"), ("prompt", "completion")])
def test_pairs(keys: tuple[str, str], load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    found = load({keys[0]: "answer:\n", keys[1]: "yes no", "unused": 3})
    prompt = tokenizer("answer:\n")["input_ids"]
    answer = tokenizer("yes no", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert found.examples == [Example(prompt + answer, [IGNORED] * len(prompt) + answer, 1)]
    assert found.format == "/".join(keys)
    assert found.problems == []
    assert (len(found), found[0]) == (1, found.examples[0])


def test_a_completion_never_changes_the_prompts_tokens(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer("Paris")["input_ids"]) < len(tokenizer("Par")["input_ids"] + tokenizer("is")["input_ids"])
    [example] = load({"input": "Par", "output": "is"}).examples
    prompt = tokenizer("Par")["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert learnt(example, tokenizer) == "is<|eos|>"


def test_eos_is_added_once_and_only_if_wanted(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    assert learnt(load(PAIR, add_eos=False)[0], tokenizer) == " Paris"
    assert learnt(load({"input": "a", "output": "b<|eos|>"})[0], tokenizer) == "b<|eos|>"


def test_the_first_of_several_outputs_counts(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    assert learnt(load({"input": "a", "output": [" Paris", " no"]})[0], tokenizer) == " Paris<|eos|>"


def test_a_tokenizer_with_bos_and_prefix_space(load: Load) -> None:
    """As sentencepiece ones: a completion tokenised on its own would get a space that it has not."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(
        ["question A: yes", "yes"] * 9, trainers.BpeTrainer(special_tokens=special, vocab_size=99, show_progress=False)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for answer, tokens in ((" yes", ["▁yes"]), ("yes", ["yes"])):
        [example] = load({"input": "question A:", "output": answer}, tokenizer=made).examples
        assert made.convert_ids_to_tokens(example.input_ids) == ["<s>", "▁question", "▁A:", *tokens, "</s>"]
        assert example.labels[:3] == [IGNORED] * 3
        assert example.input_ids[:3] == made("question A:")["input_ids"]


# -- conversations ---------------------------------------------------------------------------------------------------


def test_all_assistant_turns_are_learnt(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = load({"messages": [*TURNS, MORE]}).examples
    assert learnt(example, tokenizer) == "yes, and so on<|im_end|>no<|im_end|>"
    assert example.input_ids == tokenizer.apply_chat_template(TURNS)["input_ids"]


@pytest.mark.parametrize("answer", [1, 3])
def test_prompts_are_those_of_generation(answer: int, load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = load({"messages": TURNS}).examples
    prompt = tokenizer.apply_chat_template(TURNS[:answer], add_generation_prompt=True)["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt) - 1] == IGNORED
    assert example.labels[len(prompt)] == example.input_ids[len(prompt)]


def test_a_completion_of_messages_alone_is_learnt(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = load({"prompt": TURNS[:3], "completion": [NO]}).examples
    assert learnt(example, tokenizer) == "no<|im_end|>"
    assert example.input_ids == load({"messages": TURNS})[0].input_ids


def test_a_template_without_end_token_gets_eos(load: Load, with_template: Callable[[str], Any]) -> None:
    bare = with_template(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert learnt(load({"messages": TURNS}, tokenizer=bare)[0], bare) == " yes, and so on\n no\n<|eos|>"
    assert learnt(load({"messages": TURNS}, tokenizer=bare, add_eos=False)[0], bare) == " yes, and so on\n no\n"


def test_a_template_that_rewrites_earlier_turns_is_refused(load: Load, with_template: Callable[[str], Any]) -> None:
    forgetful = with_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert len(load({"messages": TURNS[:2]}, tokenizer=forgetful)) == 1
    with pytest.raises(
        InputError, match=r"data\.jsonl, line 2: the tokenizer's chat template changes the text"
    ) as refused:
        load({"messages": TURNS[:2]}, {"messages": TURNS}, tokenizer=forgetful, bad_records="skip")
    assert str(refused.value).endswith("of its own, with 'prompt' and 'completion' as lists of messages")
    apart = [{"prompt": TURNS[:end], "completion": TURNS[end : end + 1]} for end in (1, 3)]
    for example, end in zip(load(*apart, tokenizer=forgetful), (1, 3), strict=True):
        asked = forgetful.apply_chat_template(TURNS[:end], tokenize=False, add_generation_prompt=True)
        assert forgetful.decode(example.input_ids).startswith(asked)
        assert TURNS[end]["content"] in learnt(example, forgetful)


def test_conversations_need_a_chat_template(load: Load, plain_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="no chat template"):
        load({"messages": TURNS}, tokenizer=plain_tokenizer)
    assert len(load(PAIR, tokenizer=plain_tokenizer)) == 1


def test_what_the_template_refuses_is_a_problem(load: Load, with_template: Callable[[str], Any]) -> None:
    strict = with_template("{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}x<|im_end|>")
    found = load({"messages": TURNS}, {"messages": TURNS[:2]}, tokenizer=strict, bad_records="skip")
    assert found.problems == [Problem(1, "the chat template refuses the conversation: too many")]


# -- formats ---------------------------------------------------------------------------------------------------------


def test_unknown_formats_are_refused(load: Load) -> None:
    with pytest.raises(InputError, match="keys found: 'answer', 'question'; expected: 'messages', or 'prompt' and"):
        load({"question": "a", "answer": "b"})


def test_mixed_formats_are_refused(load: Load) -> None:
    with pytest.raises(InputError, match=r"mixes formats: prompt/completion \(line 2\), input/output \(line 1\)"):
        load(PAIR, {"prompt": "a", "completion": "b"}, bad_records="skip")


def test_a_format_complete_in_all_records_is_taken(load: Load) -> None:
    assert load({"prompt": "a", "messages": TURNS}, {"messages": TURNS}).format == "messages"
    assert load({**PAIR, "messages": TURNS}, PAIR).format == "input/output"


def test_alpacas_instruction_is_not_left_out(load: Load) -> None:
    with pytest.raises(InputError, match="'instruction' beside 'input'"):
        load({**PAIR, "instruction": "translate"})


# -- problems --------------------------------------------------------------------------------------------------------

BROKEN: list[tuple[Any, str]] = [
    ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    ("", "the line is empty"),
    ("[]", "a JSON object is expected, got a list"),
    ({"input": "a"}, "'output' missing; keys found: 'input'"),
    ({"other": "a"}, "'input' and 'output' missing; keys found: 'other'"),
    ({"input": "a", "output": 3}, "'output' must be a text, got a number"),
    ({"input": None, "output": "b"}, "'input' must be a text, got null"),
    ({"input": " \n", "output": "b"}, "'input' is empty"),
    (
        {"input": "a \ud83d", "output": "b"},
        "'input' has half of a character (a lone surrogate) in 'a \\ud83d'; correct it",
    ),
    ({"input": "a", "output": ""}, "'output' is empty"),
    ({"input": "a", "output": []}, "'output' is an empty list"),
    ({"input": "a", "output": "b" * 50}, "52 tokens, more than data.max_length 20"),
]


@pytest.mark.parametrize(("record", "reason"), BROKEN)
def test_bad_records_are_reported_with_their_line(record: Any, reason: str, load: Load) -> None:
    found = load(PAIR, record, PAIR, max_length=20, bad_records="skip")
    assert found.problems == [Problem(2, reason)]
    assert [example.line for example in found.examples] == [1, 3]
    with pytest.raises(InputError) as caught:
        load(PAIR, record, PAIR, max_length=20)
    assert f"1 of 3 records cannot be used\n  line 2: {reason}\n" in str(caught.value)
    assert "data.bad_records: skip" in str(caught.value)
    assert ("raise data.max_length" in str(caught.value)) == ("tokens" in reason)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER], "no assistant turn, so there is nothing to learn"),
        ([YES, USER], "the first turn is the assistant's; a prompt must come before it"),
        ([], "'messages' is empty"),
        ("hello", "'messages' must be a list of messages, got a text"),
        (["hello"], "'messages[0]' must be an object with 'role' and 'content', got a text"),
        ([USER, {"role": "asistant", "content": "x"}], "'messages[1].role' must be one of system, "),
        ([USER, {"role": "assistant", "content": " "}], "'messages[1].content' is empty"),
        ([{"role": "user", "content": [1]}, YES], "'messages[0].content' must be a text, got a list"),
        ([{"role": "user", "content": "\udc00"}, YES], "'messages[0].content' has half of a character"),
    ],
)
def test_bad_conversations_are_reported(messages: Any, reason: str, load: Load) -> None:
    [problem] = load({"messages": TURNS}, {"messages": messages}, bad_records="skip").problems
    assert problem.line == 2
    assert problem.reason.startswith(reason)


def test_long_conversations_are_not_read_to_their_end(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every answer of one reads all before it again, so that reading on would cost the square of its length."""
    read: list[int] = []

    class Counting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = super().__call__(*args, **kwargs)
            read.append(len(found["input_ids"]))
            return found

    counting = copy.deepcopy(tokenizer)
    counting.__class__ = Counting
    fits = {"messages": TURNS}
    found = load(fits, {"messages": TURNS * 50}, tokenizer=counting, max_length=64, bad_records="skip")
    length = len(tokenizer.apply_chat_template(TURNS)["input_ids"])
    assert 32 < length <= 64 and len(found) == 1
    turns = len(tokenizer.apply_chat_template(TURNS * 2)["input_ids"])
    assert found.problems == [Problem(2, f"at least {turns} tokens, more than data.max_length 64")]
    assert length < sum(read) < 20 * 64
    with pytest.raises(InputError, match=r"data\.max_length 64\ncorrect them, or raise data\.max_length"):
        load(fits, {"messages": TURNS * 50}, max_length=64)


def test_prompt_and_completion_must_be_of_one_kind(load: Load) -> None:
    good = {"prompt": "a", "completion": "b"}
    [problem] = load(good, {"prompt": TURNS[:1], "completion": "b"}, bad_records="skip").problems
    assert problem.reason.endswith("both lists of messages, got a list and a text")


def test_only_the_first_problems_are_listed(load: Load) -> None:
    with pytest.raises(InputError) as caught:
        load(PAIR, *["{"] * 12)
    assert "12 of 13 records cannot be used" in str(caught.value)
    assert str(caught.value).count("not JSON") == 10
    assert "… and 2 more" in str(caught.value)


@pytest.mark.parametrize(("records", "message"), [([], "has no records"), (["{"], "1 of 1 records cannot be used")])
def test_nothing_usable_is_an_error(records: list[str], message: str, load: Load) -> None:
    with pytest.raises(InputError, match=message):
        load(*records, bad_records="skip")


def test_a_tokenizer_without_eos_is_refused(load: Load, plain_tokenizer: PreTrainedTokenizerBase) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=plain_tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match=r"set data\.add_eos to false"):
        load(PAIR, tokenizer=endless)
    found = load(PAIR, tokenizer=endless, add_eos=False)
    with pytest.raises(InputError, match="neither a padding nor an end-of-sequence token"):
        AnswerCollator(endless)(found.examples)


# -- sources ---------------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_text_are_a_problem(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "data.jsonl"
    # A byte-order mark, a carriage return and a Unicode line separator inside a text are all fine.
    good = '{"input": "a\u2028b", "output": "c"}\r\n'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b'{"input": "\xff"}\n' + good + b"\n\n")
    found = read_examples(str(path), tokenizer, DataConfig("-"))
    assert found.problems == [Problem(2, "not UTF-8 at byte 12")]
    assert [example.line for example in found.examples] == [1, 3]


@pytest.mark.parametrize("as_list", [True, False])
def test_json(as_list: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([PAIR, 3], indent=1) if as_list else json.dumps(PAIR) + "\n3")
    found = read_examples(str(path), tokenizer, DataConfig("-"))
    assert [example.line for example in found.examples] == [1]
    assert found.problems == [Problem(2, "a JSON object is expected, got a number")]
    assert found.unit == ("record" if as_list else "line")


def test_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, load: Load) -> None:
    path = tmp_path / "data.parquet"
    rows = [{"messages": TURNS, "prompt": None, "completion": None}, {"messages": None}, {"messages": TURNS[:2]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = load_examples(DataConfig(str(path), bad_records="skip"), tokenizer)
    assert [(e.line, e.input_ids, e.labels) for e in found.examples] == [
        (line, e.input_ids, e.labels)
        for line, e in zip([1, 3], load({"messages": TURNS}, {"messages": TURNS[:2]}).examples, strict=True)
    ]
    assert found.problems == [Problem(2, "'messages' missing; keys found: none")]
    assert found.unit == "row"


def test_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        return [PAIR]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    config = DataConfig("owner/set-1.5:main", eval="plain_set", split="train[:9]")
    assert load_examples(config, tokenizer).unit == "row"
    load_examples(config, tokenizer, split="eval")
    assert asked == [("owner/set-1.5", "main", "train[:9]"), ("plain_set", None, "test")]


def test_a_hub_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    message = "'owner/set' is no file here, and its split 'train' cannot be loaded from the Hub: Couldn't reach the Hub"
    with pytest.raises(InputError, match=message):
        load_examples(DataConfig("owner/set"), tokenizer)


@pytest.mark.parametrize("name", ["missing.jsonl", "owner/missing.jsonl", "missing.csv", "./a", "/a/b", "a/b/c", "a b"])
def test_missing_files_are_never_looked_for_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    monkeypatch.delattr("datasets.load_dataset")
    with pytest.raises(InputError, match=f"there is no file {name}"):
        load_examples(DataConfig(name), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", b"a,b", r"must be a \.jsonl, \.json, \.parquet file"),
        ("data.json", b"[1,", "is not JSON"),
        ("data.parquet", b"no parquet", "cannot be read as Parquet"),
        (".", b"", "is a folder"),
    ],
)
def test_unreadable_files_are_refused(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    if name != ".":
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_examples(DataConfig(str(tmp_path / name)), tokenizer)


def test_eval_data_must_be_given(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"data\.eval is not given"):
        load_examples(DataConfig("x.jsonl"), tokenizer, split="eval")


# -- batches and display ---------------------------------------------------------------------------------------------


def test_collation_pads_on_the_right(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [Example([5, 6, 7], [IGNORED, 6, 7], 1), Example([8], [8], 2)]
    batch = AnswerCollator(tokenizer)(examples)
    pad = tokenizer.pad_token_id
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, pad, pad]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
    }
    assert all(value.dtype == torch.long for value in batch.values())


def test_collation_to_a_multiple(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [Example([5, 6, 7], [IGNORED, 6, 7], 1)]
    assert AnswerCollator(tokenizer, pad_to_multiple_of=8)(examples)["input_ids"].shape == (1, 8)
    assert AnswerCollator(tokenizer, pad_to_multiple_of=3)(examples)["input_ids"].shape == (1, 3)
    with pytest.raises(InputError, match="pad_to_multiple_of must be a positive integer, got 0"):
        AnswerCollator(tokenizer, pad_to_multiple_of=0)


def test_describe_marks_what_is_learnt(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    [example] = load({"messages": TURNS}).examples
    console.print(describe(example, tokenizer, tokens=True))
    printed = console.file.getvalue()
    assert "<|im_start|>assistant\n«yes, and so on<|im_end|>»\n<|im_start|>user\n" in printed
    assert f"{len(example.input_ids)} tokens, {sum(x != IGNORED for x in example.labels)} of them learnt" in printed
    assert printed.count("-100") == example.labels.count(IGNORED)
