"""Tasks of kind `kept`: how much of what the base model says itself a checkpoint still says. No labels are needed.

Along the base model's greedy answer a_1 … a_n to a prompt, with p the base model's distributions and q the checkpoint's:

    agreement  = 1/n · Σ_t [argmax p_t = argmax q_t]
    divergence = 1/n · Σ_t KL(p_t ‖ q_t)                     in nats, each given the prompt and a_1 … a_(t−1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from imsm.evaluation.answering import asked
from imsm.evaluation.candidates import Candidate
from imsm.evaluation.passes import rows
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
        expected = base.answers(prompts, task.max_new_tokens)
        # The last token of an answer is predicted, and predicts nothing.
        sequences = [head + answer.token_ids[:-1] for head, answer in zip(heads, expected, strict=True)]
        batch = rows(sequences, [len(head) for head in heads])
        width = batch.ids.shape[1]
        last = width - min(map(len, heads)) + 1
        frozen = base.logits(batch, last)
    said = candidate.own.answers(prompts, task.max_new_tokens)
    logits = candidate.own.logits(batch, last)

    results = []
    for row, (index, record) in enumerate(records):
        count = len(expected[row].token_ids)
        start = len(heads[row]) - 1 - (width - last)
        p = torch.log_softmax(frozen[row, start : start + count].float(), dim=-1)
        q = torch.log_softmax(logits[row, start : start + count].float(), dim=-1)
        measured = {
            "identical": float(said[row].token_ids == expected[row].token_ids),
            "agreeing": float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum()),
            "tokens": float(count),
            "divergence": max(float((p.exp() * (p - q)).sum()), 0.0),
        }
        results.append(RecordResult(index, record.prompt, [expected[row].text], said[row].text, measured))
    return results
