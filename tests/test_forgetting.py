"""The forgetting benchmark on a tiny model: run whole, continued where it was cut, and told right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.forgetting import claims, job, plan, records, report
from benchmarks.forgetting.__main__ import main
from benchmarks.forgetting.run import Runner
from benchmarks.relevance.sets import SETS
from imsm import DataConfig
from imsm.errors import InputError
from imsm.evaluation.tasks import TASKS, find_tasks
from imsm.training.models import adapter_config


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    for name, rows in {
        "banking77/train": [{"input": f"word{i % 7} ask\nIntent:", "output": f"word{i % 7}"} for i in range(20)],
        "banking77/test": [
            {"input": f"word{i} ask\nIntent:", "output": f"word{i}", "text": f"word{i} ask"} for i in range(7)
        ],
        "webq/test": [{"input": f"who is word{i}?", "output": [f"word{i}", "word1"]} for i in range(5)],
        "wiki/sentences": [{"text": f"word{i} word{i + 1} word3"} for i in range(4)],
    }.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    content = {
        "target": "banking77",
        "reworded": ["tasks/other.yaml"],
        "retained": ["webq", "wiki", "kept_webq", "tasks/kept_own.yaml"],
        "training_records": 8,
        "validation_records": 4,
        "limit": 4,
        "limits": {"wiki": 2},
        "train": {"max_steps": 2, "batch_size": 4, "dtype": "float32"},
        "methods": {
            "lora": {
                "title": "LoRA",
                "source": "a paper",
                "train": {"method": "peft", "adapter": lora},
                "learning_rates": [0.001, 0.03],
                "seeds": [0, 1],
                "sweep": {"scale": [0.5]},
            },
            "imsm": {
                "title": "IMSM",
                "source": "another",
                "train": {"method": "imsm", "adapter": lora, "dreams": {"count": 8, "task_prompts": 4}},
                "rate_of": "lora",
                "seeds": [0],
                "sweep": {"gate": [0.5]},
            },
        },
        "models": {},
    }
    (tmp_path / "tasks").mkdir()
    for name, text in {
        "other.yaml": "title: Other words\nfile: banking77/test.jsonl\nprompt: 'Of what is {text}?'\nlimit: 3",
        "kept_own.yaml": "title: Own questions\nkind: kept\nfile: own.jsonl\nprompt: '{text}'\nchat: auto\nmax_new_tokens: 4",
        "own.jsonl": '{"text": "word1?"}\n{"text": "word2?"}',
    }.items():
        (tmp_path / "tasks" / name).write_text(text)
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
    out, work, docs = tmp_path / "out", tmp_path / "work", tmp_path / "docs"
    arguments = ["--data-root", str(data_root), "--plan", str(plan_file), "--work", str(work), "--out", str(out)]
    run = ["run", "--model", base_folder, *arguments]
    assert main([*run, "--budget-minutes", "0"]) == 0
    assert not jobs and not list(out.rglob("*.json"))  # out of time at once, and nothing half-written
    assert main(run) == 0
    name = Path(base_folder).name
    assert sorted(path.name for path in (out / name).iterdir()) == [
        "base.json",
        "imsm-seed-0.json",
        "imsm-seed-0@gate=0.5.json",
        "lora-seed-0.json",
        "lora-seed-0@scale=0.5.json",
        "lora-seed-1.json",
    ]
    # Two rates and another seed of LoRA, one run of IMSM; two validations; base, four checkpoints and two dials tested.
    kinds = [(task["do"], task.get("tasks") == [job.VALIDATION]) for task in jobs]
    assert [kinds.count(kind) for kind in (("train", False), ("evaluate", True), ("evaluate", False))] == [4, 2, 6]
    lines = (work / "data" / "train.jsonl").read_text().splitlines()
    held_out = (work / "data" / "validation.jsonl").read_text().splitlines()
    source = (data_root / "banking77" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 8 and len(held_out) == 4 and set(lines + held_out) <= set(source)

    lora = records.read(out / name / "lora-seed-1.json")
    assert set(lora.tried) == {"0.001", "0.03"} and lora.learning_rate in (0.001, 0.03)
    assert lora.settings["method"]["method"] == "peft" and lora.training["steps"] == 2
    assert list(lora.tasks) == ["banking77", "other", "webq", "wiki", "kept_webq", "kept_own"]
    assert len(lora.tasks["other"]["records"]) == 3 and len(lora.tasks["kept_own"]["records"]) == 2
    assert lora.settings["reworded"] == ["other"] and lora.settings["retained"][-1] == "kept_own"
    assert len(lora.tasks["webq"]["records"]) == 4 and len(lora.tasks["wiki"]["records"]) == 2
    weighed = set(lora.balance["kept"]) | set(lora.balance["left_out"])
    assert weighed == {"webq", "wiki", "kept_webq", "kept_own"}  # the target in other words is not what is kept

    before = len(jobs)
    assert main(run) == 0 and len(jobs) == before  # nothing is done twice
    (out / name / "lora-seed-1.json").unlink()
    (work / name / "base.json").unlink()
    assert main(run) == 0 and len(jobs) == before + 2  # the checkpoint is there still, what it is held against is not
    for change, message in {"train: {max_steps: 3}": "other max_steps", "training_records: 7": "data was made"}.items():
        other = tmp_path / "other.yaml"
        other.write_text(yaml.safe_dump({**yaml.safe_load(plan_file.read_text()), **yaml.safe_load(change)}))
        elsewhere = ["--plan", str(other), "--out", str(tmp_path / "fresh")]
        assert main([*run, *elsewhere]) == 2 and [task["do"] for task in jobs[before + 2 :]] in ([], ["evaluate"])
        assert message in capsys.readouterr().err

    assert main(["report", "--out", str(out), "--docs", str(docs)]) == 0
    page = (docs / "forgetting.md").read_text()
    assert "| reworded | of LoRA's |" in page and "| Own questions |" in page
    assert "| LoRA | 2 |" in page and "@scale=0.5" in page and "hold**" in page
    assert (docs / "forgetting.png").stat().st_size > 0


def test_another_plan_does_not_mix_in(
    jobs: list[dict[str, Any]],
    base_folder: str,
    data_root: Path,
    plan_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    made = plan.read_plan("tiny", plan_file)
    runner = Runner(made, "tiny", base_folder, data_root, work, out, float("inf"))
    runner.write_data()
    runner.base()
    runner.plan = dataclasses.replace(made, limit=3)
    with pytest.raises(Exception, match="made under another plan"):
        runner.base()
    runner.data_root = tmp_path / "no"
    runner.work = tmp_path / "elsewhere"
    with pytest.raises(Exception, match=r"has no banking77/train\.jsonl"):
        runner.write_data()
    assert main(["report", "--out", str(tmp_path / "none")]) == 2
    assert "there are no records" in capsys.readouterr().err


def test_wrong_plans(plan_file: Path) -> None:
    content = yaml.safe_load(plan_file.read_text())
    del content["target"]
    plan_file.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"the plan .*plan\.yaml lacks target"):
        plan.read_plan("tiny", plan_file)
    name = next(iter(content["methods"]))
    content["methods"][name]["rates"] = [1]
    plan_file.write_text(yaml.safe_dump({**content, "target": "banking77"}))
    with pytest.raises(InputError, match=rf"method {name} has unknown keys: rates; it may have title, source"):
        plan.read_plan("tiny", plan_file)
    del content["methods"][name]["rates"], content["methods"][name]["source"]
    plan_file.write_text(yaml.safe_dump({**content, "target": "banking77"}))
    with pytest.raises(InputError, match=rf"method {name} lacks source"):
        plan.read_plan("tiny", plan_file)
    plan_file.write_text("target: [")
    with pytest.raises(InputError, match=r"plan\.yaml line 2 is not YAML|plan\.yaml line 1 is not YAML"):
        plan.read_plan("tiny", plan_file)


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_the_plan_is_sound(model: str) -> None:
    made = plan.read_plan(model)
    assert made.target in TASKS
    tasks = {task.name: task for task in find_tasks([*made.reworded, *made.retained])}
    target = TASKS[made.target]
    wordings = yaml.safe_load((SETS / "rewordings.yaml").read_text())["test"]
    assert [tasks[name].prompt for name in made.settings["reworded"]] == wordings and len(wordings) >= 5
    for name in made.settings["reworded"]:
        asked = (tasks[name].kind, tasks[name].metrics, tasks[name].file, tasks[name].max_new_tokens)
        assert asked == (target.kind, target.metrics, target.file, target.max_new_tokens)
    assert {"kept_near_domain", "kept_everyday"} <= set(made.settings["retained"])
    assert {"lora", "imsm", "imsm-paper", "lora-kl-dreams"} <= set(made.methods)
    for method in made.methods.values():
        # Each is searched alike, or has LoRA's rate.
        assert len(method.learning_rates) == 2 or method.rate_of == "lora"
        settings = {**made.train, **method.train}
        config = plan.train_config(settings, model="m", output_dir="o", data=DataConfig(train="d.jsonl"))
        if config.method in ("imsm", "peft") and config.adapter.get("init_lora_weights") != "corda":
            adapter_config(config.adapter, 10)
    if model == "smollm2":
        assert [len(made.methods[name].seeds) for name in ("lora", "imsm", "lora-replay", "full")] == [3, 3, 3, 1]


def group(name: str, plasticity: float, retention: float, varied: str = "") -> report.Group:
    harmonic = 2 * plasticity * retention / (plasticity + retention)
    balance = {"plasticity": plasticity, "retention": retention, "harmonic": harmonic}
    made = records.Record("m", name, name, "", 0, varied, None, {}, {}, {}, {}, balance, "", {}, {})
    return report.Group(name, name, varied, (made,))


def test_claims_follow_from_the_figures() -> None:
    found = [
        group("lora", 0.8, 0.2),
        group("imsm", 0.7, 0.5),
        group("replay", 0.7, 0.6),
        group("imsm", 0.7, 0.6, "@gate=0.5"),
        group("lora", 0.6, 0.9, "@scale=0.5"),
    ]
    made = claims.claims(found)
    assert [claim.holds for claim in made] == [False, True, False, True, False, True, False]
    assert "@gate=0.5 has 0.700 and 0.600" in made[2].text
    assert "best constant in its place, @gate=0.5 (plasticity 0.700 against 0.700)" in made[3].text
    assert "best constant in its place, @gate=0.5 (harmonic mean 0.583 against 0.646)" in made[4].text
    assert "replay (harmonic mean 0.583 against 0.646)" in made[6].text
    assert not claims.claims([group("lora", 0.8, 0.2)])


def measured(name: str, target: float, again: float, kept: float, near: float, drift: float) -> report.Group:
    """A method's group with a target, one rewording, and three tasks of what is retained."""
    made = group(name, 0.5, 0.5)

    def task(kind: str, score: str, **values: float) -> dict[str, Any]:
        return {"title": "T", "kind": kind, "score": score, "metrics": {key: [v, 0, 1] for key, v in values.items()}}

    made.records[0].settings.update(target="target", reworded=["again"], retained=["ask", "kept", claims.NEAR, "text"])
    made.records[0].tasks.update(
        target=task("answer", "exact_match", exact_match=target),
        again=task("answer", "exact_match", exact_match=again),
        ask=task("answer", "contains", contains=kept / 2),
        kept=task("kept", "identical", identical=kept, divergence=drift),
        text=task("text", "cross_entropy", cross_entropy=4 + drift),
    )
    made.records[0].tasks[claims.NEAR] = task("kept", "identical", identical=near, divergence=drift)
    return made


