"""Training with dreams: the default way, what it leaves, and how it differs from the paper's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_config
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from zoo import tiny_siamese

from imsm import DataConfig, DreamsConfig, InputError, SiameseForCausalLM, TrainConfig, train
from imsm.data import AnswerCollator, load_examples
from imsm.data.dresses import FRAMES
from imsm.gates import GATES
from imsm.generation import answers
from imsm.samples import Sample
from imsm.settings import RetainConfig, load, read_yaml, to_yaml
from imsm.training import dreaming
from imsm.training.border import fit_border, frozen_queries
from imsm.training.dreaming import Dreams, learn_from_dreams
from imsm.training.refit import constants, fit_gate, logits

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
DREAMS = {"count": 16, "prompt_tokens": 12}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    records = [{"input": f"What is {i} plus {i}? Answer:", "output": f" {2 * i}"} for i in range(24)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def settings(base_folder: str, data_file: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": base_folder,
        "output_dir": str(tmp_path / "run"),
        "data": DataConfig(train=data_file, max_length=64),
        "adapter": LORA,
        "dreams": DreamsConfig(**DREAMS),
        "batch_size": 4,
        "epochs": 1.0,
        "learning_rate": 5e-3,
        "tensorboard": False,
        "progress": False,
    }


def said(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    found = answers(model, tokenizer, prompts, max_new_tokens=6)
    return [answer.text for answer in sorted(found, key=lambda answer: answer.index)]


def test_the_adapter_is_that_of_plain_peft_and_the_rest_is_the_base(settings: dict[str, Any], tmp_path: Path) -> None:
    """Two phases: the adapter is trained at full strength, as without a gate; what is not the task is the base's alone."""
    result = train(TrainConfig(**settings))
    plain = train(
        TrainConfig(**{**settings, "method": "peft", "dreams": DreamsConfig(), "output_dir": str(tmp_path / "peft")})
    )
    model, tokenizer = result.model, result.tokenizer
    assert isinstance(model, SiameseForCausalLM) and model.relevance is not None
    assert result.metrics["false_recall"] <= 0.25 and 0.5 < result.metrics["dreams_kept"] <= 1
    task = ["What is 3 plus 3? Answer:", "What is 7 plus 7? Answer:"]
    assert said(model, tokenizer, task) == said(plain.model, tokenizer, task)
    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    other = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("zqx", "Hi!")]
    assert said(model, tokenizer, other) == said(base, tokenizer, other)
    loaded = SiameseForCausalLM.from_pretrained(settings["output_dir"])
    assert said(loaded, AutoTokenizer.from_pretrained(settings["output_dir"]), task + other) == said(
        model, tokenizer, task + other
    )
    assert read_yaml(Path(settings["output_dir"]) / "settings.yaml") == TrainConfig(**settings)
    card = (Path(settings["output_dir"]) / "README.md").read_text()
    assert (
        "dreams.count" in card
        and "a head leaves to the base model what is not the task, and to the adapter what is" in card
    )


