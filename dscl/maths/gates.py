"""What each expert gives to a token: softmax over the experts, of which the few largest count, times their columns.

Between two large products this is little work in many small steps. On a GPU one kernel does them all, and one their
gradient (`dscl.maths.gates_kernel`). The torch form is the reference that it has to equal, and stands in for it where
there is no Triton, and while something compiles.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

TILE = 4096  # columns, at the most, that a program of the kernel can hold
MOST = 256  # experts
KINDS = (torch.float16, torch.bfloat16, torch.float32)


def chosen(logits: torch.Tensor, top: int, seats: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """How much a token would give to each expert, or to each that is seated, and the few that get it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    gate = (logits if seats is None else logits.masked_fill(~seats, -math.inf)).softmax(-1)
    return gate, gate.topk(top, sorted=False).indices


def gates(logits: torch.Tensor, top: int, factor: float, seats: torch.Tensor | None = None) -> torch.Tensor:
    """Of each expert, or of those that are seated."""
    gate, few = chosen(logits, top, seats)
    return (gate * torch.zeros_like(gate).scatter_(-1, few, factor)).to(logits.dtype)


def weigh(read: torch.Tensor, experts: int, top: int, factor: float) -> torch.Tensor:
    """[tokens, columns], each expert's times its gate; of [tokens, columns and then a logit for each expert]."""
    rank = read.shape[1] // experts - 1
    if kernel_fits(read, experts, rank) and _kernel_works(read.device, read.dtype, experts, rank, top):
        weighed: torch.Tensor = _Weigh.apply(read, experts, top, factor)
        return weighed
    return by_steps(read, experts, top, factor)


def by_steps(read: torch.Tensor, experts: int, top: int, factor: float) -> torch.Tensor:
    """The torch form."""
    low, logits = read.split([read.shape[1] - experts, experts], 1)
    return (low.unflatten(1, (experts, -1)) * gates(logits, top, factor)[..., None]).flatten(1)


class _Weigh(torch.autograd.Function):
    """The same by the kernel. Gates are computed again for the gradient: only what was read is kept."""

    @staticmethod
    def forward(ctx: Any, read: torch.Tensor, experts: int, top: int, factor: float) -> torch.Tensor:
        from dscl.maths import gates_kernel as kernel

        rank = read.shape[1] // experts - 1
        ctx.save_for_backward(read)
        ctx.of = experts, rank, top, factor
        weighed = read.new_empty(len(read), experts * rank)
        kernel.start(kernel.weigh, read, weighed, None, *ctx.of)
        return weighed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from dscl.maths import gates_kernel as kernel

        (read,) = ctx.saved_tensors
        to_read = read.new_empty(read.shape)
        kernel.start(kernel.weigh_back, read, gradients[0].contiguous(), to_read, *ctx.of)
        return to_read, None, None, None


def kernel_fits(read: torch.Tensor, experts: int, rank: int) -> bool:
    return (
        not torch.compiler.is_compiling()
        and (read.is_cuda or (read.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"))
        and read.dtype in KINDS
        and read.stride(1) == 1
        and experts <= MOST
        and _power(experts) * _power(rank) <= TILE
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


@functools.cache
def _kernel_works(device: torch.device, kind: torch.dtype, experts: int, rank: int, top: int) -> bool:
    """Whether the kernel can be built here and gives what the torch form gives; tried once for each size.

    A layer that is computed again in the backward pass counts what is kept on the way: of this trial it hears nothing.
    """
    drawn = torch.Generator().manual_seed(0)
    low, toward = (torch.randn(33, experts * rank, generator=drawn) for _ in range(2))
    unlike = torch.rand(33, experts, generator=drawn).argsort(1) / 16  # of experts alike, each may choose another
    read, toward = torch.cat([low, unlike], 1).to(device, kind), toward.to(device, kind)
    found = []
    try:
        for way in (_Weigh.apply, by_steps):
            with torch.enable_grad(), torch.autocast(device.type, enabled=False), saved_tensors_hooks(_as_is, _as_is):
                leaf = read.clone().requires_grad_()
                weighed = way(leaf, experts, top, 2.0)
                found.append((weighed.detach(), *torch.autograd.grad(weighed, leaf, toward)))
        same = all(bool((ours - torchs).norm() <= 0.02 * torchs.norm()) for ours, torchs in zip(*found, strict=True))
        reason = "it does not give what torch gives"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, a driver, or a version of Triton: none of them is a reason to end
        same, reason = False, f"{type(error).__name__}: {error}".splitlines()[0]
    if not same:
        warnings.warn(f"sub-experts are weighed without their kernel on {device}: {reason}", stacklevel=2)
    return same


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
