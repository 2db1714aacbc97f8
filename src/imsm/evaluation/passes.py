"""One way of running a model: its greedy answers, and its logits on given tokens."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from imsm.generation import Answer, Prompt, answers

#: Plain greedy decoding, whatever else a model's generation config recommends.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "exponential_decay_length_penalty")),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "guidance_scale")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "stop_strings", "watermarking_config")),
}


@dataclass(frozen=True)
class Rows:
    """Token sequences of a batch, padded on the right.

    ids, mask, prompt: (B, T) int64; `mask` is 0 on padding, `prompt` is 1 on the query's tokens.
    """

    ids: Tensor
    mask: Tensor
    prompt: Tensor


def rows(sequences: Sequence[Sequence[int]], prompts: Sequence[int]) -> Rows:
    """A batch of `sequences` whose first `prompts[i]` tokens are the query (0: there is none)."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask, prompt = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (tokens, length) in enumerate(zip(sequences, prompts, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        prompt[row, :length] = 1
    return Rows(ids, mask, prompt)


@dataclass(frozen=True)
class Pass:
    """A causal language model of any kind and what it is called with.

    model: siamese, peft or plain.
    tokenizer: its tokenizer.
    kwargs: of `generate` and `forward` alike, such as `force_gate`.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    kwargs: dict[str, Any] = field(default_factory=dict)

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
        """Greedy answers to a batch of prompts, in their order."""
        # peft counts the padding of prompts behind learnt ones as tokens.
        alone = isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            said = list(
                answers(
                    self.model,
                    self.tokenizer,
                    prompts,
                    batch_size=1 if alone else len(prompts),
                    max_new_tokens=max_new_tokens,
                    **GREEDY,
                    **self.kwargs,
                )
            )
        return sorted(said, key=lambda answer: answer.index)

    @torch.inference_mode()
    def logits(self, batch: Rows, last: int) -> Tensor:
        """Logits (B, last, V) of the last so many positions. A siamese model's query is the batch's `prompt`; without
        one, all that precedes a position."""
        plain = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        takes = inspect.signature(plain.forward).parameters
        inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if "prompt_mask" in takes and bool(batch.prompt.any()):
            inputs["prompt_mask"] = batch.prompt
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = last
        # Prompt tuning gives logits for its own tokens too, in front of these.
        return self.model(**inputs, use_cache=False, **self.kwargs).logits[:, -last:]  # type: ignore[no-any-return]
