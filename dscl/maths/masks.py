"""Masks over shared parameters: which of them a task uses, how that is learned, and what it comes to in bytes.

Every parameter has a score; a task's mask opens those of the largest magnitude (`strongest`), and the loss's gradient
with respect to the mask goes to the scores as it is (Winning SubNetworks). What an ended task's mask opens is claimed:
later tasks may open it too, and cannot change it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _Opened(torch.autograd.Function):
    """1 where a score's magnitude is among the `count` largest of those allowed, else 0; straight-through backward, but
    for scores that decide nothing."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, allowed: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(scores, allowed)
        return opened(scores, allowed, count).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        scores, allowed = ctx.saved_tensors
        return torch.where(scores < 0, -gradients[0], gradients[0]).mul_(allowed), None, None


def strongest(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The mask as numbers of the scores' kind, through which the scores learn: `∂L/∂|s| = ∂L/∂m`."""
    mask: Tensor = _Opened.apply(scores, allowed, count)
    return mask


@torch.no_grad()
def opened(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    """Where the `count` largest magnitudes among those allowed stand; all of these if they are fewer. No host waits."""
    assert scores.shape == allowed.shape
    size = torch.where(allowed, scores.detach().abs().float(), -1.0).flatten()
    best = size.topk(min(count, len(size)), sorted=False).indices
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter_(0, best, True)
    return (chosen & allowed.flatten()).view(scores.shape)


def count_of(share: float, size: int) -> int:
    """How many of `size` parameters a mask opens, at least one; 0.29 of 100 is 29, whatever floating point says."""
    assert 0 < share <= 1
    return max(1, math.floor(share * size + 1e-9))


def pack(mask: Tensor) -> Tensor:
    """A mask as bits, eight to a byte."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `pack` was given."""
    assert bits.dtype == torch.uint8 and len(bits) == -(-math.prod(shape) // 8)  # noqa: PT018
    spread = bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return spread.flatten()[: math.prod(shape)].bool().view(shape)
