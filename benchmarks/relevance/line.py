"""A head as training fits it, and where a border between the task's prompts and the dreams would lie."""

from __future__ import annotations

import torch
from torch import Tensor

from imsm.relevance import STRAY_DREAMS, border_place, fit_relevance

#: Share of the task's prompts that may be left to the base model.
FALSE_RECALL = 0.01


class Line:
    """Where prompts lie on the way from the task's to the dreams.

    Args:
        task: (N, F) features of the task's prompts.
        dreams: (M, F) of what is not the task.
        penalty: of the fit.
    """

    def __init__(self, task: Tensor, dreams: Tensor, penalty: float) -> None:
        self.head = fit_relevance(task, dreams, penalty=penalty, false_recall=FALSE_RECALL, folds=0).head
        self._least = self.logits(task).quantile(1 - FALSE_RECALL)
        self._gap = (self.logits(dreams).quantile(STRAY_DREAMS) - self._least).clamp(min=0)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """(N,) float64 of features (N, F)."""
        return self.head(features)[:, 0].double()

    def nearer(self, anchors: Tensor) -> float:
        """Where training draws the border for anchors, (A, F)."""
        return border_place((self.logits(anchors) - self._least) / self._gap.clamp(min=1e-6))

    def border(self, place: float) -> float:
        """The logit above which prompts go to the base, for a border that lies there between the task, 0, and the dreams, 1."""
        return float(self._least + place * self._gap)
