"""The relevance benchmark on a tiny model: its sets, its features against a pass of one prompt alone, and its tables."""

from __future__ import annotations

import difflib
import itertools
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.continual.sets import KINDS, drawn
from benchmarks.forgetting.plan import read_plan
from benchmarks.models import quickstart
from benchmarks.relevance import ablation, bank, features, free, free_tasks, sets
from benchmarks.relevance.__main__ import main
from imsm.data.dresses import USUAL, dresses
from imsm.data.formats import Conversation
from imsm.data.rendering import Renderer
from imsm.data.turns import turn_closer
from imsm.dreams import dream
from imsm.errors import InputError
from imsm.generation import prompt_ids
from imsm.relevance import BORDER, fit_relevance
from imsm.training.dreaming import FRAMED, dressed_dreams

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
    assert [len(wordings[split]) for split in ("validation", "test")] == [10, 6]
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
    closer = [15, 16]  # of the third prompt alone
    assert "said.memory" not in features.compute(model, prompts, numbers, pad=0)
    found = features.compute(model, prompts, numbers, 0, closer)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            states = model.model(torch.tensor([prompt.ids]), output_hidden_states=True)
        for layer, state in (("third", states.hidden_states[1]), ("memory", states.last_hidden_state)):
            torch.testing.assert_close(found[f"mean.{layer}"][row], state[0, prompt.start :].mean(dim=0))
            torch.testing.assert_close(found[f"last.{layer}"][row], state[0, -1])
            torch.testing.assert_close(found[f"said.{layer}"][row], state[0, -3 if row == 2 else -1])


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
    monkeypatch.setattr(ablation, "PENALTIES", (0.01, 0.3))
    monkeypatch.setattr(ablation, "DREAMS", (4, 200))
    monkeypatch.setattr(ablation, "DRAWN", (("mean", 0.0, 0.3, 2), ("mean, last, said", FRAMED, 0.3, 40)))
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
    drawn = ablation.drawn(bank.Bank(folder), bank.Choice(**every))
    all_there = next(found for found in drawn if (found["prompts"], found["border"]) == (40, ablation.DEFAULT_RULE))
    assert len(drawn) == 2 * len(ablation.DRAWN_RULES)
    # Whatever is drawn of so few, it is all of them.
    shares = dict(zip(content["sets"], whole["rules"][ablation.DEFAULT_RULE]["shares"], strict=True))
    base = [shares[name] for name, (wanted, _) in content["sets"].items() if wanted == "base" and name[:5] != "turns"]
    assert all_there["base"]["mean"] == pytest.approx(sum(base) / len(base), abs=1e-3)
    assert "### Drawn anew, 6 times" in page and "| mean, last, said | 0.5 | 0.3 | 40 | third |" in page
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
    names = [f"task-{kind}" for kind in (*USUAL, "turned")] + [
        f"dreams-{kind}" for kind in ("plain", "chat", "turned", "asked", "framed")
    ]
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
    again = {"dreams-asked": set(range(100)), "dreams-framed": set(range(50))}  # of 600 dreams 300 ask
    assert dreams == {"dreams-plain": set(range(120)), "dreams-chat": set(range(80)), **again}
    assert "dreams-framed" not in rows_of(replace(chosen, framed=0.0))[1]
    task, dreams = rows_of(replace(chosen, dress="usual, turned", prompts=5, dressed=0.25, dreams=50))
    assert {name: len(rows) for name, rows in task.items()} == dict(zip(names[:5], (5, 2, 2, 2, 2), strict=True))
    assert {name: len(rows) for name, rows in dreams.items()} == dict(zip(names[5:], (30, 20, 20, 25, 12), strict=True))
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


# -- free writing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def free_root(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with requests of every domain, and with customers that are neither for validation nor for fitting."""
    root = tmp_path / "free-data"
    shutil.copytree(data_root, root)
    domains = [*free_tasks.UNLIKE_SHOP, "credit_cards", "home", "out_of_scope"]
    rows = [
        {"text": f"{domain} wish {i}", "intent": f"intent {i % 3}", "domain": domain}
        for i, domain in itertools.product(range(12), domains)
    ]
    (root / "clinc150" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sets, "FIT", 6)
    monkeypatch.setattr(sets, "EACH", 10)
    for file, start in ((file, start) for file, start in KINDS.values() if start):
        (root / file).write_text("".join(json.dumps({"input": f"{start} text {i} of {file}"}) + "\n" for i in range(8)))
    monkeypatch.setattr(free_tasks, "HELD_OUT", 4)
    plan = replace(free_tasks.read_plan(), test_records=2)
    monkeypatch.setattr(free_tasks, "read_plan", lambda: plan)
    return root


