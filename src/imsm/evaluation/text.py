"""Tasks of kind `text`: how well plain text is predicted, in nats a token, as a gauge of general language."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from imsm.evaluation.candidates import Candidate
from imsm.evaluation.passes import rows
from imsm.evaluation.results import RecordResult
from imsm.evaluation.task import Task, TaskRecord
from imsm.generation import prompt_ids


def run(candidate: Candidate, task: Task, records: Sequence[tuple[int, TaskRecord]]) -> list[RecordResult]:
    """Cross-entropy of a batch of texts, each with its place in the task; not scored yet.

    A text's first token has nothing before it and is not scored. `measured` has `nats`, summed over the other tokens,
    and `tokens`, their number. A siamese model knows no query here, and uses the running mean.
    """
    tokens = [prompt_ids(candidate.tokenizer, record.prompt) for _, record in records]
    batch = rows(tokens, [0] * len(tokens))
    logits = candidate.own.logits(batch, batch.ids.shape[1])
    results = []
    for row, (index, record) in enumerate(records):
        scored = len(tokens[row]) - 1
        targets = batch.ids[row, 1 : scored + 1].to(logits.device)
        nats = torch.nn.functional.cross_entropy(logits[row, :scored].float(), targets, reduction="sum")
        measured = {"nats": float(nats), "tokens": float(scored)}
        results.append(RecordResult(index, record.prompt, list(record.references), "", measured))
    return results
