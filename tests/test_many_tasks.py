"""Several tasks on one base: each answers as it would alone, rows find their own, and what is ruled out is not run."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_same
from peft import LoraConfig, PrefixTuningConfig
from prompts import padded, random_prompts
from torch import Tensor
from transformers import CompileConfig, GenerationConfig
from zoo import METHODS, VOCAB, disturb, tiny_base, tiny_siamese

from imsm import InputError, SiameseForCausalLM
from imsm.building import saved_tensors
from imsm.checkpoint import write_adapter
from imsm.mixing import Recall
from imsm.names import tensor_names
from imsm.relevance import RelevanceHead, fit_relevance
from imsm.routing import STORED, fit_router, negatives, pick, store
from imsm.tasks import Task
from imsm.training.border import fit_border, frozen_queries

#: Tokens of which each task's prompts are made, and those of no task's.
WORDS = {"red": (1, 5), "green": (16, 20), "blue": (31, 35), None: (46, 52)}
NAMES = [name for name in WORDS if name is not None]


def spoken(name: str | None, count: int, seed: int, least: int = 8, most: int = 16) -> list[list[int]]:
    """Prompts of a task's words, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(least, most, (count,), generator=generator).tolist()
    return [torch.randint(*WORDS[name], (length,), generator=generator).tolist() for length in lengths]


#: Two of each, mixed, and whose they are.
OWNERS = [*NAMES, None, None, *reversed(NAMES)]
PROMPTS = [spoken(name, 1, 300 + place)[0] for place, name in enumerate(OWNERS)]


