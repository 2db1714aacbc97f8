"""A task's prompts in other dresses: what they are about survives, their wording and form do not; turns of conversations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.relevance.turning import turning
from imsm import InputError
from imsm.data import Example
from imsm.data.dresses import KINDS, Dress, dresses
from imsm.data.formats import Conversation, Pair
from imsm.data.rendering import Renderer, decode
from imsm.data.turns import Spoken, Turns, prompt_and_answer
from imsm.data.wording import Wording
from imsm.samples import Sample

CONTENTS = [
    "my card has not come",
    "who took 20 pounds from me?",
    "open an account for a child",
    "the app will not start",
    "why was I charged twice",
    "can I pay in dollars",
    "forgot the code again!",
    "is there a limit to transfers?",
]
WORDED = "Name the intent of this message.\nMessage: {}\nIntent:"
HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def pairs(tokenizer: PreTrainedTokenizerBase, form: str, contents: Sequence[str] = CONTENTS) -> list[Example]:
    renderer = Renderer(tokenizer)
    return [renderer.render(Pair(form.format(text), " yes"), line) for line, text in enumerate(contents, 1)]


def chats(tokenizer: PreTrainedTokenizerBase, *before: dict[str, str], form: str = WORDED) -> list[Example]:
    renderer = Renderer(tokenizer)
    found = []
    for line, text in enumerate(CONTENTS, 1):
        said = [{"role": "user", "content": form.format(text)}, {"role": "assistant", "content": "yes"}]
        found.append(renderer.render(Conversation([*before, *said], len(before)), line))
    return found


def texts(tokenizer: PreTrainedTokenizerBase, found: Sequence[Dress], kind: str) -> list[str]:
    return [decode(tokenizer, dress.prompt_ids) for dress in found if dress.kind == kind]


# -- dresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pairs", "chats"])
def test_contents_survive_and_no_dress_is_another(form: str, tokenizer: PreTrainedTokenizerBase) -> None:
    examples = pairs(tokenizer, WORDED) if form == "pairs" else chats(tokenizer)
    kinds = [kind for kind in KINDS if kind != "asked"]  # the prompts begin with an instruction
    found = dresses(examples, tokenizer, 0, tuple(KINDS))
    assert [(dress.index, dress.kind) for dress in found] == [(i, kind) for i in range(len(CONTENTS)) for kind in kinds]
    for dress in found:
        text = decode(tokenizer, dress.prompt_ids)
        content = CONTENTS[dress.index]
        assert content in text if dress.kind != "shaped" else content.rstrip("?!").lower() in text.lower()
        assert text.startswith(HEAD) is text.endswith(TAIL)
        trained = prompt_and_answer(examples[dress.index])[0]
        assert (dress.prompt_ids == trained) is (dress.kind == "trained")
    for index in range(len(CONTENTS)):
        assert len({tuple(dress.prompt_ids) for dress in found if dress.index == index}) == len(kinds)


def test_what_is_asked_ends_with_a_question_mark(
    tokenizer: PreTrainedTokenizerBase, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    said = [
        "how do i get home",
        "What is it?",
        '"Is it late." she said\nand went',
        "tell me why",
        "Whatever you do",
        "why?\n",
    ]
    wanted = ["How do i get home?", "What is it?", 'Is it late." she said?', None, None, "Why?"]
    plain = pairs(tokenizer, "{}", said)
    assert [dress.index for dress in dresses(plain, tokenizer, kinds=("asked",))] == [0, 1, 2, 5]
    assert texts(tokenizer, dresses(plain, tokenizer, kinds=("asked",)), "asked") == [
        HEAD + text + TAIL for text in wanted if text is not None
    ]
    # What is asked so already is not asked again.
    found = dresses(pairs(plain_tokenizer, "{}", said), plain_tokenizer, kinds=("asked",))
    assert [dress.index for dress in found] == [0, 2, 5]
    assert [plain_tokenizer.decode(dress.prompt_ids) for dress in found] == [wanted[n] for n in (0, 2, 5)]
    turn = Conversation([{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "yes"}], 0)
    assert not dresses([Renderer(tokenizer).render(turn, 1)], tokenizer, kinds=("asked",))


@pytest.mark.parametrize("form", ["pairs", "chats"])
def test_the_other_form(form: str, tokenizer: PreTrainedTokenizerBase) -> None:
    plain, chat = WORDED.format(CONTENTS[0]), HEAD + WORDED.format(CONTENTS[0]) + TAIL
    examples = pairs(tokenizer, WORDED) if form == "pairs" else chats(tokenizer)
    found = dresses(examples, tokenizer, 0)
    expected = (plain, chat) if form == "pairs" else (chat, plain)
    assert (texts(tokenizer, found, "trained")[0], texts(tokenizer, found, "moved")[0]) == expected


def test_words_and_layout_change_in_both_forms(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = pairs(tokenizer, WORDED)
    many = [texts(tokenizer, dresses(examples, tokenizer, seed), "worded") for seed in range(20)]
    all_worded = [text for found in many for text in found]
    assert len(set(all_worded)) > 100
    assert 40 < sum(text.startswith(HEAD) for text in all_worded) < 120
    # Something of the wording is left, and seldom all of it.
    shared = {"name", "the", "intent", "of", "this", "message"}
    for found in many:
        for text, content in zip(found, CONTENTS, strict=True):
            rest = text.removeprefix(HEAD).removesuffix(TAIL).replace(content, "")
            assert any(c.isalnum() for c in rest)
    assert sum(any(word in text.lower() for word in shared) for text in all_worded) > 120
    assert sum("Name the intent of this message." in text for text in all_worded) < 60
    shaped = [text for s in range(20) for text in texts(tokenizer, dresses(examples, tokenizer, s), "shaped")]
    assert len(set(shaped)) > 80
    for text in shaped:
        assert all(word in text.lower() for word in shared)


def test_the_seed_decides(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = pairs(tokenizer, WORDED)
    random.seed(3)
    state = random.getstate()
    first = dresses(examples, tokenizer, 4)
    assert dresses(examples, tokenizer, 4) == first != dresses(examples, tokenizer, 5)
    assert random.getstate() == state


def test_bare_and_framed(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = chats(tokenizer, {"role": "system", "content": "Name the intent of a message."}, form="{}")
    found = dresses(examples, tokenizer, 0, ("bare", "framed"))
    for text, content in zip(texts(tokenizer, found, "bare"), CONTENTS, strict=True):
        assert text in (content, HEAD + content + TAIL)
    assert not any("Name" in text for text in texts(tokenizer, found, "framed"))


def test_a_tokenizer_without_a_template(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    found = dresses(pairs(plain_tokenizer, WORDED), plain_tokenizer, 0)
    assert {dress.kind for dress in found} == {"trained", "worded", "shaped"}
    assert not any("<|" in decode(plain_tokenizer, dress.prompt_ids) for dress in found)


def test_a_single_example(tokenizer: PreTrainedTokenizerBase) -> None:
    (example, *_) = pairs(tokenizer, WORDED)
    found = dresses([example], tokenizer, 0, tuple(KINDS))
    assert {dress.kind for dress in found} >= {"trained", "moved", "shaped"}
    for dress in found:
        assert CONTENTS[0] in decode(tokenizer, dress.prompt_ids).lower()
    assert dresses([], tokenizer) == []


def test_prompts_that_share_no_wording(tokenizer: PreTrainedTokenizerBase) -> None:
    found = dresses(pairs(tokenizer, "{}"), tokenizer, 0)
    assert [dress.kind for dress in found if dress.index == 1] == ["trained", "moved", "shaped"]
    for dress in found:
        assert CONTENTS[dress.index].rstrip("?!").lower() in decode(tokenizer, dress.prompt_ids).lower()


def test_a_dress_is_not_given_twice(tokenizer: PreTrainedTokenizerBase) -> None:
    found = dresses(pairs(tokenizer, "{}"), tokenizer, 0, tuple(KINDS))
    assert len({(dress.index, *dress.prompt_ids) for dress in found}) == len(found)


def test_conversations_keep_what_was_said_before(tokenizer: PreTrainedTokenizerBase) -> None:
    before = (
        {"role": "system", "content": "Help the bank."},
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "good day"},
    )
    found = dresses(chats(tokenizer, *before), tokenizer, 0)
    assert {dress.kind for dress in found} == {"trained", "moved", "worded", "shaped"}
    for dress in found:
        assert "good day" in decode(tokenizer, dress.prompt_ids).lower()
    moved = texts(tokenizer, found, "moved")[0]
    assert moved == "Help the bank.\nhello there\ngood day\n" + WORDED.format(CONTENTS[0])


def test_the_first_answer_of_a_conversation_ends_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    turns: list[dict[str, Any]] = [
        {"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")
    ]
    example = Renderer(tokenizer).render(Conversation(turns, 0), 1)
    prompt, answer = prompt_and_answer(example)
    assert decode(tokenizer, prompt) == f"{HEAD}user 0{TAIL}"
    assert decode(tokenizer, answer) == "assistant 0<|im_end|>"


def test_other_markup_is_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    odd = "<|im_start|>critic\n{}<|im_end|>"
    found = dresses(pairs(tokenizer, odd), tokenizer, 0)
    assert {dress.kind for dress in found} == {"trained"}


def test_an_unknown_kind_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="must be among trained, moved, .* got 'nice'"):
        dresses([], tokenizer, kinds=("trained", "nice"))


# -- the wording -----------------------------------------------------------------------------------------------------


def test_wording_around_and_between_contents() -> None:
    form = "Do these mean the same?\nFirst: {}\nSecond: {}\nSame:"
    prompts = [form.format(a, b) for a, b in zip(CONTENTS, reversed(CONTENTS), strict=True)]
    parts = Wording([[text] for text in prompts]).parts(prompts[0])
    assert [part.words[0] for part in parts if not part.shared] == [CONTENTS[0], CONTENTS[-1]]
    assert [part.words for part in parts if part.shared][1:] == [["\n", "Second", ":"], ["\n", "Same", ":"]]


def test_several_wordings_of_a_task() -> None:
    forms = ("Intent of: {}", "{}\nWhat does the customer want?", "Q: {} A:")
    wording = Wording([[forms[i % 3].format(text)] for i, text in enumerate(CONTENTS * 3)])
    for form in forms:
        for content in CONTENTS:
            assert wording.contents(form.format(content)) == content


def test_contents_may_begin_and_end_alike() -> None:
    contents = [f"I {text.strip('?!')}?" for text in CONTENTS[:4]] + [
        f"How {text.strip('?!')}." for text in CONTENTS[4:]
    ]
    prompts = [WORDED.format(text) for text in contents]
    # A third begins with each of two words, and nearly half end with each of two marks.
    prompts += [WORDED.format(text) for text in ("what now?", "when is it", "tell me more.", "nothing works?")]
    wording = Wording([[text] for text in prompts])
    assert [wording.contents(text) for text in prompts[:8]] == contents


def test_phrases_of_contents_are_not_the_wording() -> None:
    contents = [f"{text} so how many are {text[::-1]}" if n % 3 == 0 else text for n, text in enumerate(CONTENTS)]
    wording = Wording([[WORDED.format(text)] for text in contents])
    assert [wording.contents(WORDED.format(text)) for text in contents] == contents
    middle = Wording([[f"Put {a} in other words than {b} please"] for a, b in zip(CONTENTS, contents, strict=True)])
    assert middle.contents("Put a in other words than b please") == "a\nb"


# -- turns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a b"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "a\nb"}],
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "b"},
        ],
    ],
)
def test_what_was_written_is_read(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> None:
    turns = Turns(tokenizer)
    assert turns.read(turns.write(Spoken(messages, chat=True))) == Spoken(messages, chat=True)
    plain = Spoken([{"role": "user", "content": "a b"}], chat=False)
    assert turns.read(turns.write(plain)) == plain


def test_markup_that_the_template_does_not_write_is_not_read(tokenizer: PreTrainedTokenizerBase) -> None:
    twice = f"{HEAD}a<|im_end|>\n{HEAD}b{TAIL}"
    assert Turns(tokenizer).read(tokenizer(twice)["input_ids"]) is None


def test_turning(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Help."}
    examples = chats(tokenizer, system, form="{}")
    turns = Turns(tokenizer)
    asked = [Spoken([{"role": "user", "content": f"dream {n}"}], chat=n % 2 == 0) for n in range(5)]
    told = [
        Sample(turns.write(spoken), tokenizer(f"answer {n}<|im_end|>")["input_ids"]) for n, spoken in enumerate(asked)
    ]
    to_task, to_dream = turning(examples, [*told, Sample(told[0].prompt_ids, [])], tokenizer, 1)
    assert len(to_task) == len(to_dream) == 5
    assert (to_task, to_dream) == turning(examples, told, tokenizer, 1) != turning(examples, told, tokenizer, 2)
    seen = set()
    for task_ended, dream_ended in zip(to_task, to_dream, strict=True):
        last, first = turns.read(task_ended), turns.read(dream_ended)
        assert last is not None and first is not None
        roles = ["system", "user", "assistant", "user"]
        assert [m["role"] for m in last.messages] == [m["role"] for m in first.messages] == roles
        assert last.messages[0] == first.messages[0] == system
        assert last.messages[3]["content"] == first.messages[1]["content"] in CONTENTS
        number = first.messages[3]["content"].removeprefix("dream ")
        assert last.messages[1]["content"] == f"dream {number}"
        assert last.messages[2]["content"] == f"answer {number}"
        assert first.messages[2]["content"] == "yes"
        seen.add(number)
    assert len(seen) == 5


def test_turning_needs_a_template(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    told = [Sample([5, 6], [7, 8])]
    assert turning(pairs(plain_tokenizer, WORDED), told, plain_tokenizer) == ([], [])


def test_other_dresses_of_the_first_examples_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = pairs(tokenizer, "{}")
    whole = dresses(examples, tokenizer, 0)
    found = dresses(examples, tokenizer, 0, others=2)
    assert found == [dress for dress in whole if dress.kind == "trained" or dress.index < 2] != whole
