"""The relevance head and the recall dial: who answers, exactly what they say, and which streams are run for it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_same
from prompts import padded, random_prompts
from torch import Tensor
from transformers import CompileConfig
from zoo import ARCHITECTURES, tiny_base, tiny_siamese

from imsm import GATES, InputError, SiameseForCausalLM, TwinCache
from imsm.clusters import clusters
from imsm.data.turns import turn_closer, turn_opener
from imsm.gates import Dial
from imsm.relevance import RelevanceHead, fit_relevance
from imsm.turns import last_turn, last_turns

PROMPTS = random_prompts((6, 3, 9, 5, 12, 7))
BATCH = padded(PROMPTS)


def with_head(gate: str, architecture: str = "llama", method: str = "lora") -> SiameseForCausalLM:
    """A model whose head leaves half of `PROMPTS` to the base model; `leave` tells which."""
    model = tiny_siamese(architecture, method, gate)
    head = RelevanceHead(len(query_of(model, PROMPTS[0])))
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(3))
        head.bias.zero_()
        model.set_relevance(head)
        logits = torch.stack([head(query_of(model, prompt)) for prompt in PROMPTS]).flatten()
        head.bias -= logits.median() + 1e-3
    return model


def query_of(model: SiameseForCausalLM, prompt: list[int]) -> Tensor:
    """What the head reads of a prompt, (2d,)."""
    with torch.no_grad():
        model.streams.frozen({"input_ids": torch.tensor([prompt])}, None)
        memory = model.streams.tap.memory
        assert memory is not None
    return torch.cat([memory[0].float().mean(dim=0), memory[0, -1].float()])


def left(model: SiameseForCausalLM, shift: float = 0.0) -> list[bool]:
    """Which of `PROMPTS` go to the base model."""
    assert model.relevance is not None
    with torch.no_grad():
        return [bool(model.relevance(query_of(model, prompt)) + shift > 0) for prompt in PROMPTS]


def generate(model: Any, prompts: list[list[int]], **kwargs: Any) -> list[list[int]]:
    batch = padded(prompts)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(batch.ids, attention_mask=batch.mask, **settings)[:, batch.ids.shape[1] :].tolist()


@contextmanager
def runs(model: SiameseForCausalLM) -> Iterator[list[str]]:
    """Names of the streams that are run within, in order."""
    seen: list[str] = []
    streams = model.streams
    originals = {name: getattr(streams, name) for name in ("frozen", "tuned", "both")}

    def recorded(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return originals[name](*args, **kwargs)

        return run

    for name in originals:
        setattr(streams, name, recorded(name))
    try:
        yield seen
    finally:
        for name in originals:
            delattr(streams, name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_prompt_gets_its_mind_whole(architecture: str) -> None:
    """Left to the base: the base model's own answer. The task's: what the gate alone would say."""
    model = with_head("query_aware", architecture)
    to_base = left(model)
    assert 0 < sum(to_base) < len(to_base)
    mixed = generate(model, PROMPTS)
    head = model.relevance
    model.set_relevance(None)
    wanted = zip(generate(tiny_base(architecture), PROMPTS), generate(model, PROMPTS), strict=True)
    model.set_relevance(head)
    assert mixed == [base if leave else own for leave, (base, own) in zip(to_base, wanted, strict=True)]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_alone_and_together_uncached_and_cached(gate: str, method: str) -> None:
    model = with_head(gate, method=method)
    together = generate(model, PROMPTS)
    assert together == generate(model, PROMPTS, use_cache=False)
    assert together == [generate(model, [prompt])[0] for prompt in PROMPTS]
    if method == "lora":
        assert together == generate(model, PROMPTS, cache_implementation="static")


def test_logits_are_the_base_models_bit_for_bit() -> None:
    model = with_head("tuned")
    model.passes = "two"  # a shared pass differs by rounding
    base = tiny_base("llama").eval()
    for prompt, leave in zip(PROMPTS, left(model), strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = model(ids, prompt_length=len(prompt)).logits
            assert torch.equal(found, model(ids, force_gate=1.0 if leave else 0.0).logits)
            if leave:
                assert_same(found, base(ids).logits)


@pytest.mark.parametrize(("gate", "on_task"), [("tuned", {"tuned"}), ("query_aware", {"both"})])
def test_streams_that_are_not_needed_are_not_run(gate: str, on_task: set[str]) -> None:
    model = with_head(gate)
    for prompt, leave in zip(PROMPTS, left(model), strict=True):
        with runs(model) as seen:
            generate(model, [prompt])
        assert seen[0] == "frozen"
        if leave:
            assert set(seen) == {"frozen"}
        else:
            assert seen[1] == "tuned" and set(seen[2:]) == on_task


def test_static_caches_go_on_with_one_stream() -> None:
    model = with_head("tuned")
    for prompt, leave in zip(PROMPTS, left(model), strict=True):
        with runs(model) as seen:
            generate(model, [prompt], cache_implementation="static")
        assert seen[0] == "both" and set(seen[1:]) == {"frozen" if leave else "tuned"}


def test_compiled_decoding_says_the_same() -> None:
    model = with_head("query_aware")
    chosen = [PROMPTS[left(model).index(True)], PROMPTS[left(model).index(False)]]
    compiled = {
        "cache_implementation": "static",
        "compile_config": CompileConfig(mode="default", fullgraph=True, backend="aot_eager"),
    }
    for prompts in ([chosen[0]], chosen):
        assert generate(model, prompts, **compiled) == generate(model, prompts)
    assert generate(model, chosen, recall=1.5, **compiled) == generate(model, chosen, recall=1.5)


def test_beams_and_sequences() -> None:
    model = with_head("query_aware")
    for prompt in PROMPTS[:4]:
        settings = {"num_beams": 3, "num_return_sequences": 2}
        assert generate(model, [prompt], **settings) == generate(model, [prompt], use_cache=False, **settings)


# -- the dial --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_the_dials_ends_are_the_two_minds(gate: str) -> None:
    model = tiny_siamese("llama", "lora", gate)
    for end, forced in ((math.inf, 1.0), (-math.inf, 0.0)):
        assert generate(model, PROMPTS, recall=end) == generate(model, PROMPTS, force_gate=forced)
    assert generate(model, PROMPTS, recall=0.0) == generate(model, PROMPTS)


@pytest.mark.parametrize("gate", [name for name in GATES if name not in ("tuned", "residual")])
def test_the_dial_shifts_logits(gate: str) -> None:
    model = tiny_siamese("llama", "lora", gate)
    with torch.no_grad():
        plain = model(BATCH.ids, attention_mask=BATCH.mask, output_gate=True).gate
        turned = model(BATCH.ids, attention_mask=BATCH.mask, output_gate=True, recall=0.7).gate
    attended = BATCH.mask.bool()
    assert_same(turned[attended], torch.sigmoid(torch.logit(plain) + 0.7)[attended])


def test_a_dial_for_each_row() -> None:
    model = tiny_siamese("llama", "lora")
    shifts = torch.tensor([math.inf, -math.inf, 0.0, 1.0])
    found = generate(model, PROMPTS[:4], recall=shifts)
    assert found == [generate(model, [prompt], recall=float(shift))[0] for prompt, shift in zip(PROMPTS, shifts)]  # noqa: B905 (four of them)


def test_floor_and_ceiling_bound_the_gate() -> None:
    for gate in ("query_aware", "tuned"):
        model = with_head(gate)
        with torch.no_grad():
            out = model(BATCH.ids, attention_mask=BATCH.mask, output_gate=True, recall_floor=0.3, recall_ceiling=0.6)
        assert out.gate.min() == pytest.approx(0.3 if gate == "tuned" else out.gate.min().item())
        assert out.gate.min() >= 0.3 - 1e-6 and out.gate.max() == pytest.approx(0.6)


def test_the_dial_moves_the_border() -> None:
    model = with_head("tuned")
    assert model.relevance is not None
    for shift in (-0.5, 0.5):
        wanted = [
            generate(model, [prompt], force_gate=float(leave))[0]
            for prompt, leave in zip(PROMPTS, left(model, shift), strict=True)
        ]
        assert generate(model, PROMPTS, recall=shift) == wanted
    assert left(model, 0.5) != left(model, -0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recall": math.nan}, "recall must be a number"),
        ({"recall": "much"}, "recall must be a number"),
        ({"recall": torch.zeros(3)}, r"one for each of 2 rows, got the shape \(3,\)"),
        ({"recall_floor": 0.7, "recall_ceiling": 0.2}, "floor ≤ ceiling ≤ 1, got 0.7 and 0.2"),
        ({"recall_floor": -1.0}, "0 ≤ floor"),
        ({"recall": 1.0, "force_gate": 0.5}, "nothing to turn"),
    ],
)
def test_impossible_dials(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_siamese("llama", "lora")(torch.tensor([[1, 2], [3, 4]]), **settings)


def test_training_rows_keep_their_dials() -> None:
    model = tiny_siamese("llama", "lora")
    labels = BATCH.ids.masked_fill(~BATCH.mask.bool(), -100)
    labels[:, :-3] = -100
    shifts = torch.linspace(-1, 1, len(PROMPTS))
    with torch.no_grad():
        together = model(BATCH.ids, attention_mask=BATCH.mask, labels=labels, recall=shifts).loss
        alone = [
            model(
                BATCH.ids[i : i + 1],
                attention_mask=BATCH.mask[i : i + 1],
                labels=labels[i : i + 1],
                recall=float(shift),
            ).loss
            for i, shift in enumerate(shifts)
        ]
    assert_same(together, torch.stack(alone).mean())


def test_the_dials_turn_is_monotonous() -> None:
    gate = torch.rand(50)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    turned = [Dial(torch.tensor(shift), zero, one).turn(gate) for shift in (-math.inf, -2.0, 0.0, 3.0, math.inf)]
    for less, more in pairwise(turned):
        assert (less < more).all()
    assert_same(turned[2], gate)


# -- the fit ---------------------------------------------------------------------------------------------------------


def clouds(shift: float, count: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    task, other = torch.randn(2, count, 16, generator=generator)
    return task, other + shift / 4


def test_the_fit_tells_two_clouds_apart() -> None:
    task, other = clouds(6.0)
    fitted = fit_relevance(task[:200], other[:200])
    assert (fitted.head(task[200:]) < 0).float().mean() > 0.97
    assert (fitted.head(other[200:]) > 0).float().mean() > 0.97
    assert fitted.head.weight.dtype == torch.float32
    again = fit_relevance(task[:200], other[:200])
    assert torch.equal(fitted.head.weight, again.head.weight)


def test_where_both_overlap_the_false_recalls_are_as_asked() -> None:
    task, other = clouds(1.0)
    for asked in (0.02, 0.2):
        head = fit_relevance(task, other, false_recall=asked).head
        assert float((head(task) > 0).float().mean()) == pytest.approx(asked, abs=0.011)


def test_anchors_are_left_to_the_base_model_unless_they_lie_among_the_task() -> None:
    task, other = clouds(6.0)
    between = task[:12] + 0.55 * (other[:12] - task[:12])
    others = torch.cat([other, between])
    plain, drawn = fit_relevance(task, others).head, fit_relevance(task, others, None, None, between).head
    assert not (plain(between) > 0).all() and (drawn(between) > 0).all()
    assert torch.equal(plain.weight, drawn.weight) and float((drawn(task) < 0).float().mean()) > 0.98
    # Those that are beyond do not move it, and those among the task's own move it to the task's end.
    assert torch.equal(fit_relevance(task, others, None, None, other[:5]).head.bias, plain.bias)
    among = fit_relevance(task, others, None, None, task[:5]).head
    assert float((among(task) > 0).float().mean()) == pytest.approx(0.01, abs=0.003)


def kinds(spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """The task's queries are of ten kinds, each about a centre of its own; others, and the kind of each of the task's."""
    generator = torch.Generator().manual_seed(0)
    alike = torch.arange(10).repeat_interleave(20)
    centres = torch.randn(10, 64, generator=generator) * spread
    task = centres[alike] + torch.randn(200, 64, generator=generator) / 2
    other = torch.randn(200, 64, generator=generator) * (1 + spread) + 1.5
    return task, other, alike


def test_expectations_are_of_queries_that_were_not_seen() -> None:
    task, other, alike = kinds(1.5)
    fitted = fit_relevance(task, other, alike)
    # Where some of each kind are always seen, nothing tells that there may be others.
    assert fit_relevance(task, other, torch.arange(200) % 10).false_recall < fitted.false_recall
    unlike = fit_relevance(task, torch.cat([other, task[:40] + 0.01]))
    assert 0 <= fitted.false_recall < 0.2 and fitted.others_left > 0.9
    assert unlike.others_left < 0.95


def test_few_queries_are_enough() -> None:
    fitted = fit_relevance(torch.zeros(1, 4), torch.ones(2, 4))
    assert fitted.head(torch.zeros(4)) < 0 < fitted.head(torch.ones(4))


def test_clusters_are_alike_and_the_same_again() -> None:
    task, _, alike = kinds(6.0)
    found = clusters(task, 10)
    assert torch.equal(found, clusters(task, 10)) and len(found.unique()) == 10
    assert all(len(found[alike == kind].unique()) == 1 for kind in range(10))
    assert clusters(torch.ones(5, 3), 4).tolist() == [0] * 5


def test_a_fit_needs_both_kinds() -> None:
    with pytest.raises(InputError, match="both kinds, got 0 and 3"):
        fit_relevance(torch.zeros(0, 4), torch.zeros(3, 4))
    with pytest.raises(InputError, match="false_recall must be"):
        fit_relevance(torch.zeros(2, 4), torch.zeros(3, 4), false_recall=2.0)


# -- saving ----------------------------------------------------------------------------------------------------------


def test_the_head_is_saved_and_needed(tmp_path: Path) -> None:
    model = with_head("tuned")
    model.save_pretrained(tmp_path / "model")
    loaded = SiameseForCausalLM.from_pretrained(tmp_path / "model", base=tiny_base("llama"))
    assert loaded.relevance is not None and model.relevance is not None
    assert torch.equal(loaded.relevance.weight, model.relevance.weight)
    assert generate(loaded, PROMPTS) == generate(model, PROMPTS)
    (tmp_path / "model" / "relevance.safetensors").unlink()
    with pytest.raises(InputError, match="relevance.safetensors missing"):
        SiameseForCausalLM.from_pretrained(tmp_path / "model", base=tiny_base("llama"))


def test_a_model_without_a_head_has_no_file_of_it(tmp_path: Path) -> None:
    tiny_siamese("llama", "lora").save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "relevance.safetensors").exists()


# -- conversations ---------------------------------------------------------------------------------------------------

OPENER, CLOSER = [60, 61], [62, 58, 57]


def conversation(turns: list[list[int]], closer: list[int] = CLOSER[:1]) -> list[int]:
    """A system's words, then turns of the user, each closed, with nothing that the assistant says."""
    ids = [59]
    for turn in turns:
        ids += [*OPENER, *turn, *closer]
    return ids


