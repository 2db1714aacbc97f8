"""Training runs on a tiny model: what they leave, that they learn, and that they resume exactly."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Day
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, TrainingArguments
from zoo import tiny_siamese

from imsm import DataConfig, DreamsConfig, InputError, SiameseForCausalLM, SiameseTrainer, TrainConfig, train
from imsm.settings import read_yaml, to_yaml
from imsm.training.run import adapter_config, steps

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}


@pytest.fixture
def settings(base_folder: str, data_file: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": base_folder,
        "output_dir": str(tmp_path / "run"),
        "data": DataConfig(train=data_file, max_length=64),
        "adapter": LORA,
        "batch_size": 4,
        "epochs": 2.0,
        "learning_rate": 5e-3,
        "tensorboard": False,
        "dreams": DreamsConfig("off"),
        "progress": False,
    }


def losses(folder: Path) -> dict[int, float]:
    """Loss by step, from the log."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def test_a_run_learns_and_leaves_a_checkpoint(settings: dict[str, Any], data_file: str) -> None:
    settings["data"] = DataConfig(train=data_file, eval=data_file, max_length=64)
    result = train(TrainConfig(**settings))
    folder = Path(settings["output_dir"])
    curve = losses(folder)
    assert sorted(curve) == list(range(1, 13))
    assert curve[12] < curve[1] - 0.1
    assert result.metrics["eval_loss"] < curve[1]
    assert 0 < result.metrics["gate"] < 1 and result.metrics["gate"] != 0.5
    loaded = SiameseForCausalLM.from_pretrained(folder)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert {"results", "settings", "data", "where"} <= set(loaded.config.training)
    card = (folder / "README.md").read_text()
    assert "learning_rate" in card and "eval_loss" in card and "train.jsonl" in card
    assert read_yaml(folder / "settings.yaml") == TrainConfig(**settings)
    assert not [path for path in folder.parent.rglob("*") if path.name.startswith(".")]


def test_the_baseline_is_plain_peft(settings: dict[str, Any]) -> None:
    result = train(TrainConfig(**settings, method="peft"))
    folder = Path(settings["output_dir"])
    assert isinstance(result.model, PeftModel)
    assert not (folder / "gate.safetensors").exists() and not (folder / "model.safetensors").exists()
    assert f"base_model: {settings['model']}" in (folder / "README.md").read_text()
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(settings["model"]), str(folder))
    ids = torch.arange(1, 9)[None]
    assert torch.equal(reloaded(ids).logits, result.model(ids).logits)


def test_gate_and_adapter_have_their_own_learning_rates(settings: dict[str, Any]) -> None:
    """The one with the small rate hardly moves (not nothing for the adapter: without it the gate has no gradient)."""
    frozen_adapter = train(TrainConfig(**{**settings, "learning_rate": 1e-6, "gate_learning_rate": 1e-2})).model
    settings["output_dir"] += "-2"
    frozen_gate = train(TrainConfig(**{**settings, "learning_rate": 1e-2, "gate_learning_rate": 1e-12})).model

    def size(model: Any, part: str) -> float:
        return max(p.abs().max().item() for name, p in model.named_parameters() if part in name)

    assert size(frozen_adapter, "lora_B") < 1e-4 and size(frozen_adapter, "gate.up") > 1e-3
    assert size(frozen_gate, "lora_B") > 1e-3 and size(frozen_gate, "gate.up") < 1e-9


@pytest.mark.parametrize(
    "change", [{"optimizer": "adafactor"}, {"schedule": "linear"}, {"schedule": "constant"}, {"bf16": True}]
)
def test_settings_run(settings: dict[str, Any], change: dict[str, Any]) -> None:
    result = train(TrainConfig(**{**settings, **change, "max_steps": 3}))
    assert result.metrics["steps"] == 3


def test_the_model_is_the_checkpoint_after_bf16(settings: dict[str, Any]) -> None:
    """The autocast of training is no part of it, the decorators of its own forward are."""
    model = train(TrainConfig(**{**settings, "bf16": True, "max_steps": 3})).model
    ids = torch.arange(1, 9)[None]
    loaded = SiameseForCausalLM.from_pretrained(settings["output_dir"])
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert not {"forward", "_original_forward"} & set(vars(model))


