"""The relevance benchmark on a tiny model: its sets, its features against a pass of one prompt alone, and its tables."""

from __future__ import annotations

import difflib
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.forgetting.plan import read_plan
from benchmarks.relevance import ablation, bank, features, sets
from benchmarks.relevance.__main__ import main
from imsm.data.dresses import USUAL
from imsm.errors import InputError
from imsm.generation import prompt_ids
from imsm.relevance import fit_relevance

FILES = ["webq/test", "freebaseqa/test", "multirc/test", "cola/train", "cola/test", "mrpc/train", "mrpc/test"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    texts = [f"my card {i} is {'lost' if i % 2 else 'late'}" for i in range(25)]
    bank = [{"input": sets.TRAINED.format(text=text), "output": "card", "text": text} for text in texts]
    asked = [{"input": f"Question: who is {i}?\nAnswer:"} for i in range(8)]
    requests = [{"text": f"play song {i}", "domain": "work" if i else "banking"} for i in range(7)]
    content = {"banking77/train": bank, "banking77/test": bank[:6], "clinc150/test": requests}
    content |= {name: asked for name in [*FILES, "gsm8k/train", "gsm8k/test"]}
    content["wiki/sentences"] = [{"text": f"the river {i} is long"} for i in range(6)]
    for name, rows in content.items():
        path = root / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


# -- sets ------------------------------------------------------------------------------------------------------------


def test_wordings_are_unlike_each_other() -> None:
    wordings = yaml.safe_load((sets.SETS / "rewordings.yaml").read_text())
    assert [len(wordings[split]) for split in ("validation", "test")] == [4, 6]
    everything = [sets.TRAINED, *wordings["validation"], *wordings["test"]]
    assert all(wording.count("{text}") == 1 for wording in everything)
    for one, other in itertools.combinations(everything, 2):
        assert difflib.SequenceMatcher(None, one, other, autojunk=False).ratio() < 0.6, (one, other)
    for split in ("validation", "test"):
        assert any("\n" not in wording for wording in wordings[split])
        assert any(wording.lstrip('"').startswith("{text}") for wording in wordings[split])


def test_questions_are_asked_once() -> None:
    found = {
        (kind, split): [row["text"] for row in sets.read(sets.SETS / f"{kind}-{split}.jsonl")]
        for kind in ("near_domain", "everyday")
        for split in ("validation", "test")
    }
    assert [len(texts) for texts in found.values()] == [40, 60, 40, 60]
    everything = [text.lower() for texts in found.values() for text in texts]
    script = yaml.safe_load((sets.SETS / "conversations.yaml").read_text())
    everything += [talk["question"].lower() for part in script.values() for talk in part["answered"]]
    assert len(set(everything)) == len(everything) == 220


def test_splits_share_nothing(data_root: Path) -> None:
    found = list(sets.prompt_sets(data_root, test=True))
    names = [(made.split, made.name) for made in found]
    assert len(set(names)) == len(names)
    by_name = {key: made for key, made in zip(names, found, strict=True)}
    assert {made.split for made in sets.prompt_sets(data_root)} == {"validation"}
    for (split, name), made in by_name.items():
        assert made.prompts
        other = by_name.get(("test", name))
        # The tiny banking77/test repeats training messages, which the real one does not.
        if split == "validation" and other is not None and made.wanted == "base" and "turns" not in name:
            assert not {str(prompt) for prompt in made.prompts} & {str(prompt) for prompt in other.prompts}, name
    validation, fit = ({row["input"] for row in rows} for rows in sets.task_rows(data_root))
    assert len(fit) == 20 and not fit & validation
    assert set(by_name["validation", "trained"].prompts) == validation
    assert all("play song 0" not in str(prompt) for prompt in by_name["validation", "clinc"].prompts)
    with pytest.raises(InputError, match="there is no file .*train.jsonl; give a --data-root that holds it"):
        list(sets.prompt_sets(data_root / "no"))


def test_test_prompts_are_those_that_the_other_benchmark_draws() -> None:
    rows = list(range(1000))
    own, tests = sets.part(rows, "validation"), sets.part(rows, "test")
    drawn = set(random.Random(0).sample(range(1000), read_plan("smollm2").limit))
    assert len(own) == len(tests) == sets.EACH and not set(own) & drawn and set(tests) <= drawn


def test_conversations_turn(data_root: Path) -> None:
    found = {made.name: made for made in sets.prompt_sets(data_root) if made.split == "validation"}
    questions = {text for kind in ("near_domain", "everyday") for text in found[kind].prompts}
    task = {
        text
        for name, made in found.items()
        if made.wanted == "task" and "-chat" not in name
        for text in made.prompts
        if isinstance(text, str)
    }
    for name, first, last in (("turns-away", task, questions), ("turns-back", None, task)):
        for prompt in found[name].prompts:
            assert [turn["role"] for turn in prompt] == ["user", "assistant", "user"]
            assert first is None or prompt[0]["content"] in first
            assert any(text in prompt[-1]["content"] for text in last)
    assert found["turns-away-last"].prompts == found["turns-away"].prompts and found["turns-away-last"].last_turn


# -- features --------------------------------------------------------------------------------------------------------


def test_the_last_turn_is_found(tokenizer: PreTrainedTokenizerBase, plain_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = sets.conversation("first question", "an answer", "last one")
    for used, start in ((tokenizer, "<|im_start|>user\nlast one"), (plain_tokenizer, "last one")):
        made = features.encode(used, prompt, last_turn=True)
        assert made.start > 0 and used.decode(made.ids[made.start :]).startswith(start)
        assert features.encode(used, prompt).start == 0
    assert features.encode(tokenizer, prompt).ids == prompt_ids(tokenizer, prompt)
    assert features.encode(tokenizer, sets.conversation("alone"), last_turn=True).start == 0


def test_features_are_those_of_a_prompt_alone(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    monkeypatch.setattr(features, "BATCH_TOKENS", 24)
    prompts = [features.Encoded(list(range(5, 5 + n)), start) for n, start in ((9, 0), (3, 1), (12, 4), (7, 0))]
    numbers = features.layer_numbers(model)
    assert numbers == {"third": 1, "two_thirds": 1}
    found = features.compute(model, prompts, numbers, pad=0)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            states = model.model(torch.tensor([prompt.ids]), output_hidden_states=True)
        for layer, state in (("third", states.hidden_states[1]), ("memory", states.last_hidden_state)):
            torch.testing.assert_close(found[f"mean.{layer}"][row], state[0, prompt.start :].mean(dim=0))
            torch.testing.assert_close(found[f"last.{layer}"][row], state[0, -1])


# -- both verbs ------------------------------------------------------------------------------------------------------


def test_features_are_kept_and_ablated(
    base_folder: str,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    common = ["--model", base_folder, "--work", str(work)]
    run = ["features", *common, "--data-root", str(data_root), "--dreams", "10"]
    ablate = ["ablate", *common, "--out", str(out)]
    assert main(ablate) == 2 and "make some: python -m benchmarks.relevance features" in capsys.readouterr().err
    assert main(run) == 0
    folder = work / Path(base_folder).name
    index = json.loads((folder / features.INDEX).read_text())
    assert {found["name"] for found in index["sets"]} >= {
        *("task-trained", "task-moved", "task-worded", "task-turned", "dreams-plain", "dreams-chat", "dreams-turned"),
        *("reworded-4-chat", "wiki"),
    }

    (folder / "validation" / "wiki.safetensors").write_bytes(b"damaged")
    computed: list[int] = []
    compute = features.compute
    monkeypatch.setattr(features, "compute", lambda *given: computed.append(len(given[1])) or compute(*given))
    assert main(run) == 0 and len(computed) == 1  # the damaged one alone
    monkeypatch.setattr(ablation, "PENALTIES", (0.01, 0.1))
    monkeypatch.setattr(ablation, "DREAMS", (4, 200))
    monkeypatch.setattr(ablation, "DRAWN", (("mean", 0.1, 2), ("both", 0.1, 40)))
    monkeypatch.setattr(ablation, "DEPTHS", {"memory": ("memory",), "all": features.LAYERS})
    assert main([*ablate, "--test"]) == 2 and "no features of the test sets" in capsys.readouterr().err
    assert main([*run, "--test"]) == 0 and main([*ablate, "--test"]) == 0
    page = capsys.readouterr().out
    content = json.loads((out / f"{folder.name}.json").read_text())
    assert len(content["choices"]) >= 9 + 3 * 2 + 2 + 2 * 2 - 2 and len(content["test"]) == 2
    few = content["drawn"][0]
    assert (few["pooling"], few["prompts"]) == ("mean", 2) and 0 <= few["task"]["worst"] <= few["task"]["mean"] <= 1
    every = {**content["default"], "dressed": 1.0}
    whole = next(found for found in content["choices"] if all(found[key] == value for key, value in every.items()))
    all_there = ablation.drawn(bank.Bank(folder), bank.Choice(**every))[1]
    # Whatever is drawn of so few, it is all of them.
    shares = dict(zip(content["sets"], whole["rules"][ablation.DEFAULT_RULE]["shares"], strict=True))
    base = [shares[name] for name, (wanted, _) in content["sets"].items() if wanted == "base" and name[:5] != "turns"]
    assert all_there["base"]["mean"] == pytest.approx(sum(base) / len(base), abs=1e-3)
    assert "### Drawn anew, 6 times" in page and "| both | 0.1 | 40 |" in page
    best = max(content["choices"], key=lambda found: (found["rules"][ablation.DEFAULT_RULE]["right"], found["auc"]))
    assert all(best[key] == value for key, value in content["best"].items())
    assert "### Share sent to the base, test" in page and "| trained | 5 | task |" in page


def test_shares_follow_from_the_head(tmp_path: Path) -> None:
    """On sets that lie where they should, all go right; the default rule is the product's own border."""
    torch.manual_seed(0)
    centres = {"task-trained": -3.0, "dreams-plain": 3.0, "trained": -3.0, "everyday": 3.0, "bare": 0.0}
    index: list[dict[str, Any]] = []
    for name, centre in centres.items():
        split, wanted = ("fit", "fit") if "-" in name else ("validation", "open")
        wanted = {"trained": "task", "everyday": "base"}.get(name, wanted)
        rows = {f"{p}.{layer}": centre + torch.randn(40, 6) for p in features.POOLINGS for layer in features.LAYERS}
        features.keep(rows, tmp_path / split / f"{name}.safetensors", "key")
        index.append({"name": name, "split": split, "wanted": wanted, "count": 40})
    (tmp_path / features.INDEX).write_text(json.dumps({"model": "m", "layers": {}, "sets": index}))
    found = bank.Bank(tmp_path)
    assert found.dresses() == ["trained, plain dreams"]
    choice = bank.Choice("trained, plain dreams", pooling="mean", layers="memory")
    made = ablation.result(found, choice, "validation")
    assert made["auc"] == made["worst_auc"] == 1 and made["rules"]["half way"]["right"] == 1
    assert made["rules"]["half way"]["shares"][:2] == [0, 1] and 0 < made["rules"]["half way"]["shares"][2] < 1
    logits, points = ablation.judge(found, choice, "validation")
    assert abs(points[ablation.DEFAULT_RULE]) < 1e-4 and points["fifth"] < points["quarter"] < points["half way"]
    task, dreams = (
        load_file(tmp_path / "fit" / f"{name}.safetensors")["mean.memory"] for name in ("task-trained", "dreams-plain")
    )
    fitted = fit_relevance(task, dreams, penalty=choice.penalty)
    expected = fitted.head(load_file(tmp_path / "validation" / "bare.safetensors")["mean.memory"])[:, 0].double()
    torch.testing.assert_close(logits["bare"], expected.detach())
    fewer = ablation.judge(found, replace(choice, dreams=8), "validation")[0]
    assert not torch.equal(fewer["bare"], logits["bare"])


def test_a_head_is_fitted_to_what_training_takes(tmp_path: Path) -> None:
    """Dreams in their shares, the turned ones on top, and the first of the prompts in other dresses."""
    index: list[dict[str, Any]] = []
    names = [f"task-{kind}" for kind in (*USUAL, "turned")] + [f"dreams-{kind}" for kind in ("plain", "chat", "turned")]
    for number, name in enumerate(names):
        value = 1000 * number + torch.arange(300.0)[:, None]
        rows = {f"{p}.{layer}": value.clone() for p in features.POOLINGS for layer in features.LAYERS}
        features.keep(rows, tmp_path / "fit" / f"{name}.safetensors", "key")
        index.append({"name": name, "split": "fit", "wanted": "fit", "count": 300})
    (tmp_path / features.INDEX).write_text(json.dumps({"model": "m", "layers": {}, "sets": index}))

    def rows_of(choice: bank.Choice) -> list[dict[str, set[int]]]:
        """Of either side, the rows of each set."""
        found: list[dict[str, set[int]]] = []
        for side in bank.Bank(tmp_path).fitted_to(choice):
            found.append({})
            for value in side[:, 0].int().tolist():
                found[-1].setdefault(names[value // 1000], set()).add(value % 1000)
        return found

    chosen = bank.Choice("usual")
    task, dreams = rows_of(chosen)
    assert task == {"task-trained": set(range(80)), **{f"task-{kind}": set(range(40)) for kind in USUAL[1:]}}
    assert dreams == {"dreams-plain": set(range(120)), "dreams-chat": set(range(80))}
    task, dreams = rows_of(replace(chosen, dress="usual, turned", prompts=5, dressed=0.25, dreams=50))
    assert {name: len(rows) for name, rows in task.items()} == dict(zip(names[:5], (5, 2, 2, 2, 2), strict=True))
    assert {name: len(rows) for name, rows in dreams.items()} == dict(zip(names[5:], (30, 20, 20), strict=True))
    task, _ = rows_of(replace(chosen, draw=3))
    assert task["task-moved"] < task["task-trained"] != set(range(80))
    assert bank.dream_counts(["dreams-plain"], 200) == {"dreams-plain": 200}
    assert bank.dream_counts(["dreams-short-plain", "dreams-short-chat"], 10) == {
        "dreams-short-plain": 6,
        "dreams-short-chat": 4,
    }


def test_area() -> None:
    assert ablation.area(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])) == (0.75 + 1) / 2
    assert ablation.area(torch.tensor([0.0]), torch.tensor([1.0, 2.0])) == 0


def test_a_model_without_a_template_has_no_chat_turns(
    base_folder: str, plain_tokenizer: PreTrainedTokenizerBase, data_root: Path, tmp_path: Path
) -> None:
    assert AutoTokenizer.from_pretrained(base_folder).chat_template
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    rows = sets.task_rows(data_root)[1]
    made = features.fitted(model, plain_tokenizer, rows, 4, tmp_path)
    assert {"task-trained", "task-worded", "dreams-plain"} <= set(made)
    assert not {"task-moved", "task-turned", "dreams-chat", "dreams-turned"} & set(made)
    assert plain_tokenizer.decode(made["task-trained"][0].ids) == rows[0]["input"]