def test_the_last_turn_alone() -> None:
    assert last_turn(conversation([[1, 2], [3], [4, 5]]), OPENER) == conversation([[4, 5]])
    assert last_turn(conversation([[1]]), OPENER) == conversation([[1]])
    assert last_turn([1, 2, 3], OPENER) == [1, 2, 3]
    assert last_turn(conversation([[1], [2]]), []) == conversation([[1], [2]])
    ids, mask = torch.tensor([conversation([[1], [2]]), [0, 0, 0, *conversation([[7, 8]])]]), torch.ones(2, 9)
    mask[1, :3] = 0
    cut = last_turns(ids, mask.bool(), OPENER)
    assert cut is not None
    assert [row[kept.bool()].tolist() for row, kept in zip(*cut, strict=True)] == [
        [59, 60, 61, 2, 62],
        [59, 60, 61, 7, 8, 62],
    ]
    assert last_turns(ids[1:], mask[1:].bool(), OPENER) is None


WORDS = [[3, 4, 5], [20, 9, 33], [41, 2, 17, 8], [50, 51], [11, 30], [25, 26, 27]]


def talker(reads_said: bool = False) -> tuple[SiameseForCausalLM, list[bool]]:
    """A model whose head reads the last turn alone, and which of `WORDS` as a turn it leaves to the base model.

    `reads_said`: turns end with `CLOSER`, and the head reads the last token before it and nothing else.
    """
    closer = CLOSER if reads_said else CLOSER[:1]
    talks = [conversation([turn], closer) for turn in WORDS]
    if reads_said:
        model = tiny_siamese("llama", "lora", "tuned")
        width = model.config.hidden_size
        head, queries = RelevanceHead(3 * width), [said_of(model, talk) for talk in talks]
        head.weight[2 * width :].normal_(generator=torch.Generator().manual_seed(3))
        head.bias.zero_()
    else:
        model = with_head("tuned")
        assert model.relevance is not None
        head, queries = model.relevance, [query_of(model, talk) for talk in talks]
    with torch.no_grad():
        logits = torch.stack([head(query) for query in queries]).flatten()
        head.bias -= logits.median() + 1e-3
    model.set_relevance(head, OPENER, CLOSER if reads_said else ())
    leave = [bool(logit - logits.median() - 1e-3 > 0) for logit in logits]
    assert len(set(leave)) == 2
    return model, leave


