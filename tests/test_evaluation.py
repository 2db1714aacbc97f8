"""Evaluating checkpoints of every kind, against computations that know nothing of batches, caches or padding."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import Oracle, marked_queries, running_queries
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from zoo import METHODS, disturb, tiny_chat

import imsm_cli
from imsm import InputError, SiameseForCausalLM
from imsm.evaluation import running
from imsm.evaluation.answering import asked
from imsm.evaluation.candidates import Candidate, open_candidate
from imsm.evaluation.partial import Partial
from imsm.evaluation.passes import GREEDY
from imsm.evaluation.results import RecordResult, Result, read_result
from imsm.evaluation.running import evaluate, fingerprint, partial_path
from imsm.evaluation.task import Task, TaskRecord
from imsm.generation import answers, prompt_ids

PROMPTS = ["What is the capital of France?", "yes no", "Paris is", "answer: no and so on, and so on", "question?"]
ANSWER = Task("ask", "Ask", "answer", "ask.jsonl", ("exact_match", "contains"), max_new_tokens=6)
TEXT = Task("text", "Text", "text", "ask.jsonl", ("cross_entropy",), reference=None)
KEPT = Task(
    "kept", "Kept", "kept", "ask.jsonl", ("agreement", "identical", "divergence"), reference=None, max_new_tokens=6
)
TASKS = [ANSWER, TEXT, KEPT]
Logits = Callable[[list[int], int], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Checkpoints of every kind on one base, and the tasks' data."""
    folder = tmp_path_factory.mktemp("evaluation")
    # So many ends that some answers are short.
    ends = [tokenizer.eos_token_id, *range(100, 140)]
    base = tiny_chat(tokenizer, max_position_embeddings=128, eos_token_id=ends)
    config = base.config
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=3 / parameter.shape[-1] ** 0.5)
    # What a checkpoint recommends must not make its greedy answers other than greedy.
    base.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=1.5)
    base.generation_config.update(no_repeat_ngram_size=1, min_new_tokens=5, suppress_tokens=list(range(5, 90)))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "base")

    siamese = SiameseForCausalLM.from_base(load(), METHODS["lora"](base), gate_rank=4)
    disturb(siamese, scale=0.05)
    disturb(siamese.gate, scale=0.5)
    siamese.save_pretrained(folder / "siamese")
    siamese.peft_model.save_pretrained(str(folder / "peft"), save_embedding_layers=False)
    merged = peft.PeftModel.from_pretrained(load(), str(folder / "peft")).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    adapters = {
        "ia3": METHODS["ia3"](base),
        "dora": METHODS["dora"](base),
        "loha": METHODS["loha"](base),
        "biased": peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], bias="lora_only"),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": METHODS["prefix_tuning"](base),
    }
    for name, adapter in adapters.items():
        plain = load()
        if name == "biased":
            # A layer with a bias that training moves.
            plain = AutoModelForCausalLM.from_config(LlamaConfig(**{**config.to_dict(), "attention_bias": True}))
            plain.save_pretrained(folder / "biased_base")
            tokenizer.save_pretrained(folder / "biased_base")
            plain = AutoModelForCausalLM.from_pretrained(folder / "biased_base")
        model = peft.get_peft_model(plain, adapter)
        disturb(model)
        model.save_pretrained(str(folder / name), save_embedding_layers=False)
    small = AutoModelForCausalLM.from_config(LlamaConfig(**{**config.to_dict(), "hidden_size": 16}))
    small.save_pretrained(folder / "small")
    lines = [json.dumps({"input": prompt, "output": ["yes", "no"]}) for prompt in PROMPTS]
    (folder / "ask.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def opened(folder: Path) -> Callable[..., Candidate]:
    return lambda name, base=None: open_candidate(str(folder / name), base and str(folder / base))


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., Result]:
    """Evaluates tasks on the folder's data."""

    def start(candidate: Candidate, tasks: list[Task], **kwargs: Any) -> Result:
        settings = {"data_root": folder, "output": tmp_path / "r.json", "batch_size": 3, "progress": False, **kwargs}
        return evaluate(candidate, tasks, **settings)

    return start


