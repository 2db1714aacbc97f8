"""Settings: validation, YAML and overrides."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from imsm.errors import InputError
from imsm.settings import (
    DataConfig,
    DreamsConfig,
    RetainConfig,
    TrainConfig,
    argument_parser,
    load,
    read_yaml,
    setting_types,
    to_yaml,
)
from imsm.settings.uses import USES as KNOWN_USES

MINIMAL = "model: m\noutput_dir: o\ndata: {train: t.jsonl}\n"


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "output_dir": "o", "data": DataConfig("t.jsonl"), **changes})


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_gives_the_documented_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, MINIMAL)) == config()


ODD = [
    "null",
    "true",
    "12",
    "1e3",
    ".5e3",
    "a: b",
    "[x]",
    "x\ny",
    "~",
    "yes",
    "'q'",
    " lead",
    "#x",
    "é«",
    "1:30",
    "a.yaml",
]


@pytest.mark.parametrize("text", ODD)
def test_saved_settings_load_to_equal_ones(text: str, tmp_path: Path) -> None:
    before = config(
        model=text,
        revision=text,
        data=DataConfig(text, eval=text, bad_records="skip"),
        adapter={"peft_type": "IA3", "target_modules": [text], "x": text, "y": {"z": 1e-5}, "n": None},
        learning_rate=1e-5,
        save_steps=7,
        resume=True,
        retain=RetainConfig("kl_samples", weight=0.5, prompts=text),
    )
    assert read_yaml(written(tmp_path, to_yaml(before))) == before


@pytest.mark.parametrize("mode", ["on", "off"])
def test_settings_of_dreams_are_saved_for_those_who_have_them(mode: str, tmp_path: Path) -> None:
    before = config(method="peft", dreams=DreamsConfig(mode=mode))
    text = to_yaml(before)
    assert "task_prompts" not in text and read_yaml(written(tmp_path, text)) == before
    assert ("task_prompts" in to_yaml(config(dreams=DreamsConfig(mode=mode)))) == (mode == "on")


def test_sets_and_tuples_are_saved_as_lists(tmp_path: Path) -> None:
    before = config(adapter={"target_modules": {"v", "q"}, "betas": (0.5, 1)})
    assert before.adapter == {"peft_type": "LORA", "target_modules": ["q", "v"], "betas": [0.5, 1]}
    assert read_yaml(written(tmp_path, to_yaml(before))) == before


def test_paths_and_whole_numbers_are_taken() -> None:
    given = config(output_dir=Path("a/b"), data=DataConfig(Path("t.jsonl")), epochs=2)
    assert (given.output_dir, given.data.train, given.epochs) == ("a/b", "t.jsonl", 2.0)
    assert isinstance(given.epochs, float)


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "learning_rate: 1e-4\nadapter: {lora_dropout: 1e-1}\n")
    assert load(path).learning_rate == 1e-4
    assert load(path).adapter == {"peft_type": "LORA", "lora_dropout": 0.1}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("learning_rate", "2e-3", 2e-3),
        ("max_steps", "-1", -1),
        ("bf16", "true", True),
        ("save_steps", "null", None),
        ("save_steps", "5", 5),
        ("optimizer", "adafactor", "adafactor"),
        ("model", "1e3", "1e3"),
        ("revision", "1e3", "1e3"),
        ("revision", "null", None),
        ("output_dir", "a b 'c'", "a b 'c'"),
    ],
)
def test_overrides_win_and_have_their_type(key: str, text: str, value: object, tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "learning_rate: 0.5\nbf16: false\nsave_steps: 3\nrevision: r\n")
    loaded = getattr(load(path, {key: text}), key)
    assert loaded == value
    assert type(loaded) is type(value)


def test_overrides_alone_are_enough() -> None:
    texts = {"model": "m", "output_dir": "o", "data.train": "t.jsonl", "data.max_length": "9"}
    assert load(None, texts) == config(data=DataConfig("t.jsonl", max_length=9))


def test_adapter_overrides_add_to_the_adapter(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    default = config().adapter
    assert load(path, {"adapter.r": "4"}).adapter == {**default, "r": 4}
    assert load(path, {"adapter.target_modules": "[q, v]"}).adapter == {**default, "target_modules": ["q", "v"]}
    assert load(path, {"adapter": "{peft_type: IA3}"}).adapter == {"peft_type": "IA3"}
    path = written(tmp_path, MINIMAL + "adapter: {r: 2}\n")
    assert load(path, {"adapter.lora_alpha": "4"}).adapter == {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def test_another_adapter_method_drops_the_settings_of_the_one_before(tmp_path: Path) -> None:
    texts = {"adapter.peft_type": "VERA", "adapter.r": "64"}
    assert load(written(tmp_path, MINIMAL), texts).adapter == {"peft_type": "VERA", "r": 64}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "learning_rat: 1", "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (MINIMAL + "max_length: 1", "unknown setting 'max_length'; did you mean 'data.max_length'?"),
        (MINIMAL + "qqqqqq: 1", "unknown setting 'qqqqqq'"),
        (MINIMAL + "3: 1", "unknown setting '3'"),
        ("data: {tarin: x}", "unknown setting 'data.tarin'; did you mean 'data.train'?"),
        ("data.train: x", "'data.train' must be written as 'train' below 'data:'"),
        ("data: x", "data must be a group of settings ('train: …' and so on), got 'x'"),
        (MINIMAL + "retain: replay", "retain must be a group of settings ('kind: …' and so on), got 'replay'"),
        (MINIMAL + "retain: {kid: replay}", "unknown setting 'retain.kid'; did you mean 'retain.kind'?"),
        ("model: m\ndata: {train: x}", "the setting output_dir is missing: "),
        ("model: m\noutput_dir: o", "the setting data.train is missing: "),
        (MINIMAL + "batch_size: '8'", "batch_size must be an integer, got '8'"),
        (MINIMAL + "batch_size: null", "batch_size must be an integer, got null"),
        (MINIMAL + "learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        (MINIMAL + "adapter: [1]", "adapter must be peft's settings as a mapping, got [1]"),
        ("model: 3\noutput_dir: o\ndata: {train: x}", "model must be a text, got 3"),
        ("- a", "must hold settings as 'key: value', got a list"),
        ("", "must hold settings as 'key: value', got nothing"),
        ("a: 1\nb: [", "line 2 is not YAML: "),
    ],
)
def test_bad_yaml_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(written(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("learning_rat", "1", "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("data", "x", "unknown setting 'data'; did you mean 'data.train'?"),
        ("data.max", "1", "unknown setting 'data.max'; did you mean 'data.max_length'?"),
        ("adapter.", "1", "unknown setting 'adapter.'"),
        ("adapter", "3", "adapter must be peft's settings as a mapping, got 3"),
        ("adapter.r", "[", "adapter.r must be a YAML value, got '['"),
        ("learning_rate", "x", "learning_rate must be a number, got 'x'"),
        ("save_steps", "1.5", "save_steps must be an integer or null, got '1.5'"),
        ("resume", "maybe", "resume must be true or false, got 'maybe'"),
        ("schedule", "step", "schedule must be one of cosine, linear, constant, got 'step'"),
        ("retain.kind", "kl", "retain.kind must be one of none, kl_prompts, kl_samples, kl_dreams, replay, got 'kl'"),
        ("data.bad_records", "drop", "data.bad_records must be one of error, skip, got 'drop'"),
    ],
)
def test_bad_overrides_are_refused(key: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(written(tmp_path, MINIMAL), {key: text})
    assert message in str(caught.value)


def test_a_settings_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no settings file .*nope\.yaml"):
        load(tmp_path / "nope.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1}, "learning_rate must be a positive number, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number, got nan"),
        ({"gate_learning_rate": 0}, "gate_learning_rate must be a positive number, got 0"),
        ({"epochs": 0}, "epochs must be a positive number, got 0"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"batch_size": True}, "batch_size must be an integer, got true"),
        ({"max_steps": 0}, "max_steps must be a positive integer, or -1, got 0"),
        ({"save_steps": 0}, "save_steps must be a positive integer or null, got 0"),
        ({"gate_dropout": 1.0}, "gate_dropout must be a number from 0 to below 1, got 1"),
        ({"gate_rank": -2}, "gate_rank must be a positive integer, got -2"),
        ({"weight_decay": -0.1}, "weight_decay must be a number that is not negative, got -0.1"),
        ({"warmup": 1.5}, "warmup must be a share from 0 to below 1, or a whole number of steps, got 1.5"),
        ({"warmup": -0.1}, "warmup must be a share"),
        ({"seed": -1}, "seed must be an integer from 0 to below 2**32, got -1"),
        ({"model": ""}, "model must be a text that is not empty, got ''"),
        ({"method": "lora"}, "method must be one of imsm, peft, loramoe, full, got 'lora'"),
        ({"gate": "tokn"}, "got 'tokn'; did you mean 'token'?"),
        ({"data": {"train": "x"}}, "data must be a DataConfig, got {'train': 'x'}"),
        ({"adapter": {"r": object()}}, "adapter.r must be texts, numbers, lists or mappings"),
        ({"adapter": {1: 2}}, "adapter must be texts, numbers, lists or mappings"),
        ({"eval_steps": 5}, "eval_steps is set, but has no effect as there is nothing to evaluate on"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        config(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"max_length": 1}, {"max_length": "9"}, {"train": ""}, {"eval": ""}, {"add_eos": 1}]
)
def test_data_settings_are_checked_by_their_full_name(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^data\.{next(iter(changes))} must be "):
        DataConfig(**{"train": "t.jsonl", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "distil"},
            "retain.kind must be one of none, kl_prompts, kl_samples, kl_dreams, replay, got 'distil'",
        ),
        ({"weight": 0}, "retain.weight must be a positive number, got 0"),
        ({"samples": 0}, "retain.samples must be a positive integer, got 0"),
        ({"share": 1.0}, "retain.share must be a number between 0 and 1, got 1"),
        ({"prompts": ""}, "retain.prompts must be a text that is not empty, or null, got ''"),
    ],
)
def test_retain_settings_are_checked_by_their_full_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        RetainConfig(**changes)
    assert str(caught.value) == message


LORAMOE = {"peft_type": "LORAMOE", "target_modules": ["up_proj"]}
CORDA = {"init_lora_weights": "corda"}


QUERY_AWARE = {"gate": "query_aware"}
OFF = {"dreams": {"mode": "off"}}
JOINT = {"dreams": {"phases": "joint"}}
#: A setting, runs that do not read it and why, and runs that do.
USES: list[tuple[str, Any, list[tuple[dict[str, Any], str]], list[dict[str, Any]]]] = [
    ("gate", "token", [({"method": "peft"}, "with method: peft: use method: imsm")], [OFF, {}]),
    (
        "gate_rank",
        16,
        [({}, "with gate: tuned, which has nothing to learn"), ({"method": "full"}, "with")],
        [OFF, JOINT],
    ),
    ("gate_dropout", 0.5, [({**OFF, "gate": "average"}, "with gate: average, which")], [OFF, QUERY_AWARE]),
    ("gate_learning_rate", 1e-4, [({}, "with gate: tuned"), ({"method": "peft"}, "with method: peft")], [QUERY_AWARE]),
    (
        "dreams.weight",
        40.0,
        [({}, "with gate: tuned"), ({**JOINT, **QUERY_AWARE}, "with dreams.phases: joint")],
        [QUERY_AWARE],
    ),
    (
        "dreams.gate_steps",
        9,
        [({}, "with gate: tuned, which"), (OFF, "with dreams: off: leave dreams on")],
        [QUERY_AWARE],
    ),
    (
        "dreams.answer_tokens",
        9,
        [({}, "with gate: tuned, which"), ({"method": "peft"}, "with method: peft")],
        [QUERY_AWARE, {"method": "peft", "retain": {"kind": "kl_dreams"}}],
    ),
    ("dreams.prompt_tokens", 9, [(OFF, "with dreams: off")], [{}, JOINT, {**OFF, "retain": {"kind": "kl_dreams"}}]),
    ("dreams.count", 999, [(OFF, "with dreams: off: leave dreams on"), ({"method": "peft"}, "with")], [{}, JOINT]),
    ("dreams.phases", "joint", [(OFF, "with dreams: off")], [{}]),
    ("dreams.task_prompts", 9, [(OFF, "with dreams: off")], [{}]),
    ("dreams.false_recall", 0.5, [(OFF, "with dreams: off")], [{}]),
    ("dreams.anchors", "a.jsonl", [(OFF, "with dreams: off")], [{}]),
    (
        "memory_bank",
        "on",
        [({}, "as the first of dreams' two phases runs no frozen stream"), ({"method": "peft"}, "no frozen stream")],
        [OFF, JOINT],
    ),
    (
        "memory_bank_dir",
        "/banks",
        [({}, "as the first of dreams' two"), ({**OFF, "memory_bank": "off"}, "with memory_bank: off")],
        [OFF, JOINT],
    ),
    ("memory_bank_dtype", "float32", [({"method": "peft"}, "as method: peft has no frozen stream")], [OFF, JOINT]),
    ("adapter", {"r": 99}, [({"method": "full"}, "with method: full, which trains no adapter: use")], [{}]),
    ("adapter", LORAMOE, [({"method": "full"}, "with method: full")], [{"method": "loramoe"}]),
    ("task", "t", [({"method": "peft"}, "with method: peft")], [{}]),
    ("eval_steps", 5, [({}, "as there is nothing to evaluate on: give data.eval")], [{"data": {"eval": "e.jsonl"}}]),
    ("data.eval_split", "dev", [({}, "as there is nothing to evaluate on")], [{"data": {"eval": "e.jsonl"}}]),
    (
        "retain.weight",
        9.0,
        [({}, "with retain.kind: none: use retain.kind: kl_prompts or"), ({"retain": {"kind": "replay"}}, "replay")],
        [{"retain": {"kind": "kl_samples"}}, {"method": "peft", "retain": {"kind": "kl_prompts"}}],
    ),
    (
        "retain.share",
        0.5,
        [({"retain": {"kind": "kl_samples"}}, "with retain.kind: kl_sam")],
        [{"retain": {"kind": "replay"}}],
    ),
    (
        "retain.samples",
        9,
        [
            ({"retain": {"kind": "replay"}}, "with retain.kind: replay: use"),
            ({"method": "full"}, "use method: peft and retain.kind: kl_samples or kl_dreams"),
        ],
        [{"retain": {"kind": "kl_dreams"}}, {"method": "peft", "adapter": CORDA}],
    ),
    (
        "retain.sample_tokens",
        9,
        [({"retain": {"kind": "kl_dreams"}}, "with retain.kind: kl_dreams")],
        [{"retain": {"kind": "replay"}}, {"method": "peft", "adapter": CORDA}],
    ),
    (
        "retain.prompts",
        "general.jsonl",
        [({}, "none"), ({"method": "peft", "retain": {"kind": "kl_prompts"}}, "with retain.kind: kl_prompts")],
        [{"retain": {"kind": "kl_samples"}}, {"method": "peft", "adapter": CORDA}],
    ),
    ("retain.batch_size", 9, [({"retain": {"kind": "replay"}}, "replay")], [{"retain": {"kind": "kl_dreams"}}]),
]


def setting(key: str, value: Any, run: dict[str, Any]) -> TrainConfig:
    """The settings of a run, groups as mappings, with one more."""
    group, _, name = key.rpartition(".")
    values = {**run, group: {**run.get(group, {}), name: value}} if group else {**run, name: value}
    kinds = {"retain": RetainConfig, "dreams": DreamsConfig, "data": DataConfig}
    values["data"] = {"train": "t.jsonl", **values.get("data", {})}
    return config(**{key: kinds[key](**given) if key in kinds else given for key, given in values.items()})


@pytest.mark.parametrize(("key", "value", "unread", "read"), USES, ids=[use[0] for use in USES])
def test_what_a_run_does_not_read_is_refused(
    key: str, value: Any, unread: list[tuple[dict[str, Any], str]], read: list[dict[str, Any]], tmp_path: Path
) -> None:
    for run, reason in unread:
        with pytest.raises(InputError) as caught:
            setting(key, value, run)
        message = str(caught.value)
        assert message.startswith(f"{key} is set, but has no effect ") and reason in message
        assert message.endswith(f", or leave {key} out")
    for run in read:
        made = setting(key, value, run)
        assert made.reads(key) and read_yaml(written(tmp_path, to_yaml(made))) == made


def test_every_setting_of_gate_dreams_and_retain_has_its_use() -> None:
    groups = ("gate", "memory_bank", "dreams.", "retain.")
    named = {key for key in setting_types() if key.startswith(groups)} - {"dreams.mode", "retain.kind"}
    assert named <= set(KNOWN_USES) <= set(setting_types())
    assert set(KNOWN_USES) - {"continue_from"} == {use[0] for use in USES}


def test_switching_off_what_is_not_there_is_no_mistake() -> None:
    assert config(memory_bank="off").gate_name == "tuned"
    assert not config(method="peft", memory_bank="off", dreams=DreamsConfig("off")).dreaming


@pytest.mark.parametrize("run", [{}, {"method": "peft"}, {"method": "full"}, {"dreams": DreamsConfig("off")}])
def test_settings_that_were_saved_with_every_default_still_load(run: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    before = config(**run)
    assert read_yaml(written(tmp_path, yaml.safe_dump(asdict(before)))) == before


def test_settings_draw_no_random_numbers() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    config(gate="query_aware", gate_rank=4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "loramoe"}, "method: loramoe and adapter.peft_type: LORAMOE go together"),
        ({"method": "peft", "adapter": LORAMOE}, "method: loramoe and adapter.peft_type: LORAMOE go together"),
        ({"method": "full", "memory_bank": "on"}, "method: full has no frozen stream"),
        ({"method": "full", "packing": True}, "packing is not for method: full"),
        ({"method": "peft", "adapter": CORDA, "packing": True}, "packing is not for CorDA"),
        ({"method": "full", "retain": "kl_samples"}, "method: full does not keep at hand"),
        ({"method": "loramoe", "adapter": LORAMOE, "retain": "kl_prompts"}, "method: loramoe does not keep at hand"),
        ({"method": "peft", "adapter": CORDA, "retain": "kl_samples"}, "whose weights CorDA rewrites"),
        ({"method": "imsm", "retain": "kl_prompts"}, "kl_prompts goes with method: peft"),
        ({"method": "peft", "packing": True, "retain": "kl_prompts"}, "cannot tell prompts from padding"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    if kind := changes.get("retain"):
        changes = {**changes, "retain": RetainConfig(kind)}
    with pytest.raises(InputError) as caught:
        config(**changes)
    assert message in str(caught.value)


def test_help_explains_every_setting() -> None:
    parser = argument_parser()
    explained = {action.dest: action.help for action in parser._actions}
    assert set(setting_types()) <= set(explained)
    assert all(explained[key] for key in setting_types())