def test_accumulated_small_batches_train_as_one_large_batch(settings: dict[str, Any]) -> None:
    settings |= {"adapter": {**LORA, "lora_dropout": 0.0}, "gate_dropout": 0.0, "max_steps": 3, "warmup": 0.0}
    train(TrainConfig(**{**settings, "batch_size": 8}))
    whole = losses(Path(settings["output_dir"]))
    settings["output_dir"] += "-2"
    train(TrainConfig(**{**settings, "batch_size": 2, "gradient_accumulation": 4}))
    parts = losses(Path(settings["output_dir"]))
    assert parts == pytest.approx(whole, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(settings: dict[str, Any]) -> None:
    train(TrainConfig(**{**settings, "max_steps": 3}))
    plain = losses(Path(settings["output_dir"]))
    settings["output_dir"] += "-2"
    train(TrainConfig(**{**settings, "max_steps": 3, "gradient_checkpointing": True}))
    assert losses(Path(settings["output_dir"])) == pytest.approx(plain, rel=1e-5)


ADALORA = {
    "peft_type": "ADALORA",
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 1,
    "target_modules": ["q_proj", "v_proj"],
}


def test_adalora_runs_its_rank_schedule(settings: dict[str, Any]) -> None:
    model = train(TrainConfig(**{**settings, "adapter": ADALORA})).model
    pattern = model.peft_model.active_peft_config.rank_pattern
    kept = [sum(ranks) for ranks in pattern.values()]
    assert sum(kept) == 2 * len(kept) and max(kept) <= 4  # target_r on average
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = SiameseForCausalLM.from_pretrained(settings["output_dir"])
    assert not [one for one in said if "rank_pattern" in str(one.message)]  # peft's alarm would be false
    ids = torch.arange(1, 9)[None]
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": LORA, "memory_bank": "on", "packing": True},
        {"adapter": ADALORA, "memory_bank": "off", "group_by_length": True},
    ],
    ids=["lora-bank-packed", "adalora-live"],
)
def test_kill_and_resume_give_the_unbroken_curve(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    """SIGKILL in mid-training, then `--resume`: every later step's loss is the unbroken run's, to the last bit."""
    settings |= {**change, "save_steps": 4, "epochs": 3.0}
    unbroken = TrainConfig(**settings)
    train(unbroken)
    expected = losses(Path(unbroken.output_dir))

    broken = TrainConfig(**{**settings, "output_dir": str(tmp_path / "broken")})
    (tmp_path / "broken.yaml").write_text(to_yaml(broken))
    command = [sys.executable, "-m", "imsm_cli", "train", str(tmp_path / "broken.yaml")]
    log = tmp_path / "broken" / "log.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 6):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken" / "gate.safetensors").exists()  # it did not get to the end

    finished = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert losses(tmp_path / "broken") == expected
    resumed, whole = (
        SiameseForCausalLM.from_pretrained(folder) for folder in (tmp_path / "broken", unbroken.output_dir)
    )
    ids = torch.arange(1, 9)[None]
    assert torch.equal(resumed(ids).logits, whole(ids).logits)


def test_a_run_is_never_overwritten(settings: dict[str, Any]) -> None:
    config = TrainConfig(**{**settings, "max_steps": 1})
    with pytest.raises(InputError, match="no run to resume"):
        train(TrainConfig(**{**settings, "resume": True}))
    train(config)
    with pytest.raises(InputError, match="already holds a run"):
        train(config)
    with pytest.raises(InputError, match=r"batch_size was 4, now 2"):
        train(TrainConfig(**{**settings, "max_steps": 1, "batch_size": 2, "resume": True}))


def test_a_failed_checkpoint_leaves_the_one_before(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the second checkpoint is written: the first is whole, and resuming goes on from it."""
    from imsm.training import trainer as module

    real, calls = module.save_file, []

    def full_disk(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(TrainConfig(**settings))
    folder = Path(settings["output_dir"])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    monkeypatch.setattr(module, "save_file", real)
    assert train(TrainConfig(**{**settings, "resume": True})).metrics["steps"] == 12


def test_one_process_uses_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`Trainer` would run copies of the model in threads, each of which writes what the others read."""
    model = tiny_siamese("llama", "lora", "query_aware")
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=3, use_cpu=True, report_to=[])
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2
    trainer = SiameseTrainer(model, arguments)
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 3)
    assert trainer._wrap_model(model) is model
    assert "one of 2 GPUs is used; to use all, start with torchrun --nproc-per-node 2" in capsys.readouterr().err


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"epochs": 0.6}, {"epochs": 1.0}])
def test_a_finished_training_is_not_trained_on(settings: dict[str, Any], length: dict[str, Any]) -> None:
    """Of 6 steps an epoch: what a resume does is the end alone, however often."""
    settings |= {"schedule": "constant", **length}
    whole = train(TrainConfig(**settings))
    expected = {name: x.clone() for name, x in whole.model.state_dict().items()}
    for _ in range(2):
        resumed = train(TrainConfig(**settings, resume=True))
        assert resumed.metrics["steps"] == whole.metrics["steps"] == len(losses(whole.folder))
        assert resumed.metrics["loss"] == whole.metrics["loss"]
        assert all(torch.equal(x, expected[name]) for name, x in resumed.model.state_dict().items())
    ids = torch.arange(1, 9)[None]
    assert torch.equal(SiameseForCausalLM.from_pretrained(whole.folder)(ids).logits, whole.model(ids).logits)