def teach(model: SiameseForCausalLM, name: str) -> None:
    """A disturbed adapter and gate, a head and a store for the active task, as if it had been trained."""
    seed = 10 + NAMES.index(name)
    learning = [p for p in model.peft_model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    disturb(model.gate, 0.5, seed)
    own = frozen_queries(model, spoken(name, 120, seed))
    other = [frozen_queries(model, spoken(rest, 120, seed)) for rest in WORDS if rest != name]
    model.set_relevance(fit_relevance(own, torch.cat(other)).head)
    model.set_queries(own)


def several(gate: str = "query_aware", architecture: str = "llama", names: list[str] = NAMES) -> SiameseForCausalLM:
    """A model of tasks that differ in their words."""
    base = tiny_base(architecture)
    model = SiameseForCausalLM.from_base(base, METHODS["lora"](base), gate=gate, gate_rank=4, task=names[0]).eval()
    teach(model, names[0])
    for name in names[1:]:
        model.add_task(name, METHODS["lora"](tiny_base(architecture)), gate=gate, gate_rank=4)
        teach(model, name)
    model.task = None
    return model


def alone(model: SiameseForCausalLM, name: str, architecture: str = "llama") -> SiameseForCausalLM:
    """Today's model of one task, with the weights of one of several."""
    part = model.part(name)
    base = tiny_base(architecture)
    made = SiameseForCausalLM.from_base(base, METHODS["lora"](base), gate=part.settings["gate"], gate_rank=4)
    weights = {n.replace(f".{name}.", ".default."): p for n, p in model.peft_model.state_dict().items()}
    made.peft_model.load_state_dict({n: weights[n] for n in made.peft_model.state_dict()})
    made.gate.load_state_dict(part.gate.state_dict())
    made.set_relevance(part.relevance)
    return made.eval()


def generate(model: Any, prompts: list[list[int]], **kwargs: Any) -> list[list[int]]:
    batch = padded(prompts)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(batch.ids, attention_mask=batch.mask, **settings)[:, batch.ids.shape[1] :].tolist()


def told(model: SiameseForCausalLM, name: str | None, count: int) -> list[list[int]]:
    """Prompts of a task's words, or of no task's, that the model takes for just that; a random one takes some for another's."""
    prompts = spoken(name, 60, 7)
    chosen = model.choose(frozen_queries(model, prompts)[:, None], Recall())
    found = [prompt for prompt, owner in zip(prompts, chosen, strict=True) if owner == name]
    assert len(found) >= count
    return found[:count]


@contextmanager
def runs(model: SiameseForCausalLM) -> Iterator[list[tuple[str, int]]]:
    """Whose adapter's layers are run within, on how many rows; the frozen stream counts as "base"."""
    seen: list[tuple[str, int]] = []
    streams = model.streams
    originals = {name: getattr(streams, name) for name in ("frozen", "tuned", "both")}

    def recorded(kind: str) -> Any:
        def run(inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rows = len(inputs["input_ids"])
            if kind != "tuned":
                seen.append(("base", rows))
            if kind != "frozen":
                seen.append((str(streams.peft_model.active_adapter), rows))
            return originals[kind](inputs, *args, **kwargs)

        return run

    for name in originals:
        setattr(streams, name, recorded(name))
    try:
        yield seen
    finally:
        for name in originals:
            delattr(streams, name)


# -- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["query_aware", "tuned"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "lfm2", "gpt2"])
def test_a_task_is_what_it_would_be_alone_bit_for_bit(gate: str, architecture: str) -> None:
    model = several(gate, architecture)
    for name in NAMES:
        single = alone(model, name, architecture)
        for prompt in [*told(model, name, 3), *(others := told(model, None, 2))]:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                expected = single(ids, prompt_length=len(prompt)).logits
                assert torch.equal(model(ids, prompt_length=len(prompt), task=name).logits, expected)
                if prompt in others:  # the base's pass alone, not one of both
                    expected = single(ids, force_gate=1.0).logits
                assert torch.equal(model(ids, prompt_length=len(prompt)).logits, expected)
            assert generate(model, [prompt], task=name) == generate(single, [prompt]) == generate(model, [prompt])


@pytest.mark.parametrize("gate", ["query_aware", "tuned", "token"])
def test_rows_of_several_tasks_are_each_answered_by_their_own(gate: str) -> None:
    model = several(gate)
    base = tiny_base("llama")
    wanted = []
    for prompt, name in zip(PROMPTS, OWNERS, strict=True):
        wanted += generate(base if name is None else alone(model, name), [prompt])
    assert generate(model, PROMPTS) == wanted
    assert [generate(model, [prompt])[0] for prompt in PROMPTS] == wanted
    assert generate(model, PROMPTS, use_cache=False) == wanted
    assert generate(model, PROMPTS, cache_implementation="static") == wanted
    assert len({tuple(answer) for answer in wanted}) > len(wanted) // 2


@pytest.mark.parametrize("gate", ["query_aware", "tuned"])
def test_forward_puts_rows_together_in_order(gate: str) -> None:
    model = several(gate)
    batch = padded(PROMPTS, "right")
    with torch.no_grad():
        together = model(batch.ids, attention_mask=batch.mask, prompt_mask=batch.mask, output_gate=True)
        assert together.past_key_values is None
        for row, prompt in enumerate(PROMPTS):
            single = model(torch.tensor([prompt]), prompt_length=len(prompt), output_gate=True)
            for name in ("logits", "gate"):
                assert_same(getattr(together, name)[row, : len(prompt)], getattr(single, name)[0])
        plain = model(batch.ids, attention_mask=batch.mask, prompt_mask=batch.mask, return_dict=False)
        assert torch.equal(plain[0], together.logits)
    assert [bool((gate == 1).all()) for gate in together.gate] == [name is None for name in OWNERS]


def test_the_loss_is_the_mean_over_all_rows() -> None:
    model = several()
    batch = padded(PROMPTS, "left")
    labels = batch.ids.masked_fill(~batch.mask.bool(), -100)
    labels[:, :-2] = -100
    with torch.no_grad():
        together = model(batch.ids, attention_mask=batch.mask, labels=labels)
        assert together.logits is None
        single = [
            model(batch.ids[i : i + 1], attention_mask=batch.mask[i : i + 1], labels=labels[i : i + 1]).loss
            for i in range(len(PROMPTS))
        ]
    assert_same(together.loss, torch.stack(single).mean())


def test_streams_that_are_ruled_out_are_not_run() -> None:
    """And a query costs no more passes than with one task."""
    for gate in ("tuned", "query_aware"):
        model = several(gate)
        for prompt, name in zip(PROMPTS, OWNERS, strict=True):
            with runs(model) as seen:
                generate(model, [prompt])
            assert {who for who, _ in seen} == ({"base"} if name is None else {"base", name})
            with runs(single := alone(model, name or "red")) as before:
                generate(single, [prompt])
            assert [who == "base" for who, _ in seen] == [who == "base" for who, _ in before]


def test_each_group_runs_its_own_rows_alone() -> None:
    model = several("tuned")
    with runs(model) as seen:
        generate(model, PROMPTS, max_new_tokens=1)
    assert seen[0] == ("base", len(PROMPTS))  # who is whose
    assert sorted(seen[1:]) == sorted([("base", 2), *((name, 2) for name in NAMES)])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 2},
        {"recall": 0.4},
        {"recall": -math.inf},
        {"recall": math.inf},
        {"recall_ceiling": 0.7},
        {"force_gate": 0.0},
        {"force_gate": 0.5},
    ],
    ids=str,
)
def test_ways_of_decoding(settings: dict[str, Any]) -> None:
    model = several()
    few = [0, 3, 6] if "prompt_lookup_num_tokens" not in settings else [1]
    each = [answer for place in few for answer in generate(model, [PROMPTS[place]], **settings)]
    assert generate(model, [PROMPTS[place] for place in few], **settings) == each
    for place in few:
        owner = OWNERS[place]
        if owner is not None:
            assert generate(model, [PROMPTS[place]], **settings) == generate(
                alone(model, owner), [PROMPTS[place]], **settings
            )


