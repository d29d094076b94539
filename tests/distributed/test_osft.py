"""OSFT on real ranks: the constraint holds on the weights, at every stage and size, against dense projectors in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from dscl import dist, train
from dscl.engine import Engine, fill
from dscl.maths.subspace import READINGS
from dscl.methods import Facts
from dscl.methods.osft import Osft, OsftConfig
from tests.distributed.test_engine import (
    OFFLOAD,
    assemble,
    backbone,
    masters,
    micro_batches,
    rows,
    summed_loss,
    targets,
    whole,
)

STEPS = 6
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN = {"basis": "weights", "allocate": "fixed", "share": 0.5, "updates": 0.0, "gradients": False}
PIECES = {"sub_group_size": 5000, "stage3_param_persistence_threshold": 100}


def rate(step: int) -> float:
    """Such that the weights change by about their own size."""
    return 2e-2 * (1 + step % 3) / 3


def is_target(name: str) -> bool:
    return name.split(".")[-2] in SEVEN


# ---- plain torch in one process, with dense projectors in fp64


@dataclass(frozen=True)
class Projectors:
    """On what a target weight's change may not hold."""

    reading: str
    start: torch.Tensor
    right: torch.Tensor  # V Vᵀ
    left: torch.Tensor  # U Uᵀ

    @classmethod
    def of(cls, reading: str, weight: torch.Tensor, share: float) -> Projectors:
        """Of the strongest directions of the weight, by a general SVD."""
        exact = weight.detach().double().clone()
        u, _, vt = torch.linalg.svd(exact)
        count = int(share * min(exact.shape))
        return cls(reading, exact, vt[:count].T @ vt[:count], u[:, :count] @ u[:, :count].T)

    def protected(self, change: torch.Tensor) -> torch.Tensor:
        """The part of a change that may not be."""
        if self.reading == "input":
            return change @ self.right
        if self.reading == "paper":
            return self.left @ change @ self.right
        return change - (change - self.left @ change) + (change - self.left @ change) @ self.right
