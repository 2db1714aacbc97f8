"""The memory bank: what it gives is what the frozen stream would, and nothing stale or damaged is ever read."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from test_training import ADALORA, LORA, losses
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerBase
from zoo import METHODS, tiny_base, tiny_siamese

import imsm.memory_bank
from imsm import GATES, DataConfig, DreamsConfig, InputError, SiameseForCausalLM, TrainConfig, train
from imsm.data import IGNORED, AnswerCollator, Example
from imsm.memory_bank import MemoryBank, RecallingCollator, bank_bytes
from imsm.settings import to_yaml
from imsm.training import banking
from imsm.training.banking import passes, plan_bank

#: The paper's own training.
OFF = DreamsConfig("off")


def examples(count: int = 20, seed: int = 0) -> list[Example]:
    """Of several lengths; some with two answers, one whose answer nothing precedes, one with nothing to learn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(6, 15, (), generator=generator))
        ids = torch.randint(1, 64, (length,), generator=generator).tolist()
        learnt = {length - 2, length - 1} | ({2, 3} if number % 2 else set())
        learnt = set() if number == 3 else set(range(3)) if number == 4 else learnt
        made.append(Example(ids, [token if i in learnt else IGNORED for i, token in enumerate(ids)], number))
    return made


@pytest.fixture
def collator(plain_tokenizer: PreTrainedTokenizerBase) -> AnswerCollator:
    return AnswerCollator(plain_tokenizer)


@pytest.fixture
def passes_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lines of the examples that banks compute memories of."""
    seen: list[int] = []
    real = MemoryBank._compute

    def compute(bank: MemoryBank, batch: list[Example]) -> Any:
        seen.extend(example.line for example in batch)
        return real(bank, batch)

    monkeypatch.setattr(MemoryBank, "_compute", compute)
    yield seen


def built(
    model: SiameseForCausalLM, records: list[Example], collator: AnswerCollator, folder: Path, **settings: Any
) -> Any:
    bank = MemoryBank(model, records, collator, folder, **settings)
    bank.build()
    return bank


def learn(model: SiameseForCausalLM, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- bank ≡ live -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "architecture"),
    [
        *((gate, "llama") for gate in GATES),
        *((gate, name) for gate in ("query_aware", "query_blended") for name in ("gemma3", "gpt2", "bloom", "lfm2")),
    ],
)
def test_loss_and_gradients_are_the_live_ones(
    gate: str, architecture: str, collator: AnswerCollator, tmp_path: Path
) -> None:
    model = tiny_siamese(architecture, "lora", gate)
    records = examples()
    bank = built(model, records, collator, tmp_path, shard_tokens=60)
    assert len(bank.shards) > 2
    rows = [7, 0, 12, 3, 4]
    live, expected = learn(model, collator([records[i] for i in rows]))
    monkey = model.streams.frozen
    model.streams.frozen = None  # type: ignore[method-assign,assignment] # must not be run
    loss, found = learn(model, RecallingCollator(collator)([bank[i] for i in rows]))
    model.streams.frozen = monkey  # type: ignore[method-assign]
    assert loss == pytest.approx(live, abs=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max()))), name


def test_bfloat16_keeps_the_bits_of_a_bfloat16_base(collator: AnswerCollator, tmp_path: Path) -> None:
    base = tiny_base("llama").to(torch.bfloat16)
    model = SiameseForCausalLM.from_base(base, METHODS["lora"](base), gate="token", gate_rank=4).eval()
    records = examples()
    bank = built(model, records, collator, tmp_path, dtype=torch.bfloat16)
    batch = RecallingCollator(collator)([bank[0]])
    assert batch["base_memory"].dtype == torch.bfloat16
    alone = collator([records[0]])
    memory = model(**alone, output_memories=True).base_memory[alone["labels"].roll(-1) != IGNORED]
    assert torch.allclose(batch["base_memory"].float(), memory.float(), atol=2e-2 * float(memory.abs().max()))
    assert bank.bytes < 0.6 * bank_bytes(records, 32, torch.float32)


def test_rows_are_views_of_the_file_and_the_size_is_as_estimated(collator: AnswerCollator, tmp_path: Path) -> None:
    records = examples(300)
    bank = built(tiny_siamese("llama", "lora"), records, collator, tmp_path)
    assert not bank[5].memory.flags.owndata and not bank[5].memory.flags.writeable
    assert bank[5].memory.base is not None and numpy.shares_memory(bank[5].memory, bank.shards[0].memory)
    assert bank.built_bytes == pytest.approx(bank.bytes, rel=0.05)
    with pytest.raises(IndexError):
        bank[300]


@pytest.mark.parametrize(
    "change",
    [
        {"gate": "query_aware", "gradient_checkpointing": True},
        {"bf16": True},
        {"gate": "token", "adapter": ADALORA | {"target_r": 3}, "memory_bank_dtype": "float32"},
        {"gate": "query_blended", "packing": True},
        {"gradient_accumulation": 2, "batch_size": 3, "group_by_length": False},
    ],
)
def test_a_run_with_the_bank_is_the_run_without(
    base_folder: str, tmp_path: Path, change: dict[str, Any], passes_run: list[int]
) -> None:
    """Every step's loss, with dropout in gate and adapter, over three epochs."""
    settings = run_settings(base_folder, tmp_path) | change
    curves = []
    for bank in ("off", "on"):
        assert not passes_run
        train(TrainConfig(**with_bank(settings, bank), output_dir=str(tmp_path / bank)))
        curves.append(losses(tmp_path / bank))
    assert sorted(passes_run) == list(range(1, 25))  # once each, not once an epoch
    assert len(curves[0]) >= 9 and curves[1] == pytest.approx(curves[0], abs=1e-3)
    assert curves[0][1] != pytest.approx(curves[0][len(curves[0])], abs=2e-3)  # it moved


