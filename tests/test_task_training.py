"""Task after task by `imsm train --continue-from`, and what `imsm task` does with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from imsm import DataConfig, DreamsConfig, InputError, SiameseForCausalLM, TrainConfig, train
from imsm.generation import answers
from imsm.training import run as runs
from imsm.training.models import make_trainer
from imsm_cli import main

RECORDS = {
    "sums": [{"input": f"What is {i} plus {i}? Answer:", "output": f" {2 * i}"} for i in range(24)],
    "capitals": [{"input": f"user system user {i} so on\nParis:", "output": " France"} for i in range(24)],
    "words": [{"input": f"of of of the the {i} capital of", "output": " yes"} for i in range(24)],
}
FITTED = DreamsConfig(count=16, prompt_tokens=12, answer_tokens=4, gate_steps=8)
FILES = ("adapter_model.safetensors", "gate.safetensors", "relevance.safetensors", "queries.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    for name, records in RECORDS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {name: str(folder / f"{name}.jsonl") for name in RECORDS}


@pytest.fixture(scope="module")
def settings(base_folder: str, data: dict[str, str]) -> Callable[..., TrainConfig]:
    def made(name: str, output: Path, before: Path | None = None, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": base_folder,
            "output_dir": str(output),
            "data": DataConfig(train=data[name], max_length=64),
            "adapter": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            "dreams": DreamsConfig(count=16, prompt_tokens=12),
            "batch_size": 4,
            "epochs": 1.0,
            "learning_rate": 2e-2,
            "tensorboard": False,
            "progress": False,
            "task": name,
            "continue_from": None if before is None else str(before),
        }
        return TrainConfig(**{**values, **changes})

    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., TrainConfig]) -> list[Path]:
    """A checkpoint after each of three tasks in a row; the second one has a gate that learns."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for place, name in enumerate(RECORDS):
        gate: dict[str, Any] = {"gate": "query_aware", "dreams": FITTED} if place == 1 else {}
        train(settings(name, folder / name, found[-1] if found else None, **gate))
        found.append(folder / name)
    return found


@pytest.fixture
def folder(trained: list[Path], tmp_path: Path) -> Path:
    """A copy of the last checkpoint."""
    return Path(shutil.copytree(trained[-1], tmp_path / "checkpoint"))


def said(folder: Path, prompts: list[str], **kwargs: Any) -> list[str]:
    model, tokenizer = SiameseForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = answers(model, tokenizer, prompts, max_new_tokens=4, **kwargs)
    return [answer.text for answer in sorted(found, key=lambda answer: answer.index)]


def prompts(name: str, count: int = 6) -> list[str]:
    return [record["input"] for record in RECORDS[name][:count]]


def place(folder: Path, name: str) -> Path:
    return folder if name == "sums" else folder / "tasks" / name


