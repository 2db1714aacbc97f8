"""Tasks of kind `kept`: how much of what the base model says itself a checkpoint still says. No labels are needed.

Along the base model's greedy answer a_1 … a_n to a prompt, with p the base model's distributions and q the checkpoint's:

    agreement  = 1/n · Σ_t [argmax p_t = argmax q_t]
    divergence = 1/n · Σ_t KL(p_t ‖ q_t)                     in nats, each given the prompt and a_1 … a_(t−1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imsm.evaluation.answering import asked
from imsm.evaluation.candidates import Candidate
from imsm.evaluation.passes import Pass, rows
from imsm.evaluation.references import Reference
from imsm.evaluation.results import RecordResult
from imsm.evaluation.task import Task, TaskRecord
from imsm.generation import prompt_ids


def run(candidate: Candidate, task: Task, records: Sequence[tuple[int, TaskRecord]]) -> list[RecordResult]:
    """A batch of prompts, each with its place in the task, answered by base model and candidate; not scored yet.

    `references` is the base model's answer alone. `measured` has `identical` (1 if the candidate's own greedy answer is
    the same token by token, else 0), and over the base model's answer `tokens` (end-of-sequence token counted),
    `agreeing` (tokens that both put first) and `divergence` (KL(base ‖ candidate), nats, summed).
    """
    prompts = [asked(task, record, candidate.tokenizer) for _, record in records]
    heads = [prompt_ids(candidate.tokenizer, prompt) for prompt in prompts]
    with candidate.base_pass() as base:

        def make() -> list[Reference]:
            expected = base.answers(prompts, task.max_new_tokens)
            found = along(base, heads, [answer.token_ids for answer in expected])
            return [Reference(answer, p) for answer, p in zip(expected, found, strict=True)]

        kept = candidate.references
        references = make() if kept is None else kept.of(base, heads, task.max_new_tokens, make)
    said = candidate.own.answers(prompts, task.max_new_tokens)
    own = along(candidate.own, heads, [reference.answer.token_ids for reference in references])

    results = []
    for (index, record), reference, answer, q in zip(records, references, said, own, strict=True):
        p = reference.log_probs.to(q)
        measured = {
            "identical": float(answer.token_ids == reference.answer.token_ids),
            "agreeing": float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum()),
            "tokens": float(len(q)),
            "divergence": max(float((p.exp() * (p - q)).sum()), 0.0),
        }
        results.append(RecordResult(index, record.prompt, [reference.answer.text], answer.text, measured))
    return results


def along(model: Pass, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """A model's log-probabilities (n, V) float32 for each of the n tokens of an answer, given the prompt and those before."""
    # The last token of an answer is predicted, and predicts nothing.
    sequences = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    batch = rows(sequences, [len(prompt) for prompt in prompts])
    width = batch.ids.shape[1]
    last = width - min(map(len, prompts)) + 1
    logits = model.logits(batch, last)
    starts = [len(prompt) - 1 - (width - last) for prompt in prompts]
    return [
        torch.log_softmax(logits[row, start : start + len(answer)].float(), dim=-1)
        for row, (start, answer) in enumerate(zip(starts, answers, strict=True))
    ]