# -- the naive computation -------------------------------------------------------------------------------------------


def plain_logits(model: Any) -> Logits:
    """(T, V) of one sequence alone, without a cache."""

    def logits(tokens: list[int], prompt: int) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    return logits


def siamese_logits(folder: Path, gate: float | None = None) -> Logits:
    """By the paper's equations, or with a constant in the gate's place; a prompt of 0 tokens is no prompt."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    oracle = Oracle(SiameseForCausalLM.from_pretrained(folder / "siamese", base=str(folder / "base")), base)

    def logits(tokens: list[int], prompt: int) -> Tensor:
        ids = torch.tensor([tokens])
        ones = torch.ones_like(ids)
        with torch.no_grad():
            if gate is not None:
                h, tuned = oracle.memories(ids)
                return oracle.read_out(gate * h + (1 - gate) * tuned)[0]
            marked = marked_queries(ones, (torch.arange(len(tokens)) < prompt).long()[None])
            return oracle.logits(ids, marked if prompt else running_queries(ones))[0]

    return logits


def scaled_logits(folder: Path, factor: float) -> Logits:
    """The base model with factor · ΔW added to its weights, ΔW read off the merged model."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    merged = dict(AutoModelForCausalLM.from_pretrained(folder / "merged").named_parameters())
    with torch.no_grad():
        for name, weight in base.named_parameters():
            weight.add_(factor * (merged[name] - weight))
    return plain_logits(base)


def greedy(logits: Logits, prompt: list[int], ends: list[int], longest: int = 6) -> list[int]:
    said: list[int] = []
    while len(said) < longest and not (said and said[-1] in ends):
        said.append(int(logits(prompt + said, len(prompt))[-1].argmax()))
    return said


#: Checkpoint, base given, kind, and the naive computation of its logits.
KINDS: dict[str, tuple[str, str | None, str, Callable[[Path], Logits]]] = {
    "base": ("base", None, "base", lambda f: scaled_logits(f, 0)),
    "siamese": ("siamese", None, "siamese", siamese_logits),
    "gate": ("siamese@gate=0.25", None, "siamese", lambda f: siamese_logits(f, 0.25)),
    "peft": ("peft", None, "peft", lambda f: scaled_logits(f, 1)),
    "scale": ("peft@scale=0.5", None, "peft", lambda f: scaled_logits(f, 0.5)),
    "full": ("merged", "base", "full", lambda f: scaled_logits(f, 1)),
}


def test_conversations_are_asked_by_the_chat_template(opened: Callable[..., Candidate]) -> None:
    candidate = opened("base")
    said = (("user", "word1?"), ("assistant", "word2."), ("user", "word3?"))
    messages = [{"role": role, "content": content} for role, content in said]
    (expected,) = answers(candidate.model, candidate.tokenizer, [messages], max_new_tokens=6, **GREEDY)
    for kind, metrics in (("answer", ("contains",)), ("kept", ("identical",))):
        task = Task("chat", "Chat", kind, "chats.jsonl", metrics, messages="messages", max_new_tokens=6)
        record = TaskRecord("user: word1?\nassistant: word2.\nuser: word3?", ("x",), said)
        (result,) = running.RUNS[kind](candidate, task, [(0, record)])
        assert result.answer == expected.text and result.prompt == record.prompt


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_scored_as_naively(
    name: str, folder: Path, opened: Callable[..., Candidate], run: Callable[..., Result]
) -> None:
    spec, base, kind, naive = KINDS[name]
    candidate = opened(spec, base)
    assert (candidate.kind, candidate.base["name"]) == (kind, str(folder / "base"))
    assert (candidate.base["hidden_size"], candidate.base["num_hidden_layers"]) == (32, 2)
    result = run(candidate, TASKS)
    own, frozen = naive(folder), scaled_logits(folder, 0)
    ends = candidate.model.generation_config.eos_token_id
    answered, texts, kept = (result.tasks[task.name].records for task in TASKS)
    lengths = set()
    for i, prompt in enumerate(PROMPTS):
        tokens = candidate.tokenizer(prompt)["input_ids"]
        said, expected = greedy(own, tokens, ends), greedy(frozen, tokens, ends)
        lengths.add(len(expected))
        assert answered[i].answer == candidate.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert answered[i].references == ["yes", "no"] and set(answered[i].scores) == set(ANSWER.metrics)

        log = torch.log_softmax(own(tokens, 0), dim=-1)
        nats = -sum(float(log[t, tokens[t + 1]]) for t in range(len(tokens) - 1))
        assert texts[i].measured == {"nats": pytest.approx(nats, rel=1e-4), "tokens": len(tokens) - 1}

        assert kept[i].references == [candidate.tokenizer.decode(expected, skip_special_tokens=True).strip()]
        assert kept[i].answer == answered[i].answer
        assert kept[i].measured["identical"] == float(said == expected)
        agreeing, divergence = 0, 0.0
        for t in range(len(expected)):
            before = tokens + expected[:t]
            p, q = (x(before, len(tokens))[-1].log_softmax(-1) for x in (frozen, own))
            agreeing += int(p.argmax() == q.argmax())
            divergence += float((p.exp() * (p - q)).sum())
        assert kept[i].measured["tokens"] == len(expected) and kept[i].measured["agreeing"] == agreeing
        assert kept[i].measured["divergence"] == pytest.approx(divergence, rel=1e-3, abs=1e-5)
    assert len(lengths) > 1, "answers of one length would show little"
    if name != "base":
        assert result.tasks["kept"].metrics["divergence"].value > 0.01