def said_of(model: SiameseForCausalLM, talk: list[int]) -> Tensor:
    """What a head reads of a prompt that ends with `CLOSER`, (3d,)."""
    with torch.no_grad():
        model.streams.frozen({"input_ids": torch.tensor([talk])}, None)
        memory = model.streams.tap.memory
        assert memory is not None
    return torch.cat([query_of(model, talk), memory[0, len(talk) - len(CLOSER) - 1].float()])


@pytest.mark.parametrize("reads_said", [False, True])
def test_each_turn_is_decided_anew(reads_said: bool) -> None:
    """What came before has no say in whose the last turn is, and all of it in what is said."""
    model, leave = talker(reads_said)
    for before in WORDS[:2]:
        talks = [conversation([before, turn], CLOSER if reads_said else CLOSER[:1]) for turn in WORDS]
        wanted = [generate(model, [talk], force_gate=float(base))[0] for talk, base in zip(talks, leave, strict=True)]
        assert generate(model, talks) == wanted == generate(model, talks, use_cache=False)
        assert [generate(model, [talk])[0] for talk in talks] == wanted
        assert generate(model, talks, cache_implementation="static") == wanted


@pytest.mark.parametrize("before", [*WORDS[:2], None])
@pytest.mark.parametrize("reads_said", [False, True])
def test_a_turn_is_decided_alike_however_it_is_read(before: list[int] | None, reads_said: bool) -> None:
    """In chunks, behind what a cache holds, moved about in it, or as the query of a label."""
    model, leave = talker(reads_said)
    closer = CLOSER if reads_said else CLOSER[:1]
    for turn, base in zip(WORDS, leave, strict=True):
        talk = conversation([turn] if before is None else [before, turn], closer)
        first = talk[:-2] if before is None else conversation([before], closer)
        wanted = generate(model, [talk], force_gate=float(base))
        for size in (1, 2, 3, 4):
            assert generate(model, [talk], prefill_chunk_size=size) == wanted
        for spare in ([], [5, 5]):
            cache = TwinCache()
            with torch.no_grad():
                model(torch.tensor([first + spare]), past_key_values=cache)
            if spare:
                cache.crop(-len(spare))
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([1]))
            assert generate(model, [talk], past_key_values=cache) == wanted
        ids = torch.tensor([[*talk, 40, 41]])
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, : len(talk)], mask[:, len(talk) :] = -100, 0
        with torch.no_grad():
            losses = [
                model(ids, labels=labels, **how).loss
                for how in ({}, {"prompt_mask": mask}, {"force_gate": float(base)})
            ]
        assert_same(losses[0], losses[2])
        assert_same(losses[1], losses[2])


