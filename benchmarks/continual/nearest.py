"""Routing without heads or a classifier: every query goes to the task of the nearest stored query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NearestQuery(nn.Module):
    """Stands where a router does; logit = minus the distance to the task's nearest stored query.

    Args:
        stores: (N, F) of each task.
    """

    def __init__(self, stores: Sequence[Tensor]) -> None:
        super().__init__()
        every = torch.cat([store.float() for store in stores])
        self.register_buffer("mean", every.mean(dim=0))
        self.register_buffer("scale", every.std(dim=0).clamp(min=1e-6))
        for place, store in enumerate(stores):
            self.register_buffer(f"store{place}", self._standard(store))
        self.tasks = len(stores)

    def _standard(self, queries: Tensor) -> Tensor:
        return (queries.float() - self.mean) / self.scale  # type: ignore[operator]

    def forward(self, query: Tensor) -> Tensor:
        """Logits (B, K) of queries (B, F)."""
        own = self._standard(query)
        stores = [getattr(self, f"store{place}") for place in range(self.tasks)]
        return torch.stack([-torch.cdist(own, store).min(dim=1).values for store in stores], dim=1)
