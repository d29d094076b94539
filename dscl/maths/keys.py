"""Task keys: a router that finds a prompt's task by the cosine between its pooled state and one key for each task.

The key of a task is the direction with the largest mean cosine to the task's prompts. The authors of Winning
SubNetworks learn keys by gradient steps on that cosine. Its optimum is known: the direction of the sum of the prompts'
unit vectors. So a key is computed from a sum, which can be added over ranks and does not depend on other tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dscl.maths.rls import FeatureMap, TaskStatistics

DIRECTION_SCALE = 2.0**30  # entries of directions are rounded to multiples of 2^-30, so that fp64 sums them exactly


class UnitFeatures(FeatureMap):
    """A feature map whose features are the row's direction. Rows are 8-bit integers, as for the analytic router."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 0)

    def compute_features(self, quantized: Tensor) -> Tensor:
        """Unit vectors [n, dim] in fp64 of quantized rows [n, dim]."""
        vectors = quantized.double()
        return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class TaskKeys:
    """The keys of all tasks, as a router."""

    names: tuple[str, ...]
    directions: Tensor  # [tasks, dim] in fp64, of length 1

    def route(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(task index, margin over the second best task, 1 - cosine) of each prompt, for features [n, dim]."""
        best = (features @ self.directions.T).topk(min(2, len(self.names)), 1)
        cosine, index = best.values[:, 0], best.indices[:, 0]
        return index, cosine - best.values[:, 1] if len(self.names) > 1 else cosine, 1 - cosine


@torch.no_grad()
def compute_key_statistics(quantized: Tensor, feature_map: UnitFeatures) -> TaskStatistics:
    """The sum of the directions of a task's prompts, exact in any order; the Gram matrix stays empty."""
    features = torch.round(feature_map.compute_features(quantized) * DIRECTION_SCALE) / DIRECTION_SCALE
    count = torch.tensor([len(quantized)], device=quantized.device)
    return TaskStatistics(features.new_zeros(0), features.sum(0), count)


def build_task_keys(tasks: dict[str, TaskStatistics]) -> TaskKeys:
    """The keys of tasks from their statistics."""
    names = tuple(sorted(tasks))
    sums = torch.stack([tasks[name].feature_sum for name in names])
    return TaskKeys(names, sums / sums.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
