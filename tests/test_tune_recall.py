"""`imsm tune-recall`: the dial's curve is the model's own at every value, each answer is made once, the best value is kept."""

from __future__ import annotations

import builtins
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dreamers import WORDS, write_adapter, write_base, write_data
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import imsm_cli
from imsm import InputError, SiameseConfig, SiameseForCausalLM, answers
from imsm.data import load_examples
from imsm.evaluation import recall as recalls
from imsm.evaluation.held_out import held_out_task
from imsm.evaluation.passes import Pass
from imsm.evaluation.recall import BASE, TUNED, Dialled, Stand, along_the_dial, minds, picked
from imsm.evaluation.results import Estimate
from imsm.evaluation.task import Task, TaskRecord
from imsm.relevance import RelevanceHead
from imsm.settings import DataConfig
from imsm.training.border import frozen_queries
from imsm.turns import last_turn

KEPT = Task("kept_words", "Words", "kept", "", ("identical",), reference=None, max_new_tokens=6)
ASKED = [TaskRecord(f"Is the {a} {b}?") for a, b in zip(WORDS, WORDS[3:], strict=False)][:10]
DIAL = (-math.inf, -1.5, 0.0, 1.5, math.inf)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter that knows a task, its data, and checkpoints whose head draws its border among the prompts."""
    folder = tmp_path_factory.mktemp("dial")
    base = write_base(folder / "base")
    write_adapter(folder / "lora", base)
    write_data(folder / "task.jsonl", base, 12)
    for gate in ("tuned", "average"):
        model = SiameseForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(base), folder / "lora", gate=gate)
        tokenizer = AutoTokenizer.from_pretrained(base)
        own = [
            tokenizer(json.loads(line)["input"])["input_ids"]
            for line in (folder / "task.jsonl").read_text().splitlines()
        ]
        other = [tokenizer(record.prompt)["input_ids"] for record in ASKED]
        queries = [frozen_queries(model, prompts) for prompts in (own, other)]
        head = RelevanceHead(queries[0].shape[1])
        with torch.no_grad():
            # Across what tells them apart, so that some of both lie on either side within the dial's reach.
            apart = nn.functional.normalize(queries[1].mean(dim=0) - queries[0].mean(dim=0), dim=0)
            head.weight.normal_(generator=torch.Generator().manual_seed(0))
            head.weight.sub_((head.weight @ apart) * apart)
            head.weight.div_(head(torch.cat(queries)).std())
            head.bias.sub_(head(torch.cat(queries)).mean())
        model.set_relevance(head)
        model.save_pretrained(folder / gate)
        tokenizer.save_pretrained(folder / gate)
    return folder


def loaded(folder: Path, gate: str) -> tuple[SiameseForCausalLM, Any, tuple[Task, list[TaskRecord]]]:
    model, tokenizer = SiameseForCausalLM.from_pretrained(folder / gate), AutoTokenizer.from_pretrained(folder / gate)
    examples = load_examples(DataConfig(train=str(folder / "task.jsonl")), tokenizer).examples
    return model, tokenizer, held_out_task(examples, tokenizer, "contains")


@pytest.mark.parametrize("gate", ["tuned", "average"])
def test_the_curve_is_the_model_s_own(folder: Path, gate: str) -> None:
    model, tokenizer, (task, records) = loaded(folder, gate)
    found = along_the_dial(model, tokenizer, (task, records), [(KEPT, ASKED)], DIAL, progress=False)

    def said(prompts: list[TaskRecord], longest: int, **how: Any) -> list[str]:
        """One by one, at that value of the dial."""
        return [
            next(answers(model, tokenizer, [record.prompt], max_new_tokens=longest, **how)).text for record in prompts
        ]

    expected = said(ASKED, KEPT.max_new_tokens, force_gate=1.0)
    shares = set()
    for stand in found.stands:
        own = said(records, task.max_new_tokens, recall=stand.recall)
        right = [f" {r.references[0]} " in f" {a} " for r, a in zip(records, own, strict=True)]
        assert stand.target.value == pytest.approx(sum(right) / len(right))
        kept = [a == b for a, b in zip(said(ASKED, KEPT.max_new_tokens, recall=stand.recall), expected, strict=True)]
        assert stand.retained == stand.kept["kept_words"].value == pytest.approx(sum(kept) / len(kept))
        shares.add(stand.retained)
    assert [stand.recall for stand in found.stands] == list(DIAL)
    assert found.stands[0].target.value > 0.9 and found.stands[-1].retained == 1 and len(shares) > 2


def test_each_answer_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, (task, records) = loaded(folder, "tuned")
    asked: list[tuple[str, Any]] = []
    own = Pass.answers

    def counted(self: Pass, prompts: Any, longest: int) -> Any:
        asked.extend((prompt, tuple(self.kwargs.items())) for prompt in prompts)
        return own(self, prompts, longest)

    monkeypatch.setattr(Pass, "answers", counted)
    found = along_the_dial(model, tokenizer, (task, records), [(KEPT, ASKED)], recalls.RECALLS, progress=False)
    assert len(asked) == len(set(asked)) == found.answers == 2 * (len({r.prompt for r in records}) + len(ASKED))
    # What no value of the dial calls for is not answered.
    asked.clear()
    along_the_dial(model, tokenizer, (task, records), [(KEPT, ASKED)], [-math.inf], progress=False)
    assert {how for prompt, how in asked if prompt == records[0].prompt} == {(TUNED,)}


def test_who_answers(folder: Path) -> None:
    model, tokenizer, _ = loaded(folder, "average")
    queries = frozen_queries(model, [tokenizer(record.prompt)["input_ids"] for record in ASKED])
    at = {recall: minds(model, queries, recall, len(ASKED)) for recall in DIAL}
    assert set(at[math.inf]) == {BASE} and set(at[-math.inf]) == {TUNED}
    assert BASE in at[0.0] and ("recall", 0.0) in at[0.0]
    assert at[1.5].count(BASE) >= at[0.0].count(BASE) >= at[-1.5].count(BASE)
    assert at[1.5].count(BASE) > at[-1.5].count(BASE)
    model.set_relevance(None)
    assert minds(model, None, 1.5, 2) == [("recall", 1.5)] * 2
    tuned, _, _ = loaded(folder, "tuned")
    tuned.set_relevance(None)
    assert minds(tuned, None, 1.5, 2) == [TUNED] * 2


def test_of_several_turns_the_last_one_tells(folder: Path) -> None:
    """As in `generate`, where the head reads what stands before the first turn and the last one."""
    model, tokenizer, _ = loaded(folder, "tuned")
    opener = tokenizer("Is")["input_ids"]
    talks = [TaskRecord(f"{one.prompt}\n{other.prompt}") for one, other in zip(ASKED, ASKED[4:], strict=False)]
    model.set_relevance(model.relevance, opener=opener)
    ids = [tokenizer(talk.prompt)["input_ids"] for talk in talks]
    cut = [last_turn(tokens, opener) for tokens in ids]
    assert all(len(short) < len(tokens) for short, tokens in zip(cut, ids, strict=True))
    whole, last = (minds(model, frozen_queries(model, read), 0.0, len(talks)) for read in (ids, cut))
    assert whole != last
    said = recalls._said(model, tokenizer, KEPT, talks, [0.0], 4, False)
    assert said.minds[0.0] == last
    for place, talk in enumerate(talks):
        (own,) = answers(model, tokenizer, [talk.prompt], max_new_tokens=KEPT.max_new_tokens)
        assert own.token_ids == said.at(0.0, place).token_ids


def test_what_is_too_long_to_read_is_refused(folder: Path) -> None:
    model, tokenizer, target = loaded(folder, "tuned")
    long = [TaskRecord("Is it? " * 2 * int(model.base.config.max_position_embeddings))]
    with pytest.raises(InputError, match="record 1 of task 'kept_words' takes [0-9]+ tokens, the model reads"):
        along_the_dial(model, tokenizer, target, [(KEPT, long)], [0.0], progress=False)


@pytest.mark.parametrize("end", [math.inf, -math.inf])
def test_a_default_at_an_end_runs_one_stream(folder: Path, end: float) -> None:
    model, tokenizer, _ = loaded(folder, "average")
    model.set_relevance(None)
    ids = torch.tensor([tokenizer(ASKED[0].prompt)["input_ids"]])
    expected = model.generate(ids, max_new_tokens=6, pad_token_id=0, force_gate=float(end > 0))
    model.config.recall = end
    found = model.generate(ids, max_new_tokens=6, pad_token_id=0, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    cache = found.past_key_values
    assert (cache.shared, cache.base is None, cache.tuned is None) == (None, end < 0, end > 0)


# -- the pick --------------------------------------------------------------------------------------------------------


def stands(*means: tuple[float, float]) -> list[Stand]:
    nothing = Estimate(0, 0, 0)
    return [Stand(recall, nothing, {}, 0.0, 0.0, mean, 0.0) for recall, mean in means]


@pytest.mark.parametrize(
    ("means", "best"),
    [
        ([(-1.0, 0.4), (0.0, 0.5), (1.0, 0.6)], 1.0),
        ([(-2.0, 0.6), (-0.5, 0.6), (1.0, 0.6)], -0.5),
        ([(-math.inf, 0.9), (0.0, 0.9 + 1e-13), (2.0, 0.9)], 0.0),
        ([(-1.0, 0.6), (1.0, 0.6)], -1.0),
        ([(-math.inf, 0.7), (0.0, 0.6)], -math.inf),
    ],
)
def test_the_pick(means: list[tuple[float, float]], best: float) -> None:
    assert picked(stands(*means)).recall == best


def test_the_mean_by_hand(folder: Path) -> None:
    model, tokenizer, target = loaded(folder, "tuned")
    found = along_the_dial(model, tokenizer, target, [(KEPT, ASKED), (KEPT, ASKED[:2])][:1], DIAL, progress=False)
    best = max(stand.target.value for stand in found.stands)
    for stand in found.stands:
        relative = stand.target.value / best
        total = relative + stand.retained
        assert stand.relative == pytest.approx(relative)
        assert stand.mean == pytest.approx(2 * relative * stand.retained / total if total else 0)
    assert found.pick.mean == max(stand.mean for stand in found.stands)


# -- the verb --------------------------------------------------------------------------------------------------------


def command(folder: Path, output: Path, *more: str, gate: str = "tuned") -> list[str]:
    given = ["--data", str(folder / "task.jsonl"), "--metric", "contains", "--output", str(output), "--limit", "8"]
    return ["tune-recall", str(folder / gate), *given, *more]


def test_the_verb_prints_writes_and_draws(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shutil.copytree(folder / "tuned", tmp_path / "tuned")
    assert imsm_cli.main(command(folder, tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "−∞" in out and "+∞" in out and "◀ pick" in out
    found = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert [stand["recall"] for stand in found["dial"]] == ["-inf", -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, "inf"]
    assert found["pick"] in found["dial"] and found["records"] == {"held_out": 8, "kept_dreams": 8}
    assert found["dial"][-1]["retained"] == 1 and found["dial"][0]["target"]["value"] > 0.9
    assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert SiameseForCausalLM.from_pretrained(folder / "tuned").config.recall == 0
    assert "its default" not in out


@pytest.mark.parametrize(("gate", "values"), [("average", "-inf"), ("tuned", "-1.0")])
def test_the_pick_becomes_the_default(folder: Path, tmp_path: Path, gate: str, values: str) -> None:
    shutil.copytree(folder / gate, tmp_path / gate)
    given = command(tmp_path, tmp_path / "out", "--recalls", values, "--write", gate=gate)
    given[given.index("--data") + 1] = str(folder / "task.jsonl")
    assert imsm_cli.main(given) == 0
    turned, plain = (SiameseForCausalLM.from_pretrained(where / gate) for where in (tmp_path, folder))
    assert turned.config.recall == float(values) and plain.config.recall == 0
    tokenizer, other = AutoTokenizer.from_pretrained(folder / gate), 0
    for record in ASKED:
        ids = torch.tensor([tokenizer(record.prompt)["input_ids"]])
        assert torch.equal(logits(turned, ids), logits(plain, ids, recall=float(values)))
        assert torch.equal(logits(turned, ids, recall=0.0), logits(plain, ids))
        assert torch.equal(logits(turned, ids, force_gate=1.0), logits(plain, ids, force_gate=1.0))
        said = turned.generate(ids, max_new_tokens=6, pad_token_id=0)
        assert torch.equal(said, plain.generate(ids, max_new_tokens=6, pad_token_id=0, recall=float(values)))
        other += not torch.equal(said, plain.generate(ids, max_new_tokens=6, pad_token_id=0))
    assert other
    # Training is with the dial at 0.
    assert torch.equal(logits(turned.train(), ids), logits(plain.train(), ids))
    turned.save_pretrained(tmp_path / "again")
    assert SiameseForCausalLM.from_pretrained(tmp_path / "again").config.recall == float(values)


def logits(model: SiameseForCausalLM, ids: Tensor, **how: Any) -> Tensor:
    torch.manual_seed(0)  # of the dropout
    return model(ids, prompt_length=ids.shape[1], **how).logits  # type: ignore[no-any-return]


def test_kept_tasks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "webq").mkdir()
    lines = [json.dumps({"input": record.prompt, "output": "a"}) + "\n" for record in ASKED]
    (tmp_path / "webq" / "test.jsonl").write_text("".join(lines))
    more = ["--data-root", str(tmp_path), "--retained", "kept_webq"]
    assert imsm_cli.main(command(folder, tmp_path / "out", *more, "--recalls", "0,inf")) == 0
    found = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert found["records"] == {"held_out": 8, "kept_webq": 8} and list(found["pick"]["kept"]) == ["kept_webq"]


def test_without_matplotlib(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert imsm_cli.main(command(folder, tmp_path / "out", "--recalls", "0,inf")) == 0
    assert (
        "recall.png is left out: the picture needs matplotlib: pip install 'imsm[pictures]'" in capsys.readouterr().err
    )
    assert (tmp_path / "out" / "recall.json").is_file() and not (tmp_path / "out" / "recall.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recalls", "-1,x"], "--recalls must be numbers, inf or -inf with commas between"),
        (["--recalls", "nan"], "--recalls must be numbers"),
        (["--seed", "-1"], "--seed must be an integer from 0 to below 2**32, got -1"),
        (["--limit", "0"], "--limit must be a positive integer, got 0"),
        (["--metric", "bleu"], "the metric must be one of accuracy"),
        (["--metric", "number"], "the metric number needs a text with a number as answer"),
        (["--retained", "webq", "--data-root", "."], "--retained takes tasks of kept answers"),
        (["--retained", "kept_webq", "--data-root", "nowhere"], "there is no folder nowhere"),
        (["--retained", "kept_webq", "--base", "./nowhere"], "base model './nowhere' is not a folder"),
        (["--data-root", "nowhere"], "--data-root holds the files of --retained; name the tasks"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--recalls", "inf", "--metric", "exact_match"], "no answer along the dial scores above 0 by exact_match"),
    ],
)
def test_refusals(
    folder: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imsm_cli.main(command(folder, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_checkpoint_shows_before_data_are_looked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command(folder, tmp_path / "out", "--data", "org/name", "--retained", "kept_webq", gate="nowhere")
    assert imsm_cli.main(given) == 2
    assert capsys.readouterr().err == f"imsm: checkpoint '{folder / 'nowhere'}' is not a folder\n"


def test_refusals_of_the_function(folder: Path) -> None:
    model, tokenizer, target = loaded(folder, "tuned")
    with pytest.raises(InputError, match="at least one value"):
        along_the_dial(model, tokenizer, target, [(KEPT, ASKED)], [], progress=False)
    with pytest.raises(InputError, match="give both"):
        along_the_dial(model, tokenizer, target, [], progress=False)


def test_a_checkpoint_of_before_stands_at_0() -> None:
    assert SiameseConfig.from_dict({"gate": "average"}).recall == 0
    assert Dialled.__dataclass_fields__.keys() == {"metric", "stands", "pick", "answers"}
