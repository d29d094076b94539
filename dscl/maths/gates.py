"""Gates of low-rank experts: softmax over the router logits, the k largest kept, times the experts' columns.

This is the middle step of MoSEs' layer, `gate · (x A)`, between two large matrix products: little work in many small
operations. On a GPU, one Triton kernel does all of them and another one computes the gradient
(`dscl.maths.gates_kernel`). The reference implementation in torch defines the result; it is also used without Triton
and under `torch.compile`.
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

MAX_TILE_COLUMNS = 4096  # the most columns, padded to powers of two, that a program of the kernel can hold
MAX_EXPERTS = 256
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def select_experts(
    logits: torch.Tensor, top_k: int, expert_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router probabilities [tokens, experts], and the indices [tokens, k] of the k largest.

    `expert_mask` (True: available) excludes experts.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = (logits if expert_mask is None else logits.masked_fill(~expert_mask, -math.inf)).softmax(-1)
    return probs, probs.topk(top_k, sorted=False).indices


def compute_gates(
    logits: torch.Tensor, top_k: int, scale: float, expert_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Gates [tokens, experts]: `scale` times the probability of the k selected experts, 0 for the others."""
    probs, top_indices = select_experts(logits, top_k, expert_mask)
    return (probs * torch.zeros_like(probs).scatter_(-1, top_indices, scale)).to(logits.dtype)


def apply_gates(projected: torch.Tensor, num_experts: int, top_k: int, scale: float) -> torch.Tensor:
    """Multiply each expert's columns by its gate.

    `projected` [tokens, experts · rank + experts] holds the experts' columns, then one router logit for each expert.
    Returns the gated columns [tokens, experts · rank].
    """
    rank = projected.shape[1] // num_experts - 1
    device, dtype = projected.device, projected.dtype
    if kernel_fits(projected, num_experts, rank) and _kernel_matches_reference(device, dtype, num_experts, rank, top_k):
        gated: torch.Tensor = _ApplyGates.apply(projected, num_experts, top_k, scale)
        return gated
    return apply_gates_reference(projected, num_experts, top_k, scale)


def apply_gates_reference(projected: torch.Tensor, num_experts: int, top_k: int, scale: float) -> torch.Tensor:
    """`apply_gates` in torch operations."""
    low_rank, logits = projected.split([projected.shape[1] - num_experts, num_experts], 1)
    return (low_rank.unflatten(1, (num_experts, -1)) * compute_gates(logits, top_k, scale)[..., None]).flatten(1)


class _ApplyGates(torch.autograd.Function):
    """`apply_gates` by the Triton kernels. Only the input is saved; the backward pass recomputes the gates."""

    @staticmethod
    def forward(ctx: Any, projected: torch.Tensor, num_experts: int, top_k: int, scale: float) -> torch.Tensor:
        from dscl.maths import gates_kernel as kernel

        rank = projected.shape[1] // num_experts - 1
        ctx.save_for_backward(projected)
        ctx.sizes = num_experts, rank, top_k, scale
        gated = projected.new_empty(len(projected), num_experts * rank)
        kernel.launch_kernel(kernel.apply_gates_kernel, projected, gated, None, *ctx.sizes)
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from dscl.maths import gates_kernel as kernel

        (projected,) = ctx.saved_tensors
        grad_projected = projected.new_empty(projected.shape)
        grad_gated = grad_outputs[0].contiguous()
        kernel.launch_kernel(kernel.apply_gates_backward_kernel, projected, grad_gated, grad_projected, *ctx.sizes)
        return grad_projected, None, None, None


def kernel_fits(projected: torch.Tensor, num_experts: int, rank: int) -> bool:
    """Whether the kernels support this tensor, device and size."""
    return (
        not torch.compiler.is_compiling()
        and (projected.is_cuda or (projected.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"))
        and projected.dtype in KERNEL_DTYPES
        and projected.stride(1) == 1
        and num_experts <= MAX_EXPERTS
        and _next_power_of_2(num_experts) * _next_power_of_2(rank) <= MAX_TILE_COLUMNS
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


@functools.cache
def _kernel_matches_reference(
    device: torch.device, dtype: torch.dtype, num_experts: int, rank: int, top_k: int
) -> bool:
    """Whether the kernels can be built here and agree with the reference; tried once for each size.

    Activation checkpointing counts the tensors saved in a forward pass; identity hooks hide those of this trial.
    """
    generator = torch.Generator().manual_seed(0)
    low_rank, grad_output = (torch.randn(33, num_experts * rank, generator=generator) for _ in range(2))
    # Distinct logits, so that both implementations select the same experts.
    logits = torch.rand(33, num_experts, generator=generator).argsort(1) / 16
    projected, grad_output = torch.cat([low_rank, logits], 1).to(device, dtype), grad_output.to(device, dtype)
    results = []
    try:
        for implementation in (_ApplyGates.apply, apply_gates_reference):
            with (
                torch.enable_grad(),
                torch.autocast(device.type, enabled=False),
                saved_tensors_hooks(_identity, _identity),
            ):
                leaf = projected.clone().requires_grad_()
                gated = implementation(leaf, num_experts, top_k, 2.0)
                results.append((gated.detach(), *torch.autograd.grad(gated, leaf, grad_output)))
        pairs = zip(*results, strict=True)
        matches = all(bool((actual - expected).norm() <= 0.02 * expected.norm()) for actual, expected in pairs)
        reason = "its results differ from those of torch"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, the driver or Triton: the reference is used instead
        matches, reason = False, f"{type(error).__name__}: {error}".splitlines()[0]
    if not matches:
        warnings.warn(f"sub-experts are computed without their Triton kernel on {device}: {reason}", stacklevel=2)
    return matches


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