def test_what_a_run_gives_is_the_same_again(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["gate"] = "query_aware"
    heads = []
    for name in ("a", "b"):
        model = train(TrainConfig(**{**settings, "output_dir": str(tmp_path / name)})).model
        assert isinstance(model, SiameseForCausalLM) and model.relevance is not None
        heads.append([model.relevance.weight, model.relevance.bias, *model.gate.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*heads, strict=True))


def test_a_gate_is_fitted_where_one_is_asked_for(settings: dict[str, Any]) -> None:
    settings["dreams"] = DreamsConfig(**DREAMS, answer_tokens=4, gate_steps=12)
    result = train(TrainConfig(**{**settings, "gate": "query_aware"}))
    assert isinstance(result.model, SiameseForCausalLM)
    assert result.metrics["gate_loss"] > 0
    assert float(result.model.gate.up.weight.detach().abs().sum()) > 0


def test_joint_training_gets_the_head_behind_it(settings: dict[str, Any]) -> None:
    settings["dreams"] = DreamsConfig(**DREAMS, phases="joint")
    result = train(TrainConfig(**settings))
    assert result.model.config.gate == "query_aware" and result.model.relevance is not None  # type: ignore[union-attr]
    assert 0 < result.metrics["gate"] < 1 and "gate_loss" not in result.metrics


def test_anchors_stay_as_they_are(settings: dict[str, Any], tmp_path: Path) -> None:
    """A text that is like the task, and must be answered as before."""
    path = tmp_path / "anchors.jsonl"
    anchors = [f"What is {word}? Answer:" for word in ("love", "time", "a cat", "the sea", "blue", "a poem")]
    path.write_text("".join(json.dumps({"prompt": anchor}) + "\n" for anchor in anchors))
    settings["dreams"] = DreamsConfig(**DREAMS, anchors=str(path))
    result = train(TrainConfig(**settings))
    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    assert said(result.model, result.tokenizer, anchors) == said(base, result.tokenizer, anchors)


@pytest.mark.parametrize("chat", [True, False])
def test_a_dream_that_asks_is_seen_with_a_question_mark_too(
    chat: bool,
    examples: Any,
    base_folder: str,
    tokenizer: PreTrainedTokenizerBase,
    plain_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a user turn, where there is a chat template; and half of the dreams in a form. Anchors stay as they are."""
    words = tokenizer if chat else plain_tokenizer
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n" if chat else "{}"
    dreamt, anchor = ["The sea is blue.", "is it late"], "What now"
    seen: dict[str, Any] = {}

    def fit(*given: Any, **how: Any) -> Any:
        seen.update(how, read=given[2])
        return fit_border(*given, **how)

    monkeypatch.setattr(dreaming, "fit_border", fit)
    dreams = Dreams([Sample(words(text)["input_ids"], []) for text in dreamt], [words(anchor)["input_ids"]])
    model = SiameseForCausalLM.from_base(base_folder, get_peft_config({**LORA, "task_type": "CAUSAL_LM"}), gate="tuned")
    config = TrainConfig("m", "o", DataConfig("t"), progress=False)
    found = learn_from_dreams(config, model, words, examples, dreams)
    assert set(found) == {"false_recall", "dreams_kept"}
    *read, framed = [words.decode(ids) for ids in seen["read"]]
    assert read == [*dreamt, turn.format("Is it late?")] and seen["anchors"] == dreams.anchors
    forms = [form.format(dreamt[0]) for form in FRAMES]
    assert framed in [*forms, *map(turn.format, forms)]
    assert seen["dream_origins"] == [0, 1, 1, 0]
    assert words.decode(model.config.relevance_close) == ("<|im_end|>\n<|im_start|>assistant\n" if chat else "")


def test_off_is_the_papers_training(settings: dict[str, Any]) -> None:
    settings["dreams"] = DreamsConfig("off")
    result = train(TrainConfig(**settings))
    assert isinstance(result.model, SiameseForCausalLM)
    assert result.model.relevance is None and result.model.config.gate == "query_aware"
    assert "gate" in result.metrics and "false_recall" not in result.metrics


def test_retained_texts_go_with_dreams(settings: dict[str, Any]) -> None:
    settings["retain"] = RetainConfig("replay", share=0.2, sample_tokens=8)
    result = train(TrainConfig(**settings))
    assert result.model.config.training["data"]["replayed"] > 0  # type: ignore[union-attr]


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "mode"), [("dreams: off", "off"), ("dreams: on", "on"), ("dreams: {count: 7}", "on")])
def test_dreams_may_be_one_word(text: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\noutput_dir: o\ndata: {{train: t}}\n{text}\n")
    config = load(path)
    assert config.dreams.mode == mode
    assert load(path, {"dreams": "off"}).dreams == DreamsConfig("off")
    if "count" in text:
        with pytest.raises(InputError, match=r"dreams\.count is set, but has no effect with dreams: off"):
            load(path, {"dreams.mode": "off"})
    path.write_text(to_yaml(config))
    assert load(path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dreams": DreamsConfig("off"), "gate": "tuned"}, "the adapter alone"),
        (
            {"method": "peft", "dreams": DreamsConfig(count=9)},
            "dreams.count is set, but has no effect with method: peft",
        ),
        ({"memory_bank": "on"}, "no frozen stream"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig("m", "o", DataConfig("t"), **changes)


def test_gates_that_are_meant_by_auto() -> None:
    def gate(**changes: Any) -> str:
        return TrainConfig("m", "o", DataConfig("t"), **changes).gate_name

    assert gate() == "tuned"
    assert gate(dreams=DreamsConfig("off")) == gate(dreams=DreamsConfig(phases="joint")) == "query_aware"
    assert gate(gate="token") == "token"


# -- the fits --------------------------------------------------------------------------------------------------------


def test_queries_of_a_batch_are_those_of_each_prompt() -> None:
    model = tiny_siamese("gemma3", "lora")
    prompts = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 2]]
    with torch.no_grad():
        memories = [
            model(torch.tensor([prompt]), output_memories=True, use_cache=False).base_memory[0] for prompt in prompts
        ]
        alone = torch.stack([torch.cat([memory.mean(dim=0), memory[-1]]) for memory in memories])
    torch.testing.assert_close(frozen_queries(model, prompts), alone, atol=1e-5, rtol=1e-5)


def test_the_border_of_prompts_that_differ() -> None:
    model = tiny_siamese("llama", "lora")
    generator = torch.Generator().manual_seed(0)
    task = [[1, 2, 3, *torch.randint(4, 20, (4,), generator=generator).tolist()] for _ in range(40)]
    dreams = [torch.randint(30, 60, (7,), generator=generator).tolist() for _ in range(40)]
    border = fit_border(model, task, dreams)
    assert border.false_recall < 0.2 and border.dreams_kept > 0.9
    assert model.relevance is not None
    assert (model.relevance(frozen_queries(model, task)) < 0).all()


def test_dresses_of_an_example_are_judged_by_a_head_that_saw_none_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    task = [torch.randint(4, 40, (6,), generator=generator).tolist() for _ in range(30)]
    dreams = [torch.randint(20, 60, (6,), generator=generator).tolist() for _ in range(30)]
    twice = [prompt for prompt in task for _ in range(2)]
    model = tiny_siamese("llama", "lora")
    each = fit_border(model, twice, dreams, origins=[place // 2 for place in range(60)])
    assert fit_border(model, task, dreams, origins=range(30)).false_recall == pytest.approx(each.false_recall, abs=0.1)


@pytest.fixture
def examples(data_file: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    return load_examples(DataConfig(train=data_file, max_length=64), tokenizer).examples


def test_constants_are_what_the_forward_pass_mixes(
    examples: Any, base_folder: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    from peft import LoraConfig

    model = SiameseForCausalLM.from_base(base_folder, LoraConfig(r=4, target_modules="all-linear")).eval()
    collator = AnswerCollator(tokenizer)
    found = constants(model, examples[:5], collator)
    with torch.no_grad():
        mixed = model.gate(found.base, found.tuned, found.base_query, found.tuned_query).memory
        loss = torch.nn.functional.cross_entropy(logits(model, mixed), found.targets)
        torch.testing.assert_close(loss, model(**collator(examples[:5])).loss, atol=1e-5, rtol=1e-5)


def test_the_gates_fit_learns_from_both(examples: Any, base_folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Its loss falls, the divergence on dreams too; nothing else is changed."""
    from peft import LoraConfig
    from zoo import disturb

    model = SiameseForCausalLM.from_base(base_folder, LoraConfig(r=4, target_modules="all-linear")).eval()
    disturb(model.peft_model)
    collator = AnswerCollator(tokenizer)
    task, dreams = (constants(model, part, collator) for part in (examples[:12], examples[12:]))
    before = {name: parameter.clone() for name, parameter in model.peft_model.named_parameters()}
    losses = fit_gate(model, task, dreams, steps=60, learning_rate=2e-2, weight=2.0)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.3
    assert all(torch.equal(before[name], parameter) for name, parameter in model.peft_model.named_parameters())
    assert all(p.requires_grad for n, p in model.peft_model.named_parameters() if "lora" in n)
    assert fit_gate(tiny_siamese("llama", "lora", "average"), task, dreams, steps=3) == []


def test_every_gate_can_be_fitted(examples: Any, base_folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    from peft import LoraConfig

    for gate in GATES:
        config = LoraConfig(r=4, target_modules="all-linear")
        model = SiameseForCausalLM.from_base(base_folder, config, gate=gate).eval()
        task = constants(model, examples[:4], AnswerCollator(tokenizer))
        assert len(fit_gate(model, task, None, steps=2)) == (0 if gate in ("average", "tuned") else 2)
