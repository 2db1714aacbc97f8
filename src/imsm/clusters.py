"""Points that are alike: k-means with spread-out beginnings (Arthur and Vassilvitskii 2007, "k-means++")."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rounds of assigning and averaging at the most.
ROUNDS = 15


def clusters(points: Tensor, count: int, seed: int = 0) -> Tensor:
    """The cluster of each point, numbers from 0, (N,) int64 on the CPU; the same for the same points and seed.

    Args:
        points: (N, F), of which each feature is standardised first.
        count: clusters at most; with fewer different points there are fewer.
        seed: of the beginnings.
    """
    points = points.detach().double().cpu()
    points = (points - points.mean(dim=0)) / points.std(dim=0, correction=0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(count - 1):
        far = torch.cdist(points, centres).amin(dim=1).square()
        if not bool(far.sum() > 0):
            break
        centres = torch.cat([centres, points[torch.multinomial(far / far.sum(), 1, generator=generator)]])
    found = torch.cdist(points, centres).argmin(dim=1)
    for _ in range(ROUNDS):
        kept = [points[found == place].mean(dim=0) for place in found.unique()]
        before, found = found, torch.cdist(points, torch.stack(kept)).argmin(dim=1)
        if torch.equal(before, found):
            break
    return found
