"""A mixture of low-rank experts by grouped matrix products: tokens are sorted by expert, and the results sorted back.

    y = Σ_e gate_e · B_e A_e x      over the k experts selected for the token

Each expert multiplies only the rows of its tokens, all experts in one call. This is faster than masked dense products
where each token uses few of many experts. Shapes do not depend on the selection, so the host never waits for the GPU.
Results are gathered by index, not added atomically, so every run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

MIN_COLUMNS = {"cpu": 256, "cuda": 512}  # grouped products are used from this total of experts · rank on


def grouped_is_faster(
    device: torch.device, dtype: torch.dtype, num_experts: int, rank: int, top_k: int, *widths: int
) -> bool:
    """Whether grouped products are supported and faster for this mixture, beside a projection with these widths."""
    # Grouped products in fp32 exist on CPUs only, and not under torch.compile.
    # GPUs before Hopper have no grouped kernel; torch's fallback makes the host wait.
    is_cuda = device.type == "cuda" and torch.cuda.is_available()
    has_grouped_gemm = not is_cuda or torch.cuda.get_device_capability(device) >= (9, 0)
    dtype_supported = (dtype == torch.bfloat16 and has_grouped_gemm) or (
        dtype == torch.float32 and device.type == "cpu" and not torch.compiler.is_compiling()
    )
    # Rows must be multiples of 16 bytes.
    rows_aligned = all(size * dtype.itemsize % 16 == 0 for size in (rank, *widths))
    is_sparse = 4 * top_k <= num_experts
    return (
        bool(top_k)
        and is_sparse
        and rows_aligned
        and dtype_supported
        and num_experts * rank >= MIN_COLUMNS.get(device.type, 1 << 62)
    )


def grouped_mixture(
    x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """The mixture's output [tokens, out].

    x [tokens, in]; lora_a: A [experts, rank, in]; lora_b: Bᵀ [experts, rank, out]; expert_ids and gates [tokens, k].
    """
    num_experts, top_k = len(lora_a), expert_ids.shape[1]
    sorted_expert_ids, order = expert_ids.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_expert_ids, torch.arange(1, num_experts + 1, device=x.device), out_int32=True)
    inverse_order = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    low_rank = functional.grouped_mm(
        _DispatchTokens.apply(x, order, inverse_order, top_k), lora_a.transpose(1, 2), offs=ends
    )
    low_rank = low_rank * gates.flatten().index_select(0, order)[:, None]
    return _CombineTokens.apply(functional.grouped_mm(low_rank, lora_b, offs=ends), order, inverse_order, top_k)


class _DispatchTokens(torch.autograd.Function):
    """Copy each token's row once for each of its experts, sorted by expert: [tokens, in] -> [tokens · k, in]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse_order: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse_order)
        ctx.top_k = top_k
        return _dispatch_tokens(x, order, top_k)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, inverse_order = ctx.saved_tensors
        return _CombineTokens.apply(grad_outputs[0], order, inverse_order, ctx.top_k), None, None, None


class _CombineTokens(torch.autograd.Function):
    """Sum the k rows of each token, from the order of `_DispatchTokens`: [tokens · k, out] -> [tokens, out]."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse_order: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse_order)
        ctx.top_k = top_k
        return rows.index_select(0, inverse_order).unflatten(0, (-1, top_k)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, inverse_order = ctx.saved_tensors
        return _DispatchTokens.apply(grad_outputs[0], order, inverse_order, ctx.top_k), None, None, None


def _dispatch_tokens(x: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    return x.index_select(0, order.div(top_k, rounding_mode="floor"))
