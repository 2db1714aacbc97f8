"""lm-evaluation-harness on our models: its scores are ours on the same prompts, batched or one by one."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from zoo import disturb

from imsm import InputError, SiameseForCausalLM, answers

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'imsm[harness]'")

# Its own import and its use of `datasets` warn of what they call themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

QUESTIONS = [
    ("What is the capital of France?", [" Paris", " the system", " so on and on"], 0),
    ("Is it so? Question:", [" yes", " no"], 1),
    (
        "A question that is much longer than the others, so that rows are padded. Answer:",
        [" no no no", " yes", " user"],
        2,
    ),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model(base_folder: str) -> SiameseForCausalLM:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=3 / parameter.shape[-1] ** 0.5, generator=torch.Generator().manual_seed(0))
    model = SiameseForCausalLM.from_base(base, peft.LoraConfig(r=4, target_modules="all-linear"), gate_rank=4)
    disturb(model)
    disturb(model.gate, scale=1.0)  # so that the query makes itself felt
    return model.eval()


@pytest.fixture(scope="module")
def harness(model: SiameseForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    from imsm.evaluation.harness import harness_model

    return lambda **settings: harness_model(model, tokenizer, **settings)


def likelihood(
    model: Any, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, boundary: int = 0, **settings: Any
) -> tuple[float, bool]:
    """Of a continuation, by one unpadded pass; the query ends `boundary` tokens after the context does."""
    prompt = tokenizer(context)["input_ids"]
    ids = tokenizer(context + continuation)["input_ids"]
    mask = torch.zeros(1, len(ids), dtype=torch.long)
    mask[:, : len(prompt) + boundary] = 1
    with torch.no_grad():
        logits = model(torch.tensor([ids]), prompt_mask=mask, **settings).logits[0].float()
    targets = torch.tensor(ids[len(prompt) :])
    scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, targets[:, None]).sum()), bool((scores.argmax(1) == targets).all())


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i, metadata=("t", i, 1))
        for i, given in enumerate(arguments)
    ]


PAIRS = [(question, choice) for question, choices, _ in QUESTIONS for choice in choices]


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_likelihoods(
    harness: Callable[..., Any], model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: Any
) -> None:
    found = harness(batch_size=batch_size, max_batch_size=4).loglikelihood(requests("loglikelihood", PAIRS))
    expected = [likelihood(model, tokenizer, *pair) for pair in PAIRS]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_another_boundary_would_change_the_likelihoods(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    for context, continuation in PAIRS:
        right = likelihood(model, tokenizer, context, continuation)[0]
        assert abs(likelihood(model, tokenizer, context, continuation, boundary=-2)[0] - right) > 1e-3


def test_what_greedy_decoding_says_is_recognised(
    harness: Callable[..., Any], model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    contexts = [question for question, _, _ in QUESTIONS]
    ids = [tokenizer(context)["input_ids"] for context in contexts]
    said = {a.index: a.token_ids for a in answers(model, tokenizer, contexts, max_new_tokens=4)}
    asked = [(("", ""), ids[i], said[i]) for i in range(3)] + [(("", ""), ids[0], [*said[0][:-1], said[0][-1] ^ 1])]
    found = harness(batch_size=4)._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, True, True, False]


def test_the_same_tokens_split_at_two_places_are_two_requests(
    harness: Callable[..., Any], model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(QUESTIONS[0][0])["input_ids"]
    asked = [(("", ""), ids[:3], ids[3:]), (("", ""), ids[:-1], ids[-1:])]
    together = harness(batch_size=2)._loglikelihood_tokens(asked, disable_tqdm=True)
    for (_, context, continuation), found in zip(asked, together, strict=True):
        mask = torch.tensor([[1] * len(context) + [0] * len(continuation)])
        with torch.no_grad():
            scores = model(torch.tensor([ids]), prompt_mask=mask).logits[0].log_softmax(-1)
        targets = torch.tensor(continuation)
        expected = scores[len(context) - 1 : -1].gather(1, targets[:, None]).sum()
        assert found[0] == pytest.approx(float(expected), abs=1e-4)


def test_a_long_context_loses_its_beginning(
    harness: Callable[..., Any], model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(QUESTIONS[2][0])["input_ids"]
    short, long = [
        harness(max_length=10)._loglikelihood_tokens([(("", ""), given, [7, 8])], disable_tqdm=True)[0][0]
        for given in (ids[-9:], ids)
    ]
    assert long == pytest.approx(short, abs=1e-5)
    with pytest.raises(InputError, match="longer than the model's 10 tokens"):
        harness(max_length=10)._loglikelihood_tokens([(("", ""), ids, [7] * 11)], disable_tqdm=True)


def test_rolling_likelihood_has_no_query(
    harness: Callable[..., Any], model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [question for question, _, _ in QUESTIONS]
    start = tokenizer.eos_token_id
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    for batch_size in (1, 3):
        found = harness(batch_size=batch_size).loglikelihood_rolling(asked, disable_tqdm=True)
        for text, value in zip(texts, found, strict=True):
            ids = tokenizer(text)["input_ids"]
            with torch.no_grad():
                scores = model(torch.tensor([[start, *ids[:-1]]])).logits[0].log_softmax(-1)
            assert value == pytest.approx(float(scores.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation(
    harness: Callable[..., Any], model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    texts = [question for question, _, _ in QUESTIONS]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", [(text, dict(settings)) for text in texts])
    found = harness(batch_size=batch_size).generate_until(asked, disable_tqdm=True)
    changed = []
    for text, answer in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, prompt_length=ids.shape[1])
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        without = model.generate(
            ids, max_new_tokens=12, do_sample=False, prompt_mask=torch.tensor([[1] + [0] * (ids.shape[1] - 1)])
        )
        changed.append(not torch.equal(out, without))
    assert any(changed), "another boundary would not be noticed"


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """A task with choices and one with free answers, of local files."""
    file = tmp_path / "questions.jsonl"
    rows = [{"question": q, "choices": c, "label": label, "answer": c[label].strip()} for q, c, label in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    yield [
        {
            "task": "tiny_choices",
            **source,
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        {
            "task": "tiny_answers",
            **source,
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_tasks_of_local_files_score_as_we_do(
    harness: Callable[..., Any],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[dict[str, Any]],
    batch_size: int,
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    done = lm_eval.simple_evaluate(
        task_manager=TaskManager(include_defaults=False),
        model=harness(batch_size=batch_size),
        tasks=tasks,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )
    right = 0
    for question, choices, label in QUESTIONS:
        values = [likelihood(model, tokenizer, question, choice)[0] for choice in choices]
        right += values.index(max(values)) == label
    assert done["results"]["tiny_choices"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    said = {
        a.index: a.text for a in answers(model, tokenizer, [q for q, _, _ in QUESTIONS], batch_size=1, max_new_tokens=8)
    }
    for sample in done["samples"]["tiny_answers"]:
        ours = said[sample["doc_id"]].split("\n")[0]
        assert sample["resps"][0][0].strip() == ours.strip()


def test_by_name_with_a_checkpoint_and_a_constant_gate(
    base_folder: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    from lm_eval.api.registry import get_model

    import imsm.evaluation.harness

    trained = SiameseForCausalLM.from_base(base_folder, peft.LoraConfig(r=4, target_modules="all-linear"), gate_rank=4)
    disturb(trained)
    disturb(trained.gate, scale=0.5)
    trained.eval().save_pretrained(tmp_path / "siamese")
    for spec, settings in ((f"{tmp_path}/siamese", {}), (f"{tmp_path}/siamese@gate=1", {"force_gate": 1.0})):
        opened = get_model("imsm").create_from_arg_string(f"checkpoint={spec}", {"batch_size": 4, "device": "cuda:0"})
        found = opened.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        expected = [likelihood(trained, tokenizer, *pair, **settings)[0] for pair in PAIRS]
        assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
    # The base model, which knows of no query, says the same as the gate at 1.
    plain = imsm.evaluation.harness.SiameseLM(base_folder, batch_size=4)
    base = plain.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [value for value, _ in base] == pytest.approx([value for value, _ in found], abs=1e-4)
    assert plain.get_model_info()["model_num_parameters"] > 0
    assert opened.max_length == 256


def test_clear_errors(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    from imsm.evaluation.harness import harness_model

    with pytest.raises(InputError, match=r"needs its tokenizer: harness_model\(model, tokenizer\)"):
        harness_model(model)
    monkeypatch.delitem(sys.modules, "imsm.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(InputError, match=r"not installed: pip install 'imsm\[harness\]'"):
        importlib.import_module("imsm.evaluation.harness")
