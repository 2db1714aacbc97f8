"""`imsm generate`, `chat` and `info` on a tiny checkpoint, and the generation primitives under them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import METHODS, disturb

import imsm_cli
from imsm import InputError, SiameseForCausalLM, answers, stream
from imsm.generation import prompt_ids, trim

PROMPTS = ["What is the capital of France?", "yes", "Paris is"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, base_folder: str, tokenizer: Any) -> str:
    """A disturbed tiny siamese model with its tokenizer."""
    folder = tmp_path_factory.mktemp("verbs") / "checkpoint"
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = SiameseForCausalLM.from_base(base, METHODS["lora"](base), gate_rank=4)
    disturb(model)
    model.config.base_model = base_folder
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(checkpoint: str) -> tuple[SiameseForCausalLM, Any]:
    return SiameseForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)


def alone(model: Any, tokenizer: Any, prompt: str, **kwargs: Any) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


# -- primitives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_in_batches_are_those_alone(loaded: tuple[Any, Any], batch_size: int) -> None:
    model, tokenizer = loaded
    got = {a.index: a.text for a in answers(model, tokenizer, PROMPTS, batch_size=batch_size, max_new_tokens=8)}
    assert got == {i: alone(model, tokenizer, prompt) for i, prompt in enumerate(PROMPTS)}


def test_each_prompt_is_answered_under_its_own_dial(loaded: tuple[SiameseForCausalLM, Any]) -> None:
    """Batches are made by length; a dial of a value a prompt goes with its prompt."""
    dials = torch.tensor([math.inf if place % 2 else -math.inf for place in range(len(PROMPTS))])
    got = {a.index: a.text for a in answers(*loaded, PROMPTS, batch_size=2, max_new_tokens=8, recall=dials)}
    assert got == {i: alone(*loaded, prompt, recall=float(dials[i])) for i, prompt in enumerate(PROMPTS)}
    assert len({alone(*loaded, PROMPTS[0], recall=dial) for dial in (math.inf, -math.inf)}) == 2


def test_several_answers_to_a_prompt(loaded: tuple[Any, Any]) -> None:
    got = list(answers(*loaded, PROMPTS, batch_size=2, max_new_tokens=4, num_beams=2, num_return_sequences=2))
    assert sorted(answer.index for answer in got) == [0, 0, 1, 1, 2, 2]


def test_stream_is_the_answer_in_pieces(loaded: tuple[Any, Any]) -> None:
    pieces = list(stream(*loaded, PROMPTS[0], max_new_tokens=8))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == alone(*loaded, PROMPTS[0])


def test_a_failing_stream_raises(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="not used by the model"):
        list(stream(*loaded, "yes", max_new_tokens=2, nonsense=1))


def test_messages_need_a_template(plain_tokenizer: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "yes"}]
    assert tokenizer.decode(prompt_ids(tokenizer, messages)).endswith("<|im_start|>assistant\n")
    with pytest.raises(InputError, match="no chat template"):
        prompt_ids(plain_tokenizer, messages)
    with pytest.raises(InputError, match="must not be empty"):
        prompt_ids(plain_tokenizer, "")


def test_trim() -> None:
    assert trim([5, 2, 7, 2], 2) == [5, 2]
    assert trim([5, 7], [2, 3]) == [5, 7]
    assert trim([5, 3, 3], [2, 3]) == [5, 3]
    assert trim([5, 7], None) == [5, 7]


# -- imsm generate ---------------------------------------------------------------------------------------------------


def test_generate_prints_an_answer_a_prompt(
    checkpoint: str, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    status = imsm_cli.main(["generate", checkpoint, *PROMPTS, "--plain", "--max-new-tokens", "8", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert status == 0
    assert lines == [{"prompt": p, "answer": alone(*loaded, p)} for p in PROMPTS]


def test_generate_compares_the_memories(
    checkpoint: str, loaded: tuple[Any, Any], base_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", checkpoint, "yes", "--plain", "--max-new-tokens", "8", "--compare"]
    assert imsm_cli.main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["base"] == alone(AutoModelForCausalLM.from_pretrained(base_folder), loaded[1], "yes")
    assert said["tuned"] == alone(loaded[0].peft_model, loaded[1], "yes")
    assert said["interwoven"] == alone(*loaded, "yes")
    assert imsm_cli.main(command) == 0
    table = capsys.readouterr().out
    assert "base" in table and "tuned" in table and "interwoven" in table


def test_generate_reads_files_and_standard_input(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("yes\n\nno\n")
    (tmp_path / "p.jsonl").write_text('{"input": "yes"}\n{"messages": [{"role": "user", "content": "no"}]}\n')
    short = ["--max-new-tokens", "2", "--json"]
    assert imsm_cli.main(["generate", checkpoint, "--file", str(tmp_path / "p.txt"), *short]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert imsm_cli.main(["generate", checkpoint, "--file", str(tmp_path / "p.jsonl"), *short]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    # A mark that Python's lines end at, and one that some editors begin files with.
    (tmp_path / "odd.jsonl").write_text('\ufeff{"input": "yes\u2028no"}\n', encoding="utf-8")
    assert imsm_cli.main(["generate", checkpoint, "--file", str(tmp_path / "odd.jsonl"), *short]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    assert imsm_cli.main(["generate", checkpoint, *short]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_sampling_follows_its_seed(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", checkpoint, "yes", "--temperature", "2", "--max-new-tokens", "12", "--json", "--seed"]
    said = []
    for seed in ("1", "1", "2"):
        assert imsm_cli.main([*command, seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "hi"], "'nowhere/at/all' is not a folder"),
        (["CHECKPOINT"], "no prompts given"),
        (["CHECKPOINT", "hi", "--file", "x.txt"], "not both"),
        (["CHECKPOINT", "--file", "missing.txt"], "prompts cannot be read from missing.txt"),
        (
            ["CHECKPOINT", "--file", '{"messages": [5]}'],
            "line 1: 'messages[0]' must be an object with 'role' and 'content'",
        ),
        (["CHECKPOINT", "--file", '{"messages": [{"content": "a"}]}'], "line 1: 'messages[0].role' must be one of"),
        (["CHECKPOINT", "--file", '{"prompt": 5}'], "line 1: 'prompt' must be a text, got"),
        (["CHECKPOINT", "hi", "--max-new-tokens", "0"], "--max-new-tokens must be a positive integer, got 0"),
        (["CHECKPOINT", "hi", "--temperature", "-1"], "--temperature must be 0 (greedy) or positive, got -1.0"),
        (["CHECKPOINT", "hi", "--temperature", "nan"], "--temperature must be 0 (greedy) or positive, got nan"),
        (["CHECKPOINT", "hi", "--seed", "-1"], "--seed must be an integer from 0 to below 2**32, got -1"),
        (["CHECKPOINT", "--file", '{"prompt": "\\ud83d"}'], "line 1: 'prompt' has half of a character"),
        (["CHECKPOINT", "hi", "--top-p", "0"], "--top-p must be in (0, 1], got 0.0"),
        (["CHECKPOINT", "hi", "--batch-size", "0"], "--batch-size must be a positive integer, got 0"),
        (["CHECKPOINT", "hi", "--base", "nowhere/at/all"], "cannot be loaded as a causal language model"),
        (["CHECKPOINT", "hi", "--device", "cuda:99"], "device cuda:99 cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    checkpoint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    file = tmp_path / "prompts.jsonl"
    if arguments[-1].startswith("{"):
        file.write_text(arguments[-1])
        arguments = [*arguments[:-1], str(file)]
    assert imsm_cli.main(["generate", *(checkpoint if a == "CHECKPOINT" else a for a in arguments)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("imsm: ")]
    assert len(told) == 1 and message in told[0]


# -- imsm chat -------------------------------------------------------------------------------------------------------


def test_chat(
    checkpoint: str, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["yes", "and Paris?", "/gate 1", "yes", "/gate off", "/reset", "", "/help", "yes", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert imsm_cli.main(["chat", checkpoint, "--max-new-tokens", "6"]) == 0
    out = capsys.readouterr().out
    first = "".join(stream(*loaded, [{"role": "user", "content": "yes"}], max_new_tokens=6))
    # The same answer before the reset and after it, and the conversation in between is another.
    assert out.count(first) >= 2
    assert "gate forced to 1" in out and "gate as learned" in out and out.count("/reset starts anew") == 2


def test_chat_ends_with_its_input(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert imsm_cli.main(["chat", checkpoint]) == 0


# -- imsm info -------------------------------------------------------------------------------------------------------


def test_info(checkpoint: str, loaded: tuple[Any, Any], base_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert imsm_cli.main(["info", checkpoint, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = loaded[0]
    assert facts["base model"] == base_folder
    assert facts["method"] == "LORA"
    assert facts["parameters"]["gate"] == f"{5 * 32 * 4:,}"
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert facts["parameters"]["adapter"] == f"{adapter:,}"
    assert imsm_cli.main(["info", checkpoint]) == 0
    assert "query_aware, rank 4" in capsys.readouterr().out


def test_info_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert imsm_cli.main(["info", str(tmp_path)]) == 2
    assert "not a complete siamese checkpoint: config.json" in capsys.readouterr().err
