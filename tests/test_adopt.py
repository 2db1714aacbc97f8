"""`imsm adopt` and `imsm export`: an adapter of peft's becomes a siamese model, and comes out as it went in."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from dreamers import write_adapter, write_base, write_data
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import imsm
import imsm_cli
from imsm import DataConfig, DreamsConfig, InputError, SiameseForCausalLM, TrainConfig, adopt, folders
from imsm.building import ADAPTER, ADAPTER_CONFIG, fetch_adapter, has_tokenizer
from imsm.checkpoint import read_config
from imsm.data.turns import prompt_and_answer
from imsm.dreams import dream
from imsm.evaluation.answering import asked
from imsm.evaluation.candidates import open_candidate
from imsm.evaluation.held_out import dreams_task, held_out_task
from imsm.generation import prompt_ids

DREAMS = {"count": 24, "prompt_tokens": 12, "task_prompts": 24}
FITTED = {"answer_tokens": 4, "gate_steps": 8}
FLAGS = [part for name, value in DREAMS.items() for part in (f"--dreams.{name}", str(value))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("adopt") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: str) -> str:
    return write_adapter(tmp_path_factory.mktemp("adopt") / "lora", base)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, base: str) -> str:
    return write_data(tmp_path_factory.mktemp("adopt") / "task.jsonl", base, 40)


def settings(base: str, data: str, output: Path, **more: Any) -> TrainConfig:
    dreams = DreamsConfig(**{**DREAMS, **more.pop("dreams", {})})
    return TrainConfig(
        model=base,
        output_dir=str(output),
        data=DataConfig(train=data, eval=more.pop("eval", None)),
        dreams=dreams,
        progress=False,
        **more,
    )


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, base: str, adapter: str, data: str) -> tuple[Path, str]:
    """The folder that the verb leaves, and what it prints."""
    folder = tmp_path_factory.mktemp("adopt") / "adopted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "140")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = imsm_cli.main(
                ["adopt", adapter, "--data", data, "--output", str(folder), "--held-out", "6", "--metric", "contains"]
                + [*FLAGS, "--progress=false"]
            )
    assert status == 0
    return folder, out.getvalue()


def test_the_checkpoint_tells_task_from_dreams(printed: tuple[Path, str], data: str, base: str) -> None:
    model = SiameseForCausalLM.from_pretrained(printed[0])
    assert model.config.gate == "tuned" and model.relevance is not None
    tokenizer = AutoTokenizer.from_pretrained(printed[0])
    prompts = [json.loads(line)["input"] for line in Path(data).read_text().splitlines()]
    found = dream(AutoModelForCausalLM.from_pretrained(base), tokenizer, 24, 0, prompt_tokens=12, answers=False)
    assert sum(left(model, tokenizer(prompt)["input_ids"]) for prompt in prompts) <= 2
    assert sum(left(model, sample.prompt_ids) for sample in found) >= 20


def left(model: SiameseForCausalLM, ids: list[int]) -> bool:
    """Whether the base model answers these tokens."""
    with torch.no_grad():
        gate = model(torch.tensor([ids]), prompt_length=len(ids), output_gate=True).gate
    assert gate is not None
    return bool((gate[:, -1] == 1).all())


def test_the_audit_is_printed_and_kept(printed: tuple[Path, str]) -> None:
    folder, text = printed
    assert "Held-out records" in text and "Dreams: answers kept" in text and "adopted (siamese)" in text
    assert "seconds" in text and str(folder) in text
    results = {
        name: json.loads((folder / "audit" / f"{name}.json").read_text()) for name in ("base", "peft", "siamese")
    }
    score = {name: found["tasks"]["held_out"]["metrics"]["contains"]["value"] for name, found in results.items()}
    assert score["peft"] > 0.9 > score["base"] and score["siamese"] > score["base"]
    kept = {name: results[name]["tasks"]["kept_dreams"]["metrics"] for name in ("peft", "siamese")}
    assert kept["siamese"]["identical"]["value"] > kept["peft"]["identical"]["value"]
    assert kept["siamese"]["divergence"]["value"] < kept["peft"]["divergence"]["value"]
    assert len(results["siamese"]["tasks"]["held_out"]["records"]) == 6
    assert (folder / "audit" / "audit.html").is_file()


def test_the_record_says_what_was_done(printed: tuple[Path, str], adapter: str) -> None:
    found = SiameseForCausalLM.from_pretrained(printed[0]).config.training
    assert found["settings"]["adopted"] == Path(adapter).name and found["settings"]["dreams.count"] == 24
    assert not {"epochs", "learning_rate", "method", "dreams.phases"} & set(found["settings"])
    assert found["data"]["records"] == 34 and found["data"]["train"] == "task.jsonl"
    assert {"false_recall", "dreams_kept", "seconds"} <= set(found["results"])


# -- the adapter stays as it is --------------------------------------------------------------------------------------


def test_the_adapter_comes_out_byte_for_byte(
    printed: tuple[Path, str], adapter: str, base: str, tmp_path: Path
) -> None:
    assert imsm_cli.main(["export", str(printed[0]), "--adapter-only", "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [ADAPTER_CONFIG, ADAPTER]
    for name in (ADAPTER_CONFIG, ADAPTER):
        assert (tmp_path / "out" / name).read_bytes() == (Path(adapter) / name).read_bytes()
    ids = torch.arange(5, 15)[None]
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))(ids).logits
    assert torch.equal(own, SiameseForCausalLM.from_pretrained(printed[0])(ids, force_gate=0.0).logits)


def test_a_gate_that_learns(base: str, adapter: str, data: str, tmp_path: Path) -> None:
    """The gate is fitted, adapter and base are not."""
    adopted = adopt(adapter, settings(base, data, tmp_path / "out", gate="query_aware", gate_rank=4, dreams=FITTED))
    assert adopted.metrics["gate_loss"] > 0 and adopted.held_out == adopted.dreams == []
    assert not any(module.training for module in adopted.model.modules())
    assert any(parameter.abs().sum() > 0 for parameter in adopted.model.gate.up.parameters())
    before = SiameseForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(base), adapter)
    same = adopted.model.peft_model.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in before.peft_model.state_dict().items())
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (Path(adapter) / ADAPTER).read_bytes()
    assert SiameseForCausalLM.from_pretrained(tmp_path / "out").config.gate == "query_aware"


def test_held_out_records_are_not_fitted_to(base: str, adapter: str, data: str, tmp_path: Path) -> None:
    adopted = adopt(adapter, settings(base, data, tmp_path / "a", eval=data), held_out=5, held_out_dreams=4)
    assert len(adopted.held_out) == 5 and adopted.model.config.training["data"]["records"] == 40
    dreams = dream(
        AutoModelForCausalLM.from_pretrained(base), adopted.tokenizer, 24, 0, prompt_tokens=12, answers=False
    )
    assert 0 < len(adopted.dreams) <= 4
    assert not {tuple(s.prompt_ids) for s in dreams} & {tuple(s.prompt_ids) for s in adopted.dreams}


def test_records_ask_with_the_tokens_they_were_made_of(base: str, adapter: str, data: str, tmp_path: Path) -> None:
    adopted = adopt(adapter, settings(base, data, tmp_path / "a"), held_out=5, held_out_dreams=6)
    tokenizer = adopted.tokenizer
    task, records = held_out_task(adopted.held_out, tokenizer, "contains")
    found = [prompt_ids(tokenizer, asked(task, record, tokenizer)) for record in records]
    assert found == [prompt_and_answer(example)[0] for example in adopted.held_out]
    assert {record.references[0] for record in records} <= {
        json.loads(line)["output"].strip() for line in Path(data).read_text().splitlines()
    }
    task, records = dreams_task(adopted.dreams, tokenizer)
    assert {bool(record.turns) for record in records} == {True, False}
    assert [prompt_ids(tokenizer, asked(task, record, tokenizer)) for record in records] == [
        s.prompt_ids for s in adopted.dreams
    ]


def test_kept_tasks_of_a_data_root(
    base: str, adapter: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "webq").mkdir()
    (tmp_path / "webq" / "test.jsonl").write_text(
        "".join(json.dumps({"input": f"Q: {word}?\nA:", "output": "a"}) + "\n" for word in ("open", "fox", "dog"))
    )
    command = ["adopt", adapter, "--data", data, "--output", str(tmp_path / "out"), *FLAGS, "--progress=false"]
    command += ["--held-out", "3", "--metric", "contains", "--data-root", str(tmp_path), "--retained"]
    assert imsm_cli.main([*command, "webq"]) == 2
    assert "--retained takes tasks of kept answers, such as kept_cola" in capsys.readouterr().err
    assert imsm_cli.main([*command, "kept_webq"]) == 0
    assert "WebQuestions: answers kept" in capsys.readouterr().out


# -- the adapter's own tokenizer -------------------------------------------------------------------------------------


@pytest.fixture
def dressed(base: str, adapter: str, tmp_path: Path) -> tuple[Path, Path, Any]:
    """A base without a chat template, the adapter in a folder with one, as trainers leave it, and that tokenizer."""
    plain, own = Path(shutil.copytree(base, tmp_path / "plain")), Path(shutil.copytree(adapter, tmp_path / "lora"))
    for path in own.glob("*token*"):
        path.unlink()
    (plain / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{# the adapter's #}" + tokenizer.chat_template
    tokenizer.save_pretrained(own)
    assert not AutoTokenizer.from_pretrained(plain).chat_template
    return plain, own, tokenizer


def test_the_adapters_own_tokenizer_is_taken(dressed: tuple[Path, Path, Any], data: str, tmp_path: Path) -> None:
    plain, own, tokenizer = dressed
    records = [json.loads(line) for line in Path(data).read_text().splitlines()]
    turns = [
        [{"role": "user", "content": record["input"]}, {"role": "assistant", "content": record["output"]}]
        for record in records
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    adopted = adopt(own, settings(str(plain), str(chats), tmp_path / "out"), held_out=4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    rendered = [tokenizer.apply_chat_template(each)["input_ids"] for each in turns]
    assert [example.input_ids for example in adopted.held_out] == [
        rendered[example.line - 1] for example in adopted.held_out
    ]
    assert open_candidate(str(own), str(plain)).tokenizer.chat_template == tokenizer.chat_template
    assert open_candidate(str(tmp_path / "out"), str(plain)).tokenizer.chat_template == tokenizer.chat_template


def test_a_tokenizer_that_is_not_of_the_base(dressed: tuple[Path, Path, Any], data: str, tmp_path: Path) -> None:
    plain, own, tokenizer = dressed
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|other|>"})
    tokenizer.save_pretrained(own)
    message = f"has tokens that the base model does not embed: 1 beyond its {rows}, such as '<|other|>'"
    with pytest.raises(InputError, match=re.escape(message)):
        adopt(own, settings(str(plain), data, tmp_path / "out"))
    with pytest.raises(InputError, match=re.escape(message)):
        open_candidate(str(own), str(plain))
    assert not (tmp_path / "out").exists()
    tokenizer.save_pretrained(plain)  # a base may come with such a token, as Gemma 3 does
    assert open_candidate(str(own), str(plain)).tokenizer.pad_token == "<|other|>"


def test_the_hub_is_asked_for_the_tokenizer(adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[str] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return adapter

    monkeypatch.setattr(folders, "snapshot_download", snapshot)
    assert fetch_adapter("org/lora") == Path(adapter)
    for name in (ADAPTER, ADAPTER_CONFIG, "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        assert any(fnmatch(name, pattern) for pattern in patterns)
    assert not any(fnmatch("training_args.bin", pattern) for pattern in patterns)


def test_the_hub_is_asked_for_a_checkpoints_tokenizer(
    printed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = printed

    def snapshot(name: str, allow_patterns: list[str], **_: Any) -> str:
        for path in folder.rglob("*"):
            inside = path.relative_to(folder).as_posix()
            if path.is_file() and any(fnmatch(inside, pattern) for pattern in allow_patterns):
                (tmp_path / "hub" / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, tmp_path / "hub" / inside)
        return str(tmp_path / "hub")

    monkeypatch.setattr(folders, "snapshot_download", snapshot)
    found, _ = read_config("org/checkpoint", {})
    assert found == tmp_path / "hub" and has_tokenizer(found)
    assert not list(found.rglob("audit*"))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--held-out": "30"}, "at most half of the 40 records of .* can be held out, got 30"),
        ({"--held-out": "-1"}, "--held-out must not be negative, got -1"),
        ({"--metric": "bleu"}, "--metric must be one of accuracy, .*; got 'bleu'"),
        ({"--retained": "kept_webq"}, "--retained needs the tasks' files: give their folder with --data-root"),
        ({"--dreams.count": "0"}, "dreams.count must be a positive integer, got 0"),
        ({"--gate": "tune"}, "gate must be one of .*; got 'tune'; did you mean 'tuned'?"),
        ({"--gate-rank": "x"}, "gate_rank must be an integer, got 'x'"),
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--base": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_refusals(
    change: dict[str, str],
    message: str,
    adapter: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"--data": data, "--output": str(tmp_path / "out"), "--progress": "false", **change}
    command = ["adopt", adapter, *(part for pair in given.items() for part in pair)]
    assert imsm_cli.main(command) == 2
    found = capsys.readouterr().err
    assert re.search(message, found), found
    assert not (tmp_path / "out").exists()


def test_refusals_of_the_function(base: str, adapter: str, data: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    with pytest.raises(InputError, match="is the adapter's own folder"):
        adopt(own, settings(base, data, own))
    with pytest.raises(
        InputError, match="dreams.phases: two, got method: imsm, dreams.mode: on and dreams.phases: joint"
    ):
        adopt(adapter, settings(base, data, tmp_path / "out", dreams={"phases": "joint"}))
    with pytest.raises(InputError, match="holds no adapter"):
        adopt(base, settings(base, data, tmp_path / "out"))
    with pytest.raises(InputError, match="held_out must not be negative"):
        adopt(adapter, settings(base, data, tmp_path / "out"), held_out=-1)
    assert imsm.adopt is adopt and not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten(printed: tuple[Path, str], adapter: str, data: str, base: str) -> None:
    with pytest.raises(InputError, match="already holds a run; an adoption is made whole or not at all, so delete it"):
        adopt(adapter, settings(base, data, printed[0]))


def test_records_that_the_metric_cannot_score_show_at_once(
    adapter: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "adopt",
        adapter,
        "--data",
        data,
        "--output",
        str(tmp_path / "out"),
        "--metric",
        "number",
        "--held-out",
        "6",
    ]
    assert imsm_cli.main(command) == 2
    assert "the metric number needs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_adapter_without_a_base(adapter: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(adapter, tmp_path / "own")
    config = json.loads((tmp_path / "own" / ADAPTER_CONFIG).read_text())
    (tmp_path / "own" / ADAPTER_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    command = ["adopt", str(tmp_path / "own"), "--data", data, "--output", str(tmp_path / "out")]
    assert imsm_cli.main(command) == 2
    assert "does not name its base model; give it with --base" in capsys.readouterr().err


def test_export_refuses(
    printed: tuple[Path, str], adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(printed[0]), "--output", str(tmp_path / "out")]
    assert imsm_cli.main(command) == 2
    assert "say what to export: --adapter-only" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert imsm_cli.main([*command, "--adapter-only"]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err
    assert imsm_cli.main(["export", adapter, "--adapter-only", "--output", str(tmp_path / "other")]) == 2
    assert "not a complete siamese checkpoint" in capsys.readouterr().err
