"""The paper's tables remade: its figures, the recipes on tiny models of their architectures, and a run end to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from zoo import tiny_base

from imsm import DataConfig, InputError, SiameseForCausalLM, SiameseTrainer
from imsm.cli.reproduce import run as reproduce
from imsm.evaluation.results import Estimate, RecordResult, TaskResult
from imsm.reproduce.comparison import t_test
from imsm.reproduce.paper import paper_tables
from imsm.reproduce.peak import peak_memory
from imsm.reproduce.plans import ROWS, Run, chosen, make_plan, merged, share
from imsm.reproduce.processes import lone_environment
from imsm.reproduce.recipes import Recipe, read_recipe, recipe_names
from imsm.reproduce.speed import measure
from imsm.settings import TrainConfig, read_yaml
from imsm.training import train
from imsm.training.run import adapter_config

TABLES = ["table1", "table2", "table3", "table4", "table5", "table6", "figure3", "figure4"]


# -- the paper's figures ---------------------------------------------------------------------------------------------


def test_every_table_has_its_figures_row_by_row() -> None:
    tables = paper_tables()
    assert list(tables) == TABLES
    for name, table in tables.items():
        labels = {row.label for row in ROWS[name]}
        for part in table.parts:
            for model, rows in part.figures.items():
                assert set(rows) <= labels, (name, model)
                assert all(len(figures) == len(table.columns) for figures in rows.values()), (name, model)
                if name != "figure3":
                    assert set(rows) == labels, (name, model)


def test_averages_are_those_of_the_scores() -> None:
    """A figure that was copied wrongly would show, but for what the paper itself rounds or has wrong."""
    for name, table in paper_tables().items():
        places = [i for i, column in enumerate(table.columns) if column.kind == "score"]
        average = next((i for i, column in enumerate(table.columns) if column.kind == "average"), None)
        for rows in (rows for part in table.parts for rows in part.figures.values() if name != "figure3"):
            for label, figures in rows.items() if average is not None else ():
                mean = sum(figures[i] for i in places) / len(places)
                assert figures[average] == pytest.approx(mean, abs=0.011), (name, label)


def test_figures_of_a_model_that_is_not_in_a_table_are_its_first_models() -> None:
    assert paper_tables()["table1"].model("Llama3-8B") == "Llama3-8B"
    assert paper_tables()["table2"].model("Llama3-8B") == "ChatGLM3-6B"
    assert paper_tables()["figure4"].model("Llama3-8B") is None
    assert paper_tables()["table5"].figure("Llama3-8B", 0, "imsm-lora", 1) == pytest.approx(21.18 / 22.98, abs=1e-3)


# -- plans -----------------------------------------------------------------------------------------------------------


def test_runs_of_the_tables() -> None:
    jobs = {name: {job.run.name: job for job in make_plan(name).jobs()} for name in TABLES}
    # the base model, and six rows on four tasks
    assert len(jobs["table1"]) == 25
    assert jobs["table1"]["original"].tasks == ["mrpc", "cola", "ropes", "gsm8k"]
    assert jobs["table1"]["cola/imsm-ia3"].tasks == ["cola"]
    assert set(jobs["table2"]) == {"original"} | {f"ropes/{row.label}" for row in ROWS["table2"][1:]}
    assert jobs["table2"]["ropes/lora"].tasks == ["ropes", "webq", "multirc", "mrpc", "freebaseqa"]
    assert set(jobs["table3"]) == {"original", "gsm8k/dora", "gsm8k/imsm-dora"}
    assert len(jobs["table4"]) == 3 * 4 * 3 and "mrpc/imsm-adalora-token" in jobs["table4"]
    assert {name for name, job in jobs["table5"].items() if job.speed} == {
        f"gsm8k/imsm-{m}" for m in ("lora", "ia3", "adalora")
    }
    assert set(jobs["table6"]) == {
        f"gsm8k/imsm-{method}{rank}" for method in ("lora", "ia3", "adalora") for rank in ("-rank4", "", "-rank16")
    }
    assert set(jobs["figure3"]) == {f"{task}/{row}" for task in ("ropes", "gsm8k") for row in ("loramoe", "imsm-lora")}


def test_tables_share_their_runs() -> None:
    together = merged([make_plan(name) for name in ("table1", "table2", "table5")])
    names = [job.run.name for job in together]
    assert len(names) == len(set(names)) == 25
    job = next(job for job in together if job.run.name == "gsm8k/imsm-lora")
    assert job.tasks == ["gsm8k"] and job.speed
    assert next(job for job in together if job.run.name == "ropes/lora").tasks[1:] == [
        "webq",
        "multirc",
        "mrpc",
        "freebaseqa",
    ]


def test_runs_are_chosen_by_name() -> None:
    jobs = make_plan("table1").jobs()
    assert [job.run.name for job in chosen(jobs, ["cola/*ia3", "original"])] == [
        "original",
        "cola/ia3",
        "cola/imsm-ia3",
    ]
    with pytest.raises(InputError, match=r"--only colla/\* fits no run; there are original, mrpc/lora"):
        chosen(jobs, ["colla/*"])


def test_another_training_task() -> None:
    plan = make_plan("table2", "cola")
    assert [job.run.name for job in plan.jobs()][:2] == ["original", "cola/lora"]
    assert plan.jobs()[1].tasks[0] == "cola"
    with pytest.raises(InputError, match="table1 trains on each of its columns' tasks"):
        make_plan("table1", "cola")
    with pytest.raises(InputError, match="--trained-on must be one of mrpc, .* got 'wiki'"):
        make_plan("table2", "wiki")
    with pytest.raises(
        InputError, match="there is no 'tabel1' to reproduce; there are table1, .*; did you mean 'table1'"
    ):
        make_plan("tabel1")


def test_methods_that_the_paper_does_not_have_get_rows_of_their_own() -> None:
    methods = ["lora", "mine", "loramoe"]
    own = {
        name: [(row.label, row.baseline) for row in make_plan(name, methods=methods).rows if row.run.method == "mine"]
        for name in ("table2", "table4", "table6", "figure3")
    }
    assert own == {
        "table2": [("mine", None), ("imsm-mine", "mine")],
        "table4": [("mine", None), *((f"imsm-mine{gate}", "mine") for gate in ("", "-token", "-average"))],
        "table6": [(f"imsm-mine-rank{rank}", None) for rank in (4, 8, 16)],
        "figure3": [("imsm-mine", "loramoe")],
    }
    assert "ropes/imsm-mine" in [job.run.name for job in make_plan("table2", methods=methods).jobs()]


def test_processes_share_the_runs_and_see_a_device_each() -> None:
    jobs = make_plan("table1").jobs()
    shares = [share(jobs, process, 3) for process in range(3)]
    assert sorted(job.run.name for part in shares for job in part) == sorted(job.run.name for job in jobs)
    assert [job.run.name for job in shares[1]][:2] == [jobs[1].run.name, jobs[4].run.name]
    several = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "ACCELERATE_USE_FSDP": "1", "HOME": "/h"}
    assert lone_environment(several, 1) == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "1"}
    assert lone_environment({**several, "CUDA_VISIBLE_DEVICES": "4,6"}, 1)["CUDA_VISIBLE_DEVICES"] == "6"


# -- recipes ---------------------------------------------------------------------------------------------------------


class ChatGLM(nn.Module):
    """The linear maps of ChatGLM3 as its own code names and shapes them."""

    def __init__(self, hidden: int, groups: int, feedforward: int, layers: int) -> None:
        super().__init__()
        self.config = {"model_type": "chatglm"}
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer, attention, mlp = nn.Module(), nn.Module(), nn.Module()
            attention.query_key_value = nn.Linear(hidden, hidden + groups)
            attention.dense = nn.Linear(hidden, hidden)
            mlp.dense_h_to_4h = nn.Linear(hidden, 2 * feedforward)
            mlp.dense_4h_to_h = nn.Linear(feedforward, hidden)
            layer.self_attention, layer.mlp = attention, mlp
            self.layers.append(layer)


#: Shapes of the paper's models.
SHAPES: dict[str, tuple[int, Any]] = {
    "ChatGLM3-6B": (4096, lambda: ChatGLM(4096, 2 * 2 * 128, 13696, 28)),
    "Qwen1.5-4B": (
        2560,
        lambda: AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(
                hidden_size=2560,
                intermediate_size=6912,
                num_hidden_layers=40,
                num_attention_heads=20,
                num_key_value_heads=20,
            )
        ),
    ),
    "Llama3-8B": (
        4096,
        lambda: AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            )
        ),
    ),
}
RECIPES = {"ChatGLM3-6B": "chatglm3-6b", "Qwen1.5-4B": "qwen1.5-4b", "Llama3-8B": "llama3-8b"}


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("method", ["lora", "ia3", "adalora"])
def test_recipes_have_the_papers_number_of_parameters(model: str, method: str) -> None:
    hidden, make = SHAPES[model]
    settings = {**read_recipe(RECIPES[model]).methods[method]["adapter"], "task_type": None}
    with init_empty_weights():
        adapted = get_peft_model(make(), adapter_config(settings, total_steps=100))
    adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    table = paper_tables()["table1"]
    assert adapter / 1e6 == pytest.approx(table.figure(model, 0, method, 0), abs=6e-4)
    assert (adapter + 5 * hidden * 8) / 1e6 == pytest.approx(table.figure(model, 0, f"imsm-{method}", 0), abs=1.1e-3)


#: A tiny random model of each architecture that recipes name.
TINY = {"llama": "llama", "qwen2": "qwen2", "glm": "glm", "gemma3_text": "gemma3"}


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    folders = {}
    for architecture, name in TINY.items():
        model = tiny_base(name)
        model.resize_token_embeddings(len(tokenizer))
        folders[architecture] = str(tmp_path_factory.mktemp("tiny") / name)
        model.save_pretrained(folders[architecture])
        tokenizer.save_pretrained(folders[architecture])
    return folders


def test_recipes_shipped() -> None:
    assert set(recipe_names()) == {
        *("chatglm3-6b", "chatglm3-6b-glm", "qwen1.5-4b", "llama2-7b", "llama3-8b", "llama3.1-8b"),
        *("smollm2-135m-instruct", "gemma-3-270m"),
    }
    assert [name for name in recipe_names() if read_recipe(name).scaled] == ["gemma-3-270m", "smollm2-135m-instruct"]
    assert {read_recipe(name).architecture for name in recipe_names()} == {*TINY, "chatglm"}


#: Every method of every recipe, but once where two recipes have the same for one architecture. The recipe of ChatGLM3's
#: own code, which transformers has not, is counted above.
DIFFERENT = {
    json.dumps([recipe.architecture, recipe.methods[method]]): (recipe, method)
    for recipe in map(read_recipe, recipe_names())
    for method in recipe.methods
    if recipe.architecture in TINY
}


@pytest.mark.parametrize(
    ("recipe", "method"), DIFFERENT.values(), ids=lambda it: it if isinstance(it, str) else it.name
)
def test_a_step_of_every_recipe(
    recipe: Recipe, method: str, tiny_folders: dict[str, str], data_root: Path, tmp_path: Path
) -> None:
    """On a tiny random model of the architecture."""
    siamese = method != "loramoe"
    data = DataConfig(train=str(data_root / "cola" / "train.jsonl"))
    model = tiny_folders[recipe.architecture]
    config = recipe.config(Run(method, siamese, trained_on="cola"), model, data, tmp_path / "run", max_steps=1)
    assert config.learning_rate == recipe.methods[method]["learning_rate"] and config.epochs == 3
    result = train(replace(config, dtype="float32", progress=False, tensorboard=False, memory_bank="off"))
    assert result.metrics["steps"] == 1 and result.metrics["loss"] > 0
    if siamese:
        assert isinstance(result.model, SiameseForCausalLM)
        learnt = {name for name, p in result.model.peft_model.named_parameters() if p.requires_grad}
        modules = {re.split(r"\.(?:lora|ia3)_", name)[0].rsplit(".", 1)[-1] for name in learnt}
        assert modules == set(recipe.methods[method]["adapter"]["target_modules"])


def test_wrong_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no recipe 'llama3-8'; there are .*; did you mean 'llama3-8b'"):
        read_recipe("llama3-8")
    with pytest.raises(InputError, match="there is no recipe file .*none.yaml"):
        read_recipe(str(tmp_path / "none.yaml"))
    good = {"title": "T", "paper": "Llama3-8B", "architecture": "llama", "methods": {"lora": {"learning_rate": 1e-3}}}
    for change, message in {
        "methods": (
            {"lora": {"learning_rat": 1}},
            "lora in the recipe .* unknown key 'learning_rat'; did you mean 'learning_rate'",
        ),
        "titel": ("x", "unknown key 'titel'; did you mean 'title'"),
        "settings": ({"seed": 1}, "settings in the recipe .* unknown key 'seed'"),
    }.items():
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps({**good, change: message[0]}))
        with pytest.raises(InputError, match=message[1]):
            read_recipe(str(file))
    file.write_text("- a list")
    with pytest.raises(InputError, match="must hold a recipe as 'key: value', got a list"):
        read_recipe(str(file))
    file.write_text("title: T")
    with pytest.raises(InputError, match="must be a mapping with architecture, methods, paper, title"):
        read_recipe(str(file))
    file.write_text("{title: T, paper: P, architecture: llama, methods: {lora: {learning_rate: 3e-4}}}")
    assert read_recipe(str(file)).methods["lora"]["learning_rate"] == 3e-4
    file.write_text("{")
    with pytest.raises(InputError, match="is not YAML"):
        read_recipe(str(file))
    file.write_text(json.dumps(good))
    with pytest.raises(InputError, match="has no settings for dora; it has lora"):
        read_recipe(str(file)).config(Run("dora"), "m", DataConfig(train="x"), tmp_path)


# -- the t-test ------------------------------------------------------------------------------------------------------


def scored(scores: list[float], fingerprint: str = "f") -> TaskResult:
    records = [RecordResult(i, "", [], "", scores={"accuracy": score}) for i, score in enumerate(scores)]
    return TaskResult("t", "T", "answer", "accuracy", {"accuracy": Estimate(0, 0, 0)}, None, records, 0.0, fingerprint)


def test_students_t_test_over_records() -> None:
    before, after = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    # mean difference 1/6, standard deviation sqrt(17/30), five degrees of freedom: t = 0.5423
    assert t_test(scored(before), scored(after), "accuracy") == pytest.approx(0.611, abs=1e-3)
    assert t_test(scored(before), scored(before), "accuracy") == 1.0
    assert t_test(scored([0.0] * 9), scored([1.0] * 9), "accuracy") == 0.0
    assert t_test(scored([0.0] * 9), scored([1.0] * 8 + [0.0]), "accuracy") < 0.05
    with pytest.raises(InputError, match="results on t are of different records"):
        t_test(scored(before), scored(after, "g"), "accuracy")


# -- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for task, answers in {
        "cola": ["yes", "no"],
        "multirc": ["yes", "no"],
        "mrpc": ["yes", "no"],
        "webq": ["Paris"],
        "freebaseqa": ["France"],
    }.items():
        (root / task).mkdir()
        for split, count in (("train", 12), ("test", 6)):
            rows = [{"input": f"Question {i}: is it so?", "output": answers[i % len(answers)]} for i in range(count)]
            (root / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def arguments(base_folder: str, data_root: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model", base_folder, "--recipe", "smollm2-135m-instruct", "--data-root", str(data_root)),
        *("--output", str(tmp_path / "out"), "--records", "8", "--limit", "4", "--epochs", "1", "--seed", "3"),
    ]


def test_a_study_that_never_began_gives_its_folder_to_another(
    arguments: list[str], data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(data_root, tmp_path / "other")
    lines = (other / "cola" / "train.jsonl").read_text().splitlines()
    (other / "cola" / "train.jsonl").write_text("\n".join(['{"input": "of the other root", "output": "yes"}', *lines]))
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "mine.txt").touch()

    def no_model(config: TrainConfig) -> None:
        raise InputError("no such model")

    monkeypatch.setattr("imsm.reproduce.running.train", no_model)
    drawn = tmp_path / "out" / "data" / "cola.jsonl"
    for root in (other, data_root):
        arguments = [*replace_last(arguments, "--data-root", str(root)), "--records", str(len(lines) + 1)]
        with pytest.raises(InputError, match="no such model"):
            reproduce(["table1", *arguments, "--only", "cola/lora"])
        assert ("of the other root" in drawn.read_text()) == (root == other)
    assert (tmp_path / "out" / "data" / "mine.txt").exists()


def test_a_table_from_runs_to_figures(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imsm.reproduce.running.measure", partial(measure, new_tokens=4, repetitions=2))
    out = tmp_path / "out"
    only = ["--only", "original", "--only", "cola/*lora"]
    assert reproduce(["table2", *arguments, "--trained-on", "cola", "--only", "cola/lora", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["cola/lora: train, cola, webq, multirc, mrpc, freebaseqa"]
    assert not out.exists()

    assert reproduce(["table2", "table5", *arguments, "--trained-on", "cola", *only]) == 0
    printed = capsys.readouterr()
    assert "cola/imsm-lora: train, cola, webq, multirc, mrpc, freebaseqa, speed" in printed.err
    assert "scaled down: a model of 135 million parameters" in " ".join(printed.out.split())
    config = read_yaml(out / "runs" / "cola" / "imsm-lora" / "settings.yaml")
    assert (config.method, config.epochs, config.batch_size, config.seed, config.weight_decay) == (
        "imsm",
        1,
        16,
        3,
        0.01,
    )
    assert len((out / "data" / "cola.jsonl").read_text().splitlines()) == 8

    table = json.loads((out / "table2.json").read_text())
    assert table["scaled"].endswith(
        "8 training records a task; at most 4 test records a task; epochs 1 instead of 3; trained on cola instead of ropes"
    )
    lines = {line["label"]: line["cells"] for line in table["lines"]}
    for label in ("original", "lora", "adalora", "imsm-lora", "imsm-adalora"):
        scores = [cell["ours"] for cell in lines[label]]
        assert None not in scores
        assert scores[-1] == pytest.approx(sum(scores[:-1]) / 5)
    assert (table["done"], table["runs"]) == (5, 7)
    assert lines["lora"][0]["p"] is None and 0 <= lines["imsm-lora"][0]["p"] <= 1
    assert all(cell["ours"] is None for cell in lines["ia3"] + lines["imsm-ia3"])
    assert all(cell["paper"] is None for cells in lines.values() for cell in cells)  # trained on another task
    timed = json.loads((out / "table5.json").read_text())
    speeds = {line["label"]: [cell["ours"] for cell in line["cells"]] for line in timed["lines"]}
    assert speeds["imsm-lora"][1] == pytest.approx(speeds["imsm-lora"][0] / speeds["lora"][0])
    assert speeds["ia3"] == [None, None]

    # What is done is not done again, and the table stays as it is.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent != out}
    assert reproduce(["table2", *arguments, "--trained-on", "cola", *only]) == 0
    assert capsys.readouterr().err == ""
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((out / "table2.json").read_text()) == table

    # A run that lost one evaluation does just that one.
    (out / "results" / "cola" / "lora" / "webq.json").unlink()
    assert reproduce(["table2", *arguments, "--trained-on", "cola", *only]) == 0
    assert "cola/lora: webq\n" in capsys.readouterr().err

    with pytest.raises(InputError, match=r"holds other runs: limit was 4, now 5; give another --output"):
        reproduce(["table2", *arguments, "--limit", "5", *only[:2]])

    # A run that is made anew is evaluated anew, on the same data.
    shutil.rmtree(out / "runs" / "cola" / "lora")
    study = replace_last(arguments, "--data-root", str(out / "data"))
    with pytest.raises(InputError, match=r"holds other runs: data_root was .*, now .*; give another --output"):
        reproduce(["table2", *study, *only[:2]])
    capsys.readouterr()
    assert reproduce(["table2", *arguments, "--trained-on", "cola", *only]) == 0
    assert "cola/lora: train, " in (said := capsys.readouterr().err) and "webq" in said


def replace_last(arguments: list[str], option: str, value: str) -> list[str]:
    """The arguments with another value behind an option."""
    place = arguments.index(option)
    return [*arguments[: place + 1], value, *arguments[place + 2 :]]


def test_the_papers_figures_beside_ours(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(["table1", *arguments, "--only", "cola/imsm-ia3"]) == 0
    text = (tmp_path / "out" / "table1.md").read_text()
    assert text.startswith("## table1: Target tasks, base0 by the recipe smollm2-135m-instruct (scaled down: ")
    row = next(line for line in text.splitlines() if line.startswith("| imsm-ia3"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == "– (88.87)" and cells[4].endswith(" (70.78)") and not cells[4].startswith("–")
    # two layers: keys and values 16 wide, down_proj's input 64; the gate 5 x 32 x 8
    assert cells[1] == f"{(2 * (16 + 16 + 64) + 5 * 32 * 8) / 1e6:.3f} (0.688)"
    assert "in brackets the paper's, of Llama3-8B. 1 of 25 runs are done." in text


def test_a_run_that_was_cut_goes_on(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SiameseTrainer, "save_portable", cut)
        with pytest.raises(KeyboardInterrupt):
            reproduce(["table1", *arguments, "--only", "cola/lora"])
    assert not (tmp_path / "out" / "runs" / "cola" / "lora" / "measured.json").exists()
    assert reproduce(["table1", *arguments, "--only", "cola/lora"]) == 0
    assert json.loads((tmp_path / "out" / "runs" / "cola" / "lora" / "measured.json").read_text())["parameters"] > 0


def test_memory_in_training(arguments: list[str], tmp_path: Path) -> None:
    assert (
        reproduce(["figure4", *arguments, "--trained-on", "cola", "--only", "cola/*-lora", "--only", "cola/lora"]) == 0
    )
    table = json.loads((tmp_path / "out" / "figure4.json").read_text())
    lines = {line["label"]: [cell["ours"] for cell in line["cells"]] for line in table["lines"]}
    if sys.platform == "linux":
        assert 0.05 < lines["lora"][0] < 50
        assert lines["imsm-lora"][1] == pytest.approx(lines["imsm-lora"][0] / lines["lora"][0])
    assert table["paper_model"] is None


@pytest.mark.slow
def test_two_processes_share_the_runs(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "imsm_cli", "reproduce", "table1", *arguments, "--only", "cola/*lora"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "out" / "table1.json").read_text())
    lines = {line["label"]: line["cells"] for line in table["lines"]}
    assert all(lines[label][3]["ours"] is not None for label in ("lora", "imsm-lora", "adalora", "imsm-adalora"))


def test_clear_errors(arguments: list[str], base_folder: str, data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no recipe 'nothing'"):
        reproduce(["table1", "--model", "nothing"])
    with pytest.raises(InputError, match="names no model: give .* as --model NAME --recipe chatglm3-6b-glm"):
        reproduce(["table1", "--model", "chatglm3-6b-glm"])
    with pytest.raises(InputError, match="--limit must be positive, got 0"):
        reproduce(["table1", *arguments, "--limit", "0"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{title: T, paper: P, model: m, architecture: llama, methods: {lora: {}}}")
    with pytest.raises(InputError, match="the recipe .*recipe.yaml has no settings for loramoe"):
        reproduce(["figure3", "--model", str(recipe), "--dry-run"])
    for how in ([], ["--dry-run"]):
        with pytest.raises(InputError, match=r"there is no file .*ropes.test.jsonl"):
            reproduce(["table1", *arguments, "--only", "cola/lora", "--only", "ropes/lora", *how])
    assert not (tmp_path / "out" / "runs").exists(), "data are looked at before the first run"


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="of a process's own memory on Linux")
def test_what_an_earlier_run_left_is_not_in_the_peak_of_the_next() -> None:
    blocks = [torch.ones(25_000) for _ in range(3_000)]  # 300 MB in blocks that the C library keeps when they are freed
    last = torch.ones(25_000)
    with peak_memory() as full:
        pass
    del blocks
    with peak_memory() as empty:
        pass
    assert full["bytes"] - empty["bytes"] > 200e6
    with peak_memory() as third:
        again = torch.ones(50_000_000)
    assert third["bytes"] - empty["bytes"] > 150e6
    assert last.sum() == 25_000 and again[0] == 1