def test_free_tasks_hold_out_what_heads_have_not_seen(free_root: Path) -> None:
    tasks = {task.name: task for task in free_tasks.free_tasks(free_root)}
    shops = ["shop", "shop, two wordings"]
    assert list(tasks) == [*shops, "travel", "kitchen_and_dining", "customers", *free_tasks.TEMPLATES]
    assert [name for name, task in tasks.items() if not task.chat] == list(free_tasks.TEMPLATES)
    others = {found.name: found for found in free_tasks.other_sets(free_root)}
    for task in tasks.values():
        assert set(task.others) <= set(others) and len(set(task.others)) == len(task.others)
        for fold in task.folds:
            assert fold.held_out and not {text for text, _ in fold.fit} & set(fold.held_out)
    away = {name: {part[6:] for part in task.others if part.startswith("clinc-")} for name, task in tasks.items()}
    assert away["travel"] == {*free_tasks.UNLIKE_SHOP, "credit_cards", "home"} - {"travel", "auto_and_commute"}
    assert away["customers"] == {*free_tasks.UNLIKE_SHOP, "home"} - {"banking"}
    assert "kitchen_and_dining" not in away["kitchen_and_dining"] and away["shop"] == set(free_tasks.UNLIKE_SHOP)
    assert [name for name, task in tasks.items() if "near_shop" in task.others] == list(free_tasks.SHOPS)
    assert len(others["near_shop"].prompts) == 40

    validation, fit = ({row["text"] for row in rows} for rows in sets.task_rows(free_root))
    (customers,) = tasks["customers"].folds
    found = {text for text, _ in customers.fit} | set(customers.held_out)
    assert len(found) == 25 - 5 - 6 and not found & (validation | fit)
    assert set(dict(customers.fit).values()) == {"card"}
    kept = {row["text"] for row in sets.other_requests(free_root, "test")}
    (travel,) = tasks["travel"].folds
    assert kept and not kept & ({text for text, _ in travel.fit} | set(travel.held_out))
    assert set(dict(travel.fit).values()) <= {"intent 0", "intent 1", "intent 2"}
    plan = free_tasks.read_plan()
    for name in free_tasks.TEMPLATES:
        (fold,) = tasks[name].folds
        trained, tests = drawn(name, free_root, plan.training_records, plan.test_records)
        assert {text for text, _ in fold.fit} | set(fold.held_out) == {row["input"] for row in trained}
        assert tests and len(fold.held_out) == 4
    with pytest.raises(InputError, match="must hold requests of all domains, but lacks .*travel"):
        free_tasks.free_tasks(poorer(free_root))


def poorer(root: Path) -> Path:
    """The root without requests on travel."""
    path = root / "clinc150" / "test.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "travel" not in line))
    return root


@pytest.mark.parametrize(("held_out", "least"), [(1, 160), (2, 110)])
def test_every_wording_of_the_shop_is_held_out_as_often_and_no_test_wording_is_read(held_out: int, least: int) -> None:
    shop = quickstart("shop")

    def wording(text: str) -> tuple[int, int]:
        """The intent, and the place among its wordings."""
        return next(
            (number, place)
            for number, intent in enumerate(shop.INTENTS)
            for place, ask in enumerate(intent.asks)
            if re.fullmatch(re.sub(r"\\{\w+\\}", "(.+)", re.escape(ask)), text)
        )

    folds = free_tasks.shop_folds(held_out)
    chosen = list(itertools.combinations(range(5), held_out))
    assert len(folds) == len(chosen)
    for made, unseen in zip(folds, chosen, strict=True):
        assert {wording(text) for text in made.held_out} == set(itertools.product(range(len(shop.INTENTS)), unseen))
        assert {place for text, _ in made.fit for place in [wording(text)[1]]} == set(range(5)) - set(unseen)
        assert all(shop.INTENTS[wording(text)[0]].key[-1] in answer.lower() for text, answer in made.fit)
        assert len({text for text, _ in made.fit}) == len(made.fit) >= least