def test_a_resumed_run_trains_on_the_same_data(settings: dict[str, Any], data_file: str, tmp_path: Path) -> None:
    text = Path(data_file).read_text()
    data = tmp_path / "own.jsonl"
    data.write_text(text)
    settings |= {"data": DataConfig(train=str(data), max_length=64), "save_steps": 4}
    train(TrainConfig(**settings))
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    resuming = TrainConfig(**settings, resume=True)
    data.write_text(text + text)
    with pytest.raises(InputError, match=r"steps: 12, now 24; data: .*data\.train and the number of processes"):
        train(resuming)
    data.write_text(text.replace("7 plus 7 is", "7 plus 7 are"))
    with pytest.raises(InputError, match=r"another plan \(data: other examples than now\)"):
        train(resuming)
    kept = tmp_path / "run" / "checkpoint-8" / "plan.json"
    plan = kept.read_text()
    data.write_text(text)
    kept.write_text(json.dumps({**json.loads(plan), "processes": 2}))
    with pytest.raises(InputError, match=r"another plan \(processes: 2, now 1\)"):
        train(resuming)
    kept.write_text("no plan")
    with pytest.raises(InputError, match=r"checkpoint-8 cannot be resumed.*; delete it to resume from the one before"):
        train(resuming)
    kept.write_text(plan)
    assert train(resuming).metrics["steps"] == 12


def test_what_a_resumed_run_no_longer_reads_may_be_left_out(settings: dict[str, Any], tmp_path: Path) -> None:
    """As of the memory bank, which may be given up when the disk is full."""
    train(TrainConfig(**settings, max_steps=1, memory_bank_dtype="bfloat16"))
    assert train(TrainConfig(**settings, max_steps=1, memory_bank="off", resume=True)).metrics["steps"] == 1
    with pytest.raises(InputError, match="memory_bank_dtype was 'auto', now 'float32'"):
        train(TrainConfig(**settings, max_steps=1, memory_bank_dtype="float32", resume=True))
    kept = tmp_path / "run" / "settings.yaml"
    kept.write_text(kept.read_text() + "method: peft\ngate_learning_rate: 0.1\n")
    with pytest.raises(
        InputError, match=r"cannot be resumed, its settings\.yaml is not of this version: .*another folder"
    ):
        train(TrainConfig(**settings, max_steps=1, memory_bank="off", resume=True))


def test_a_run_is_resumed_on_another_day(
    settings: dict[str, Any], base_folder: str, tmp_path: Path, day: Day, tokenizer: PreTrainedTokenizerBase
) -> None:
    """With a chat template that writes the date, which is not always as long."""
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "<|im_start|>system\n{{ strftime_now('%d %B') }}<|im_end|>\n" + tokenizer.chat_template
    dated.save_pretrained(shutil.copytree(base_folder, tmp_path / "dated"))
    said = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i + i}"}] for i in range(24)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in said))
    settings |= {"model": str(tmp_path / "dated"), "save_steps": 4}
    settings["data"] = DataConfig(train=str(tmp_path / "chats.jsonl"), max_length=64)
    lengths = set()
    for date in ("30 Apr", "01 May"):
        day(date)
        lengths.add(len(dated.apply_chat_template(said[0], return_dict=False)))
        found = train(TrainConfig(**settings, resume=date == "01 May"))
        assert found.metrics["steps"] == 12
        shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    assert len(lengths) == 2, lengths


def test_a_checkpoint_of_before_has_no_plan(settings: dict[str, Any], tmp_path: Path) -> None:
    train(TrainConfig(**settings))
    (tmp_path / "run" / "checkpoint-12" / "plan.json").unlink()
    assert train(TrainConfig(**settings, resume=True)).metrics["steps"] == 12