@pytest.mark.parametrize("source", ["an argument", "a configuration", "the model's configuration"])
def test_rows_are_padded_alike_within_tasks_and_across_them(source: str) -> None:
    """Without a padding token by the first that ends, as `generate` does."""
    model = several()
    prompts = PROMPTS[:-1]  # of the first task one alone, which is padded where tasks are put together
    batch, free = padded(prompts), generate(model, prompts)
    end = free[0][1]
    unsaid = next(token for token in range(VOCAB) if all(token not in row for row in free))
    ends, kwargs = {"eos_token_id": [end, unsaid]}, {"max_new_tokens": 6, "do_sample": False}
    own = model.generation_config
    own.pad_token_id, own.eos_token_id = None, 9
    if source == "an argument":
        own.pad_token_id = 9
        found = model.generate(batch.ids, attention_mask=batch.mask, pad_token_id=None, **ends, **kwargs)
    elif source == "a configuration":
        found = model.generate(batch.ids, GenerationConfig(**ends, **kwargs), attention_mask=batch.mask)
    else:
        own.eos_token_id = ends["eos_token_id"]
        found = model.generate(batch.ids, attention_mask=batch.mask, **kwargs)
    stopped = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert [len(row) for row in stopped].count(6) < len(stopped) and len(stopped[0]) < 6
    assert found[:, batch.ids.shape[1] :].tolist() == [row + [end] * (6 - len(row)) for row in stopped]


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["greedy", "beams", "samples"],
)
def test_allowed_tokens_are_asked_for_by_a_prompts_place_in_the_batch(settings: dict[str, Any]) -> None:
    """As with one task: by the number of the prompt, of sampled sequences by that of the sequence."""
    model = several()
    asked: list[tuple[int, list[int]]] = []

    def allowed(place: int, ids: Tensor) -> list[int]:
        asked.append((place, ids[: len(batch.ids[0])].tolist()))
        return [2 * place + 1, 2 * place + 2]

    batch = padded(PROMPTS)
    for task in ("red", None):
        asked.clear()
        found = generate(model, PROMPTS, prefix_allowed_tokens_fn=allowed, task=task, max_new_tokens=2, **settings)
        each = settings.get("num_return_sequences", 1)
        assert len(found) == each * len(PROMPTS)
        counted = each if "do_sample" in settings else 1
        assert all(ids == batch.ids[place // counted].tolist() for place, ids in asked)
        for row, answer in enumerate(found):
            place = row if counted > 1 else row // each
            assert set(answer) <= {2 * place + 1, 2 * place + 2}


def test_compiled_decoding_says_the_same() -> None:
    model = several()
    compiled = {
        "cache_implementation": "static",
        "compile_config": CompileConfig(mode="default", fullgraph=True, backend="aot_eager"),
    }
    assert generate(model, PROMPTS[:2], **compiled) == generate(model, PROMPTS[:2])


def test_threads_do_not_take_each_others_tasks() -> None:
    """Each with prompts of its own task, and of several, whatever the other's call has activated meanwhile."""
    model = several()
    calls = [spoken("red", 1, 5, 6, 7), spoken("green", 1, 5, 6, 7), PROMPTS[1:4]]
    wanted = [generate(model, prompts) for prompts in calls]
    found: list[list[Any]] = [[] for _ in calls]
    owners: list[list[str | None]] = []

    def ask(place: int) -> None:
        for _ in range(5):
            found[place].append(generate(model, calls[place]))
            owners.append(model.find_tasks(input_ids=torch.tensor(calls[0])))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[answer] * 5 for answer in wanted]
    assert owners == [["red"]] * 15


def test_a_task_is_set_between_calls() -> None:
    """Of another thread, too: a call that has begun ends with the task that it began with."""
    model = several()
    wanted = generate(model, PROMPTS[:2], task="red")
    layer, seen, threads = model.base.get_decoder().layers[0], [], []

    def meddle(*_: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=setattr, args=(model, "task", "green")))
            threads[0].start()
            threads[0].join(timeout=0.2)
        seen.append(model.active)

    hook = layer.register_forward_hook(meddle)
    assert generate(model, PROMPTS[:2], task="red") == wanted
    hook.remove()
    threads[0].join()
    assert set(seen) == {"red"} and model.task == "green"


