"""What the README shows works: its Python runs, its YAML loads, the files and verbs that it names exist."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import imsm_cli
from imsm.settings import read_yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_python_runs(
    base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model in the place of the Hub's, and with a data file of the name it uses."""
    (code,) = blocks("python")
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", base_folder)
    monkeypatch.chdir(tmp_path)
    record = {"messages": [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "no"}]}
    (tmp_path / "dialogues.jsonl").write_text((json.dumps(record) + "\n") * 4)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "shop" / "gate.safetensors").is_file()


def test_the_settings_load(tmp_path: Path) -> None:
    (settings,) = blocks("yaml")
    (tmp_path / "config.yaml").write_text(settings)
    config = read_yaml(tmp_path / "config.yaml")
    assert config.method == "imsm" and config.adapter["r"] == 16 and config.epochs == 3


def test_the_commands_exist() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert {"scripts/quickstart", "scripts/test"} <= {line.split()[0] for line in commands}
    for line in commands:
        first, *rest = line.split()
        if first.startswith("scripts/"):
            assert os.access(ROOT / first, os.X_OK)
        elif first == "imsm":
            assert rest[0] in imsm_cli.VERBS


def test_the_files_it_points_at_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_the_table_is_the_measured_one() -> None:
    results = json.loads((ROOT / "docs" / "quickstart.json").read_text(encoding="utf-8"))
    for method, title in (("base", "base model"), ("lora", "LoRA"), ("imsm", "IMSM")):
        row = results[method]
        assert f"| {title} | {row['task']:.2f} | {row['retained']:.2f} | {row['train_seconds']:.0f} s |" in TEXT
