"""A task's prompts in other dresses, so that what is learnt of them is the task and not its one wording or form.

Nothing but the prompts themselves is needed: words that they share are taken for the task's wording, and what is left for
its contents, which stay. Where the tokenizer has a chat template, each dress is a user turn or a plain text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from imsm.data.rendering import Example
from imsm.data.turns import Spoken, Turns, prompt_and_answer
from imsm.data.wording import Wording
from imsm.errors import InputError

#: Attempts at a dress unlike those that are there.
ATTEMPTS = 4
#: Forms in which a content may be asked about, whatever the task.
FRAMES = ("Input: {}\nOutput:", "Q: {}\nA:", "{}\nAnswer:", "Text: {}", "{} =>", "- {}\n-", "### {}\n###", "{}:")
#: Marks around what somebody said.
QUOTES = "\"'“”‘’"
#: Words that questions begin with.
ASKING = frozenset(
    ["are", "can", "could", "did", "do", "does", "how", "is", "should"]
    + ["what", "when", "where", "which", "who", "why", "will", "would"]
)
#: The dresses that are made unless others are asked for.
USUAL = ("trained", "moved", "worded", "shaped")


@dataclass(frozen=True)
class Dress:
    """A prompt of the task as it could have been written too.

    prompt_ids: as generation would get it, (P,).
    kind: one of `KINDS`.
    index: the example's place in the list.
    """

    prompt_ids: list[int]
    kind: str
    index: int


def dresses(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    kinds: Sequence[str] = USUAL,
    *,
    others: int | None = None,
) -> list[Dress]:
    """The prompt of each example, which is what stands before its first answer, in one dress of each kind.

    trained: as it is.
    moved: the same text in the other form, a user turn or a plain text; a system message stands before the text.
    worded: words of the wording dropped, shuffled, replaced by others from contents, or put before or behind these.
    shaped: another case, punctuation, line breaks or quotation marks; of prompts without a wording in common, of the whole.
    bare: the contents alone.
    framed: the contents in a form that says nothing of the task.
    asked: the first line of a text that begins as questions do, ending as they do; as a user turn, if there is a chat template.

    A dress that cannot be had is left out, such as another form without a chat template, other words where prompts share
    none, or one that comes to a prompt that another of the same example is already. What comes of an example depends on
    its place and on the seed, and on the other examples by the wording alone.

    Args:
        examples: of one task or several.
        tokenizer: that of the examples.
        seed: of the changes.
        kinds: of `KINDS`.
        others: of how many examples, the first ones, other dresses than "trained" are made; of all unless given.

    Returns:
        The dresses of the first example in the order of `kinds`, then of the second, and so on.

    Raises:
        InputError: there is no such kind.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError(f"kinds of dresses must be among {', '.join(KINDS)}, got {', '.join(map(repr, unknown))}")
    turns = Turns(tokenizer)
    prompts = [prompt_and_answer(example)[0] for example in examples]
    read = [turns.read(ids) for ids in prompts]
    wording = Wording([[m["content"] for m in spoken.messages if _open(m)] for spoken in read if spoken is not None])
    found = []
    for index, (ids, spoken) in enumerate(zip(prompts, read, strict=True)):
        there = {tuple(ids)}
        for kind in kinds:
            if kind == "trained":
                found.append(Dress(ids, kind, index))
                continue
            if spoken is None or (others is not None and index >= others):
                continue
            rng = random.Random(f"{seed} {index} {kind}")
            for _ in range(ATTEMPTS):
                made = KINDS[kind](spoken, wording, rng)
                if made is None or not any(c.isalnum() for c in made.text):
                    continue
                if kind == "asked":
                    made = replace(made, chat=turns.user is not None)
                elif kind != "moved" and turns.user is not None:
                    made = replace(made, chat=rng.random() < 0.5)
                new = turns.write(made) if turns.user is not None or not made.chat else []
                if new and tuple(new) not in there:
                    there.add(tuple(new))
                    found.append(Dress(new, kind, index))
                    break
    return found


def _open(message: dict[str, str]) -> bool:
    """Whether a message may be changed: what the assistant said may not."""
    return message["role"] != "assistant"


def _each(spoken: Spoken, change: Callable[[str], str]) -> Spoken:
    """The messages changed one by one, those without text left out."""
    changed = [{**m, "content": change(m["content"])} if _open(m) else m for m in spoken.messages]
    return replace(spoken, messages=[m for m in changed if m["content"].strip()])


def _trained(spoken: Spoken, wording: Wording, rng: random.Random) -> Spoken | None:
    return spoken


def _moved(spoken: Spoken, wording: Wording, rng: random.Random) -> Spoken | None:
    return replace(spoken, chat=not spoken.chat)


def _worded(spoken: Spoken, wording: Wording, rng: random.Random) -> Spoken | None:
    changed = {m["content"]: wording.reworded(m["content"], rng) for m in spoken.messages if _open(m)}
    if all(text is None for text in changed.values()):
        return None
    return _each(spoken, lambda text: changed[text] or text)


def _shaped(spoken: Spoken, wording: Wording, rng: random.Random) -> Spoken | None:
    return _each(spoken, lambda text: wording.reshaped(text, rng))


def _bare(spoken: Spoken, wording: Wording, rng: random.Random) -> Spoken | None:
    return _each(spoken, wording.contents)


def _framed(spoken: Spoken, wording: Wording, rng: random.Random) -> Spoken | None:
    text = wording.contents(spoken.messages[-1]["content"])
    last = {**spoken.messages[-1], "content": rng.choice(FRAMES).format(text)}
    return replace(spoken, messages=[last]) if text else None


def _asked(spoken: Spoken, wording: Wording, rng: random.Random) -> Spoken | None:
    line = spoken.text.strip().strip(QUOTES).partition("\n")[0].rstrip(" .!?…:;," + QUOTES)
    first = re.match(r"\w+", line)
    if first is None or first[0].lower() not in ASKING:
        return None
    return replace(spoken, messages=[{"role": "user", "content": line[0].upper() + line[1:] + "?"}])


KINDS: dict[str, Callable[[Spoken, Wording, random.Random], Spoken | None]] = {
    "trained": _trained,
    "moved": _moved,
    "worded": _worded,
    "shaped": _shaped,
    "bare": _bare,
    "framed": _framed,
    "asked": _asked,
}
