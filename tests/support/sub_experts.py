"""The shape and random values of a sub-expert layer in tests."""

from __future__ import annotations

import math
from typing import Any

import torch

from dscl.model.adapters.sub_experts import SubExpertLinear, SubExpertShape

IN, OUT, TASKS = 24, 16, 3  # rows are multiples of 16 bytes in bf16 too, as the grouped kernel requires


def make_shape(rank1: bool = True, **changes: Any) -> SubExpertShape:
    values = {
        "num_experts": 4, "rank": 3, "top_k": 2, "mask_density": 0.5, "scale": 1.5, "rank1": rank1, **changes
    }  # fmt: skip
    return SubExpertShape(**{"max_experts": values["num_experts"], **values})


@torch.no_grad()
def randomize_parameters(layer: SubExpertLinear, seed: int) -> None:
    """Fill the trainable parameters with random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name in layer.trainable_names:
        parameter = getattr(layer, name)
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / math.sqrt(IN))