@pytest.mark.parametrize("spec", ["base", "siamese@gate=1", "siamese@scale=0@gate=0", "peft@scale=0"])
def test_what_is_the_base_keeps_everything(
    spec: str, opened: Callable[..., Candidate], run: Callable[..., Result]
) -> None:
    metrics = run(opened(spec), [KEPT]).tasks["kept"].metrics
    assert [metrics[name].value for name in KEPT.metrics] == [1.0, 1.0, 0.0]


def test_references_are_made_once_for_all_checkpoints(
    folder: Path, tmp_path: Path, opened: Callable[..., Candidate], run: Callable[..., Result]
) -> None:
    kept = tmp_path / "references"
    alone = {spec: run(opened(spec), [KEPT], fresh=True).tasks["kept"].records for spec in ("base", "siamese", "peft")}
    run(opened("base"), [KEPT], fresh=True, references=kept)
    files = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    assert len(files) == 2, "a file a batch"
    for spec in ("siamese", "peft"):
        found = run(opened(spec), [KEPT], fresh=True, references=kept).tasks["kept"].records
        for a, b in zip(found, alone[spec], strict=True):
            assert (a.answer, a.references) == (b.answer, b.references)
            assert a.measured == pytest.approx(b.measured, rel=1e-5, abs=1e-6)
    # Of another base they are others.
    assert {file: file.stat().st_mtime_ns for file in kept.iterdir()} == files
    run(opened("biased_base"), [KEPT], fresh=True, references=kept)
    assert len(list(kept.iterdir())) == 4
    for file in files:
        file.write_bytes(b"damaged")
    again = run(opened("base"), [KEPT], fresh=True, references=kept).tasks["kept"].records
    assert [record.references for record in again] == [record.references for record in alone["base"]]
    assert all(file.stat().st_size > 100 for file in files), "what cannot be read is made anew"


@pytest.mark.parametrize(("spec", "batch_size"), [("siamese", 1), ("siamese", 8), ("prompt", 1), ("prefix", 1)])
def test_batches_do_not_matter(
    spec: str, batch_size: int, opened: Callable[..., Candidate], run: Callable[..., Result]
) -> None:
    candidate = opened(spec)
    together = run(candidate, TASKS)
    other = run(candidate, TASKS, batch_size=batch_size, fresh=True)
    for task in TASKS:
        for a, b in zip(together.tasks[task.name].records, other.tasks[task.name].records, strict=True):
            assert a.answer == b.answer and a.measured == pytest.approx(b.measured, rel=1e-4, abs=1e-5)