def test_what_was_said_is_read_before_what_closes_the_turn() -> None:
    """At every place of a text, in rows of different lengths, read at once or token by token."""
    model, _ = talker(reads_said=True)
    width = model.config.hidden_size
    talks = [conversation([turn], CLOSER) + [40, 41] for turn in WORDS]
    batch = padded(talks)
    with torch.no_grad():
        whole = model(batch.ids, batch.mask, output_memories=True)
        memory, length = whole.base_memory, batch.ids.shape[1]
        assert memory is not None and model.relevance is not None
        for row, talk in enumerate(talks):
            start = length - len(talk)
            for end in range(len(talk)):
                closed = talk[: end + 1][-len(CLOSER) :] == CLOSER
                said = memory[row, start + end - len(CLOSER) * closed].float()
                base = bool(said @ model.relevance.weight[2 * width :] + model.relevance.bias > 0)
                wanted = model(torch.tensor([talk[: end + 1]]), force_gate=float(base)).logits[0, -1]
                assert_same(whole.logits[row, start + end], wanted)
        cache = TwinCache()
        stepped = [
            model(batch.ids[:, at : at + 1], batch.mask[:, : at + 1], past_key_values=cache).logits[:, 0]
            for at in range(length)
        ]
    inside = batch.mask.bool()
    assert_same(torch.stack(stepped, dim=1)[inside], whole.logits[inside])
    found = model.streams.frozen_query(batch.ids[:, :-2], batch.mask[:, :-2], CLOSER)
    at_once = torch.stack([said_of(model, talk[:-2]) for talk in talks])
    assert_same(found[:, 0], at_once)


