"""The command line up to where a model would be loaded."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import imsm_cli
from imsm.cli.train import split_arguments
from imsm.errors import InputError

SETTINGS = "model: nowhere/at/all\noutput_dir: o\ndata: {train: t.jsonl}\n"


@pytest.fixture
def settings(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS)
    return str(path)


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


# -- the launcher ----------------------------------------------------------------------------------------------------


def test_launcher_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys, imsm_cli\n"
        "assert imsm_cli.main(['--help']) == 0 and imsm_cli.main(['--version']) == 0\n"
        "assert imsm_cli.main(['nonsense']) == 2\n"
        "assert not {'torch', 'transformers', 'peft', 'imsm', 'rich'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: imsm ")


def test_help_has_a_line_for_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert imsm_cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb in ("train", "generate", "chat", "data", "info"):
        assert any(line.startswith(f"  {verb} ") for line in lines)


@pytest.mark.parametrize("verb", imsm_cli.VERBS)
def test_every_verb_has_a_module_and_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(f"imsm.cli.{verb.replace('-', '_')}").run)
    try:
        status = imsm_cli.main([verb, "--help"])
    except SystemExit as stop:  # argparse's way out
        status = stop.code
    assert status == 0
    assert f"imsm {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tran", "imsm: unknown verb 'tran'; did you mean 'train'?\n"),
        ("zzz", f"imsm: unknown verb 'zzz'; there are {', '.join(imsm_cli.VERBS)}\n"),
        ("--versoin", "imsm: unknown option '--versoin'; did you mean '--version'?\n"),
    ],
)
def test_unknown_verbs_name_the_nearest(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert imsm_cli.main([argument]) == 2
    assert capsys.readouterr().err == message


def test_no_verb_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert imsm_cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: imsm ")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("give a folder"), 2, "imsm: give a folder\n"),
        (
            OSError(28, "No space left on device", "a b"),
            1,
            "imsm: OSError: [Errno 28] No space left on device: 'a b'\n",
        ),
        (RuntimeError("two\n  lines"), 1, "imsm: RuntimeError: two lines\n"),
        (KeyboardInterrupt(), 130, "imsm: interrupted\n"),
    ],
)
def test_errors_become_one_line_and_a_status(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.delenv("IMSM_TRACEBACK", raising=False)
    monkeypatch.setattr("imsm.cli.train.run", fail)
    assert imsm_cli.main(["train"]) == status
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("by_variable", [True, False])
def test_traceback_on_request(
    by_variable: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IMSM_TRACEBACK", "1" if by_variable else "0")
    assert imsm_cli.main(["train", "nope.yaml", *([] if by_variable else ["--traceback"])]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.endswith("imsm: there is no settings file nope.yaml\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys, imsm_cli, imsm.cli.info as info\n"
        "def run(argv):\n    print('x' * 200000)\n    return 0\n"
        "info.run = run\nsys.exit(imsm_cli.main(['info']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("given", "tied"),
    [
        (["--recall", "-inf", "hello"], ["--recall=-inf", "hello"]),
        (["--recalls", "-2,-.5,0"], ["--recalls=-2,-.5,0"]),
        (["--recall=-1", "--plain"], ["--recall=-1", "--plain"]),
        (["-1 is less than 0", "--json", "-info"], ["-1 is less than 0", "--json", "-info"]),
        (["--plain", "-5 degrees, is that cold?"], ["--plain", "-5 degrees, is that cold?"]),
    ],
)
def test_numbers_below_zero_are_values_of_the_option_before_them(given: list[str], tied: list[str]) -> None:
    assert imsm_cli.joined(given) == tied


def test_generate_takes_the_dials_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert imsm_cli.main(["generate", "no/such/checkpoint", "--recall", "-inf", "hello"]) == 2
    assert "no/such/checkpoint" in capsys.readouterr().err


# -- imsm train ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "imsm: no settings given; usage: imsm train [SETTINGS.yaml]"),
        (["nope.yaml"], "imsm: there is no settings file nope.yaml"),
        (["SETTINGS", "--learning_rat", "3"], "imsm: unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["SETTINGS", "--learning_rate", "-1"], "imsm: learning_rate must be a positive number, got -1"),
        (["SETTINGS", "--learning-rate=x"], "imsm: learning_rate must be a number, got 'x'"),
        (["SETTINGS", "--epochs"], "imsm: --epochs needs a value"),
        (["SETTINGS", "--epochs", "--resume"], "imsm: --epochs needs a value"),
        (["SETTINGS", "other.yaml"], "imsm: one settings file is expected, got "),
        (["--model", "m", "--output_dir", "o"], "imsm: the setting data.train is missing: "),
    ],
)
def test_train_refuses_wrong_arguments(
    argv: list[str], message: str, settings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imsm_cli.main(["train", *(settings if part == "SETTINGS" else part for part in argv)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1


def test_train_refuses_missing_data(
    settings: str, tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing.jsonl")
    output = str(tmp_path / "out")
    argv = ["train", settings, "--model", tokenizer_folder, "--data.train", missing, "--output_dir", output]
    assert imsm_cli.main(argv) == 2
    assert capsys.readouterr().err == f"imsm: there is no file {missing}\n"
    assert not Path(output).exists()


def test_train_arguments_are_split_wherever_they_stand() -> None:
    argv = ["--resume", "run.yaml", "--max_steps", "-1", "--bf16", "false", "--data.max-length=9", "--adapter.r", "4"]
    path, overrides = split_arguments(argv)
    assert path == Path("run.yaml")
    assert overrides == {
        "resume": "true",
        "max_steps": "-1",
        "bf16": "false",
        "data.max_length": "9",
        "adapter.r": "4",
    }


# -- imsm data show --------------------------------------------------------------------------------------------------


def test_data_show(tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    records = [
        {"input": "question", "output": " yes [b]"},
        {"input": "question", "output": ""},
        {"input": "a", "output": "b"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    assert imsm_cli.main(["data", "show", str(path), "--model", tokenizer_folder, "--count", "1", "--tokens"]) == 0
    printed = capsys.readouterr().out
    assert "question« yes [b]<|eos|>»" in printed
    assert "a«b" not in printed
    assert "2 usable records of format input/output" in printed
    assert "1 of 3 records cannot be used\n  line 2: 'output' is empty" in printed
    assert "│ -100" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nope.jsonl"], "imsm: there is no file nope.jsonl"),
        (["DATA", "--count", "-1"], "imsm: --count must not be negative, got -1"),
        (["DATA", "--max-length", "0"], "imsm: data.max_length must be an integer above 1, got 0"),
        (["DATA", "--model", "no/such/folder"], "imsm: the tokenizer of --model 'no/such/folder' cannot be loaded: "),
    ],
)
def test_data_show_refuses(
    argv: list[str], message: str, tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input": "a", "output": "b"}\n')
    given = [str(path) if part == "DATA" else part for part in argv]
    assert imsm_cli.main(["data", "show", "--model", tokenizer_folder, *given]) == 2
    assert capsys.readouterr().err.startswith(message)
