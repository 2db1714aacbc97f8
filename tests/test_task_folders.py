"""Checkpoints of several tasks: what is saved and loaded again, and what is done to their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_many_tasks import NAMES, OWNERS, PROMPTS, alone, generate, several
from zoo import tiny_base

from imsm import InputError, SiameseConfig, SiameseForCausalLM
from imsm.cli.info import describe
from imsm.relevance import RelevanceHead
from imsm_cli import main


def load(folder: Path) -> SiameseForCausalLM:
    return SiameseForCausalLM.from_pretrained(folder, base=tiny_base("llama"))


def load_tasks(folder: Path) -> list[str]:
    return list(json.loads((folder / "config.json").read_text())["tasks"])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


TASK = {"adapter_config.json", "adapter_model.safetensors", "gate.safetensors", "queries.safetensors"}
TASK |= {"relevance.safetensors"}
ONE = {*TASK, "README.md", "config.json", "generation_config.json"}
ALL = {
    *ONE,
    "router.safetensors",
    *(f"tasks/{name}/{file}" for name in NAMES[1:] for file in (*TASK, "task.json")),
}


def test_info_counts_all_tasks(tmp_path: Path) -> None:
    model = several("query_aware")
    model.save_pretrained(tmp_path / "model")
    found = describe(str(tmp_path / "model"))["parameters"]
    adapters = sum(p.numel() for name, p in model.peft_model.named_parameters() if "lora_" in name)
    gates = sum(p.numel() for name in NAMES for p in model.part(name).gate.parameters())
    assert found == {"adapter": f"{adapters:,}", "gate": f"{gates:,}"}


@pytest.mark.parametrize("gate", ["query_aware", "tuned"])
def test_round_trip(tmp_path: Path, gate: str) -> None:
    model = several(gate)
    model.activate("green")  # whichever is active, the first task lies where a single one does
    model.config.training = {"results": {"loss": 0.5}}
    model.save_pretrained(tmp_path / "model")
    assert files(tmp_path / "model") == ALL
    loaded = load(tmp_path / "model")
    assert loaded.tasks == NAMES and loaded.active == "red" and loaded.task is None and not loaded.training
    model.activate("red")
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in NAMES:
        one, other = model.part(name), loaded.part(name)
        assert one.settings == other.settings
        assert one.queries is not None and other.queries is not None and torch.equal(one.queries, other.queries)
        ids = torch.tensor([PROMPTS[OWNERS.index(name)]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert generate(loaded, PROMPTS) == generate(model, PROMPTS)
    assert loaded.part("green").settings["training"] == {"results": {"loss": 0.5}}
    assert "red, green, blue" in (tmp_path / "model" / "README.md").read_text()


def test_one_task_of_a_name_is_a_folder_as_ever(tmp_path: Path) -> None:
    model = several(names=["red"])
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert files(tmp_path / "model") == ONE and config["format_version"] == 2 and config["tasks"] == ["red"]
    assert generate(load(tmp_path / "model"), PROMPTS) == generate(model, PROMPTS)
    assert "tasks" not in SiameseConfig(hidden_size=8).to_dict()


def test_an_older_imsm_refuses_several(tmp_path: Path) -> None:
    several(names=["red", "green"]).save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["format_version"] == 3


def test_a_checkpoint_without_a_store_can_be_read_but_not_added_to(tmp_path: Path) -> None:
    model = several(names=["red"])
    said = generate(model, PROMPTS)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/queries.safetensors").unlink()
    loaded = load(tmp_path / "model")
    assert generate(loaded, PROMPTS) == said
    with pytest.raises(InputError, match="task 'red' has no stored queries.*imsm adopt ADAPTER"):
        loaded.add_task("green", several(names=["green"]).peft_model.peft_config["green"])


def test_fewer_tasks_leave_nothing_of_those_before(tmp_path: Path) -> None:
    model = several()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/notes.txt").write_text("mine")
    model.remove_task("red")
    model.save_pretrained(tmp_path / "model")
    assert files(tmp_path / "model") == {*(f for f in ALL if "green" not in f), "notes.txt"}
    assert generate(load(tmp_path / "model"), PROMPTS) == generate(model, PROMPTS)
    model.remove_task("green")
    model.save_pretrained(tmp_path / "model")
    assert files(tmp_path / "model") == {*ONE, "notes.txt"}
    assert generate(load(tmp_path / "model"), PROMPTS) == generate(model, PROMPTS)


def test_a_task_that_is_being_learnt_is_saved_too(tmp_path: Path) -> None:
    model = several(names=["red", "green"])
    model.add_task("blue", model.peft_model.peft_config["green"])
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.tasks == NAMES and loaded.rivals == ["red", "green"]
    learning = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert learning and all(".blue." in name for name in learning)


def test_the_newest_goes_on_learning(tmp_path: Path) -> None:
    several().save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    loaded.task = "blue"
    ids = torch.tensor([PROMPTS[2]])
    loaded.train()(ids, labels=ids).loss.backward()
    learnt = {name for name, p in loaded.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("lora_A.blue" in name for name in learnt) and "gate.down.weight" in learnt
    assert not any("red" in name or "green" in name for name in learnt)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("router.safetensors", "router.safetensors missing"),
        ("tasks/green/task.json", "task.json missing"),
        ("tasks/green/gate.safetensors", "gate.safetensors missing"),
        ("tasks/green/relevance.safetensors", "relevance.safetensors missing"),
        ("tasks/green/adapter_config.json", "adapter_config.json is missing"),
        ("tasks/green", "task.json missing"),
    ],
)
def test_incomplete(tmp_path: Path, file: str, message: str) -> None:
    several(names=["red", "green"]).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=message):
        load(tmp_path / "model")


def test_damaged(tmp_path: Path) -> None:
    several(names=["red", "green"]).save_pretrained(tmp_path / "model")
    folder = tmp_path / "model/tasks/green"
    good = (folder / "task.json").read_text()
    (folder / "task.json").write_text("{")
    with pytest.raises(InputError, match=r"task\.json cannot be read"):
        load(tmp_path / "model")
    (folder / "task.json").write_text(json.dumps({**json.loads(good), "relevance_turn": [1]}))
    with pytest.raises(InputError, match=r"does not go with config\.json: it has another relevance_turn"):
        load(tmp_path / "model")
    (folder / "task.json").write_text(good)
    (folder / "queries.safetensors").write_bytes(b"\x00" * 30)
    with pytest.raises(InputError, match=r"queries\.safetensors is damaged"):
        load(tmp_path / "model")


def test_stores_hold_half_precision_vectors_alone(tmp_path: Path) -> None:
    several().save_pretrained(tmp_path / "model")
    held = load_file(tmp_path / "model/tasks/green/queries.safetensors")
    assert set(held) == {"queries"} and held["queries"].dtype == torch.float16 and held["queries"].shape == (120, 64)


def test_what_is_saved_is_what_one_task_saves(tmp_path: Path) -> None:
    model = several()
    model.save_pretrained(tmp_path / "model")
    alone(model, "green").save_pretrained(tmp_path / "green")
    for file in ("adapter_model.safetensors", "gate.safetensors", "relevance.safetensors"):
        ours, theirs = load_file(tmp_path / "model/tasks/green" / file), load_file(tmp_path / "green" / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("ours", "theirs", "after"),
    [([5], [5, 9], [5, 9]), (5, 9, [5, 9]), ([9, 5], 5, [9, 5]), (None, 9, 9), (5, None, 5), (None, None, None)],
)
def test_an_imported_task_stops_where_it_did(tmp_path: Path, ours: Any, theirs: Any, after: Any) -> None:
    folders = tmp_path / "red", tmp_path / "green"
    for folder, ends in zip(folders, (ours, theirs), strict=True):
        model = several(names=[folder.name])
        model.generation_config.update(eos_token_id=ends, repetition_penalty=1.5 if folder.name == "red" else 1.25)
        model.save_pretrained(folder)
    assert main(["task", "import", *map(str, folders)]) == 0
    loaded = load(folders[0])
    assert loaded.tasks == ["red", "green"]
    assert loaded.generation_config.eos_token_id == after and loaded.generation_config.repetition_penalty == 1.5
    assert load(folders[1]).generation_config.eos_token_id == theirs


def test_an_import_into_a_folder_without_generation_settings_takes_the_others(tmp_path: Path) -> None:
    for name in ("red", "green"):
        model = several(names=[name])
        model.generation_config.eos_token_id = [5, 9]
        model.save_pretrained(tmp_path / name)
    settings = tmp_path / "red/generation_config.json"
    settings.write_text("{")
    assert main(["task", "import", str(tmp_path / "red"), str(tmp_path / "green")]) == 2
    assert load_tasks(tmp_path / "red") == ["red"]
    settings.unlink()
    assert main(["task", "import", str(tmp_path / "red"), str(tmp_path / "green")]) == 0
    assert load(tmp_path / "red").generation_config.eos_token_id == [5, 9]


def called(folder: Path, old: str, new: str) -> None:
    """Gives a task that is not the first another name, as was once possible with any."""
    (folder / "tasks" / old).rename(folder / "tasks" / new)
    config = json.loads((folder / "config.json").read_text())
    config["tasks"] = [new if name == old else name for name in config["tasks"]]
    (folder / "config.json").write_text(json.dumps(config))


def test_names_by_which_peft_would_lose_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both, other = tmp_path / "both", tmp_path / "other"
    model = several(names=["red", "green"])
    model.save_pretrained(both)
    several(names=["blue"]).save_pretrained(other)
    before = {path: path.read_bytes() for path in both.rglob("*") if path.is_file()}
    for name, why in (
        ("1", "a number"),
        ("77", "a number"),
        ("mlp", "one of"),
        ("model", "one of"),
        ("lora_A", "one of"),
    ):
        for verb in (["rename", str(both), "green", name], ["import", str(both), str(other), "--as", name]):
            assert main(["task", *verb]) == 2
            said = capsys.readouterr().err
            assert "a task's name must not be" in said and why in said and f"got {name!r}" in said
    assert {path: path.read_bytes() for path in both.rglob("*") if path.is_file()} == before
    # In a folder from before such names were refused it is said when it is loaded, and can be put right.
    called(both, "green", "1")
    with pytest.raises(InputError, match=r"of task 'red' .*'1'; give it another name .*imsm task rename"):
        load(both)
    assert main(["task", "import", str(both), str(other)]) == 2
    assert "got '1', which is one of" in capsys.readouterr().err
    assert main(["task", "rename", str(both), "1", "green"]) == 0
    assert generate(load(both), PROMPTS) == generate(model, PROMPTS)


def test_an_older_name_that_costs_nothing_is_loaded(tmp_path: Path) -> None:
    base = tiny_base("llama")
    model = SiameseForCausalLM.from_base(base, LoraConfig(r=4, target_modules=["q_proj"]), task="red").eval()
    model.set_relevance(RelevanceHead(64))
    model.set_queries(torch.randn(20, 64))
    model.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one/config.json").read_text())
    (tmp_path / "one/config.json").write_text(json.dumps({**config, "tasks": ["model"]}))
    assert load(tmp_path / "one").tasks == ["model"]
    model.add_task("green", LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "two")
    called(tmp_path / "two", "green", "mlp")
    loaded = load(tmp_path / "two")
    loaded.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").tasks == ["red", "mlp"]
