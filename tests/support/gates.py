"""Sizes, inputs and tolerances for the kernel of the gates, on the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dscl.maths import gates

SIZES = [  # tokens, experts, rank, top
    (5, 8, 8, 2), (70, 8, 8, 8), (130, 4, 4, 1), (33, 3, 5, 2), (1, 1, 8, 1), (9, 20, 3, 7), (3, 64, 64, 2),
    (7, 2, 1, 1),
]  # fmt: skip
Way = Callable[..., torch.Tensor]


def drawn(tokens: int, experts: int, rank: int, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read, with logits that differ in every kind, and a gradient."""
    generator = torch.Generator().manual_seed(tokens)
    low, toward = (torch.randn(tokens, experts * rank, generator=generator, dtype=torch.float64) for _ in range(2))
    unlike = torch.rand(tokens, experts, generator=generator).argsort(1) / 16 - 1
    return torch.cat([low, unlike], 1).to(kind), toward.to(kind)


def passed(way: Way, read: torch.Tensor, toward: torch.Tensor, *sizes: Any) -> list[torch.Tensor]:
    """What comes out, and the gradient of what went in."""
    leaf = read.clone().requires_grad_()
    weighed = way(leaf, *sizes)
    return [weighed.detach(), *torch.autograd.grad(weighed, leaf, toward)]


def check(found: list[torch.Tensor], read: torch.Tensor, toward: torch.Tensor, *sizes: Any, more: float = 0) -> None:
    """As near to what is exact as the torch form is, or so much further off."""
    torchs = passed(gates.apply_gates_reference, read, toward, *sizes)
    exact = passed(gates.apply_gates_reference, read.double(), toward.double(), *sizes)
    for ours, theirs, wanted in zip(found, torchs, exact, strict=True):
        assert ours.dtype == read.dtype
        off, may_be = ((tensor.double() - wanted).norm() for tensor in (ours, theirs))
        assert off <= 1.1 * may_be + (1e-7 + more) * wanted.norm()
