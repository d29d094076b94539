"""Keys: which task a prompt belongs to, by the cosine between its pooled state and one direction for each task.

A task's key is the direction whose mean cosine to its prompts is the largest, which is that of the sum of their unit
vectors; gradient steps on that cosine, as in Winning SubNetworks' successors, move a key there. So a key is a sum, too:
it adds over ranks, and nothing of the other tasks goes into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dscl.maths.rls import Expansion, Statistics

FINE = 2.0**30  # a direction's entries are multiples of its inverse, whose sums fp64 holds exactly


class Units(Expansion):
    """Rows are kept as 8-bit integers, as for the analytic router; a feature vector is a row's direction."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 0)

    def features(self, rows: Tensor) -> Tensor:
        """[n, dim] in fp64, of length 1."""
        exact = rows.double()
        return exact / exact.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Keys:
    """Every task's key."""

    names: tuple[str, ...]
    directions: Tensor  # [tasks, dim] in fp64, of length 1

    def route(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each prompt its task's index, the lead over the second best task, and how far its cosine is from 1."""
        best = (features @ self.directions.T).topk(min(2, len(self.names)), 1)
        cosine, index = best.values[:, 0], best.indices[:, 0]
        return index, cosine - best.values[:, 1] if len(self.names) > 1 else cosine, 1 - cosine


@torch.no_grad()
def gather_keys(rows: Tensor, units: Units) -> Statistics:
    """Of a task's prompts the sum of their directions, the same in every order; no Gram matrix is needed."""
    features = torch.round(units.features(rows) * FINE) / FINE
    count = torch.tensor([len(rows)], device=rows.device)
    return Statistics(features.new_zeros(0), features.sum(0), count)


def keys_of(tasks: dict[str, Statistics]) -> Keys:
    names = tuple(sorted(tasks))
    sums = torch.stack([tasks[name].total for name in names])
    return Keys(names, sums / sums.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
