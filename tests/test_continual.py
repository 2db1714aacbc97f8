"""The benchmark of tasks in a row on a tiny model: its sets, its sums, and a run whole, cut and continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from zoo import disturb, tiny_base

from benchmarks.continual import orthogonal, scores, sets
from benchmarks.continual.__main__ import main
from benchmarks.continual.nearest import NearestQuery
from benchmarks.continual.run import METHODS, read_plan
from imsm import InputError, SiameseForCausalLM


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    domains = [*sets.EVERYDAY, "work", "banking", "meta", "out_of_scope"]
    files: dict[str, list[dict[str, Any]]] = {
        "banking77/train": [
            {"input": f"Name it.\nMessage: card {i}\nIntent:", "output": f"i{i % 5}"} for i in range(30)
        ],
        "banking77/test": [{"input": f"Name it.\nMessage: bank {i}\nIntent:", "output": f"i{i % 5}"} for i in range(9)],
        "clinc150/test": [
            {"text": f"so and so {i}", "intent": f"in_{i % 3}", "domain": domains[i % len(domains)]} for i in range(160)
        ],
        "gsm8k/train": [{"input": f"You are.\nBelow is\n{i} plus?", "output": "x"} for i in range(12)],
        "freebaseqa/test": [{"input": f"Please\nQuestion:Who is {i}?\nAnswer:", "output": "x"} for i in range(12)],
        "mrpc/train": [{"input": f"D.\nSentence1: A {i} .\nSentence2: B\nOuput:", "output": "x"} for i in range(12)],
        "cola/train": [{"input": f" Given\nSentence:They {i}.\nOutput:", "output": "yes"} for i in range(12)],
        "wiki/sentences": [{"text": f"the capital {i}"} for i in range(12)],
    }
    for name, rows in files.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    content = {
        "tasks": ["desks", "kinds", "banking"],
        "training_records": 12,
        "test_records": 4,
        "train": {
            "max_steps": 2,
            "batch_size": 4,
            "dtype": "float32",
            "adapter": {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "dreams": {"count": 12, "prompt_tokens": 12},
        },
        "seeds": [0],
        "methods": {name: {"title": name.title(), "source": "a paper"} for name in METHODS},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_run_is_continued_and_reported(
    jobs: list[dict[str, Any]],
    base_folder: str,
    data_root: Path,
    plan_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, work, name = tmp_path / "out", tmp_path / "work", Path(base_folder).name
    arguments = ["--data-root", str(data_root), "--plan", str(plan_file), "--work", str(work), "--out", str(out)]
    run = ["run", "--model", base_folder, *arguments]
    assert main([*run, "--budget-minutes", "0"]) == 0
    assert not jobs and not list(out.rglob("*.json"))  # out of time at once, and nothing half-written
    assert main([*run, "--methods", "nearest", "imsm"]) == 0
    kinds = [task["do"] for task in jobs]
    # The adapters are trained once for both; base, three checkpoints either way, and the cost.
    assert [kinds.count(kind) for kind in ("train", "evaluate", "cost")] == [3, 7, 1]
    assert main(run) == 0
    assert [task["do"] for task in jobs].count("adapter") == 3 + 1 + 3
    assert sorted(path.name for path in (out / name).iterdir()) == sorted(f"{method}-seed-0.json" for method in METHODS)
    before = len(jobs)
    assert main(run) == 0 and len(jobs) == before  # nothing is done twice
    (out / name / "sequential-seed-0.json").unlink()
    assert main(run) == 0 and len(jobs) == before

    found = {method: json.loads((out / name / f"{method}-seed-0.json").read_text()) for method in METHODS}
    for method, record in found.items():
        assert len(record["matrix"]) == (1 if method == "all" else 3) and len(record["base"]) == 3
        assert record["average"] == scores.average_accuracy(record["matrix"])
        assert (record["backward"] is None) == (method == "all")
        assert {task: len(rows) for task, rows in record["records"].items()} == dict.fromkeys(record["tasks"], 4)
    assert found["all"]["training"][0]["steps"] == 6 and found["sequential"]["training"][2]["steps"] == 2
    assert found["imsm"]["cost"]["own"]["ratio"] > 0 and found["imsm"]["cost"]["tokens"][2] == 32
    assert len(found["imsm"]["cost"]["finds"]) == 2
    checkpoint = work / name / "imsm" / "seed-0" / "2-banking" / "checkpoint"
    assert SiameseForCausalLM.from_pretrained(checkpoint).tasks == ["desks", "kinds", "banking"]
    assert main(["report", "--out", str(out)]) == 0
    page = capsys.readouterr().out
    assert "| Imsm | 0 |" in page and "| after | desks | kinds | banking |" in page and "| the first task's |" in page

    for change, message in {
        "training_records: 11": "data was made",
        "train: {max_steps: 3}": "made under another",
    }.items():
        other = tmp_path / "other.yaml"
        other.write_text(yaml.safe_dump({**yaml.safe_load(plan_file.read_text()), **yaml.safe_load(change)}))
        assert main([*run, "--plan", str(other)]) == 2
        assert message in capsys.readouterr().err
    fresh = ["--out", str(tmp_path / "fresh"), "--plan", str(tmp_path / "other.yaml")]
    assert main([*run, *fresh]) == 2 and "trained under another plan" in capsys.readouterr().err
    assert main([*run, "--methods", "x"]) == 2 and "no method x" in capsys.readouterr().err
    assert main(["report", "--out", str(tmp_path / "none")]) == 2


def test_an_orthogonal_update_leaves_the_ones_before(
    jobs: list[dict[str, Any]], base_folder: str, data_root: Path, plan_file: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = ["--data-root", str(data_root), "--plan", str(plan_file), "--work", str(work), "--out", str(out)]
    assert main(["run", "--model", base_folder, *arguments, "--methods", "orthogonal"]) == 0
    folders = sorted((work / Path(base_folder).name / "orthogonal" / "seed-0").iterdir())
    one, two, three = (load_file(folder / "checkpoint" / "adapter_model.safetensors") for folder in folders)
    for before, after in ((one, two), (two, three)):
        for name, old in before.items():
            if "lora_A" in name:
                assert torch.equal(after[name][: len(old)], old) and len(after[name]) == len(old) + 2
            else:
                assert torch.equal(after[name][:, : old.shape[1]], old)
                assert after[name][:, old.shape[1] :].abs().max() > 0
    config = json.loads((folders[2] / "checkpoint" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 2


def test_the_penalty_makes_new_ranks_orthogonal(tmp_path: Path) -> None:
    base = tiny_base("llama")
    model = SiameseForCausalLM.from_base(base, LoraConfig(r=2, target_modules=["q_proj"])).peft_model
    disturb(model)
    model.save_pretrained(tmp_path / "one")
    logits = model.eval()(torch.tensor([[3, 4, 5]])).logits
    settings = orthogonal.widened({"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}, 2)
    assert settings["r"] == 4 and settings["lora_alpha"] == 16
    wide: PeftModel = SiameseForCausalLM.from_base(tiny_base("llama"), LoraConfig(**settings)).peft_model
    orthogonal.keep_before(wide, tmp_path / "one")
    assert torch.allclose(
        wide.eval()(torch.tensor([[3, 4, 5]])).logits, logits, atol=1e-5
    )  # lora_alpha was 8 by default
    learning = [p for n, p in wide.named_parameters() if "lora_A" in n]

    def overlap() -> float:
        return float(sum((p[:2] @ p[2:].t()).abs().sum() for p in learning).detach())  # type: ignore[union-attr]

    before = overlap()
    optimizer = torch.optim.SGD(learning, lr=0.002)
    for _ in range(40):
        optimizer.zero_grad()
        (sum(p.sum() for p in learning) * 0).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert overlap() < 0.5 * before


def test_what_a_matrix_says() -> None:
    matrix = [[0.8, 0.1, 0.2], [0.6, 0.9, 0.3], [0.5, 0.7, 0.6]]
    assert scores.average_accuracy(matrix) == pytest.approx(0.6)
    assert scores.backward_transfer(matrix) == pytest.approx(((0.5 - 0.8) + (0.7 - 0.9)) / 2)
    assert scores.forward_transfer(matrix, [0.0, 0.2, 0.1]) == pytest.approx(((0.1 - 0.2) + (0.3 - 0.1)) / 2)


def test_sets_are_apart_and_always_the_same(data_root: Path) -> None:
    seen: set[str] = set()
    for name, found in sets.SETS.items():
        training, test = sets.drawn(name, data_root, 10, 4)
        assert (training, test) == sets.drawn(name, data_root, 10, 4) and len(test) == 4 and len(training) <= 10
        inputs = {row["input"] for row in (*training, *test)}
        assert len(inputs) == len(training) + 4 and not inputs & seen
        seen |= inputs
        assert sets.task(name).title == found.title
    kinds = {row["output"]: row["input"] for row in sets.kinds(data_root)}
    assert set(kinds) == set(sets.KINDS) and "\nwho is 11?\n" in kinds["trivia question"]
    assert "\n11 plus?\n" in kinds["maths problem"] and "\na 11 .\n" in kinds["news sentence"]
    with pytest.raises(InputError, match="too few for a test on 400"):
        sets.drawn("desks", data_root, 10, 400)
    (data_root / "cola" / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"has no cola/train\.jsonl"):
        sets.drawn("kinds", data_root, 10, 4)


def test_the_nearest_store_wins() -> None:
    stores = [torch.tensor([[0.0, 0.0], [9.0, 9.0]]).half(), torch.tensor([[5.0, 5.0]]).half()]
    router = NearestQuery(stores)
    assert router(torch.tensor([[1.0, 0.0], [8.0, 9.0], [5.5, 4.0]])).argmax(dim=1).tolist() == [0, 0, 1]


def test_the_plan_is_sound(tmp_path: Path) -> None:
    plan = read_plan()
    assert len(plan.tasks) == 4 and set(plan.methods) == set(METHODS)
    assert read_plan(records=7).training_records == 7
    for change, message in (
        ({"tasks": ["desks", "x"]}, "the task x"),
        ({"tasks": ["desks"]}, "two tasks or more"),
        ({"tesks": ["desks"]}, r"plan\.yaml has unknown keys: tesks"),
    ):
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({**vars(plan), **change}))
        with pytest.raises(InputError, match=message):
            read_plan(path)
    with pytest.raises(InputError, match=r"there is no plan file .*none\.yaml"):
        read_plan(tmp_path / "none.yaml")