def test_free_tasks_are_judged_as_training_would(
    base_folder: str,
    free_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(free, "DREAMS", 10)
    monkeypatch.setattr(free, "WEIGHED", [(0, False), (3, False), (3, True)])
    monkeypatch.setattr(
        free,
        "VARIED",
        {**free.VARIED, "framed": (0.0, FRAMED), "penalty": (0.3,), "prompts": (5, 80), "border": (0.0, BORDER)},
    )
    work, out = tmp_path / "work", tmp_path / "out"
    run = ["free", "--model", base_folder, "--data-root", str(free_root), "--work", str(work), "--out", str(out)]
    run += ["--seeds", "0", "3"]
    assert main(run) == 0
    page = capsys.readouterr().out
    folder = work / Path(base_folder).name
    path = out / f"{folder.name}-free.json"
    content = json.loads(path.read_text())
    assert path.stat().st_size < 12000 and len(list((work / "dreams").iterdir())) == 2
    assert [content["dreams"], len(content["choices"])] == [{"0": 10, "3": 10}, 16]
    assert content["tasks"]["customers"] == {"folds": 1, "fit": 10, "held_out": 4}
    for made in content["choices"]:
        for name in content["tasks"]:
            kept, worst, sent = made[name]
            assert 0 <= worst <= kept <= 1 and 0 <= sent <= 1

    # By another way: prompts read for this alone, and the head's own border.
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    customers = next(task for task in free_tasks.free_tasks(free_root) if task.name == "customers")
    renderer, (fold,) = Renderer(tokenizer), customers.folds
    examples = [renderer.render(Conversation(sets.conversation(*turn), 0), 1) for turn in fold.fit]
    task = [dress.prompt_ids for dress in dresses(examples, tokenizer, others=5)]
    assert len(fold.fit) < len(task) <= 25

    def queries(prompts: list[list[int]]) -> torch.Tensor:
        read = [features.Encoded(ids) for ids in prompts]
        found = features.compute(model, read, features.layer_numbers(model), 0, turn_closer(tokenizer))
        return torch.cat([found[f"{pooling}.memory"] for pooling in ("mean", "last", "said")], dim=1)

    unseen = queries([prompt_ids(tokenizer, sets.conversation(text)) for text in fold.held_out])
    music = next(found for found in free_tasks.other_sets(free_root) if found.name == "clinc-home")
    away = queries([prompt_ids(tokenizer, prompt) for prompt in music.prompts])
    shares: list[list[float]] = []
    for seed in (0, 3):
        samples = dream(model, tokenizer, 10, seed, answers=False, folder=work / "dreams")
        others = [dress.prompt_ids for dress in dressed_dreams(samples, tokenizer)]
        head = fit_relevance(queries(task), queries(others), penalty=0.3).head
        shares.append([float((head(rows) > 0).float().mean()) for rows in (unseen, away)])
    own, home = (sum(share) / 2 for share in zip(*shares, strict=True))
    sent = content["sent"]["customers"]
    assert (sent[free.OWN], sent["clinc-home"]) == (pytest.approx(own, abs=1e-3), pytest.approx(home, abs=1e-3))
    usual = next(found for found in content["choices"] if all(found[k] == v for k, v in free.DEFAULT.items()))
    assert usual["customers"][0] == pytest.approx(1 - own, abs=1e-3)
    assert usual["customers"][2] == pytest.approx(
        sum(share for name, share in sent.items() if name != free.OWN) / (len(sent) - 1), abs=2e-3
    )
    kinds = {(found["task"], found["set"]) for found in content["anchors"]}
    assert kinds == set(free_tasks.NEAR) and len(content["anchors"]) == 3 * len(kinds)
    for found in content["anchors"]:
        if not found["count"]:
            assert found["figures"][0] == pytest.approx(1 - content["sent"][found["task"]][free.OWN], abs=2e-3)
            assert found["figures"][1] == 1.0
    kept, anchors, alike, away_share = content["anchors"][-1]["figures"]
    assert min(kept, alike, away_share) >= 0 and anchors >= content["anchors"][-2]["figures"][1]
    assert f"| customers | near_domain-chat | 3 | yes | {kept:.3f} |" in page
    assert "customers: 10 to fit and 4 held out" in page and "Seeds of dreams: 0, 3." in page
    assert "| pooling | framed | penalty | prompts | border | shop: kept | shop: worst | shop: sent |" in page
    assert f"| clinc-home | {len(away)} |  | " in page and "| mean, last, said | 0.5 | 0.3 | 80 | 0.4 |" in page

    monkeypatch.setattr(features, "compute", lambda *given: pytest.fail("everything has been read"))
    assert main(run) == 0 and capsys.readouterr().out == page


def test_figures_of_heads() -> None:
    heads = [{free.OWN: 0.0, "a": 1.0, "b": 0.5}, {free.OWN: 0.5, "a": 1.0, "b": 0.0}]
    assert free.figures(heads) == [0.75, 0.5, 0.625]
    assert free.mean_sent(heads) == {free.OWN: 0.25, "a": 1.0, "b": 0.25}


def test_without_a_chat_template_the_tasks_are_plain_texts(
    base_folder: str,
    plain_tokenizer: PreTrainedTokenizerBase,
    free_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(folder)
    plain_tokenizer.save_pretrained(folder)
    monkeypatch.setattr(free, "DREAMS", 6)
    monkeypatch.setattr(free, "VARIED", {name: (value,) for name, value in free.DEFAULT.items()})
    run = ["free", "--model", str(folder), "--data-root", str(free_root), "--work", str(tmp_path / "work")]
    assert main([*run, "--out", str(tmp_path), "--seeds", "0"]) == 0
    content = json.loads((tmp_path / "plain-free.json").read_text())
    assert list(content["tasks"]) == list(free_tasks.TEMPLATES) and not content["anchors"]
    assert {"near_domain", "webq", "clinc"} <= set(content["sets"])
    assert not any(name.endswith("-chat") or name == "near_shop" for name in content["sets"])
    (choice,) = content["choices"]
    assert all(0 <= choice[name][2] <= 1 for name in free_tasks.TEMPLATES)
