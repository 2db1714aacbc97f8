"""The naive computation that everything is held against: the method's equations, two whole passes and no cache.

Written from the paper's equations alone. It knows nothing of `imsm` but where a model keeps its gate's weights, and
runs the frozen stream on a base model that never met an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100

#: For every row and every position, the tokens of the query.
Queries = Sequence[Sequence[Sequence[int]]]


def running_queries(mask: Tensor) -> Queries:
    """No boundary is known: the query of a position is what precedes it, and itself."""
    return [
        [[j for j in range(position + 1) if row[j]] for position in range(len(row))] for row in mask.bool().tolist()
    ]


def marked_queries(mask: Tensor, prompt: Tensor) -> Queries:
    """The query is the prompt, for every position."""
    both = (mask.bool() & prompt.bool()).tolist()
    return [[[j for j in range(len(row)) if row[j]]] * len(row) for row in both]


def answer_queries(mask: Tensor, labels: Tensor) -> Queries:
    """An answer's query is all that precedes it; a position belongs to the answer it predicts, or else to the next."""
    running = running_queries(mask)
    return [
        [
            [j for j in range(start) if attended[j]] or running[row][position]
            for position in range(len(answers))
            for start in [_start_of_answer([label != IGNORE for label in answers], position)]
        ]
        for row, (attended, answers) in enumerate(zip(mask.bool().tolist(), labels.tolist(), strict=True))
    ]


def _start_of_answer(supervised: list[bool], position: int) -> int:
    """Where the answer starts that the token after `position` is in, or that comes next, or that was the last."""
    token = position + 1
    if token < len(supervised) and supervised[token]:
        while token > 0 and supervised[token - 1]:
            token -= 1
        return token
    starts = [t for t, label in enumerate(supervised) if label and (t == 0 or not supervised[t - 1])]
    following = [start for start in starts if start > position]
    return min(following) if following else max(starts, default=0)


def mean_memories(memory: Tensor, queries: Queries) -> Tensor:
    """q̄ of every position, (B, T, d)."""
    means = torch.zeros_like(memory, dtype=torch.float32)
    for row, positions in enumerate(queries):
        for position, tokens in enumerate(positions):
            for token in tokens:
                means[row, position] = means[row, position] + memory[row, token].float() / len(tokens)
    return means


def mix(name: str, weights: dict[str, Tensor], h: Tensor, tuned: Tensor, q: Tensor, tuned_q: Tensor) -> Tensor:
    """h* of a gate variant, by the paper's equations. All memories and means (..., d)."""

    def gate(*features: Tensor) -> Tensor:
        return torch.sigmoid(torch.cat(features, dim=-1) @ weights["down.weight"].T @ weights["up.weight"].T)

    h, tuned = h.float(), tuned.float()
    if name == "query_aware":
        g = gate(q, h, tuned, tuned_q)
        return g * h + (1 - g) * tuned
    if name == "average":
        return 0.5 * h + 0.5 * tuned
    if name == "tuned":
        return tuned
    if name == "query_blended":
        h, tuned = 0.5 * h + 0.5 * q, 0.5 * tuned + 0.5 * tuned_q
    g = gate(h, tuned)
    token = g * h + (1 - g) * tuned
    if name == "residual":
        return 0.5 * h + 0.5 * token
    if name == "projected":
        return torch.cat([h, token], dim=-1) @ weights["project_down.weight"].T @ weights["project_up.weight"].T
    assert name in ("token", "query_blended")
    return token


def assert_same(logits: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for rounding, seen against the size of the logits."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


class Oracle:
    """A siamese model computed naively.

    Args:
        model: gives adapter and gate weights.
        base: the same base model, built anew.
    """

    def __init__(self, model: Any, base: Any) -> None:
        self.peft_model = model.peft_model
        self.gate: nn.Module = model.gate
        self.variant: str = model.config.gate
        self.base = base

    def memories(
        self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """h and h', each (B, T, d): what reaches the output head in a pass of the base, and in one of peft's."""
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if mask is not None:
            inputs["attention_mask"] = mask
        if positions is not None and self.base.config.model_type != "bloom":
            inputs["position_ids"] = positions
        tuned_head = self.peft_model.get_base_model().get_output_embeddings()
        with torch.no_grad():
            h = _head_input(self.base, self.base.get_output_embeddings(), inputs)
        return h, _head_input(self.peft_model, tuned_head, inputs)

    def logits(
        self, ids: Tensor, queries: Queries, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """(B, T, V), differentiable in adapter and gate."""
        h, tuned = self.memories(ids, mask, positions)
        weights = dict(self.gate.named_parameters())
        mixed = mix(self.variant, weights, h, tuned, mean_memories(h, queries), mean_memories(tuned, queries))
        return self.read_out(mixed.to(tuned.dtype))

    def read_out(self, memory: Tensor) -> Tensor:
        """What the base model makes of its last hidden state."""
        head, config = self.base.get_output_embeddings(), self.base.config
        logits = memory @ head.weight.detach().T
        if head.bias is not None:
            logits = logits + head.bias.detach()
        logits = logits / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The prompt and its continuation, every step computed from nothing."""
        tokens = list(prompt)
        for _ in range(new_tokens):
            queries = [[range(len(prompt))] * len(tokens)]
            tokens.append(int(self.logits(torch.tensor([tokens]), queries)[0, -1].argmax()))
        return tokens


def _head_input(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> Tensor:
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[0]