def test_methods_are_compared_on_the_seeds_that_both_have() -> None:
    two, one = group("imsm", 0.8, 0.9), group("replay", 0.7, 0.9)
    two = dataclasses.replace(
        two, records=(*two.records, dataclasses.replace(group("imsm", 0.2, 0.9).records[0], seed=1))
    )
    (claim,) = claims.claims([two, one])
    assert claim.holds and "0.847 against 0.787" in claim.text
    later = dataclasses.replace(one, records=(dataclasses.replace(one.records[0], seed=5),))
    assert [len(found.records) for found in two.beside(later)] == [2, 1]


def test_promises_are_held_against_lora_and_the_base() -> None:
    base, lora = measured("base", 0.0, 0.0, 1.0, 1.0, 0.0), measured("lora", 0.7, 0.5, 0.1, 0.2, 1.0)
    good, bad = measured("imsm", 0.696, 0.49, 0.99, 0.9, 0.004), measured("imsm", 0.694, 0.48, 0.97, 0.89, 0.006)
    paper = measured("imsm-paper", 0.695, 0.5, 0.3, 0.3, 1.0)
    for ours, holds in ((good, True), (bad, False)):
        made = claims.promises(ours, lora, base, paper)
        # The score on questions is 0.99 and 0.97 of the base's.
        assert [claim.holds for claim in made] == [holds] * 8
    assert "(0.980 times)" in claims.promises(good, lora, base, None)[1].text
    assert len(claims.claims([base, lora, good])) == 7 + 2