def test_a_task_may_chat(opened: Callable[..., Candidate], run: Callable[..., Result]) -> None:
    candidate = opened("peft")
    records = run(candidate, [replace(ANSWER, chat=True)]).tasks["ask"].records
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = {
        a.index: a.text for a in answers(candidate.model, candidate.tokenizer, chats, max_new_tokens=6, **GREEDY)
    }
    assert {record.index: record.answer for record in records} == expected
    assert [record.prompt for record in records] == PROMPTS
    # As a chat where the tokenizer can, and as a text where it cannot.
    ask, record, tokenizer = replace(ANSWER, chat="auto"), TaskRecord("word1?"), copy.deepcopy(candidate.tokenizer)
    assert asked(ask, record, tokenizer) == [{"role": "user", "content": "word1?"}]
    tokenizer.chat_template = None
    assert asked(ask, record, tokenizer) == "word1?"


# -- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["peft@scale=1", "siamese@gate=0", "siamese@gate=0@scale=1"])
def test_at_full_strength_it_is_the_adapter(spec: str, folder: Path, opened: Callable[..., Candidate]) -> None:
    candidate = opened(spec)
    ids = torch.tensor([prompt_ids(candidate.tokenizer, PROMPTS[0])])
    got = candidate.model(input_ids=ids, **candidate.generate_kwargs).logits
    adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "peft")
    torch.testing.assert_close(got, adapter(input_ids=ids).logits)


@pytest.mark.parametrize("adapter", ["ia3", "dora", "biased", "prompt", "prefix", "loha"])
def test_any_adapter_is_held_against_its_own_base(
    adapter: str, folder: Path, opened: Callable[..., Candidate], run: Callable[..., Result]
) -> None:
    """Those too that cannot be switched off (trained biases), or that lengthen the sequence (prompts)."""
    base = "biased_base" if adapter == "biased" else "base"
    candidate = opened(adapter, base)
    kept = run(candidate, [TEXT, KEPT]).tasks["kept"]
    alone = run(opened(base), [ANSWER], fresh=True).tasks["ask"].records
    assert [record.references for record in kept.records] == [[record.answer] for record in alone]
    assert kept.metrics["divergence"].value > 1e-4
    model = candidate.model
    ids = torch.tensor([prompt_ids(candidate.tokenizer, PROMPTS[0])])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
    assert running.text.run(candidate, TEXT, [(0, TaskRecord(PROMPTS[0]))])[0].measured["nats"] == pytest.approx(
        float(nats), rel=1e-4
    )


def test_loha_is_scaled_too(opened: Callable[..., Candidate], run: Callable[..., Result]) -> None:
    half, full = (
        run(opened(f"loha@scale={x}"), [KEPT], fresh=True).tasks["kept"].metrics["divergence"].value for x in (0.5, 1)
    )
    assert 0 < half < full


def test_the_tokenizer_comes_from_the_checkpoint_or_its_base(
    folder: Path, plain_tokenizer: Any, opened: Callable[..., Candidate], tmp_path: Path
) -> None:
    assert opened("peft").tokenizer.chat_template
    for path in (folder / "peft").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    plain_tokenizer.save_pretrained(tmp_path)
    assert not open_candidate(str(tmp_path)).tokenizer.chat_template


def test_a_folder_may_have_an_at_in_its_name(folder: Path, tmp_path: Path) -> None:
    os.symlink(folder / "base", tmp_path / "odd@gate=2")
    assert open_candidate(str(tmp_path / "odd@gate=2")).kind == "base"


