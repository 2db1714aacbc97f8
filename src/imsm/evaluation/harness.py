"""lm-evaluation-harness on our models: likelihood with each prompt as the query, rolling likelihood, generation.

After `import imsm.evaluation.harness` its model "imsm" takes `checkpoint=…`, anything that `imsm eval` takes.
`python -m imsm.evaluation.harness run --model imsm --model_args checkpoint=…` is its command line with that done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imsm.errors import InputError
from imsm.evaluation.candidates import Candidate, open_candidate
from imsm.model import SiameseForCausalLM

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise InputError("lm-evaluation-harness is not installed: pip install 'imsm[harness]'") from error

if TYPE_CHECKING:
    from lm_eval.api.model import LM

#: What the harness asks about a request: its text or None, the context's tokens, the continuation's.
Request = tuple["tuple[str, str] | None", "list[int]", "list[int]"]
#: Requests that one row of a batch answers, by their places: same context, same continuation but for its last token.
Row = tuple["list[int]", "list[int]", "list[int]"]


@register_model("imsm")
class SiameseLM(HFLM):
    """The harness's Hugging Face model for any of our checkpoints.

    A siamese model is told where the query ends: at the end of a request's context, which in generation is the whole
    prompt. Rolling likelihood has no query; every position's is what precedes it.

    Args:
        checkpoint: what `imsm eval` takes, a candidate that is open already, or a model.
        tokenizer: a model's tokenizer; a checkpoint brings its own.
        base, dtype, device, trust_remote_code: for opening a checkpoint, see `open_candidate`.
        kwargs: for `HFLM`, such as `batch_size` and `max_length`.

    Raises:
        InputError: the checkpoint cannot be opened, or a model comes without its tokenizer.
    """

    def __init__(
        self,
        checkpoint: str | Candidate | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        base: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(checkpoint, str):
            if device == "cuda:0" and not torch.cuda.is_available():
                device = None  # the harness's command line says it where nothing is asked for
            checkpoint = open_candidate(checkpoint, base, dtype, device, trust_remote_code)
        model: Any = checkpoint
        self.settings: dict[str, Any] = {}
        if isinstance(checkpoint, Candidate):
            self.settings = dict(checkpoint.generate_kwargs)
            model, tokenizer = checkpoint.model, tokenizer or checkpoint.tokenizer
        if tokenizer is None:
            raise InputError("a model needs its tokenizer: harness_model(model, tokenizer)")
        self.siamese = isinstance(model, SiameseForCausalLM)
        config = (model.base if self.siamese else model).config
        if kwargs.get("max_length") is None:
            kwargs["max_length"] = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **kwargs)

    def _model_call(self, inps: Tensor, **inputs: Any) -> Tensor:  # type: ignore[override]
        with (
            torch.inference_mode(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            return self.model(inps, use_cache=False, **self.settings, **inputs).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:  # type: ignore[override]
        # `generate` takes the padded prompt's length for the query's, and leaves padding out of it.
        return super()._model_generate(context, max_length, stop, **{**self.settings, **kwargs})

    def _loglikelihood_tokens(  # type: ignore[override]
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would give it.

        Not HFLM's, whose batches no longer know where a row's context ends, and which shares a row's logits between
        requests that split the same tokens at different places.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Likelihoods")
        for rows in self._batches(requests, override_bs):
            for (places, _, _), logprobs in zip(rows, self._continuations(rows, requests), strict=True):
                for place in places:
                    name, _, continuation = requests[place]
                    wanted = torch.tensor(continuation, device=logprobs.device)
                    total = logprobs.gather(1, wanted[:, None]).sum()
                    greedy = bool((logprobs.argmax(dim=1) == wanted).all())
                    results[place] = (float(total), greedy)
                    if name is not None:
                        self.cache_hook.add_partial("loglikelihood", name, results[place])
                progress.update(len(places))
        progress.close()
        return results

    def _batches(self, requests: Sequence[Request], size: int | None) -> Iterator[list[Row]]:
        """Rows in batches, longest first."""
        places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            places.setdefault((tuple(context), tuple(continuation[:-1])), []).append(place)
        rows = [(there, list(context), list(shared)) for (context, shared), there in places.items()]
        rows.sort(key=lambda row: -len(row[1]) - len(row[2]))
        automatic = self.batch_size == "auto" and size is None
        self.batch_sizes: dict[int, int] = {}  # those found for other requests do not hold for these
        start = 0
        while start < len(rows):
            if automatic:
                longest = [(None, context, shared + [0]) for _, context, shared in rows]
                chosen = int(self._batch_scheduler(start, longest))
            else:
                chosen = int(size or self.batch_size)
            yield rows[start : start + chosen]
            start += chosen

    def _continuations(self, rows: Sequence[Row], requests: Sequence[Request]) -> Iterator[Tensor]:
        """Log-probabilities (continuation, V) float32 at each row's continuation; what is too long loses its beginning."""
        tokens = [(context + shared)[-self.max_length :] for _, context, shared in rows]
        prompts = [len(ids) - len(shared) for ids, (_, _, shared) in zip(tokens, rows, strict=True)]
        if min(prompts) < 1:
            raise InputError(f"a continuation is longer than the model's {self.max_length} tokens; raise max_length")
        width = max(map(len, tokens))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for row, given in enumerate(tokens):
            ids[row, : len(given)] = torch.tensor(given)
        position = torch.arange(width)
        inputs: dict[str, Any] = {"attention_mask": (position < torch.tensor([[len(t)] for t in tokens])).long()}
        first = 0
        if self.siamese:
            first = min(prompts) - 1
            inputs["logits_to_keep"] = width - first
            # Rolling windows, which have no name, are text without a query.
            if any(requests[places[0]][0] is not None for places, _, _ in rows):
                inputs["prompt_mask"] = (position < torch.tensor(prompts)[:, None]).long()
        inputs = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        logits = self._model_call(ids.to(self.device), **inputs)
        for row, (given, prompt) in enumerate(zip(tokens, prompts, strict=True)):
            # The token after position t is predicted at t.
            kept = logits[row, prompt - 1 - first : len(given) - first]
            yield torch.log_softmax(kept, dim=-1, dtype=self.softmax_dtype or torch.float32)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": self.model.dtype}


def harness_model(
    candidate: Candidate | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
) -> LM:
    """A model for `lm_eval.simple_evaluate(model=…)`. Arguments and errors as for `SiameseLM`."""
    return SiameseLM(candidate, tokenizer=tokenizer, **kwargs)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
