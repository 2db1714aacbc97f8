"""Every baseline trains from its YAML, and what it leaves gives the trained model's logits again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_memory_bank import two_processes
from test_training import losses
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from zoo import METHODS, disturb

from imsm import DataConfig, DreamsConfig, InputError, SiameseForCausalLM, TrainConfig, loramoe, train
from imsm.cli.info import describe
from imsm.data import AnswerCollator, load_examples
from imsm.samples import Sample
from imsm.settings import RetainConfig, load, to_yaml
from imsm.training import divergence as divergence_module
from imsm.training.divergence import SampleDivergence, kl_divergence, prompt_positions
from imsm.training.models import adapter_config
from imsm.training.retained import OwnCollator, base_texts, replay_count, with_replay

FOLDER = Path(__file__).parents[1] / "examples" / "baselines"
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
#: What `method: full` has no use for, as it is by default.
ADAPTER = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
IDS = torch.arange(1, 13)[None]


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
        "dreams": DreamsConfig("off"),
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
    texts |= {"learning_rate": "1e-2", "warmup": "0"}
    if "retain:" in path.read_text() and path.stem != "lora_kl_prompts":
        texts["retain.sample_tokens"] = "8"
        if "kind: replay" not in path.read_text():
            texts["retain.samples"] = "8"
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


def test_corda_is_knowledge_preserving_unless_it_is_refused(settings: dict[str, Any]) -> None:
    """peft's own default is the other mode."""
    found = adapter_config({**LORA, "init_lora_weights": "CorDA"}, 10)
    assert found.init_lora_weights == "corda" and found.corda_config.corda_method == "kpm"
    adapter = {**LORA, "init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}}
    with pytest.raises(InputError, match="corda_method must be kpm, .* got 'ipm'"):
        train(TrainConfig(**{**settings, "adapter": adapter}))


@pytest.fixture
def half_base(base_folder: str, tmp_path: Path) -> str:
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return str(folder)


def test_full_fine_tuning_of_a_half_precision_base_takes_small_steps(settings: dict[str, Any], half_base: str) -> None:
    """Of 2e-5 a step, as in the YAML, which bfloat16 would round away in most weights."""
    del settings["adapter"]
    settings |= {"model": half_base, "method": "full", "learning_rate": 2e-5, "max_steps": 2, "save_steps": 1}
    trained = train(TrainConfig(**settings)).model
    assert trained.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(half_base, dtype=torch.float32)
    layer = "model.layers.0.mlp.up_proj.weight"
    assert (trained.get_parameter(layer) != base.get_parameter(layer)).float().mean() > 0.9
    again = AutoModelForCausalLM.from_pretrained(settings["output_dir"])
    assert torch.equal(again.get_parameter(layer), trained.get_parameter(layer))
    settings |= {"dtype": "bfloat16", "output_dir": settings["output_dir"] + "-2"}
    assert train(TrainConfig(**settings)).model.dtype == torch.bfloat16


def test_corda_on_a_half_precision_base_loses_nothing_by_rounding(settings: dict[str, Any], half_base: str) -> None:
    adapter = {**LORA, "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}
    retain = RetainConfig(samples=8, sample_tokens=8)
    trained = train(TrainConfig(**{**settings, "model": half_base, "adapter": adapter, "retain": retain})).model
    base = AutoModelForCausalLM.from_pretrained(half_base, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, settings["output_dir"]).eval()
    assert torch.allclose(again(IDS).logits, trained(IDS).logits, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Adapter .* invalid shape")  # layers may be left without any rank
def test_adalora_is_saved_as_it_was_trained(settings: dict[str, Any]) -> None:
    """Though ranks are chosen every third step alone."""
    adapter = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "deltaT": 3, "target_modules": "all-linear"}
    trained = train(TrainConfig(**{**settings, "adapter": adapter, "max_steps": 9, "learning_rate": 2e-2})).model
    again = opened(settings["output_dir"], settings["model"])
    assert torch.allclose(again(IDS).logits, trained(IDS).logits, atol=1e-6)
    assert adapter_config(adapter, 9).tfinal == 1 and adapter_config({**adapter, "tfinal": 4}, 9).tfinal == 4
    assert adapter_config(adapter, 1).tfinal == 0


def test_info_says_what_a_baseline_is(settings: dict[str, Any], tmp_path: Path) -> None:
    experts = {"peft_type": "LORAMOE", "target_modules": ["up_proj"]}
    for method, adapter, words in (
        ("full", ADAPTER, "gate.safetensors missing; it holds a plain model, which transformers'"),
        ("loramoe", experts, "it holds a LoRAMoE checkpoint, which imsm.loramoe.load loads"),
        ("peft", LORA, "it holds a peft adapter, which peft's PeftModel.from_pretrained loads and imsm eval"),
    ):
        folder = str(tmp_path / method)
        train(TrainConfig(**{**settings, "method": method, "adapter": adapter, "output_dir": folder, "max_steps": 1}))
        with pytest.raises(InputError) as caught:
            describe(folder)
        assert words in str(caught.value)
        assert ("make a siamese checkpoint of it: imsm adopt" in str(caught.value)) is (method == "peft")


def test_a_siamese_model_still_refuses_corda(settings: dict[str, Any]) -> None:
    adapter = {**LORA, "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}
    with pytest.raises(InputError, match="rewrites base weights"):
        train(TrainConfig(**{**settings, "adapter": adapter, "method": "imsm"}))


# -- divergence from the base model ----------------------------------------------------------------------------------


def test_kl_divergence_of_a_hand_made_case() -> None:
    base = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    tuned = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    first = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    both, none = torch.tensor([[True, True]]), torch.tensor([[False, False]])
    assert kl_divergence(base[None] + 3, tuned[None] - 1, both).item() == pytest.approx(first.item() / 2)
    assert kl_divergence(base[None], tuned[None], torch.tensor([[True, False]])).item() == pytest.approx(first.item())
    assert kl_divergence(base[None], tuned[None], none).item() == 0


def test_the_divergence_keeps_some_rows_in_memory_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces it is what it is as a whole, gradients too; beside the logits themselves little is saved for them."""
    monkeypatch.setattr(divergence_module, "VALUES", 3 * 50)
    base, tuned = torch.randn(2, 2, 7, 50, generator=torch.Generator().manual_seed(0))
    where = torch.arange(14).view(2, 7) % 3 > 0
    tuned.requires_grad_()
    p, q = base[where].log_softmax(-1), tuned[where].log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    (wanted,) = torch.autograd.grad(expected, tuned)
    given = {x.untyped_storage().data_ptr() for x in (base, tuned)}
    saved: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in given:
            saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = kl_divergence(base, tuned, where)
    (gradient,) = torch.autograd.grad(found, tuned)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, wanted, atol=1e-7)
    assert sum(saved) < 50


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
    few = {"samples": 8, "sample_tokens": 8} if kind == "kl_samples" else {}
    free = divergences(settings, kind=kind, weight=1e-6, **few)
    settings["output_dir"] += "-2"
    held = divergences(settings, kind=kind, weight=100.0, **few)
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


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (3, 3)])
def test_a_step_is_the_same_in_however_many_passes(
    settings: dict[str, Any], tmp_path: Path, batch_size: int, accumulation: int
) -> None:
    """Prompts differ in length, and some records have none: the mean is over all of a step's positions."""
    records = [{"input": f"{i} " + "and so on " * (i % 4), "output": " yes" * (1 + i % 3)} for i in range(9)]
    records[4]["input"] = "a"
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings |= {"data": DataConfig(train=str(path)), "max_steps": 4, "learning_rate": 1e-2, "schedule": "constant"}
    settings |= {"retain": RetainConfig("kl_prompts", weight=20.0), "optimizer": "adamw"}
    whole = train(TrainConfig(**{**settings, "batch_size": batch_size * accumulation})).log
    settings |= {"output_dir": str(tmp_path / "2"), "batch_size": batch_size, "gradient_accumulation": accumulation}
    parts = train(TrainConfig(**settings)).log
    for key in ("kl", "loss"):
        assert [entry[key] for entry in parts] == pytest.approx([entry[key] for entry in whole], rel=2e-3, abs=1e-6)
    assert parts[-1]["kl"] > 1e-4


def test_two_processes_hold_to_the_base_as_one(settings: dict[str, Any], tmp_path: Path) -> None:
    """DDP over gloo with half the batch each: prompts differ in length, so that a mean of means would be another one."""
    records = [{"input": f"{i} " + "and so on " * (i % 4), "output": " yes" * (1 + i % 3)} for i in range(16)]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings |= {"data": DataConfig(train=str(path)), "learning_rate": 1e-2, "schedule": "constant"}
    settings |= {"retain": RetainConfig("kl_prompts", weight=20.0)}
    alone = train(TrainConfig(**{**settings, "batch_size": 8})).log
    config = TrainConfig(**{**settings, "output_dir": str(tmp_path / "both")})
    (tmp_path / "both.yaml").write_text(to_yaml(config))
    two_processes([sys.executable, "-m", "imsm_cli", "train", str(tmp_path / "both.yaml")])
    lines = [json.loads(line) for line in (tmp_path / "both" / "log.jsonl").read_text().splitlines()]
    both = [line for line in lines if "kl" in line]
    for key in ("kl", "loss"):
        assert [entry[key] for entry in both] == pytest.approx([entry[key] for entry in alone], rel=2e-3, abs=1e-6)
    assert both[-1]["kl"] > 1e-5


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
    lines = [{"prompt": "What is it?"}, {"prompt": "Say yes."}, {"prompt": "no and so on"}, {"prompt": "what " * 99}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings["retain"] = RetainConfig("replay", share=0.2, prompts=str(prompts), sample_tokens=8)
    settings |= {"epochs": 1.0, "max_steps": -1}
    assert train(TrainConfig(**settings)).metrics["steps"] == 7  # 24 + 3 in fours
    said = capsys.readouterr().err
    assert "3 texts of the base model, of 6 wanted" in said and "1 of 4 prompts are left out" in said
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
    with loramoe.recorded(result.model):
        result.model.train()(batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = loramoe.balancing_constraint(result.model, batch["attention_mask"], batch["own"], 0.5).item()
    assert result.metrics["loss"] == pytest.approx(plain + 2.0 * expected, rel=1e-4)
    assert expected > 0.01


def test_checkpointing_gives_the_same_experts_and_keeps_nothing(settings: dict[str, Any]) -> None:
    adapter = {"peft_type": "LORAMOE", "target_modules": ["up_proj", "down_proj"], "balance": 1.0}
    settings |= {"method": "loramoe", "adapter": adapter}
    plain = train(TrainConfig(**settings)).model
    settings |= {"gradient_checkpointing": True, "output_dir": settings["output_dir"] + "-2"}
    again = train(TrainConfig(**settings)).model
    for name, parameter in loramoe.expert_parameters(plain).items():
        assert torch.allclose(loramoe.expert_parameters(again)[name], parameter, atol=1e-5)
    assert all(layer.shares is None for _, layer in loramoe.layers(again))


# -- resumption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"retain": RetainConfig("kl_samples", samples=8, sample_tokens=8, batch_size=3)},
        {"method": "full", "adapter": ADAPTER, "learning_rate": 1e-3},
        {"adapter": {**LORA, "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}},
        {
            "method": "loramoe",
            "adapter": {"peft_type": "LORAMOE", "target_modules": ["up_proj"], "lora_dropout": 0.1},
            "retain": RetainConfig("replay", share=0.2, sample_tokens=8),
        },
    ],
    ids=["kl_samples", "full", "corda", "loramoe"],
)
def test_a_resumed_run_goes_on_as_the_unbroken_one(settings: dict[str, Any], tmp_path: Path, change: Any) -> None:
    """From the checkpoint of step 4, as a killed run leaves it."""
    settings |= {**change, "max_steps": 6, "save_steps": 2, "save_total_limit": None, "gradient_accumulation": 2}
    if "init_lora_weights" in change.get("adapter", {}):
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
