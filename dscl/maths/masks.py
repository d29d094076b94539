"""Binary masks over shared parameters: their selection by learned scores, and their storage as bits.

As in Winning SubNetworks, every parameter has a score. A task's mask selects the parameters whose scores have the
largest magnitude, and the gradient with respect to the mask is passed straight through to the scores. The parameters
selected by a finished task are frozen: later tasks may use them but not change them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _TopKMask(torch.autograd.Function):
    """Forward: `top_k_mask` as numbers. Backward: straight-through to the magnitudes, zero where not allowed."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, allowed: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(scores, allowed)
        return top_k_mask(scores, allowed, count).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        scores, allowed = ctx.saved_tensors
        return torch.where(scores < 0, -grad_outputs[0], grad_outputs[0]).mul_(allowed), None, None


def trainable_top_k_mask(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The mask m of `top_k_mask` in the scores' dtype, differentiable straight-through: `∂L/∂|s| = ∂L/∂m`."""
    mask: Tensor = _TopKMask.apply(scores, allowed, count)
    return mask


@torch.no_grad()
def top_k_mask(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    """True at the `count` allowed scores of the largest magnitude (at all allowed ones if fewer); no host sync."""
    assert scores.shape == allowed.shape
    magnitudes = torch.where(allowed, scores.detach().abs().float(), -1.0).flatten()
    top_indices = magnitudes.topk(min(count, len(magnitudes)), sorted=False).indices
    is_selected = torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(0, top_indices, True)
    return (is_selected & allowed.flatten()).view(scores.shape)


def mask_size(density: float, size: int) -> int:
    """The number of `size` parameters that a mask of this density selects, at least 1; 0.29 of 100 is 29."""
    assert 0 < density <= 1
    return max(1, math.floor(density * size + 1e-9))


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean mask into bytes, eight entries to a byte: uint8 [ceil(size / 8)]."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_bits`: the boolean mask of this shape."""
    assert bits.dtype == torch.uint8 and len(bits) == -(-math.prod(shape) // 8)  # noqa: PT018
    unpacked = bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return unpacked.flatten()[: math.prod(shape)].bool().view(shape)
