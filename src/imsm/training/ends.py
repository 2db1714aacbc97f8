"""What ends an answer for a model that has learnt its data: the base's ends, and the token that the data end answers with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from transformers import GenerationConfig, PreTrainedTokenizerBase

from imsm.data import IGNORED, Example
from imsm.ends import joined

#: Tokens at an answer's end among which the one that ends it is looked for: a template may put a line's end behind it.
LAST = 3
#: Settings that do nothing without sampling, or without beams. Of a base's own transformers says so; changed ones it saves
#: without them alone.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")


def learn_end(generation: GenerationConfig, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Has `generate` stop where the examples' answers end, if that is at a special token, as well as where it did.

    Args:
        generation: the model's settings, which are changed.
        examples: what it learns.
        tokenizer: that of the examples.
    """
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    found: Counter[int] = Counter()
    for example in examples:
        learnt = (token for token in islice(reversed(example.labels), LAST) if token != IGNORED)
        if (end := next((token for token in learnt if token in special), None)) is not None:
            found[end] += 1
    if not found or 2 * found.most_common(1)[0][1] < len(examples):
        return
    ends = joined(generation.eos_token_id, found.most_common(1)[0][0])
    if ends == generation.eos_token_id:
        return
    generation.eos_token_id = ends
    idle = [*(() if generation.do_sample else SAMPLING), *(() if (generation.num_beams or 1) > 1 else BEAMS)]
    for name in idle:
        setattr(generation, name, None)