def test_each_run_adds_a_task_and_leaves_those_before(trained: list[Path]) -> None:
    for number, checkpoint in enumerate(trained):
        model = SiameseForCausalLM.from_pretrained(checkpoint)
        assert model.tasks == list(RECORDS)[: number + 1]
        for name in model.tasks[:number]:
            for file in FILES:
                before, after = place(trained[number - 1], name) / file, place(checkpoint, name) / file
                assert before.read_bytes() == after.read_bytes(), (name, file)
    assert model.part("capitals").settings["gate"] == "query_aware"
    assert model.part("words").settings["training"]["data"]["train"] == "words.jsonl"
    assert model.part("words").settings["training"]["results"]["others_left"] > 0.9
    adapters = [load_file(place(trained[-1], name) / FILES[0]) for name in RECORDS]
    assert any(not torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_a_further_task_is_learnt_with_the_checkpoints_tokenizer(
    folder: Path, settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """As `imsm adopt` leaves it with the tokenizer that the adapter came with."""
    own = AutoTokenizer.from_pretrained(folder)
    own.chat_template = "{# my own #}" + own.chat_template
    own.save_pretrained(folder)
    found = train(settings("words", tmp_path / "further", folder, task="further"))
    assert found.tokenizer.chat_template == own.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "further").chat_template == own.chat_template


def test_every_prompt_finds_its_task(trained: list[Path]) -> None:
    for name, checkpoint in zip(RECORDS, trained, strict=True):
        learnt = said(checkpoint, prompts(name), task=name)
        assert said(trained[-1], prompts(name)) == said(trained[-1], prompts(name), task=name) == learnt
    other = ["<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"]
    assert said(trained[-1], other) == said(trained[-1], other, force_gate=1.0)
    mixed = [prompt for name in RECORDS for prompt in prompts(name, 2)]
    assert said(trained[-1], mixed) == [answer for prompt in mixed for answer in said(trained[-1], [prompt])]


def test_a_first_run_of_a_name_trains_what_one_without_does(
    settings: Callable[..., TrainConfig], trained: list[Path], tmp_path: Path
) -> None:
    plain = train(settings("sums", tmp_path / "plain", task=None))
    assert plain.model.tasks == ["default"]  # type: ignore[union-attr]
    for file in FILES:
        ours, theirs = load_file(trained[0] / file), load_file(tmp_path / "plain" / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("phases", ["two", "joint"])
def test_a_continuation_that_was_cut_is_resumed(
    settings: Callable[..., TrainConfig],
    trained: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phases: str,
) -> None:
    dreams = DreamsConfig(count=16, prompt_tokens=12, phases=phases)  # type: ignore[arg-type]
    config = settings("capitals", tmp_path / "whole", trained[0], dreams=dreams, save_steps=3)
    whole = train(config)
    with monkeypatch.context() as patch:

        def cut(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(runs, "learn_from_dreams", cut)
        with pytest.raises(KeyboardInterrupt):
            train(settings("capitals", tmp_path / "cut", trained[0], dreams=dreams, save_steps=3))
    again = settings("capitals", tmp_path / "cut", trained[0], dreams=dreams, save_steps=3, resume=True)
    resumed = train(again)
    ours, theirs = dict(resumed.model.named_parameters()), dict(whole.model.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_learns_has_a_gradient(
    settings: Callable[..., TrainConfig], trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first phase, on a checkpoint with another task; after both the gate may learn again."""
    idle: list[str] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            idle.extend(name for name, p in model.named_parameters() if p.requires_grad and p.grad is None)

    def watched(*args: Any) -> Any:
        trainer = make_trainer(*args)
        trainer.add_callback(Watch)
        assert not any(p.requires_grad for p in trainer.siamese.gate.parameters())
        return trainer

    monkeypatch.setattr(runs, "make_trainer", watched)
    result = train(settings("capitals", tmp_path / "out", trained[0], gate="query_aware", max_steps=2))
    assert idle == []
    learning = list(result.model.gate.parameters())  # type: ignore[union-attr]
    assert learning and all(p.requires_grad for p in learning)


def test_continuations_that_cannot_be(
    settings: Callable[..., TrainConfig], trained: list[Path], tmp_path: Path, base_folder: str
) -> None:
    bare = Path(shutil.copytree(trained[0], tmp_path / "bare"))
    (bare / "queries.safetensors").unlink()
    other = Path(shutil.copytree(base_folder, tmp_path / "other-base"))
    for source, changes, message in (
        (trained[1], {}, "there is a task 'capitals' already"),
        (trained[0], {"task": "a b"}, "a task's name must be"),
        (trained[0], {"output_dir": str(trained[0]), "resume": True}, "have other settings|has other settings"),
        (bare, {}, "task 'sums' in .* has no relevance head or no stored queries.*imsm adopt"),
        (trained[0], {"model": str(other)}, "model must be the base of"),
        (tmp_path / "nowhere", {}, "is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            train(settings("capitals", tmp_path / "new", source, **changes))
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["1", "mlp", "model", "embed_tokens", "lora", "a b"])
def test_a_name_is_refused_before_anything_is_dreamt(
    settings: Callable[..., TrainConfig],
    trained: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    def too_late(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(runs, "sampled_dreams", too_late)
    for before in (None, trained[0]):
        with pytest.raises(InputError, match=r"a task's name must .*got '"):
            train(settings("words", tmp_path / "new", before, task=name))
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continue_from": "c"}, "needs a name for the new task"),
        ({"continue_from": "c", "task": "t", "dreams": DreamsConfig("off")}, "needs dreams"),
        ({"task": "t", "method": "peft"}, "task is set, but has no effect with method: peft: use method: imsm"),
        ({"task": ""}, "task must be a text that is not empty"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig("m", "o", DataConfig("t"), **changes)


# -- imsm task -------------------------------------------------------------------------------------------------------


def test_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", "list", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [fact["task"] for fact in facts] == list(RECORDS)
    assert all(fact["stored queries"] > 0 and fact["records"] == 24 for fact in facts)
    assert main(["task", "list", str(folder)]) == 0
    assert "capitals" in capsys.readouterr().out
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == "sums, capitals, words"


@pytest.mark.parametrize("gone", list(RECORDS))
def test_remove(folder: Path, trained: list[Path], gone: str) -> None:
    before = {name: said(folder, prompts(name), task=name) for name in RECORDS if name != gone}
    (folder / "notes.txt").write_text("mine")
    assert main(["task", "remove", str(folder), gone]) == 0
    assert SiameseForCausalLM.from_pretrained(folder).tasks == list(before)
    for name, answer in before.items():
        assert said(folder, prompts(name)) == said(folder, prompts(name), task=name) == answer
    # Just as if the model had done it.
    model = SiameseForCausalLM.from_pretrained(trained[-1])
    model.remove_task(gone)
    ours, theirs = dict(SiameseForCausalLM.from_pretrained(folder).named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "router" in name)
    for name in before:
        if name != gone:
            assert main(["task", "remove", str(folder), name]) == (0 if name != list(before)[-1] else 2)
    assert not (folder / "tasks").exists() and not (folder / "router.safetensors").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.loads((folder / "config.json").read_text())["format_version"] == 2


def test_rename(folder: Path) -> None:
    before = said(folder, prompts("sums", 2) + prompts("words", 2))
    assert main(["task", "rename", str(folder), "sums", "adding"]) == 0
    assert main(["task", "rename", str(folder), "words", "sums"]) == 0
    assert SiameseForCausalLM.from_pretrained(folder).tasks == ["adding", "capitals", "sums"]
    assert said(folder, prompts("sums", 2) + prompts("words", 2)) == before
    assert said(folder, prompts("words", 2), task="sums") == before[2:]


@pytest.mark.parametrize("name", list(RECORDS))
def test_what_is_exported_is_the_task_alone(folder: Path, tmp_path: Path, name: str) -> None:
    assert main(["task", "export", str(folder), name, "--output", str(tmp_path / "one")]) == 0
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (place(folder, name) / file).read_bytes()
    assert said(tmp_path / "one", prompts(name)) == said(folder, prompts(name), task=name)
    assert not (tmp_path / "one" / "tasks").exists() and not (tmp_path / "one" / "settings.yaml").exists()
    # And comes back as it was.
    assert main(["task", "remove", str(folder), name]) == 0
    assert main(["task", "import", str(folder), str(tmp_path / "one"), "--as", "back"]) == 0
    assert SiameseForCausalLM.from_pretrained(folder).tasks[-1] == "back"
    assert said(folder, prompts(name)) == said(tmp_path / "one", prompts(name))


def test_import_from_among_several(trained: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "first"))
    assert main(["task", "import", str(folder), str(trained[-1]), "--task", "words"]) == 0
    assert SiameseForCausalLM.from_pretrained(folder).tasks == ["sums", "words"]
    for name in ("sums", "words"):
        assert said(folder, prompts(name)) == said(trained[-1], prompts(name), task=name)
    for file in FILES:
        assert (folder / "tasks/words" / file).read_bytes() == (trained[-1] / "tasks/words" / file).read_bytes()


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_refusals(folder: Path, trained: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(trained[0], tmp_path / "other"))
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}

    def refused(*arguments: str) -> str:
        assert main(["task", *arguments]) == 2
        return capsys.readouterr().err

    assert "there is no task 'pink'" in refused("remove", str(folder), "pink")
    assert "must be a checkpoint's folder" in refused("remove", "a/hub-name", "sums")
    assert "there is a task 'words' already" in refused("rename", str(folder), "sums", "words")
    assert "must be letters" in refused("rename", str(folder), "sums", "../x")
    assert "is not empty" in refused("export", str(folder), "sums", "--output", str(trained[0]))
    assert "there is a task 'sums' already" in refused("import", str(folder), str(other))
    edit(other, base_model="another/model")
    message = refused("import", str(folder), str(other), "--as", "more")
    assert "of another base: base_model 'another/model'" in message and "--same-base" in message
    edit(other, base_model="another/model", hidden_size=48)
    assert "hidden_size 48" in refused("import", str(folder), str(other), "--as", "more", "--same-base")
    edit(other, hidden_size=32, relevance_turn=[1, 2])
    assert "reads other things" in refused("import", str(folder), str(other), "--as", "more", "--same-base")
    shutil.rmtree(other)
    shutil.copytree(trained[0], other)
    (other / "queries.safetensors").unlink()
    assert "no stored queries" in refused("import", str(folder), str(other), "--as", "more")
    adapter = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    assert "adapters of one model are of one kind" in refused("import", str(folder), str(other), "--as", "more")
    assert adapter["peft_type"] == "LORA"
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before


def test_the_same_base_under_another_name(folder: Path, trained: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained[0], tmp_path / "other"))
    edit(other, base_model="another/model")
    assert main(["task", "import", str(folder), str(other), "--as", "more", "--same-base"]) == 0
    assert said(folder, prompts("sums"), task="more") == said(folder, prompts("sums"), task="sums")


# -- the other verbs -------------------------------------------------------------------------------------------------


def test_generate_finds_the_task_or_takes_the_one_it_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [prompts("sums", 1)[0], prompts("words", 1)[0]]
    common = ["generate", str(folder), *asked, "--plain", "--max-new-tokens", "4", "--json"]

    def printed(*more: str) -> list[str]:
        assert main([*common, *more]) == 0
        return [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]

    assert printed() == said(folder, asked) != printed("--task", "capitals")
    assert printed("--task", "sums") == said(folder, asked, task="sums")
    assert main([*common, "--task", "pink"]) == 2 and "there is no task 'pink'" in capsys.readouterr().err


def test_tasks_are_evaluated_like_any_checkpoint(folder: Path, base_folder: str, tmp_path: Path) -> None:
    """Answers, likelihoods of what the base says, and plain texts: whatever is asked of rows of several tasks at once."""
    from imsm.evaluation.candidates import open_candidate
    from imsm.evaluation.running import evaluate
    from imsm.evaluation.task import Task

    rows = [record for name in RECORDS for record in RECORDS[name][:3]]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({**row, "text": row["input"]}) + "\n" for row in rows))
    tasks = [
        Task("answers", "A", "answer", "all.jsonl", ("exact_match",), max_new_tokens=4),
        Task("kept", "K", "kept", "all.jsonl", ("identical",), reference=None, max_new_tokens=4),
        Task("text", "T", "text", "all.jsonl", ("cross_entropy",), None, "{text}", reference=None),
    ]
    found = evaluate(
        open_candidate(str(folder)), tasks, data_root=tmp_path, output=tmp_path / "out.json", progress=False
    )
    alone = said(folder, [row["input"] for row in rows])
    assert [record.answer for record in found.tasks["answers"].records] == alone
    assert all(len(task.records) == 9 for task in found.tasks.values())


def test_what_is_for_one_task_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from imsm.evaluation.candidates import open_candidate

    assert main(["export", str(folder), "--adapter-only", "--output", str(tmp_path / "x")]) == 2
    assert "the adapters of several tasks, sums, capitals, words" in capsys.readouterr().err
    with pytest.raises(InputError, match="@scale is for one adapter"):
        open_candidate(f"{folder}@scale=0.5")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS["sums"][:4]))
    tuned = ["tune-recall", str(folder), "--data", str(data), "--output", str(tmp_path / "recall")]
    assert main(tuned) == 2 and "the dial is tuned for one task" in capsys.readouterr().err