@pytest.mark.parametrize(
    ("spec", "base", "message"),
    [
        ("nowhere", None, "checkpoint .*nowhere' is not a folder"),
        ("nowhere@gate=0.5", None, "checkpoint .*nowhere' is not a folder"),
        (".", None, "holds no checkpoint: none of config.json, adapter_config.json"),
        ("siamese@dial=1", None, "unknown suffix '@dial'; there are @gate=…, @recall=… and @scale=…"),
        ("siamese@gate=1.5", None, "@gate must be a number from 0 .* to 1 .*, got '1.5'"),
        ("siamese@gate=half", None, "@gate must be a number"),
        ("siamese@gate=nan", None, "@gate must be a number"),
        ("siamese@gate=1@gate=0", None, "@gate is given twice"),
        ("peft@scale=-1", None, "@scale must be a number from 0"),
        ("peft@scale=inf", None, "@scale must be a number from 0"),
        ("peft@gate=1", None, "@gate=… needs a siamese checkpoint, and .*peft is peft"),
        ("base@scale=1", None, "@scale=… needs a siamese or peft checkpoint, and .*base is a plain model"),
        ("ia3@scale=1", None, "IA3 as configured has parts that are not"),
        ("dora@scale=0.5", None, "LORA as configured is not .DoRA"),
        ("prefix@scale=1", None, "PREFIX_TUNING as configured has parts that are not"),
        ("biased@scale=0.5", None, "@scale needs an adapter that is the base model at strength 0"),
        ("peft", "small", "peft cannot put this adapter into LlamaForCausalLM"),
        ("peft", "nowhere/at/all", "cannot be loaded as a causal language model"),
        ("small", None, "no tokenizer in .*small nor with its base"),
    ],
)
def test_what_cannot_be_opened(spec: str, base: str | None, message: str, opened: Callable[..., Candidate]) -> None:
    with pytest.raises(InputError, match=message):
        opened(spec, base)


def test_an_adapter_on_a_base_of_another_size_says_where(folder: Path) -> None:
    with pytest.raises(InputError, match=r"cannot put this adapter into LlamaForCausalLM: .*: size mismatch for .*"):
        open_candidate(str(folder / "peft"), str(folder / "small"))


def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match="device cuda:99 cannot be used"):
        open_candidate(str(folder / "base"), device="cuda:99")


def test_a_whole_model_and_its_base_must_have_one_shape(
    opened: Callable[..., Candidate], run: Callable[..., Result]
) -> None:
    candidate = opened("merged", "small")
    with pytest.raises(InputError, match="small has hidden_size 16, the checkpoint 32; give its own base"):
        run(candidate, [KEPT])


# -- running ---------------------------------------------------------------------------------------------------------


class Interrupting:
    """Stands for a kind's run, and is interrupted at its n-th batch."""

    def __init__(self, kind: str, after: int) -> None:
        self.run, self.after, self.asked = running.RUNS[kind], after, 0

    def __call__(self, candidate: Candidate, task: Task, records: Any) -> list[RecordResult]:
        if self.asked == self.after:
            raise KeyboardInterrupt
        self.asked += 1
        return self.run(candidate, task, records)


def without_seconds(result: Result) -> dict[str, Any]:
    found = asdict(result)
    for task in found["tasks"].values():
        task.pop("seconds")
    return found