def test_a_row_is_judged_alike_whatever_stands_beside_it() -> None:
    """Beside a row of two answers, whose query is not one prompt."""
    model, leave = talker()
    for turn, base in zip(WORDS, leave, strict=True):
        talk = conversation([WORDS[0], turn])
        ids = torch.tensor([[*talk, 40, 41, 42], [*talk, 40, 41, 42]])
        labels = torch.full_like(ids, -100)
        labels[:, len(talk) :] = ids[:, len(talk) :]
        labels[1, 3] = ids[1, 3]
        with torch.no_grad():
            gate = model(ids, labels=labels, output_gate=True).gate
            alone = model(ids[:1], labels=labels[:1], output_gate=True).gate
        assert torch.equal(gate[0], alone[0]) and bool((gate[0] == float(base)).all())


def test_rows_of_several_answers_are_not_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their turns are not what the head judges, so none is read alone."""
    model, _ = talker()
    ids = torch.tensor([[*conversation(WORDS[:2]), 40, 41, 42]] * 2)
    labels = torch.full_like(ids, -100)
    labels[:, -3:], labels[:, 3] = ids[:, -3:], ids[:, 3]
    read: list[Any] = []
    monkeypatch.setattr(model.streams, "frozen_query", lambda *turns: read.append(turns))
    with torch.no_grad():
        assert torch.isfinite(model(ids, labels=labels).loss)
    assert not read


def test_a_settled_cache_says_why_a_stream_is_missing() -> None:
    model, _ = talker()
    for turn in WORDS:
        found = model.generate(
            torch.tensor([conversation([turn])]), max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True
        )
        with pytest.raises(InputError, match="holds one stream alone, .* start the next turn from a fresh cache"):
            model(
                torch.tensor([[3]]), past_key_values=found.past_key_values.begin_answer(None) or found.past_key_values
            )


def test_a_deep_copy_has_a_head_of_its_own() -> None:
    model = with_head("query_aware")
    twin = copy.deepcopy(model)
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_the_opener_comes_from_the_template(tokenizer: Any, plain_tokenizer: Any, with_template: Any) -> None:
    assert tokenizer.decode(turn_opener(tokenizer)) == "<|im_start|>user\n"
    assert turn_opener(plain_tokenizer) == []
    assert turn_opener(with_template("nothing of it")) == []
    assert tokenizer.decode(turn_closer(tokenizer)) == "<|im_end|>\n<|im_start|>assistant\n"
    assert turn_closer(plain_tokenizer) == turn_closer(with_template("nothing of it")) == []
