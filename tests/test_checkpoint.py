"""The checkpoint folder: a round trip changes nothing, and a folder that does not fit is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from zoo import ARCHITECTURES, GROUPED, METHODS, disturb, tiny_base

from imsm import GATES, InputError, SiameseConfig, SiameseForCausalLM, checkpoint

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "gate.safetensors",
    "generation_config.json",
}
IDS = torch.tensor([[5, 9, 33, 2, 61, 17], [8, 8, 21, 40, 3, 50]])
PAIRS = [
    *(("llama", method, "query_aware") for method in METHODS),
    *(("llama", "lora", gate) for gate in GATES if gate != "query_aware"),
    *((architecture, "lora", "query_aware") for architecture in ARCHITECTURES if architecture != "llama"),
]


def saved(tmp_path: Path, architecture: str = "llama", method: str = "lora", gate: str = "query_aware") -> Any:
    """A disturbed model whose base lies in `tmp_path / "base"`, saved to `tmp_path / "model"`."""
    tiny_base(architecture).save_pretrained(tmp_path / "base")
    made = SiameseForCausalLM.from_base(
        tmp_path / "base", METHODS[method](tiny_base(architecture)), gate=gate, gate_rank=4
    )
    disturb(made)
    made.eval().save_pretrained(tmp_path / "model")
    return made


def learned(model: SiameseForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "base_layer" not in name}


@pytest.mark.parametrize("task", ["default", "shop"])
def test_an_adapter_alone_is_what_peft_saves(tmp_path: Path, task: str) -> None:
    """Byte for byte, and right in the folder whatever its name."""
    base = tiny_base("llama")
    model = SiameseForCausalLM.from_base(base, METHODS["lora"](base), task=task)
    (tmp_path / "ours").mkdir()
    checkpoint.write_adapter(model, task, tmp_path / "ours", with_card=True)
    model.peft_model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    written = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "theirs").rglob("*") if path.is_file()}
    assert "README.md" in written


@pytest.mark.parametrize(("architecture", "method", "gate"), PAIRS)
def test_round_trip(tmp_path: Path, architecture: str, method: str, gate: str) -> None:
    before = saved(tmp_path, architecture, method, gate)
    after = SiameseForCausalLM.from_pretrained(tmp_path / "model")
    assert not after.training
    assert learned(before).keys() == learned(after).keys()
    for name, tensor in learned(before).items():
        assert torch.equal(tensor, learned(after)[name]), name
    assert torch.equal(before(IDS).logits, after(IDS).logits)
    assert {p.name for p in (tmp_path / "model").iterdir()} == FILES


@pytest.mark.parametrize("method", METHODS)
def test_peft_alone_reads_the_adapter(tmp_path: Path, method: str) -> None:
    made = saved(tmp_path, "llama", method)
    tuned = PeftModel.from_pretrained(tiny_base("llama"), str(tmp_path / "model")).eval()
    assert torch.allclose(tuned(IDS).logits, made(IDS, force_gate=0).logits, atol=1e-6)


def test_the_base_weights_are_not_in_it(tmp_path: Path) -> None:
    made = saved(tmp_path)
    stored = {
        **load_file(tmp_path / "model/adapter_model.safetensors"),
        **load_file(tmp_path / "model/gate.safetensors"),
    }
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in made.parameters() if p.requires_grad)


def test_the_auto_classes(tmp_path: Path) -> None:
    made = saved(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert isinstance(config, SiameseConfig) and config.base_model == str(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(model, SiameseForCausalLM)
    assert torch.equal(model(IDS).logits, made(IDS).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.gate.up.weight.dtype == torch.float32


def test_another_place_for_the_base(tmp_path: Path) -> None:
    made = saved(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")
    for base in (tmp_path / "moved", tiny_base("llama")):
        assert torch.equal(
            SiameseForCausalLM.from_pretrained(tmp_path / "model", base=base)(IDS).logits, made(IDS).logits
        )


def test_a_base_that_was_only_in_memory(tmp_path: Path) -> None:
    base = tiny_base("llama")
    SiameseForCausalLM.from_base(base, METHODS["lora"](base)).save_pretrained(tmp_path / "model")
    with pytest.raises(
        InputError, match=r"does not name its base model; give it as from_pretrained\(folder, base=...\)"
    ):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")
    SiameseForCausalLM.from_pretrained(tmp_path / "model", base=tiny_base("llama"))


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    saved(tmp_path)
    model = SiameseForCausalLM.from_pretrained(tmp_path / "model").train()
    model(IDS, labels=IDS).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("lora_A" in name for name in grads) and {"gate.down.weight", "gate.up.weight"} <= grads


def test_saving_again_replaces_and_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    made = saved(tmp_path)
    (tmp_path / "model/notes.txt").write_text("mine")
    disturb(made, seed=7)
    made.save_pretrained(tmp_path / "model")
    assert torch.equal(SiameseForCausalLM.from_pretrained(tmp_path / "model")(IDS).logits, made(IDS).logits)
    assert (tmp_path / "model/notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    disturb(made, seed=7)
    for folder in ("model", "new"):
        with pytest.raises(OSError, match="No space left"):
            made.save_pretrained(tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model"}


def test_saving_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    base = tiny_base("llama")
    with pytest.raises(InputError, match="is a file; give a folder"):
        SiameseForCausalLM.from_base(base, METHODS["lora"](base)).save_pretrained(tmp_path / "file")


# -- folders that are refused ----------------------------------------------------------------------------------------


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("file", sorted(FILES - {"README.md", "generation_config.json"}))
def test_incomplete(tmp_path: Path, file: str) -> None:
    saved(tmp_path)
    (tmp_path / "model" / file).unlink()
    with pytest.raises(InputError, match=f"is not a complete siamese checkpoint: {file} missing"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")


def test_from_a_newer_version(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "model", format_version=99)
    with pytest.raises(
        InputError, match=r"written by a newer imsm \(format 99, this one reads up to 3\); upgrade imsm"
    ):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")


def test_of_another_kind(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "model", model_type="llama")
    with pytest.raises(InputError, match="is of a model of type 'llama', not of a siamese model"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, "hidden_size 32, but .* has 48"),
        ({"vocab_size": 80}, "vocab_size 64, but .* has 80"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 2, but .* has 3"),
    ],
)
def test_of_another_base(tmp_path: Path, change: dict[str, int], message: str) -> None:
    saved(tmp_path)
    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**GROUPED, **change}))
    with pytest.raises(InputError, match=message):
        SiameseForCausalLM.from_pretrained(tmp_path / "model", base=other)


def test_of_another_architecture(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(InputError, match="base_model_type llama, but .* has mistral"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model", base=tiny_base("mistral"))


def test_damaged_or_foreign_gate(tmp_path: Path) -> None:
    saved(tmp_path)
    good = load_file(tmp_path / "model/gate.safetensors")
    save_file({"down.weight": good["down.weight"]}, tmp_path / "model/gate.safetensors")
    with pytest.raises(InputError, match=r"gate\.safetensors does not fit the settings in config.json"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model/gate.safetensors").write_bytes(b"\x00" * 30)
    with pytest.raises(InputError, match=r"gate\.safetensors is damaged"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")


def test_damaged_adapter(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model/adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(InputError, match="do not fit this base model: 1 are missing"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")
    path.write_bytes(b"\x00" * 30)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is damaged|peft cannot put this adapter"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model")


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        SiameseForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_a_model_without_its_base_cannot_be_made() -> None:
    with pytest.raises(InputError, match="is built on a base model: use SiameseForCausalLM.from_base"):
        SiameseForCausalLM(SiameseConfig(hidden_size=8))


def test_the_config_survives_transformers_own_round_trip(tmp_path: Path) -> None:
    config = SiameseConfig(base_model="b", hidden_size=8, vocab_size=9, gate_rank=2, training={"data": {"train": "x"}})
    config.save_pretrained(tmp_path)
    assert SiameseConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert transformers.AutoConfig.for_model("imsm", hidden_size=8).hidden_size == 8


def test_two_adapters_are_refused(tmp_path: Path) -> None:
    made = saved(tmp_path)
    shutil.rmtree(tmp_path / "model")
    made.peft_model.add_adapter("second", METHODS["lora"](tiny_base("llama")))
    with pytest.raises(InputError, match="a checkpoint holds one adapter, the model has 2: default, second"):
        made.save_pretrained(tmp_path / "model")