def test_steps() -> None:
    config = TrainConfig(model="m", output_dir="o", data=DataConfig(train="d"), batch_size=4, gradient_accumulation=2)
    assert steps(config, 25) == 4 * 3
    config.max_steps = 5
    assert steps(config, 25) == 5


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"peft_type": "LORRA"}, "did you mean 'LORA'"),
        ({"peft_type": "LORA", "rank": 8}, "unknown setting 'adapter.rank'"),
        ({"peft_type": "LORA", "lora_alfa": 8}, "did you mean 'lora_alpha'"),
    ],
)
def test_adapter_settings_are_peft_s_own(adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapter_config(adapter, 10)


def test_a_model_that_is_not_there(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"tokenizer of model .* cannot be loaded"):
        train(TrainConfig(**{**settings, "model": "/nowhere/at/all"}))
    assert not Path(settings["output_dir"]).exists()


def test_a_loss_that_is_no_number_stops_the_run(settings: dict[str, Any]) -> None:
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(TrainConfig(**{**settings, "learning_rate": 1e30, "gate_learning_rate": 1e30, "max_grad_norm": 0.0}))


# -- what the base model cannot read ---------------------------------------------------------------------------------


def gpt2(folder: Path, tokenizer: PreTrainedTokenizerBase, positions: int, rows: int | None = None) -> str:
    """A tiny model that cannot read behind its last position, of a vocabulary as large as the tokenizer's or of `rows`."""
    config = GPT2Config(
        vocab_size=rows or len(tokenizer),
        n_positions=positions,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_record_that_the_base_model_cannot_read_is_refused_at_once(
    settings: dict[str, Any], plain_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = tmp_path / "long.jsonl"
    lines = [{"input": "a b", "output": "c"}, {"input": "0 1 2 3 4 5 6 7 8 9" * 4, "output": "d"}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings |= {"data": DataConfig(train=str(data)), "adapter": {**LORA, "target_modules": ["c_attn"]}}
    refused = {
        r"long.jsonl, line 2 has \d+ tokens, the model reads 16": gpt2(tmp_path / "short", plain_tokenizer, 16),
        r"line 1 has the token '.*', number \d+, and the model embeds 5": gpt2(
            tmp_path / "few", plain_tokenizer, 256, 5
        ),
    }
    for message, model in refused.items():
        with pytest.raises(InputError, match=message):
            train(TrainConfig(**{**settings, "model": model}))
    assert not Path(settings["output_dir"]).exists()


def test_a_dress_that_the_base_model_cannot_read_is_left_out(
    settings: dict[str, Any], plain_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """In capitals these prompts take more tokens than the model has positions for; the finished training is not lost to it."""
    shared = "the of the request is about the"
    prompts = [f"{shared} {letter}: " for letter in "abcdefghijkl"]
    data = tmp_path / "shared.jsonl"
    data.write_text("".join(json.dumps({"input": prompt, "output": "x"}) + "\n" for prompt in prompts))
    longest = max(len(plain_tokenizer(prompt + "x")["input_ids"]) for prompt in prompts) + 1
    assert min(len(plain_tokenizer(prompt.upper())["input_ids"]) for prompt in prompts) > longest
    settings |= {
        "model": gpt2(tmp_path / "exact", plain_tokenizer, longest),
        "data": DataConfig(train=str(data)),
        "adapter": {**LORA, "target_modules": ["c_attn"]},
        "dreams": DreamsConfig(count=12, prompt_tokens=6),
        "max_steps": 1,
    }
    assert "dreams_kept" in train(TrainConfig(**settings)).metrics

    anchors = tmp_path / "anchors.jsonl"
    anchors.write_text(json.dumps({"text": "too long " * 40}) + "\n")
    settings |= {"output_dir": str(tmp_path / "other"), "dreams": DreamsConfig(count=12, anchors=str(anchors))}
    with pytest.raises(InputError, match=r"anchors.jsonl has an anchor of \d+ tokens, the model reads"):
        train(TrainConfig(**settings))


def test_a_folder_that_cannot_be_made_and_an_adapter_that_cannot_learn_are_refused_at_once(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir .*file/run cannot be made, as .*file is no folder"):
        train(TrainConfig(**{**settings, "output_dir": str(tmp_path / "file" / "run")}))
    with pytest.raises(InputError, match="adapter.inference_mode must be false"):
        train(TrainConfig(**{**settings, "adapter": {**LORA, "inference_mode": True}}))
    assert not Path(settings["output_dir"]).exists()