def scored(name: str, score: float, varied: str = "") -> report.Group:
    made = group(name, 0.5, 0.5, varied)
    task = {"title": "T", "kind": "answer", "score": "exact_match", "metrics": {"exact_match": [score, 0.0, 1.0]}}
    made.records[0].tasks.update({"target": task, "again": task})
    return made


def test_reworded_scores_are_held_against_loras() -> None:
    settings = {"target": "target", "reworded": ["again"], "retained": []}
    lora = scored("lora", 0.4)
    lines = report.table([lora, scored("imsm", 0.3)], settings, lora).splitlines()
    assert "| 0.400 | 0.400 | 1.00 |" in lines[2] and "| 0.300 | 0.300 | 0.75 |" in lines[3]
    assert "| 0.300 | 0.300 | – |" in report.table([scored("imsm", 0.3)], settings, None)
    assert "reworded" not in report.table([lora], {**settings, "reworded": []}, None)


def test_the_page_says_which_machine_measured_what() -> None:
    here = records.read(Path(report.__file__).parent / "results/gemma3/base.json")
    there = dataclasses.replace(here, machine={**here.machine, "processor": "another", "flags": ["sve"]})
    groups = [report.Group(name, name, "", (record,)) for name, record in (("one", here), ("two", there))]
    said = report.machines(groups)
    assert "): one; another (sve): two. Another machine trains" in said and said.startswith("By machine: ")
    assert report.machines(groups[:1]) == ""
