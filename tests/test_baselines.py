"""Every baseline trains from its YAML, and what it leaves gives the trained model's logits again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_training import losses
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from zoo import METHODS, disturb

from imsm import DataConfig, InputError, SiameseForCausalLM, TrainConfig, loramoe, train
from imsm.data import AnswerCollator, load_examples
from imsm.samples import Sample
from imsm.settings import RetainConfig, load
from imsm.training.divergence import SampleDivergence, kl_divergence, prompt_positions
from imsm.training.retained import OwnCollator, base_texts, replay_count, with_replay

FOLDER = Path(__file__).parents[1] / "examples" / "baselines"
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
IDS = torch.arange(1, 13)[None]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    records = [{"input": f"{i} plus {i} is", "output": f" {2 * i}"} for i in range(24)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def settings(base_folder: str, data_file: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": base_folder,
        "output_dir": str(tmp_path / "run"),
        "data": DataConfig(train=data_file, max_length=128),
        "adapter": LORA,
        "method": "peft",
        "batch_size": 4,
        "max_steps": 3,
        "warmup": 0.0,
        "learning_rate": 5e-3,
        "tensorboard": False,
        "progress": False,
    }


def opened(folder: str, base: str) -> PreTrainedModel | PeftModel:
    """The checkpoint, told by its files."""
    path = Path(folder)
    if (path / loramoe.CONFIG).is_file():
        return loramoe.load(path)[0]
    if (path / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_trains_from_its_yaml_and_loads_again(path: Path, base_folder: str, data_file: str, tmp_path: Path) -> None:
    assert path.read_text().startswith("# ") and "arXiv" in path.read_text()
    texts = {"model": base_folder, "output_dir": str(tmp_path / "run"), "data.train": data_file, "max_steps": "2"}
    texts |= {"retain.samples": "8", "retain.sample_tokens": "8", "learning_rate": "1e-2", "warmup": "0"}
    if path.stem == "corda":
        texts["adapter.r"] = "4"
    result = train(load(path, {**texts, "tensorboard": "false", "progress": "false"}))
    folder = texts["output_dir"]
    with torch.no_grad():
        expected = result.model(IDS).logits
        again = opened(folder, base_folder)(IDS).logits
        base = AutoModelForCausalLM.from_pretrained(base_folder)(IDS).logits
    assert torch.allclose(again, expected, atol=2e-5)
    assert (expected - base).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    assert not [path for path in Path(folder).parent.rglob("*") if path.name.startswith(".")]


def test_corda_takes_from_the_base_and_gives_an_adapter_for_the_untouched_one(settings: dict[str, Any]) -> None:
    adapter = {**LORA, "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}
    retain = RetainConfig(samples=8, sample_tokens=8)
    model = train(TrainConfig(**{**settings, "adapter": adapter, "retain": retain})).model
    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    layer = "model.layers.0.mlp.up_proj"
    inside = model.get_base_model().get_submodule(layer).base_layer.weight
    assert (inside - base.get_submodule(layer).weight).abs().max() > 1e-4
    saved = json.loads((Path(settings["output_dir"]) / "adapter_config.json").read_text())
    assert saved["r"] == 8 and saved["init_lora_weights"] is True


def test_a_siamese_model_still_refuses_corda(settings: dict[str, Any]) -> None:
    adapter = {**LORA, "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}
    with pytest.raises(InputError, match="rewrites base weights"):
        train(TrainConfig(**{**settings, "adapter": adapter, "method": "imsm"}))


# -- divergence from the base model ----------------------------------------------------------------------------------


def test_kl_divergence_of_a_hand_made_case() -> None:
    base = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    tuned = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    first = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert kl_divergence(base + 3, tuned - 1).item() == pytest.approx(first.item() / 2)
    assert kl_divergence(base[:0], tuned[:0]).item() == 0


def test_prompt_positions_leave_out_the_answer_and_what_predicts_it() -> None:
    labels = torch.tensor([[-100, -100, -100, 7, 8, -100], [-100, -100, 5, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    expected = [[1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0]]
    assert prompt_positions(labels, mask).long().tolist() == expected


def divergences(settings: dict[str, Any], **retain: Any) -> list[float]:
    result = train(TrainConfig(**{**settings, "retain": RetainConfig(**retain)}))
    return [entry["kl"] for entry in result.log if "kl" in entry]


@pytest.mark.parametrize("kind", ["kl_prompts", "kl_samples"])
def test_the_divergence_is_zero_at_first_and_held_down_by_its_weight(settings: dict[str, Any], kind: str) -> None:
    settings |= {"max_steps": 8, "learning_rate": 2e-2, "schedule": "constant"}
    free = divergences(settings, kind=kind, weight=1e-6, samples=8, sample_tokens=8)
    settings["output_dir"] += "-2"
    held = divergences(settings, kind=kind, weight=100.0, samples=8, sample_tokens=8)
    assert free[0] == pytest.approx(0, abs=1e-5) and free[-1] > 1e-3
    assert held[-1] < 0.3 * free[-1]


def test_the_loss_is_cross_entropy_and_weighted_divergence(settings: dict[str, Any]) -> None:
    """In the second step of two runs whose first, where the divergence has no gradient, moves the adapter alike."""
    settings |= {"max_steps": 2, "learning_rate": 2e-2, "schedule": "constant", "max_grad_norm": 0.0}
    plain = train(TrainConfig(**settings)).metrics
    settings["output_dir"] += "-2"
    kept = train(TrainConfig(**{**settings, "retain": RetainConfig("kl_prompts", weight=5.0)})).metrics
    assert kept["kl"] > 1e-4
    assert kept["loss"] == pytest.approx(plain["loss"] + 5.0 * kept["kl"], abs=2e-5)


@pytest.mark.parametrize("method", ["peft", "imsm"])
def test_sample_divergence_is_that_of_two_plain_models(method: str, base_folder: str) -> None:
    """The tuned stream (or the mix) against the base, at all tokens of samples of unlike lengths but the last."""
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = SiameseForCausalLM.from_base(base, METHODS["lora"](base)).eval()
    disturb(model)
    samples = [Sample([5, 6, 7, 8], [9, 10]), Sample([11, 12], [13, 14, 15, 16, 17])]
    collator = AnswerCollator(AutoTokenizer.from_pretrained(base_folder))
    gate = None if method == "imsm" else 0.0
    found = SampleDivergence(1.0, samples, collator, 2, 0, force_gate=gate)(model, {"input_ids": IDS}, None, 0)
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    rows = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.answer_ids])
        mask = torch.arange(ids.shape[1])[None] < len(sample.prompt_ids)
        mixed = (
            model(ids, prompt_mask=mask, use_cache=False).logits if method == "imsm" else model.peft_model(ids).logits
        )
        p, q = plain(ids).logits[0, :-1].log_softmax(-1), mixed[0, :-1].log_softmax(-1)
        rows.append((p.exp() * (p - q)).sum(-1))
    assert found.item() == pytest.approx(torch.cat(rows).mean().item(), rel=1e-4)
    assert found.item() > 1e-3


def test_every_sample_is_seen_before_one_is_seen_twice(tokenizer: Any) -> None:
    samples = [Sample([i], [i + 1]) for i in range(5)]
    divergence = SampleDivergence(1.0, samples, AnswerCollator(tokenizer), 2, seed=3)
    seen = [example.input_ids[0] for place in range(5) for example in divergence.batch(place)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert seen[:5] != seen[5:]


def test_each_forward_pass_has_samples_of_its_own(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    places, real = [], SampleDivergence.batch

    def batch(self: SampleDivergence, place: int) -> Any:
        places.append(place)
        return real(self, place)

    monkeypatch.setattr(SampleDivergence, "batch", batch)
    retain = RetainConfig("kl_samples", samples=8, sample_tokens=8)
    train(TrainConfig(**{**settings, "retain": retain, "gradient_accumulation": 2}))
    assert places == list(range(6))


# -- replay ----------------------------------------------------------------------------------------------------------


def test_replay_is_its_share_of_the_records() -> None:
    assert replay_count(0.05, 95) == 5
    assert replay_count(0.05, 96) == 6
    assert replay_count(0.05, 1) == 1
    assert replay_count(0.5, 24) == 24


def test_replay_of_the_user_s_prompts(settings: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "What is it?"}, {"prompt": "Say yes."}, {"prompt": "no and so on"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings["retain"] = RetainConfig("replay", share=0.2, prompts=str(prompts), sample_tokens=8)
    settings |= {"epochs": 1.0, "max_steps": -1}
    assert train(TrainConfig(**settings)).metrics["steps"] == 7  # 24 + 3 in fours
    assert "3 texts of the base model, of 6 wanted" in capsys.readouterr().err
    settings |= {"output_dir": str(tmp_path / "2"), "data": DataConfig(settings["data"].train, max_length=16)}
    settings["retain"].sample_tokens = 15
    with pytest.raises(InputError, match="no prompt of retain.prompts .* raise data.max_length"):
        train(TrainConfig(**settings))
    assert not (tmp_path / "2").exists()


def test_the_balancing_constraint_is_in_the_loss_with_replayed_records_as_world_knowledge(
    settings: dict[str, Any],
) -> None:
    """One step on all records at once; what it changes is too little to count."""
    adapter = {"peft_type": "LORAMOE", "target_modules": ["up_proj"], "delta": 0.5}
    retain = RetainConfig("replay", share=0.2, sample_tokens=8)
    settings |= {"method": "loramoe", "max_steps": 1, "learning_rate": 1e-12, "batch_size": 30, "retain": retain}
    plain = train(TrainConfig(**{**settings, "adapter": {**adapter, "balance": 0.0}})).metrics["loss"]
    settings["output_dir"] += "-2"
    config = TrainConfig(**{**settings, "adapter": {**adapter, "balance": 2.0}})
    result = train(config)
    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    records = load_examples(config.data, result.tokenizer)
    mixed = with_replay(records, base_texts(config, base, result.tokenizer, 6), 0.2)
    batch = OwnCollator(AnswerCollator(result.tokenizer))(mixed.examples)
    assert batch["own"].tolist() == [False] * 24 + [True] * 6
    result.model.train()(batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = loramoe.balancing_constraint(result.model, batch["attention_mask"], batch["own"], 0.5).item()
    assert result.metrics["loss"] == pytest.approx(plain + 2.0 * expected, rel=1e-4)
    assert expected > 0.01


# -- resumption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"retain": RetainConfig("kl_samples", samples=8, sample_tokens=8, batch_size=3)},
        {"method": "full", "learning_rate": 1e-3},
        {"adapter": {**LORA, "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}},
    ],
    ids=["kl_samples", "full", "corda"],
)
def test_a_resumed_run_goes_on_as_the_unbroken_one(settings: dict[str, Any], tmp_path: Path, change: Any) -> None:
    """From the checkpoint of step 4, as a killed run leaves it."""
    settings |= {**change, "max_steps": 6, "save_steps": 2, "save_total_limit": None, "gradient_accumulation": 2}
    if "retain" not in change:
        settings["retain"] = RetainConfig(samples=8, sample_tokens=8)
    whole = train(TrainConfig(**settings))
    folder = Path(settings["output_dir"])
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("checkpoint-4", "checkpoint-2"):
        shutil.copytree(folder / name, broken / name)
    shutil.copy(folder / "settings.yaml", broken)
    shutil.copy(folder / "log.jsonl", broken)
    resumed = train(TrainConfig(**{**settings, "output_dir": str(broken), "resume": True}))
    assert losses(broken) == losses(folder)
    assert torch.equal(resumed.model(IDS).logits, whole.model(IDS).logits)