def test_a_base_model_is_given_what_it_takes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose forward takes no further arguments, as of code from the Hub."""
    model = several()
    wanted = generate(model, PROMPTS), generate(model, PROMPTS[:2], task="red")
    inner = type(model.base).forward
    names = [name for name in inspect.signature(inner).parameters if name != "kwargs"]

    def closed(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert set(kwargs) <= set(names), kwargs.keys()
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(type(model.base), "forward", closed)
    assert (generate(model, PROMPTS), generate(model, PROMPTS[:2], task="red")) == wanted


def test_the_dial_shifts_all_heads_alike() -> None:
    model = several("tuned")
    rows = torch.tensor([math.inf, 0.0, -math.inf, 0.0, -math.inf, 0.0, math.inf, -math.inf])
    found = generate(model, PROMPTS, recall=rows)
    assert found == [
        generate(model, [prompt], recall=float(shift))[0] for prompt, shift in zip(PROMPTS, rows, strict=True)
    ]
    base = tiny_base("llama")
    assert found[0] == generate(base, [PROMPTS[0]])[0]
    assert found[4] != generate(base, [PROMPTS[4]])[0]  # nobody's, but the adapted model was asked for


def test_a_cache_stepped_by_hand_belongs_to_one_task() -> None:
    model = several()
    single = alone(model, "green")
    prompt = spoken("green", 1, 3)[0]
    ids, step = torch.tensor([prompt]), torch.tensor([[7]])
    with torch.no_grad():
        first, expected = model(ids, prompt_length=len(prompt)), single(ids, prompt_length=len(prompt))
        assert first.past_key_values.task == "green"
        generate(model, [PROMPTS[0]])  # another task's turn between
        after = model(step, past_key_values=first.past_key_values).logits
        assert torch.equal(after, single(step, past_key_values=expected.past_key_values).logits)
        with pytest.raises(InputError, match="this cache is of task 'green', got task 'red'"):
            model(step, past_key_values=first.past_key_values, task="red")
        ours = model(torch.tensor([PROMPTS[3]]), prompt_length=len(PROMPTS[3]))
        base = tiny_base("llama")
        theirs = base(torch.tensor([PROMPTS[3]]))
        assert_same(
            model(step, past_key_values=ours.past_key_values).logits,
            base(step, past_key_values=theirs.past_key_values).logits,
        )
    batch = padded(PROMPTS)
    with pytest.raises(InputError, match="rows of this batch go to different tasks"):
        model(batch.ids, attention_mask=batch.mask, prompt_length=batch.ids.shape[1], use_cache=True)


def test_a_conversations_last_turn_decides() -> None:
    model = several()
    model.config.relevance_turn = [62]
    before, last = spoken("red", 1, 3, 24, 25)[0], spoken("green", 1, 3, 24, 25)[0]
    for talk, name in (([62, *before, 62, *last], "green"), ([62, *last, 62, *before], "red")):
        said = {task: generate(model, [talk], task=task, force_gate=0.0) for task in ("red", "green")}
        assert generate(model, [talk], force_gate=0.0) == said.pop(name)
        assert generate(model, [talk], force_gate=0.0) not in said.values()


def test_what_cannot_be_told() -> None:
    model = several()
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(InputError, match="inputs_embeds are for cannot be told"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(InputError, match="packed rows may hold several tasks"):
        model(torch.tensor([[1, 2, 3, 4]]), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)
    with pytest.raises(InputError, match=r"there is no task 'pink'; there are red, green, blue"):
        generate(model, PROMPTS, task="pink")
    with pytest.raises(InputError, match="no one answer for prompts of several tasks"):
        generate(model, PROMPTS, return_dict_in_generate=True)
    with pytest.raises(InputError, match="no one answer for prompts of several tasks"):
        generate(model, PROMPTS, generation_config=GenerationConfig(return_dict_in_generate=True))
    model.generation_config.return_dict_in_generate = True
    with pytest.raises(InputError, match="no one answer for prompts of several tasks"):
        generate(model, PROMPTS)
    assert len(generate(model, PROMPTS, return_dict_in_generate=False)) == len(PROMPTS)
    with pytest.raises(InputError, match="of several tasks one learns"):
        model.train()(ids, labels=ids)
    with pytest.raises(InputError, match="there is no task 'x'; there are default"):
        tiny_siamese("llama", "lora")(ids, task="x")


# -- the list --------------------------------------------------------------------------------------------------------


def test_tasks_before_stay_as_they_are_while_one_learns() -> None:
    model = several(names=["red", "green"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.add_task("blue", LoraConfig(r=4, target_modules=["q_proj"]))
    assert model.task == model.active == "blue" and model.tasks == ["red", "green", "blue"]
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(".blue." in name or name.startswith("gate.") for name in learning)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.tensor(spoken("blue", 4, 1, 6, 7))
    for _ in range(2):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
    assert model.peft_model.active_adapter == "blue"
    now = dict(model.named_parameters())
    for name, value in before.items():
        if name.startswith(("gate.", "relevance.")):  # of the task that was active then
            name = f"parked.green.{name}"
        assert torch.equal(now[name], value), name
    assert any(float(now[name].detach().abs().max()) > 0 for name in learning if "lora_B" in name)
    # Using the others does not make them learn.
    model.eval()
    model.task = None
    generate(model, [PROMPTS[0]])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name if "blue" in name else f"parked.blue.{name}" for name in learning
    }


def test_a_task_without_a_head_answers_only_by_its_name() -> None:
    model = several(names=["red", "green"])
    said = generate(model, PROMPTS)
    model.add_task("blue", LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(InputError, match="task 'blue' has no relevance head, so that another could not be told"):
        model.add_task("more", LoraConfig(r=4))
    model.task = None
    assert generate(model, PROMPTS) == said
    model.activate("blue")
    model.set_relevance(RelevanceHead(64))
    with pytest.raises(InputError, match="task 'blue' has no stored queries.*imsm adopt"):
        model.add_task("more", LoraConfig(r=4))


def test_a_new_head_leaves_to_the_tasks_before_what_is_theirs() -> None:
    nobodys = spoken(None, 120, 2)
    # Each has a word of the other task: against dreams alone that other task would look like this one.
    green = [[one[0], *other] for one, other in zip(spoken("red", 120, 1), spoken("green", 120, 1), strict=True)]
    model = several(names=["red"])
    model.add_task("green", METHODS["lora"](tiny_base("llama")))
    border = fit_border(model, green, nobodys)
    assert border.others_left is not None and border.others_left > 0.95 and border.dreams_kept > 0.95
    assert model.rivals == ["red", "green"] and model.router is not None
    first = tiny_siamese("llama", "lora")
    assert fit_border(first, green, nobodys).others_left is None
    red = model.part("red").queries
    assert red is not None and first.relevance is not None
    assert float((first.relevance(red) > 0).float().mean()) < 0.7


def test_a_lower_ceiling_mixes_what_no_head_claims_the_same_with_and_without_a_cache() -> None:
    model = several("tuned")
    nobodys = told(model, None, 1)
    for ceiling in (0.5, 0.999):
        said = [generate(model, nobodys, recall_ceiling=ceiling, use_cache=cached) for cached in (True, False)]
        assert said[0] == said[1]
        # Beside rows of other tasks, too.
        assert generate(model, [*PROMPTS, *nobodys], recall_ceiling=ceiling)[-1:] == said[0]
    assert generate(model, nobodys, recall_ceiling=0.999, use_cache=False) == generate(model, nobodys, force_gate=1.0)


def test_tasks_are_saved_and_loaded_when_the_first_has_no_head(tmp_path: Path) -> None:
    model = several()
    model.activate("red")
    model.set_relevance(None)
    model.task = None
    assert model.rivals == ["green", "blue"]
    said = generate(model, PROMPTS)
    model.save_pretrained(tmp_path)
    loaded = SiameseForCausalLM.from_pretrained(tmp_path, base=tiny_base("llama")).eval()
    assert loaded.rivals == ["green", "blue"] and generate(loaded, PROMPTS) == said


def test_a_task_that_is_removed_leaves_the_others() -> None:
    model = several()
    said = {name: generate(model, [PROMPTS[OWNERS.index(name)]]) for name in NAMES}
    for gone, left in (("green", ["red", "blue"]), ("red", ["blue"])):
        model.remove_task(gone)
        assert model.tasks == list(model.peft_model.peft_config) == left
        for name in left:
            assert generate(model, [PROMPTS[OWNERS.index(name)]]) == said[name]
    assert not model.parked and model.router is None
    assert not any(".red." in name or ".green." in name for name, _ in model.named_parameters())
    with pytest.raises(InputError, match="'blue' is the only task"):
        model.remove_task("blue")


@pytest.mark.parametrize("name", ["", "a/b", "-x", "keys", "type", "lora", "red", "a.b"])
def test_impossible_names(name: str) -> None:
    model = several(names=["red"])
    with pytest.raises(InputError, match="name"):
        model.add_task(name, LoraConfig(r=4))
    assert model.tasks == ["red"] and list(model.peft_model.peft_config) == ["red"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("1", "a number"),
        ("2024", "a number"),
        ("mlp", "which is one of model.layers.0.mlp;"),
        ("model", "which is one of"),
        ("layers", "which is one of"),
        ("q_proj", "which is one of"),
        ("weight", "which is one of"),
        ("lora_A", "which is one of"),
        ("base_model", "which is one of"),
    ],
)
def test_names_by_which_peft_would_lose_weights(name: str, path: str) -> None:
    base = tiny_base("llama")
    with pytest.raises(InputError) as first:
        SiameseForCausalLM.from_base(base, METHODS["lora"](base), task=name)
    model = SiameseForCausalLM.from_base(base, METHODS["lora"](base), task="red")
    model.set_relevance(RelevanceHead(64))
    model.set_queries(torch.randn(20, 64))
    with pytest.raises(InputError) as second:
        model.add_task(name, METHODS["lora"](tiny_base("llama")))
    assert model.tasks == ["red"] and list(model.peft_model.peft_config) == ["red"]
    for refused in (first, second):
        message = str(refused.value)
        assert (
            "a task's name must not be" in message and f"got {name!r}" in message and "give it another name" in message
        )
    assert path in str(first.value)


METHODS_OF_SEVERAL = [name for name in METHODS if name not in ("adalora", "prefix_tuning")]


@pytest.mark.parametrize("method", METHODS_OF_SEVERAL)
def test_the_files_of_adapters_are_whole_and_what_is_not_is_found(tmp_path: Path, method: str) -> None:
    base = tiny_base("llama")
    model = SiameseForCausalLM.from_base(base, METHODS[method](base), task="red")
    adapters = model.peft_model
    alone = tensor_names(adapters, "red")
    adapters.add_adapter("green", METHODS[method](tiny_base("llama")))
    for name in ("red", "green"):
        (tmp_path / name).mkdir()
        write_adapter(model, name, tmp_path / name)
        assert saved_tensors(tmp_path / name) == alone
    # The name of a layer, given behind our back.
    adapters.add_adapter("1", METHODS[method](tiny_base("llama")))
    lost = {name for name in alone if ".1." in name}
    assert lost
    (tmp_path / "lost").mkdir()
    with pytest.raises(InputError) as refused:
        write_adapter(model, "red", tmp_path / "lost")
    message = f"peft would leave out {len(lost)} tensors of task 'red' when it saves them, such as {min(lost)}, because another"
    assert message in str(refused.value) and "is a part of that: '1'; give it another name" in str(refused.value)
    assert not any((tmp_path / "lost").iterdir())


def test_a_task_before_whose_name_would_cost_the_new_one_weights() -> None:
    """One of an older checkpoint, harmless until an adapter reaches the layers that it is called by."""
    base, reach = tiny_base("llama"), LoraConfig(r=4, target_modules=["up_proj"])
    model = SiameseForCausalLM.from_base(base, LoraConfig(r=4, target_modules=["q_proj"]), task="red")
    model.place_task("mlp", LoraConfig(r=4, target_modules=["q_proj"]), Task(model.gate, None, None, {}), new=False)
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(InputError, match=r"leave out 4 tensors of task 'green' .*'mlp'; .*imsm task rename"):
        model.place_task("green", reach, Task(model.gate, None, None, {}))
    assert model.tasks == list(model.peft_model.peft_config) == ["red", "mlp"]
    assert {id(p) for p in model.parameters() if p.requires_grad} == learning


def test_adapters_that_do_not_go_together_leave_the_model_as_it_was() -> None:
    model = several(names=["red", "green"])
    said = generate(model, PROMPTS)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    for config, message in (
        (METHODS["ia3"](tiny_base("llama")), "different peft types"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "needs adapters in its layers"),
        (LoraConfig(r=4, target_modules=["lm_head"]), "changes the output head"),
        (LoraConfig(r=4, target_modules=["nothing"]), "peft cannot put this adapter"),
    ):
        with pytest.raises(InputError, match=message):
            model.add_task("blue", config)
        assert model.tasks == list(model.peft_model.peft_config) == ["red", "green"]
    assert generate(model, PROMPTS) == said
    now = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name][0], before[name][0]) and now[name][1] == before[name][1] for name in now)


def test_heads_of_all_tasks_read_the_same() -> None:
    model = several()
    with pytest.raises(InputError, match="the heads of all tasks read the same"):
        model.set_relevance(RelevanceHead(64), [7, 8])
    with pytest.raises(InputError, match="reads 2 x 32 values.*this one reads 128"):
        model.set_relevance(RelevanceHead(128))
    model.activate("red")
    model.set_relevance(None)
    assert model.rivals == ["green", "blue"] and model.config.relevance_turn == []
    assert generate(model, [PROMPTS[1]]) == generate(model, [PROMPTS[1]], task="green")


# -- the parts -------------------------------------------------------------------------------------------------------


def clouds(count: int, tasks: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(tasks, 24, generator=generator) * 2
    return [centre + torch.randn(count, 24, generator=generator) for centre in centres]


def test_the_router_tells_stores_apart() -> None:
    seen, unseen = zip(*((part[:50], part[50:]) for part in clouds(90)), strict=True)
    router = fit_router([store(part) for part in seen])
    for place, part in enumerate(unseen):
        assert (router(part).argmax(dim=1) == place).float().mean() > 0.95
    again = fit_router([store(part) for part in seen])
    assert torch.equal(router.weight, again.weight) and torch.equal(router.bias, again.bias)
    # A task with few queries weighs as much as one with many.
    uneven = fit_router([seen[0], seen[1][:5]])
    assert (uneven(unseen[1]).argmax(dim=1) == 1).float().mean() > 0.9
    with pytest.raises(InputError, match="two tasks or more"):
        fit_router([seen[0]])


def test_the_router_speaks_among_claims_alone() -> None:
    claims = torch.tensor([[True, True, False], [False, False, False], [False, True, False]])
    logits = torch.tensor([[0.0, 1.0, 5.0], [3.0, 1.0, 0.0], [9.0, 0.0, 0.0]])
    assert pick(claims, logits) == [1, -1, 1]
    assert pick(claims[1:], None) == [-1, 1]


def test_stores_are_small_and_without_text() -> None:
    queries = torch.randn(1000, 16) * 1e4
    kept = store(queries)
    assert kept.shape == (STORED, 16) and kept.dtype == torch.float16 and bool(kept.isfinite().all())
    assert torch.equal(store(queries[:9]), queries[:9].half())
    assert store(torch.full((1, 2), 1e9)).isfinite().all()
    assert negatives([], 10) is None
    mixed = negatives([torch.zeros(50, 4).half(), torch.ones(3, 4).half()], 20)
    assert mixed is not None and mixed.dtype == torch.float32
    assert (mixed == 0).all(dim=1).sum() == 10 and (mixed == 1).all(dim=1).sum() == 3


def test_random_prompts_are_not_what_tasks_are_made_of() -> None:
    """The fixture itself: tasks are told apart on prompts that nothing was fitted to."""
    model = several()
    for name in WORDS:
        queries = frozen_queries(model, spoken(name, 30, 999))
        found = model.choose(queries[:, None], Recall())
        assert found.count(name) >= 28
    assert len(set(map(len, random_prompts()))) > 1