@pytest.mark.parametrize("lost", [0, 5, 80], ids=["whole lines", "a cut line", "a lost line and a cut one"])
def test_a_cut_run_goes_on_where_it_was(
    lost: int,
    opened: Callable[..., Candidate],
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbroken = run(opened("siamese"), TASKS, output=tmp_path / "unbroken.json")
    output = tmp_path / "cut.json"
    for kind in ("answer", "kept"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setitem(running.RUNS, kind, Interrupting(kind, 1))
            run(opened("siamese"), TASKS, output=output)
        assert not output.exists()
        content = partial_path(output).read_bytes()
        assert len(content.splitlines()) == (1 + 3 if kind == "answer" else 1 + 5 + 5 + 3)
        partial_path(output).write_bytes(content[: len(content) - lost])
        if kind == "answer":
            monkeypatch.setitem(running.RUNS, "answer", second := Interrupting("answer", 99))
    resumed = run(opened("siamese"), TASKS, output=output)
    assert second.asked == 1 or lost
    assert without_seconds(resumed) == without_seconds(unbroken)
    assert without_seconds(read_result(output)) == without_seconds(unbroken)
    assert not partial_path(output).exists()


def test_what_is_finished_is_not_run_again(
    opened: Callable[..., Candidate],
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = run(opened("base"), TASKS)
    monkeypatch.setitem(running.RUNS, "answer", Interrupting("answer", 0))
    assert run(opened("base"), TASKS, progress=True) == first
    assert "r.json is finished already" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        run(opened("base"), TASKS, fresh=True)
    assert read_result(tmp_path / "r.json") == first, "the old result stays until there is a new one"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"limit": 4}, "evaluation: limit was None, now 4; give"),
        ({"batch_size": 2}, "evaluation: batch_size was 3, now 2; give"),
        ({"candidate": "peft"}, "checkpoint was .*siamese.* now .*peft.*; kind was 'siamese', now 'peft'"),
        (
            {"task": replace(ANSWER, max_new_tokens=5)},
            "evaluation: records, prompts or metrics are others in ask; give",
        ),
        ({"task": replace(ANSWER, metrics=("contains",))}, "evaluation: records, prompts or metrics are others in ask"),
        ({"weights": True}, "evaluation: weights was '[0-9a-f]+', now '[0-9a-f]+'; give"),
        (
            {"recall": 1.5},
            "evaluation: the prompts' tokens, what ends an answer, or where the dial stands is another; give",
        ),
        ({"eos": 7}, "evaluation: the prompts' tokens, what ends an answer, or where the dial stands is another; give"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_another_evaluation_is_not_mixed_in(
    changed: dict[str, Any],
    message: str,
    finished: bool,
    opened: Callable[..., Candidate],
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        if not finished:
            patch.setitem(running.RUNS, "answer", Interrupting("answer", 1))
        with pytest.raises(KeyboardInterrupt) if not finished else monkeypatch.context():
            run(opened("siamese"), [ANSWER])
    changed = dict(changed)
    candidate = opened(changed.pop("candidate", "siamese"))
    if changed.pop("weights", False):
        with torch.no_grad():
            candidate.model.gate.up.weight[0, 0] += 1
    candidate.model.config.recall = changed.pop("recall", 0.0)
    candidate.model.generation_config.eos_token_id = changed.pop("eos", candidate.model.generation_config.eos_token_id)
    task = changed.pop("task", ANSWER)
    with pytest.raises(InputError, match=message + ".*another --output, delete it, or start anew with --fresh"):
        run(candidate, [task], **changed)
    assert set(run(candidate, [task], **changed, fresh=True).tasks["ask"].metrics) == set(task.metrics)
    with pytest.raises(InputError, match="evaluation: tasks were ask, now ask, .*; give another --output"):
        run(candidate, [task, TEXT], **changed)


def test_a_fresh_run_that_was_cut_goes_on(
    opened: Callable[..., Candidate], run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = run(opened("base"), [ANSWER], limit=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(running.RUNS, "answer", Interrupting("answer", 1))
        run(opened("siamese"), [ANSWER], fresh=True)
    assert read_result(tmp_path / "r.json") == old
    new = run(opened("siamese"), [ANSWER])
    assert new.kind == "siamese" and len(new.tasks["ask"].records) == len(PROMPTS)
    assert read_result(tmp_path / "r.json") == new and not partial_path(tmp_path / "r.json").exists()


def test_another_may_have_finished_the_same(
    opened: Callable[..., Candidate], run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running.RUNS["answer"]

    def beside(candidate: Candidate, task: Task, batch: Any) -> Any:
        partial_path(tmp_path / "r.json").unlink(missing_ok=True)
        return real(candidate, task, batch)

    monkeypatch.setitem(running.RUNS, "answer", beside)
    assert len(run(opened("base"), [ANSWER]).tasks["ask"].records) == len(PROMPTS)


def test_a_template_that_refuses_a_record_names_it(
    opened: Callable[..., Candidate], run: Callable[..., Result], folder: Path, tmp_path: Path
) -> None:
    candidate = opened("base")
    candidate.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(InputError, match=r"record 1 of task 'ask': the chat template refuses it \(no system turn\)"):
        run(candidate, [replace(ANSWER, chat=True)])


def test_half_a_character_is_refused(
    opened: Callable[..., Candidate], run: Callable[..., Result], tmp_path: Path
) -> None:
    for record in ({"input": "yes", "output": "ok \ud83d"}, {"input": "yes \ud83d", "output": "ok"}):
        (tmp_path / "ask.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(InputError, match=r"ask.jsonl line 1: .* has half of a character"):
            run(opened("base"), [ANSWER], data_root=tmp_path)


def test_a_damaged_partial_file(opened: Callable[..., Candidate], tmp_path: Path) -> None:
    path = tmp_path / "r.json.partial.jsonl"
    path.write_text('{"checkpoint": "a"}\nnonsense\n{"task": "ask"}\n')
    with pytest.raises(InputError, match="damaged in line 2; delete it, or start anew with --fresh"):
        Partial(path, {"checkpoint": "a"})
    path.write_text("[]\n")
    with pytest.raises(InputError, match="is of another evaluation: it says nothing of itself; give another --output"):
        Partial(path, {"checkpoint": "a"})
    for content in ('{"checkpoint": "a"', '{"checkpoint": "a"}\n{"task": "as'):
        path.write_text(content)
        with Partial(path, {"checkpoint": "a"}) as partial:
            assert partial.records == {}
        assert path.read_text() == '{"checkpoint": "a"}\n'


def test_two_runs_of_one_output_do_not_write_it_both(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "result.json.partial.jsonl"
    with Partial(path, {"checkpoint": "a"}) as partial:
        partial.add("banking77", [RecordResult(0, "a prompt", ["a"], "a")], 1.0)
        for fresh in (False, True):
            with pytest.raises(InputError, match="another evaluation; wait"):
                Partial(path, {"checkpoint": "a"}, fresh)
    with Partial(path, {"checkpoint": "a"}) as partial:
        assert list(partial.records["banking77"]) == [0]


def test_where_nothing_can_be_written(
    opened: Callable[..., Candidate], run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; give an --output in a folder"):
        run(opened("base"), [ANSWER], output=tmp_path / "file" / "r.json")
    os.symlink("/dev/full", tmp_path / "full.json.partial.jsonl")
    with pytest.raises(InputError, match="cannot be written: No space left on device; make room"):
        run(opened("base"), [ANSWER], output=tmp_path / "full.json", fresh=True)


def test_a_disk_that_fills_up_on_the_way(
    opened: Callable[..., Candidate], run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Partial._write

    def full(self: Partial, lines: list[dict[str, Any]]) -> None:
        if self.records.get("ask"):
            self._file.write(b'{"task": "as')
            raise OSError(28, "No space left on device")
        written(self, lines)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left.* goes on from there"):
        patch.setattr(Partial, "_write", full)
        run(opened("base"), [ANSWER])
    assert len(run(opened("base"), [ANSWER]).tasks["ask"].records) == len(PROMPTS)


def test_what_tells_a_task_from_another() -> None:
    records = [TaskRecord("a", ("b",)), TaskRecord("c")]
    same = fingerprint(ANSWER, records)
    assert same == fingerprint(replace(ANSWER, name="other", title="Other", metrics=("contains",)), records)
    others = [
        fingerprint(replace(ANSWER, chat=True), records),
        fingerprint(replace(ANSWER, max_new_tokens=7), records),
        fingerprint(ANSWER, records[:1]),
        fingerprint(ANSWER, records[::-1]),
        fingerprint(ANSWER, [TaskRecord("a", ("b", "c"))]),
        fingerprint(ANSWER, [TaskRecord("a", ("b",)), TaskRecord("c", ("",))]),
    ]
    assert len({same, *others}) == 7


@pytest.mark.parametrize(
    ("line", "task", "message"),
    [
        ("yes " * 300, ANSWER, "record 6 of task 'ask' takes [0-9]+ tokens, the model reads 128"),
        ("x", TEXT, "record 6 of task 'text' is one token, of which none can be scored"),
    ],
    ids=["long", "short"],
)
@pytest.mark.parametrize("kind", ["base", "siamese", "peft"])
def test_records_that_do_not_fit(
    kind: str,
    line: str,
    task: Task,
    message: str,
    folder: Path,
    tmp_path: Path,
    opened: Callable[..., Candidate],
    run: Callable[..., Result],
) -> None:
    more = json.dumps({"input": line, "output": "yes"})
    (tmp_path / "ask.jsonl").write_text((folder / "ask.jsonl").read_text() + more + "\n")
    with pytest.raises(InputError, match=message):
        run(opened(kind), [task], data_root=tmp_path)


def test_wrong_arguments(opened: Callable[..., Candidate], run: Callable[..., Result]) -> None:
    with pytest.raises(InputError, match="must be positive, got 0 and None"):
        run(opened("base"), [ANSWER], batch_size=0)
    with pytest.raises(InputError, match="every task can be given once, got ask, ask"):
        run(opened("base"), [ANSWER, replace(ANSWER, max_new_tokens=5)])


# -- imsm eval -------------------------------------------------------------------------------------------------------


@pytest.fixture
def task_file(folder: Path, tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: mine\ntitle: My [task]\nfile: {folder / 'ask.jsonl'}\nmetrics: [contains]\nmax_new_tokens: 4\n"
    )
    return str(path)


def test_eval_prints_its_table_and_goes_on(
    folder: Path,
    task_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    command = ["eval", str(folder / "siamese@gate=0.5"), "--tasks", task_file, "--batch-size", "2", "--limit", "4"]
    with monkeypatch.context() as patch:
        patch.setitem(running.RUNS, "answer", Interrupting("answer", 1))
        assert imsm_cli.main(command) == 130
    told = capsys.readouterr().err
    assert "What is finished is kept; the same command goes on from there." in told
    monkeypatch.setitem(running.RUNS, "answer", rest := Interrupting("answer", 9))
    assert imsm_cli.main(command) == 0
    assert rest.asked == 1
    out = capsys.readouterr()
    for part in (
        "(siamese)",
        "My [task]",
        "Contains the answer",
        "95 % interval",
        "Every record is in siamese@gate=0.5",
    ):
        assert part in out.out
    assert "My [task]: 4/4 records" in out.err
    result = read_result(tmp_path / "siamese@gate=0.5.eval.json")
    assert result.settings["limit"] == 4 and len(result.tasks["mine"].records) == 4
    assert result.where["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BASE", "--tasks", "mprc"], "unknown task 'mprc'"),
        (["BASE", "--tasks", "TASK", "--limit", "0"], "--limit must be a positive integer, got 0"),
        (["BASE", "--tasks", "TASK", "--seed", "-1"], "--seed must be an integer from 0 to below 2**32, got -1"),
        (["BASE", "--tasks", "TASK", "--batch-size", "0"], "--batch-size must be a positive integer, got 0"),
        (["BASE", "--tasks", "TASK", "--output", "x.txt"], "--output must be a .json file, got x.txt"),
        (["nowhere/at/all", "--tasks", "TASK"], "'nowhere/at/all' is not a folder"),
        (["./nowhere@gate=1", "--tasks", "banking77"], "checkpoint './nowhere' is not a folder"),
        (["nowhere", "--tasks", "banking77"], "checkpoint 'nowhere' is neither a folder here nor a repository"),
        (["org/name", "--base", "./nowhere", "--tasks", "banking77"], "base model './nowhere' is not a folder"),
        ([".", "--tasks", "banking77"], ". holds no checkpoint"),
        (["BASE", "--tasks", "mrpc", "--data-root", "nowhere"], "nowhere"),
        (
            ["BASE", "--tasks", "TASK", "kept_webq"],
            "a whole model, which does not say what it was tuned from, so that kept_webq",
        ),
        (["BASE", "--tasks", "TASK", "--device", "cuda:99"], "device cuda:99 cannot be used"),
    ],
)
def test_eval_refuses(
    arguments: list[str],
    message: str,
    folder: Path,
    task_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {"BASE": str(folder / "base"), "TASK": task_file}
    assert imsm_cli.main(["eval", *(places.get(a, a) for a in arguments)]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("imsm: ")]
    assert len(told) == 1 and message in told[0]