def test_a_sliding_window_model_trains_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    curves = []
    for name, change in {
        "live": {},
        "bank": {},
        "packed": {"packing": True},
    }.items():
        settings = run_settings(str(tmp_path / "base"), tmp_path) | {"adapter": {**LORA, "lora_dropout": 0.0}}
        settings = with_bank(settings, "off" if name == "live" else "on")
        train(TrainConfig(**settings, **change, gate_dropout=0.0, output_dir=str(tmp_path / name)))
        curves.append(losses(tmp_path / name))
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
    assert curves[2] == pytest.approx(curves[0], abs=1e-3)


def with_bank(settings: dict[str, Any], bank: str) -> dict[str, Any]:
    """The settings with a bank, or without one and what is said of it."""
    unread = ("memory_bank_dir", "memory_bank_dtype") if bank == "off" else ()
    return {**{key: value for key, value in settings.items() if key not in unread}, "memory_bank": bank}


def run_settings(base_folder: str, tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "train.jsonl"
    records = [{"input": f"{i} plus {'1 plus ' * (i % 5)}{i} is", "output": f" {2 * i}"} for i in range(24)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "model": base_folder,
        "data": DataConfig(train=str(data), max_length=64),
        "adapter": LORA,
        "batch_size": 8,
        "group_by_length": True,
        "learning_rate": 5e-3,
        "tensorboard": False,
        "dreams": OFF,
        "progress": False,
        "memory_bank_dir": str(tmp_path / "banks"),
    }


# -- the model's side ------------------------------------------------------------------------------------------------


def test_the_frozen_memories_fit_or_are_refused(collator: AnswerCollator, tmp_path: Path) -> None:
    model = tiny_siamese("llama", "lora")
    bank = built(model, examples(), collator, tmp_path)
    batch = RecallingCollator(collator)([bank[0], bank[1]])
    for wrong in (
        {"output_logits": True},
        {"output_memories": True},
        {"use_cache": True},
        {"force_gate": 0.0},
        {"labels": None},
    ):
        with pytest.raises(InputError, match="base_memory stands in"):
            model(**{**batch, **wrong})
    with pytest.raises(InputError, match="needs base_query"):
        model(**{**batch, "base_query": None})
    with pytest.raises(InputError, match=r"base_memory must be .* \(6, 32\), got \(5, 32\)"):
        model(**{**batch, "base_memory": batch["base_memory"][1:]})


# -- the fingerprint -------------------------------------------------------------------------------------------------


def test_every_ingredient_changes_the_fingerprint(collator: AnswerCollator, tmp_path: Path) -> None:
    def marked(change: Any = None, records: list[Example] | None = None, method: str = "lora", **settings: Any) -> str:
        model = tiny_siamese("llama", method)
        if change is not None:
            change(model.base)
        return MemoryBank(model, records or examples(), collator, tmp_path, **settings).fingerprint

    def nudge(tensor: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.view(-1)[-1] += 1e-3

    records = examples()
    tokens, labels, fewer = (copy.deepcopy(records) for _ in range(3))
    tokens[9].input_ids[0] += 1
    labels[9].labels[-1] = IGNORED
    found = {
        "as it is": marked(),
        "a weight of the first layer": marked(lambda b: nudge(b.model.layers[0].self_attn.q_proj.weight)),
        "a weight without an adapter": marked(lambda b: nudge(b.model.norm.weight)),
        "the head": marked(lambda b: nudge(b.lm_head.weight)),
        "a buffer": marked(lambda b: nudge(b.model.rotary_emb.inv_freq)),
        "the configuration": marked(lambda b: setattr(b.config, "rms_norm_eps", 1e-3)),
        "the attention": marked(lambda b: b.set_attn_implementation("eager")),
        "dtype of the base": marked(lambda b: b.to(torch.bfloat16)),
        "a token": marked(records=tokens),
        "a label": marked(records=labels),
        "an example less": marked(records=fewer[:-1]),
        "the order": marked(records=records[::-1]),
        "the bank's dtype": marked(dtype=torch.bfloat16),
        "autocast": marked(bf16=True),
    }
    assert len(set(found.values())) == len(found)
    # The adapter is no part of it, whatever it does to the base model's modules.
    for method in ("lora", "dora", "ia3", "adalora", "vera", "ln_tuning", "prefix_tuning"):
        assert marked(method=method) == found["as it is"], method


def test_nothing_stale_is_read(collator: AnswerCollator, tmp_path: Path, passes_run: list[int]) -> None:
    records = examples()
    old = built(tiny_siamese("llama", "lora"), records, collator, tmp_path)
    model = tiny_siamese("llama", "dora", "token")
    assert passes_run and not passes_run.clear()
    again = built(model, records, collator, tmp_path)
    assert not passes_run  # another adapter and gate on the same base: the memories are the same
    with torch.no_grad():
        model.base.model.norm.weight[0] += 1.0
    new = built(model, records, collator, tmp_path)
    assert len(passes_run) == len(records)
    assert numpy.array_equal(old[0].memory, again[0].memory) and not numpy.allclose(old[0].memory, new[0].memory)


def test_weights_that_are_not_in_memory_are_refused(collator: AnswerCollator, tmp_path: Path) -> None:
    model = tiny_siamese("llama", "lora").to("meta")
    with pytest.raises(InputError, match="offloaded"):
        MemoryBank(model, examples(), collator, tmp_path)


# -- interruptions and damage ----------------------------------------------------------------------------------------


def test_an_interrupted_build_goes_on_where_it_was(
    collator: AnswerCollator, tmp_path: Path, passes_run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, records = tiny_siamese("llama", "lora"), examples()
    whole = built(model, records, collator, tmp_path / "whole", shard_tokens=60)
    passes_run.clear()
    real, written = imsm.memory_bank._write, []

    def interrupted(path: Path, columns: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        real(path, columns)

    monkeypatch.setattr(imsm.memory_bank, "_write", interrupted)
    bank = MemoryBank(model, records, collator, tmp_path / "broken", shard_tokens=60)
    with pytest.raises(KeyboardInterrupt):
        bank.build()
    assert len(passes_run) < len(records) and bank.built_bytes > 0
    monkeypatch.setattr(imsm.memory_bank, "_write", real)
    passes_run.clear()
    reports: list[tuple[int, int]] = []
    bank.build(lambda done, total: reports.append((done, total)))
    kept = bank.starts[2]
    assert sorted(passes_run) == list(range(kept, len(records)))  # the two whole shards were not computed again
    tokens = sum(len(record.input_ids) for record in records[kept:])
    assert reports[-1] == (tokens, tokens)
    for row in range(len(records)):
        assert numpy.array_equal(bank[row].memory, whole[row].memory)
        assert numpy.array_equal(bank[row].query, whole[row].query)


@pytest.mark.parametrize("damage", ["truncated", "almost whole", "empty", "garbage", "of other examples"])
def test_a_damaged_shard_is_computed_again(
    damage: str, collator: AnswerCollator, tmp_path: Path, passes_run: list[int]
) -> None:
    model, records = tiny_siamese("llama", "lora"), examples()
    expected = built(model, records, collator, tmp_path, shard_tokens=60)
    first, second = sorted(tmp_path.rglob("*.arrow"))[:2]
    content = first.read_bytes()
    first.unlink()  # not the inode that `expected` has mapped
    first.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "almost whole": content[:-400],
            "empty": b"",
            "garbage": b"\0" * len(content),
            "of other examples": second.read_bytes(),
        }[damage]
    )
    passes_run.clear()
    bank = built(model, records, collator, tmp_path, shard_tokens=60)
    assert sorted(passes_run) == list(range(expected.starts[1]))
    assert numpy.array_equal(bank[0].memory, expected[0].memory)


def test_a_full_disk_is_said_and_leaves_no_half_file(
    collator: AnswerCollator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imsm.memory_bank.os, "fsync", full_disk)
    bank = MemoryBank(tiny_siamese("llama", "lora"), examples(), collator, tmp_path)
    with pytest.raises(InputError, match=r"cannot be written .* No space left .* make room there, .* memory_bank: off"):
        bank.build()
    assert list(bank.folder.iterdir()) == []


def test_what_killed_builds_left_behind_goes(collator: AnswerCollator, tmp_path: Path) -> None:
    bank = MemoryBank(tiny_siamese("llama", "lora"), examples(), collator, tmp_path)
    bank.folder.mkdir(parents=True)
    old, young = (bank.folder / f"{imsm.memory_bank.BESIDE}{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    bank.build()
    assert not old.exists() and young.exists() and len(bank.shards) == 1


# -- several processes -----------------------------------------------------------------------------------------------


def two_processes(command: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Runs a command as both ranks of a gloo group, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    started = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = []
    for process in started:
        out, err = process.communicate(timeout=120)
        ended.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    assert [process.returncode for process in ended] == [0, 0], [process.stderr[-2000:] for process in ended]
    return ended


BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
import imsm.memory_bank
from test_memory_bank import examples
from zoo import tiny_siamese
from imsm.data import AnswerCollator
from imsm.memory_bank import MemoryBank

class Tokenizer:
    pad_token_id = 0

torch.distributed.init_process_group("gloo")
real = MemoryBank._compute
computed = []
def compute(bank, batch):
    computed.extend(example.line for example in batch)
    return real(bank, batch)
MemoryBank._compute = compute
bank = MemoryBank(tiny_siamese("llama", "lora"), examples(), AnswerCollator(Tokenizer()), Path(sys.argv[1]), shard_tokens=60)
bank.build()
print(*computed)
print(*(f"{float(bank[row].memory.sum()):.4f}" for row in range(len(bank))))
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_the_building(collator: AnswerCollator, tmp_path: Path) -> None:
    ended = two_processes([sys.executable, "-c", BUILD, str(tmp_path), str(Path(__file__).parent)])
    (mine, first), (others, second) = (process.stdout.strip().split("\n") for process in ended)
    shares = [set(map(int, line.split())) for line in (mine, others)]
    assert all(shares) and not shares[0] & shares[1]
    assert shares[0] | shares[1] == set(range(20)) and len(mine.split()) + len(others.split()) == 20
    assert first == second
    alone = MemoryBank(tiny_siamese("llama", "lora"), examples(), collator, tmp_path, shard_tokens=60)
    assert all(alone._open(number) is not None for number in range(len(alone.starts)))


def test_two_processes_train_as_one(base_folder: str, tmp_path: Path) -> None:
    """DDP over gloo with half the batch each, with the bank: the losses are those of one process without.

    Resumed in mid-epoch they are the same to the last bit.
    """
    settings = run_settings(base_folder, tmp_path)
    settings |= {"adapter": {**LORA, "lora_dropout": 0.0}, "gate_dropout": 0.0, "save_steps": 4, "save_total_limit": 9}
    train(TrainConfig(**with_bank(settings, "off"), output_dir=str(tmp_path / "alone")))
    both = tmp_path / "both"
    config = TrainConfig(**{**settings, "batch_size": 4}, output_dir=str(both), memory_bank="on")
    (tmp_path / "both.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "imsm_cli", "train", str(tmp_path / "both.yaml")]
    two_processes(command)
    unbroken = losses(both)
    assert unbroken == pytest.approx(losses(tmp_path / "alone"), abs=1e-3)
    ids = torch.arange(1, 9)[None]
    logits = [SiameseForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("both", "alone")]
    assert torch.allclose(*logits, atol=1e-3)
    states = {path.name for path in (both / "checkpoint-4").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    for later in (8, 9):
        shutil.rmtree(both / f"checkpoint-{later}")
    two_processes([*command, "--resume"])
    assert losses(both) == unbroken
    assert torch.equal(SiameseForCausalLM.from_pretrained(both)(ids).logits, logits[0])


def test_two_processes_recompute_activations(base_folder: str, tmp_path: Path) -> None:
    """A gate that learns after the adapter has no part in the adapter's training, where every gradient is waited for."""
    settings = with_bank(run_settings(base_folder, tmp_path), "off")
    dreams = DreamsConfig(count=16, prompt_tokens=12, answer_tokens=4, gate_steps=8)
    settings |= {"batch_size": 4, "gate": "query_aware", "gradient_checkpointing": True, "dreams": dreams}
    config = TrainConfig(**{**settings, "max_steps": 3}, output_dir=str(tmp_path / "both"))
    (tmp_path / "both.yaml").write_text(to_yaml(config))
    two_processes([sys.executable, "-m", "imsm_cli", "train", str(tmp_path / "both.yaml")])
    assert sorted(losses(tmp_path / "both")) == [1, 2, 3]
    gate = SiameseForCausalLM.from_pretrained(tmp_path / "both").gate
    assert any(parameter.abs().sum() > 0 for parameter in gate.up.parameters())


# -- auto, on, off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "free", "decision"),
    [
        ({}, 1e9, r"on \(11\.1 kB for 20 examples in float32, in .*banks/[0-9a-f]{32}\)"),
        ({"epochs": 1.0}, 1e9, r"off \(11\.1 kB .* would not pay"),
        ({"max_steps": 2}, 1e9, "would not pay"),
        ({"max_steps": 6}, 1e9, "on"),
        ({}, 2e4, r"off \(11\.1 kB for .* has 20 kB free, of which it may take 50%"),
        ({"memory_bank": "on"}, 2e4, "on"),
        ({"memory_bank": "on", "epochs": 1.0}, 1e9, "on"),
        ({"memory_bank": "off"}, 1e9, "off"),
        ({"method": "peft"}, 1e9, "off"),
        ({"dreams": DreamsConfig()}, 1e9, "off .it has no use: the frozen stream is not run"),
        ({"memory_bank_dtype": "bfloat16"}, 1e9, r"on \(5\.7 kB for 20 examples in bfloat16"),
        ({"bf16": True}, 1e9, "in bfloat16"),
    ],
)
def test_decisions(
    settings: dict[str, Any],
    free: float,
    decision: str,
    collator: AnswerCollator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(banking, "free_bytes", lambda folder: int(free))
    common: dict[str, Any] = {"model": "m", "output_dir": "o", "data": DataConfig("d")}
    config = TrainConfig(**common, **{"dreams": OFF, **settings})
    if config.reads("memory_bank_dir"):
        config = replace(config, memory_bank_dir=str(tmp_path / "banks"))
    bank, line = plan_bank(config, tiny_siamese("llama", "lora"), examples(), collator)
    assert (bank is not None) == line.startswith("memory bank: on")
    assert re.search(decision, line), line


def test_on_that_cannot_be_is_refused(
    collator: AnswerCollator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"model": "m", "output_dir": "o", "data": DataConfig("d"), "memory_bank": "on"}
    with pytest.raises(InputError, match="the first of dreams' two phases runs no frozen stream"):
        TrainConfig(**common)
    common["dreams"] = OFF
    with pytest.raises(InputError, match="method: peft has no frozen stream"):
        TrainConfig(**common, method="peft")
    monkeypatch.setattr(banking, "free_bytes", lambda folder: 9000)
    config = TrainConfig(**common, memory_bank_dir=str(tmp_path))
    model = tiny_siamese("llama", "lora")
    with pytest.raises(InputError, match=r"takes 11\.1 kB .* has 9 kB free: make room"):
        plan_bank(config, model, examples(), collator)
    built(model, examples(), collator, tmp_path)
    assert plan_bank(config, model, examples(), collator)[0] is not None  # it is there already


def test_passes() -> None:
    config = TrainConfig(model="m", output_dir="o", data=DataConfig("d"), batch_size=4, gradient_accumulation=2)
    assert passes(config, 100, 1) == 3.0
    config.max_steps = 50
    assert passes(config, 100, 2) == 8.0


def test_banks_lie_in_the_user_s_cache_folder(
    cache_folder: Path, collator: AnswerCollator, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = MemoryBank(tiny_siamese("llama", "lora"), examples(), collator)
    assert bank.folder == cache_folder / "imsm" / "memory_banks" / bank.fingerprint
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert imsm.memory_bank.default_folder() == Path.home() / ".cache" / "imsm" / "memory_banks"
