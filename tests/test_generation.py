"""What `generate` offers, each way of decoding against the naive one or against itself without a cache."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle, assert_same
from prompts import Batch, padded, random_prompts
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, pipeline
from transformers.generation.streamers import BaseStreamer
from zoo import ARCHITECTURES, VOCAB, tiny_base, tiny_siamese

from imsm import InputError, SiameseForCausalLM, stream

#: A plain cache, one with a prefix in the tuned half, one of sliding windows, one of convolution states.
KINDS = [("llama", "lora"), ("llama", "prefix_tuning"), ("gemma3", "lora"), ("lfm2", "lora")]
PROMPTS = random_prompts()
BATCH = padded(PROMPTS)


def generate(model: Any, batch: Batch = BATCH, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(batch.ids, attention_mask=batch.mask, **settings)


@pytest.fixture(scope="module")
def model() -> SiameseForCausalLM:
    return tiny_siamese("llama", "lora")


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def kind(request: pytest.FixtureRequest) -> tuple[SiameseForCausalLM, Oracle]:
    model = tiny_siamese(*request.param)
    return model, Oracle(model, tiny_base(request.param[0]))


@pytest.mark.parametrize("prompt", [[5], [5, 9], list(range(1, 31))], ids=["1 token", "2 tokens", "30 tokens"])
def test_prompts_of_any_length_alone(kind: tuple[SiameseForCausalLM, Oracle], prompt: list[int]) -> None:
    model, oracle = kind
    assert generate(model, padded([prompt])).tolist() == [oracle.greedy(prompt, 8)]
    assert model.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False, pad_token_id=0).tolist() == [
        oracle.greedy(prompt, 1)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_vary(architecture: str) -> None:
    """Parity on answers of one repeated token would show nothing."""
    answers = generate(tiny_siamese(architecture, "lora"))[:, BATCH.ids.shape[1] :]
    assert len(set(answers.flatten().tolist())) > 6


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "max_new_tokens": 12},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_cached_is_uncached(kind: tuple[SiameseForCausalLM, Oracle], settings: dict[str, Any]) -> None:
    model, _ = kind
    settings |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    torch.manual_seed(4)
    cached = generate(model, **settings)
    torch.manual_seed(4)
    uncached = generate(model, **{**settings, "use_cache": False})
    assert cached.sequences.tolist() == uncached.sequences.tolist()
    assert_same(torch.stack(cached.logits), torch.stack(uncached.logits))


@pytest.mark.parametrize("beams", [1, 3])
def test_prompt_mask_in_generation(kind: tuple[SiameseForCausalLM, Oracle], beams: int) -> None:
    model, _ = kind
    marks = (torch.arange(BATCH.ids.shape[1]) > 6).long().expand(3, -1)
    cached = generate(model, prompt_mask=marks, num_beams=beams)
    assert cached.tolist() == generate(model, prompt_mask=marks, num_beams=beams, use_cache=False).tolist()
    assert cached.tolist() != generate(model, num_beams=beams).tolist()


@pytest.mark.parametrize("chunk", [2, 4, 20])
def test_prefill_in_chunks(kind: tuple[SiameseForCausalLM, Oracle], chunk: int) -> None:
    assert generate(kind[0], prefill_chunk_size=chunk).tolist() == generate(kind[0]).tolist()


@pytest.mark.parametrize("drafted", [2, 5])
def test_prompt_lookup_is_greedy(kind: tuple[SiameseForCausalLM, Oracle], drafted: int) -> None:
    model, _ = kind
    widths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for prompt in random_prompts([12, 3, 7]):
            prompt = prompt[:3] * 3 + prompt
            batch = padded([prompt])
            looked_up = generate(model, batch, prompt_lookup_num_tokens=drafted, max_new_tokens=20)
            assert looked_up.tolist() == generate(model, batch, max_new_tokens=20).tolist()
    finally:
        handle.remove()
    assert any(1 < width <= drafted + 1 for width in widths), "nothing was looked up"


def test_assisted_generation_is_greedy(kind: tuple[SiameseForCausalLM, Oracle]) -> None:
    """Drafts that are all right, and drafts that are mostly wrong."""
    model, oracle = kind
    batch = padded(PROMPTS[:1])
    for assistant in (copy.deepcopy(model), oracle.base):
        assert generate(model, batch, assistant_model=assistant).tolist() == generate(model, batch).tolist()


@pytest.mark.parametrize("given", ["everything", "new tokens"])
def test_conversation_goes_on_from_the_cache(kind: tuple[SiameseForCausalLM, Oracle], given: str) -> None:
    """The query of the second answer is all that precedes it, the first answer included."""
    model, oracle = kind
    first = generate(model, padded(PROMPTS[:1]), return_dict_in_generate=True)
    said, turn = first.sequences[0].tolist(), [7, 8, 9]
    held = first.past_key_values.seen
    assert held == len(said) - 1
    ids = torch.tensor([said + turn])
    new = ids if given == "everything" else ids[:, held:]
    second = model.generate(
        new,
        attention_mask=torch.ones_like(ids),
        past_key_values=first.past_key_values,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    assert (said + turn + second[0, new.shape[1] :].tolist()) == oracle.greedy(said + turn, 8)


def test_conversation_in_a_padded_batch(kind: tuple[SiameseForCausalLM, Oracle]) -> None:
    model, _ = kind
    first = generate(model, return_dict_in_generate=True)
    turn = torch.tensor(random_prompts([4, 4, 4], seed=5))
    ids = torch.cat([first.sequences, turn], dim=1)
    mask = torch.cat([BATCH.mask, torch.ones(3, 8 + 4, dtype=torch.long)], dim=1)
    both = Batch(ids, mask, mask)
    assert generate(model, both, past_key_values=first.past_key_values).tolist() == generate(model, both).tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "ia3"])
def test_forced_gate_is_the_base_model_or_peft(method: str, beams: int) -> None:
    model, base = tiny_siamese("llama", method), tiny_base("llama")
    assert generate(model, force_gate=1, num_beams=beams).tolist() == generate(base, num_beams=beams).tolist()
    tuned = generate(model.peft_model, padded(PROMPTS[:1]), num_beams=beams)
    assert generate(model, padded(PROMPTS[:1]), force_gate=0, num_beams=beams).tolist() == tuned.tolist()
    halves = generate(model, force_gate=0.5, num_beams=beams)
    assert halves.tolist() == generate(model, force_gate=0.5, num_beams=beams, use_cache=False).tolist()
    cache = generate(model, force_gate=0, return_dict_in_generate=True).past_key_values
    assert cache.base is None, "a stream that has no say must not be run"


def test_static_cache_is_the_dynamic_one(kind: tuple[SiameseForCausalLM, Oracle]) -> None:
    assert generate(kind[0], cache_implementation="static").tolist() == generate(kind[0]).tolist()


def test_embedded_prompts(kind: tuple[SiameseForCausalLM, Oracle]) -> None:
    model, _ = kind
    embedded = model.get_input_embeddings()(BATCH.ids)
    answers = model.generate(
        inputs_embeds=embedded, attention_mask=BATCH.mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert answers.tolist() == generate(model)[:, BATCH.ids.shape[1] :].tolist()


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer_is_given_every_token(model: SiameseForCausalLM) -> None:
    streamer = Recorder()
    answer = generate(model, padded(PROMPTS[:1]), streamer=streamer)
    assert streamer.tokens == answer[0].tolist()
    assert streamer.ended


class StopAfter(StoppingCriteria):
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.tokens)


def test_stopping_criteria_and_end_of_sequence(model: SiameseForCausalLM) -> None:
    whole = generate(model)
    width = BATCH.ids.shape[1]
    stopped = generate(model, stopping_criteria=StoppingCriteriaList([StopAfter(width + 3)]))
    assert stopped.tolist() == whole[:, : width + 3].tolist()
    end = int(whole[0, width + 2])
    ended = generate(model, eos_token_id=end)
    for row, free in zip(ended[:, width:].tolist(), whole[:, width:].tolist(), strict=True):
        kept = free[: free.index(end) + 1] if end in free else free
        assert row[: len(kept)] == kept
        assert set(row[len(kept) :]) <= {0}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One word a token: w1 w2 …"""
    vocabulary = {"<pad>": 0, **{f"w{token}": token for token in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


def test_text_streamer(model: SiameseForCausalLM, words: PreTrainedTokenizerFast) -> None:
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    answer = generate(model, padded(PROMPTS[:1]), streamer=streamer)
    assert "".join(streamer).split() == words.decode(answer[0, len(PROMPTS[0]) :]).split()


def test_pipeline(model: SiameseForCausalLM, words: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=words)
    prompts = [" ".join(f"w{token}" for token in prompt) for prompt in PROMPTS]
    texts = generator(prompts, max_new_tokens=8, do_sample=False, return_full_text=False, batch_size=3)
    answers = generate(model)[:, BATCH.ids.shape[1] :]
    assert [text[0]["generated_text"].split() for text in texts] == [
        words.decode(row, skip_special_tokens=True).split() for row in answers
    ]
    assert "not supported" not in caplog.text


# -- threads ---------------------------------------------------------------------------------------------------------


def at_once(*works: Callable[[], None]) -> None:
    """Does all of it, each by a thread of its own, and raises what one of them raises."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("passes", ["shared", "two"])
def test_calls_of_two_threads_answer_as_one_after_the_other(passes: str) -> None:
    """Prompts of one length, so that a mix-up of their memories would go unnoticed but for the answers."""
    model = tiny_siamese("llama", "lora")
    model.passes = passes
    batches = [padded([prompt]) for prompt in random_prompts([6, 6], seed=3)]
    wanted = [generate(model, batch, max_new_tokens=12).tolist() for batch in batches]
    with torch.no_grad():
        logits = [model(batch.ids).logits for batch in batches]
    found: list[list[Any]] = [[], []]

    def asking(place: int) -> Callable[[], None]:
        def ask() -> None:
            for _ in range(8):
                found[place].append(generate(model, batches[place], max_new_tokens=12).tolist())
                with torch.no_grad():
                    assert_same(model(batches[place].ids).logits, logits[place])

        return ask

    at_once(asking(0), asking(1))
    assert found == [[wanted[0]] * 8, [wanted[1]] * 8]


def test_a_copy_waits_for_itself_alone(model: SiameseForCausalLM) -> None:
    batch = padded(PROMPTS[:1])
    wanted = generate(model, batch).tolist()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.call_lock is not model.call_lock
        found: list[Any] = []
        with model.call_lock.inner:
            assert model.call_lock.held and not copied.call_lock.held
            at_once(lambda copied=copied, found=found: found.append(generate(copied, batch).tolist()))  # type: ignore[misc]
        assert found == [wanted] and not model.call_lock.held


def test_a_compiled_forward_is_one_graph(model: SiameseForCausalLM) -> None:
    ids = torch.tensor(PROMPTS[:1])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


SAID = "w5 w9 w3 w12 w40 w7"


def test_a_stream_that_is_left_stops(model: SiameseForCausalLM, words: PreTrainedTokenizerFast) -> None:
    wanted, before, steps = generate(model).tolist(), set(threading.enumerate()), []
    handle = model.register_forward_pre_hook(lambda module, args: steps.append(1))
    try:
        pieces = stream(model, words, SAID, max_new_tokens=100)
        next(pieces)
        pieces.close()
        assert set(threading.enumerate()) == before
        assert len(steps) < 60
    finally:
        handle.remove()
    for _ in stream(model, words, SAID, max_new_tokens=100):
        break
    assert set(threading.enumerate()) == before
    assert generate(model).tolist() == wanted


def test_a_call_between_pieces_waits_for_the_answer(model: SiameseForCausalLM, words: PreTrainedTokenizerFast) -> None:
    wanted, whole = generate(model).tolist(), "".join(stream(model, words, SAID, max_new_tokens=40))
    assert len(whole.split()) == 40
    pieces = stream(model, words, SAID, max_new_tokens=40)
    first = next(pieces)
    assert generate(model).tolist() == wanted
    assert first + "".join(pieces) == whole


def test_a_streams_own_stopping_criteria_hold(model: SiameseForCausalLM, words: PreTrainedTokenizerFast) -> None:
    pieces = stream(model, words, SAID, max_new_tokens=40, stopping_criteria=[StopAfter(len(SAID.split()) + 3)])
    assert len("".join(pieces).split()) == 3


def test_a_stream_within_a_call_of_its_model_is_refused(
    model: SiameseForCausalLM, words: PreTrainedTokenizerFast
) -> None:
    class Within(Recorder):
        def put(self, value: Tensor) -> None:
            list(stream(model, words, SAID, max_new_tokens=2))

    with pytest.raises(InputError, match="a stream cannot be read within a call of its own model"):
        generate(model, padded(PROMPTS[:1]), streamer=Within())


def test_a_stream_that_is_forgotten_lets_the_program_end() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_generation import SAID, stream, tiny_siamese, words
pieces = stream(tiny_siamese("llama", "lora"), words.__wrapped__(), SAID, max_new_tokens=100)
next(pieces)
print("begun")
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "begun\n"
