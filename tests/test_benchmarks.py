"""The benchmarks on a tiny model: records whole, continued where they were cut, and judged right. No timing is asserted."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import data, decode, limit, machine, measure, memory, pictures, report, systems, table, targets, train
from benchmarks.__main__ import main
from benchmarks.run import Cell, Options, Record
from imsm.errors import InputError

EAGER = ["base", "peft", "merged", "two", "shared"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children run in this process: starting one takes longer than what it measures. One test starts a real one."""

    def in_child(module: str, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for found in importlib.import_module(f"benchmarks.{module}").child(json.loads(json.dumps(task))):
            yield json.loads(json.dumps(found))

    monkeypatch.setattr(measure, "in_child", in_child)


def run(verb: str, base_folder: str, out: Path, *more: str) -> int:
    return main([verb, "--quick", "--model", base_folder, "--out", str(out), "--dtypes", "float32", *more])


def content(out: Path, verb: str) -> dict[str, Any]:
    (path,) = out.glob(f"{verb}-*.json")
    return json.loads(path.read_text())


# -- the verbs -------------------------------------------------------------------------------------------------------


def test_decode_is_recorded_whole_and_continued(here: None, base_folder: str, tmp_path: Path) -> None:
    arguments = ("--new-tokens", "4", "--systems", *EAGER)
    assert run("decode", base_folder, tmp_path, "--repetitions", "1", *arguments) == 0
    first = content(tmp_path, "decode")
    assert set(first) == {"benchmark", "model", "settings", "commit", "versions", "machine", "cells"}
    assert first["settings"]["systems"] == EAGER and first["settings"]["new_tokens"] == 4
    assert list(first["cells"]) == ["batch 1, prompt 16, float32", "batch 2, prompt 16, float32"]
    for cell in first["cells"].values():
        assert cell["facts"]["same_tokens"] == {"two=shared": 1.0, "peft=merged": 1.0}
        (measured,) = cell["rounds"]
        assert list(measured) == EAGER
        for numbers in measured.values():
            assert set(numbers) == {"prefill_seconds", "seconds", "tokens_per_second"}
            assert all(value > 0 for value in numbers.values())

    assert run("decode", base_folder, tmp_path, "--repetitions", "2", *arguments) == 0
    second = content(tmp_path, "decode")
    for name, cell in second["cells"].items():
        assert len(cell["rounds"]) == 2 and cell["rounds"][0] == first["cells"][name]["rounds"][0]


def test_a_budget_stops_between_rounds(
    here: None, base_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--new-tokens", "2", "--systems", "base", "--batches", "1", "--repetitions", "3")
    assert run("decode", base_folder, tmp_path, *arguments, "--budget-minutes", "0") == 0
    assert not list(tmp_path.iterdir())
    options = Options(base_folder, tmp_path)
    record = Record(tmp_path / "x.json", {})
    verb: Any = CutShort()
    verb_run(verb, options, record)
    assert len(json.loads((tmp_path / "x.json").read_text())["cells"]["c"]["rounds"]) == 1
    assert verb.closed and "out of time" in capsys.readouterr().err


class CutShort:
    """A verb of which one round fits before the deadline."""

    closed = False

    def rounds(self, *arguments: Any) -> Iterator[dict[str, Any]]:
        try:
            for _ in range(3):
                yield {"round": {"a": {"seconds": 1.0}}}
        finally:
            self.closed = True


def verb_run(verb: Any, options: Options, record: Record) -> None:
    from benchmarks.run import run_cell

    options.deadline = 0.0
    cell = Cell("c", {})
    run_cell(verb, cell, options, "", record, record.cell(cell), "here")


def test_memory_counts_exactly(here: None, base_folder: str, tmp_path: Path) -> None:
    arguments = ("--systems", "peft", "two", "--repetitions", "1", "--new-tokens", "4")
    assert run("memory", base_folder, tmp_path, *arguments) == 0
    (cell,) = content(tmp_path, "memory")["cells"].values()
    (measured,) = cell["rounds"]
    # 2 layers, keys and values, batch 2, 2 heads of 8, 16 + 4 − 1 tokens, 4 bytes.
    assert measured["peft"]["cache_bytes"] == 2 * 2 * 2 * 2 * 8 * 19 * 4
    assert measured["two"]["cache_bytes"] == 2 * measured["peft"]["cache_bytes"]
    gate = 5 * 32 * 8 * 4
    assert measured["two"]["weight_bytes"] == measured["peft"]["weight_bytes"] + gate
    assert measured["two"]["peak_bytes"] > 2**20


def test_scaling_adapts_the_upper_layers(here: None, base_folder: str, tmp_path: Path) -> None:
    arguments = ("--systems", "peft", "shared", "--repetitions", "1", "--new-tokens", "2", "--lengths", "8")
    assert run("scaling", base_folder, tmp_path, *arguments) == 0
    record = content(tmp_path, "scaling")
    assert [cell["setting"]["sweep"] for cell in record["cells"].values()] == [
        "share",
        "share",
        "gate_rank",
        "gate_rank",
        "prompt",
    ]
    (half,) = targets.verdicts(record)
    assert half.cell == "upper 50% of layers"
    model = systems.load("siamese", base_folder, "float32", layers=[1], gate_rank=4)
    adapted = {name.split("layers.")[1][0] for name, _ in model.named_parameters() if "lora_B" in name}
    assert adapted == {"1"} and model.gate.down.weight.shape[0] == 4


def test_the_limit_counts_what_is_read(here: None, base_folder: str, tmp_path: Path) -> None:
    arguments = ("--systems", "base", "two", "shared", "--repetitions", "1", "--new-tokens", "3")
    assert run("limit", base_folder, tmp_path, *arguments) == 0
    (cell,) = content(tmp_path, "limit")["cells"].values()
    (measured,) = cell["rounds"]
    read = cell["facts"]["bytes_a_step"]
    bandwidth = measured["memory"]["read_bytes_per_second"]
    for name in ("base", "two", "shared"):
        numbers = measured[name]
        assert numbers["allowed_per_second"] == pytest.approx(bandwidth / read[name])
        assert numbers["share"] == pytest.approx(numbers["tokens_per_second"] / numbers["allowed_per_second"])
    model = systems.load("base", base_folder, "float32")
    head = model.get_output_embeddings().weight.numel() * 4
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters()) * 4 + 32 * 4
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not tied and read["base"] == head + layers
    assert read["two"] - read["shared"] == layers
    assert limit.bytes_a_step(model, twice=False) == memory.weight_bytes(model) - head


def test_a_measurement_in_a_process_of_its_own(base_folder: str) -> None:
    task = {"folder": base_folder, "batch": 1, "prompt": 4, "dtype": "float32", "new_tokens": 2, "system": "base"}
    found = measure.answer("memory", task)
    assert set(found) == {"peak_bytes", "weight_bytes", "cache_bytes"}
    with pytest.raises(RuntimeError, match="ended with status 1"):
        measure.answer("no_such_module", task)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    (tmp_path / "data" / "cola").mkdir(parents=True)
    records = [
        {"input": f" Is number {number} even?\nOutput:", "output": "no" if number % 2 else "yes"}
        for number in range(12)
    ]
    data.write(records, tmp_path / "data" / "cola" / "train.jsonl")
    return tmp_path / "data"


def test_training_is_like_for_like(
    here: None, base_folder: str, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("--data-root", str(data_root), "--systems", "trainer", "live", "bank", "--repetitions", "1")
    assert run("train", base_folder, out, *arguments) == 0
    (cell,) = content(out, "train")["cells"].values()
    assert cell["facts"]["same_tokens"] is True
    (measured,) = cell["rounds"]
    # A new adapter changes nothing, so that the first epoch's loss is the same however it is trained.
    assert measured["live"]["loss"] == pytest.approx(measured["trainer"]["loss"], abs=0.01)
    assert measured["bank"]["loss"] == pytest.approx(measured["trainer"]["loss"], abs=0.01)
    assert all(numbers["seconds"] > 0 for numbers in measured.values())


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install trl")
def test_sft_reads_the_same_tokens(base_folder: str, data_root: Path, tmp_path: Path) -> None:
    common = {
        "folder": base_folder,
        "data": str(data_root / "cola" / "train.jsonl"),
        "dtype": "float32",
        "records": 12,
        "batch_size": 4,
        "epochs": 1,
        "steps": -1,
        "learning_rate": 3e-4,
        "seed": 0,
        "output": str(tmp_path / "output"),
    }
    (own,) = train.child({**common, "system": "trainer"})
    sft = measure.answer("train", {**common, "system": "sft_plain"})
    assert (sft["tokens"], sft["supervised"]) == (own["tokens"], own["supervised"])
    assert sft["loss"] == pytest.approx(own["loss"], abs=1e-3)


def test_without_trl_it_says_what_to_do(
    base_folder: str,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert run("train", base_folder, tmp_path, "--data-root", str(data_root)) == 2
    assert "pip install trl" in capsys.readouterr().err


def test_the_hub_gives_the_same_prompts() -> None:
    row = {"sentence": "Our friends won't buy this analysis.", "label": 1, "idx": 0}
    assert data.from_hub(row) == {
        "input": " Given a sentence, judge the grammatical acceptability of the sentence with yes or no.\n"
        "Sentence:Our friends won't buy this analysis.\nOutput:",
        "output": "yes",
    }
    assert data.from_hub({**row, "label": 0})["output"] == "no"


def test_too_few_records_are_an_error(data_root: Path) -> None:
    assert len(data.cola(data_root, 12)) == 12
    with pytest.raises(InputError, match="has 12 records, 13 are wanted"):
        data.cola(data_root, 13)
    with pytest.raises(InputError, match="--data-root"):
        data.cola(data_root / "no", 1)


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_record_of_another_run_is_not_continued(tmp_path: Path) -> None:
    head = {"settings": {"new_tokens": 8}, "commit": "a"}
    record = Record(tmp_path / "decode.json", head)
    record.cell(Cell("one", {"batch": 1}))["rounds"].append({"base": {"seconds": 1.0}})
    record.save()
    same = Record(tmp_path / "decode.json", head)
    same.resume()
    assert same.content == record.content
    with pytest.raises(InputError, match="another settings and commit: replace it with --fresh"):
        Record(tmp_path / "decode.json", {"settings": {"new_tokens": 9}, "commit": "b"}).resume()
    assert [path.name for path in tmp_path.iterdir()] == ["decode.json"]


def test_settings_that_cannot_work(base_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "--model", "no/such/model", "--out", str(tmp_path)]) == 2
    assert "--model must be one of smollm2, gemma3" in capsys.readouterr().err
    assert main(["decode", "--model", base_folder, "--out", str(tmp_path), "--systems", "fast"]) == 2
    assert "got 'fast'" in capsys.readouterr().err
    assert main(["decode", "--model", base_folder, "--repetitions", "0"]) == 2
    assert main(["report", "--out", str(tmp_path / "no")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_machine_is_described_and_not_named() -> None:
    import platform

    described = json.dumps({**machine.machine(), **machine.versions()})
    assert '"cores"' in described and torch.__version__ in described
    assert platform.node() not in described or len(platform.node()) < 3


# -- numbers made by hand --------------------------------------------------------------------------------------------


def by_hand(verb: str, setting: dict[str, Any], *rounds: measure.Round) -> dict[str, Any]:
    where = {"processor": "a processor", "flags": ["avx2"], "architecture": "x86_64"}
    return {
        "benchmark": verb,
        "model": "Tiny",
        "settings": {"new_tokens": 8, "systems": list(rounds[0]), "quick": False},
        "commit": "0123456789abcdef",
        "versions": {"python": "3.11", "imsm": "0", "torch": "2"},
        "machine": {**where, "cores": 2, "threads": 1, "memory_bytes": 2**33},
        "cells": {"the cell": {"setting": setting, "facts": {}, "rounds": list(rounds)}},
    }


def training(bank: float, trainer: float, peak: float = 1.0) -> measure.Round:
    return {
        "trainer": {"seconds": trainer, "peak_bytes": 100.0, "loss": 1.0},
        "sft": {"seconds": 80.0, "peak_bytes": 90.0, "loss": 1.0},
        "bank": {"seconds": bank, "peak_bytes": 100.0 * peak, "loss": 1.0},
    }


def test_medians_and_verdicts() -> None:
    rounds = [training(bank, trainer) for bank, trainer in ((90, 100), (500, 101), (89, 99), (91, 400), (88, 98))]
    assert measure.medians(rounds)["bank"]["seconds"] == 90
    assert measure.medians(rounds)["trainer"]["seconds"] == 100
    found = {
        (v.target.peer, v.target.metric): (v.ratio, v.met)
        for v in targets.verdicts(by_hand("train", {"epochs": 3}, *rounds))
    }
    assert found == {
        ("trainer", "seconds"): (0.9, True),
        ("sft", "seconds"): (90 / 80, True),
        ("trainer", "peak_bytes"): (1.0, True),
    }
    ten = targets.verdicts(by_hand("train", {"epochs": 10}, *rounds))
    assert [(v.target.bound, v.met) for v in ten if v.target.metric == "seconds"] == [(1.08, False)]


def test_the_page_names_the_commands() -> None:
    record = by_hand("train", {"epochs": 3}, training(90, 100))
    record["settings"] |= {"records": 48, "batch_size": 8, "data": "cola", "systems": list(train.NAMES)}
    del record["settings"]["new_tokens"]
    record["machine"]["threads"] = 2
    plain = "scripts/benchmark train --records 48 --batch-size 8 --epochs 3 --data-root DATA"
    assert report.command(record) == plain
    ten = {**by_hand("train", {"epochs": 10}, training(90, 100)), "settings": record["settings"]}
    ten["settings"] = {**record["settings"], "systems": ["sft", "bank"]}
    assert report.command(ten) == plain.replace("train", "train --threads 1 --systems sft bank").replace("s 3", "s 10")
    both = [{**record, "model": "SmolLM2-135M"}, {**record, "model": "Gemma-3-270M"}, ten]
    assert report.commands(both) == f"{plain} --model smollm2 gemma3\n{report.command(ten)} --model Tiny"
    cells = by_hand("decode", {"batch": 1, "prompt": 64, "dtype": "float32"}, {})
    cells["cells"]["another"] = {"setting": {"batch": 8, "prompt": 64, "dtype": "float32"}}
    cells["settings"]["systems"] = list(decode.NAMES)
    named = "scripts/benchmark decode --threads 1 --new-tokens 8 --batches 1 8 --lengths 64 --dtypes float32"
    assert report.command(cells) == named


def test_a_cell_may_lack_a_system(tmp_path: Path) -> None:
    record = by_hand("train", {"epochs": 3}, {**training(90, 100), "live": training(110, 100)["bank"]})
    ten = by_hand("train", {"epochs": 10}, training(80, 100))["cells"]["the cell"]
    record["cells"]["longer"] = ten
    seconds = table.tables(record)[0]
    assert seconds.rows[0][-1] == "110.0 s (1.10)" and seconds.rows[1][-1] == "–"
    pictures.picture([record], tmp_path / "train.png")
    assert (tmp_path / "train.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("sense", "ratio", "met"),
    [
        ("at most", 1.2, True),
        ("at most", 1.201, False),
        ("at least", 1.2, True),
        ("at least", 1.199, False),
        ("exactly", 1.2, True),
        ("exactly", 1.19, False),
    ],
)
def test_bounds(sense: Any, ratio: float, met: bool) -> None:
    assert targets.Target("decode", "a", "b", "seconds", sense, 1.2).met(ratio) is met


def test_decoding_is_judged_at_small_batches() -> None:
    rates = {"peft": 10.0, "shared": 7.0, "compiled": 10.0, "peft_compiled": 12.0}
    measured = {name: {"tokens_per_second": rate, "prefill_seconds": 1.0} for name, rate in rates.items()}
    setting = {"batch": 8, "prompt": 64, "dtype": "float32"}
    found = targets.verdicts(by_hand("decode", setting, measured))
    assert [(v.target.system, v.target.peer, v.met) for v in found] == [
        ("shared", "peft", False),
        ("compiled", "peft", True),
        ("compiled", "peft_compiled", False),
    ]
    assert targets.verdicts(by_hand("decode", {**setting, "batch": 32}, measured)) == []


def test_the_report_is_made_from_the_records(tmp_path: Path) -> None:
    rounds = [training(bank, 100.0, peak=1.07) for bank in (80, 85, 95)]
    record = by_hand("train", {"epochs": 3}, *rounds)
    (tmp_path / "train-tiny.json").write_text(json.dumps(record))
    sweep = {"sweep": "prompt", "prompt": 64, "share": 1.0, "gate_rank": 8}
    numbers = {"prefill_seconds": 1.0, "tokens_per_second": 2.0}
    other = by_hand("decode", {"batch": 1, "prompt": 64, "dtype": "float32"}, {"compiled": {**numbers, "seconds": 1.0}})
    other["cells"]["the cell"]["facts"] = {"graphs": {"compiled": 0}, "same_tokens": {"two=shared": 0.5}}
    (tmp_path / "decode-tiny.json").write_text(json.dumps(other))
    scaled = by_hand("scaling", sweep, {"peft": numbers, "shared": numbers})
    (tmp_path / "scaling-tiny.json").write_text(json.dumps(scaled))
    assert main(["report", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| the cell | 100.0 s | 80.0 s (0.80) | 85.0 s (0.85) |" in page
    assert "- train, Tiny, the cell: peak bytes of ours, with the bank is 1.070 ×" in page
    assert "| 1.070 | at most 1.05 | **not met** |" in page and "| 0.850 | at most 0.90 | met |" in page
    assert "a processor (avx2), 2 cores, 1 thread, 8 GiB, with python 3.11, torch 2, at commit 0123456789ab." in page
    assert "Repetitions: 3." in page and "Not measured yet: `scripts/benchmark limit`" in page
    assert "ours, shared matmuls, compiled: ran uncompiled" in page and "two=shared 50.0%" in page
    pictures = {path.name for path in (tmp_path / "docs").glob("*.png")}
    assert pictures == {"benchmark-train.png", "benchmark-decode.png", "benchmark-scaling.png"}


def test_every_verb_has_a_table_and_a_place_in_the_report() -> None:
    from benchmarks.__main__ import VERBS

    assert set(VERBS) == set(table.METRICS) == set(report.VERBS)
    for target in targets.TARGETS:
        assert target.metric in [metric for metric, *_ in table.METRICS[target.verb]]
        assert {target.system, target.peer} <= set(table.TITLES)
