"""The Triton kernels of `dscl.maths.gates`. Each program handles a block of tokens with all their columns and logits.

With TRITON_INTERPRET=1, set before Triton is imported, they run on CPUs, slowly.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dscl.maths.gates import MAX_TILE_COLUMNS


def launch_kernel(
    kernel: Any, projected: torch.Tensor, gated: torch.Tensor, grad_projected: torch.Tensor | None,
    num_experts: int, rank: int, top_k: int, scale: float,
) -> None:  # fmt: skip
    """Start a kernel: the forward one writes `gated`; the backward one reads its gradient there and writes
    `grad_projected`."""
    sizes = kernel_sizes(num_experts, rank, top_k)
    tensors = (projected, gated) if grad_projected is None else (projected, gated, grad_projected)
    with torch.cuda.device_of(projected):  # Triton launches kernels on the current device
        kernel[(triton.cdiv(len(projected), sizes["BLOCK"]),)](
            *tensors, len(projected), projected.stride(0), scale, **sizes
        )


def kernel_sizes(num_experts: int, rank: int, top_k: int) -> dict[str, int]:
    """The compile-time constants of a kernel."""
    padded_experts, padded_rank = triton.next_power_of_2(num_experts), triton.next_power_of_2(rank)
    # Small blocks, so that there are many programs.
    block = max(1, min(32, MAX_TILE_COLUMNS // 4 // (padded_experts * padded_rank)))
    return {
        "EXPERTS": num_experts, "RANK": rank, "TOP_K": top_k,
        "PADDED_EXPERTS": padded_experts, "PADDED_RANK": padded_rank, "BLOCK": block,
    }  # fmt: skip


@triton.jit
def _token_indices(num_tokens, BLOCK: tl.constexpr):
    """The token indices [block] of this program, and which of them are valid; indices past the end become the last."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tl.minimum(tokens, num_tokens - 1), tokens < num_tokens


@triton.jit
def _softmax_top_k(
    projected, tokens, width,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr, PADDED_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Softmax of the router logits [block, experts], and whether each is among the k largest of its token."""
    expert_ids = tl.arange(0, PADDED_EXPERTS)
    logits = tl.load(
        projected + tokens[:, None] * width + EXPERTS * RANK + expert_ids[None, :],
        mask=(expert_ids < EXPERTS)[None, :], other=-float("inf"),
    ).to(tl.float32)  # fmt: skip
    probs = tl.exp(logits - tl.max(logits, 1)[:, None])
    probs = probs / tl.sum(probs, 1)[:, None]
    remaining = probs
    selected = remaining < 0
    for _ in tl.static_range(TOP_K):
        is_best = expert_ids[None, :] == tl.argmax(remaining, 1)[:, None]
        selected = selected | is_best
        remaining = tl.where(is_best, -1.0, remaining)
    return probs, selected


@triton.jit
def _column_offsets(
    tokens, width, EXPERTS: tl.constexpr, RANK: tl.constexpr, PADDED_EXPERTS: tl.constexpr, PADDED_RANK: tl.constexpr
):  # fmt: skip
    """Memory offsets of the columns [block, experts, rank], and which columns are valid [1, experts, rank]."""
    expert_ids, rank_ids = tl.arange(0, PADDED_EXPERTS)[None, :, None], tl.arange(0, PADDED_RANK)[None, None, :]
    return tokens[:, None, None] * width + expert_ids * RANK + rank_ids, (expert_ids < EXPERTS) & (rank_ids < RANK)


@triton.jit(do_not_specialize=["num_tokens"])  # one build for all numbers of tokens
def apply_gates_kernel(
    projected, gated, num_tokens, width, scale,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr, PADDED_RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens, valid_token = _token_indices(num_tokens, BLOCK)
    probs, selected = _softmax_top_k(projected, tokens, width, EXPERTS, RANK, TOP_K, PADDED_EXPERTS)
    dtype = gated.dtype.element_ty
    gates = (probs * tl.where(selected, scale, 0.0)).to(dtype).to(tl.float32)
    input_offsets, valid_column = _column_offsets(tokens, width, EXPERTS, RANK, PADDED_EXPERTS, PADDED_RANK)
    low_rank = tl.load(projected + input_offsets, mask=valid_column, other=0.0).to(tl.float32)
    output_offsets, _ = _column_offsets(tokens, EXPERTS * RANK, EXPERTS, RANK, PADDED_EXPERTS, PADDED_RANK)
    stored = valid_column & valid_token[:, None, None]
    tl.store(gated + output_offsets, (low_rank * gates[:, :, None]).to(dtype), mask=stored)


@triton.jit(do_not_specialize=["num_tokens"])
def apply_gates_backward_kernel(
    projected, grad_output, grad_projected, num_tokens, width, scale,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr, PADDED_RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens, valid_token = _token_indices(num_tokens, BLOCK)
    probs, selected = _softmax_top_k(projected, tokens, width, EXPERTS, RANK, TOP_K, PADDED_EXPERTS)
    dtype = grad_projected.dtype.element_ty
    gate_scale = tl.where(selected, scale, 0.0)
    gates = (probs * gate_scale).to(dtype).to(tl.float32)
    input_offsets, valid_column = _column_offsets(tokens, width, EXPERTS, RANK, PADDED_EXPERTS, PADDED_RANK)
    gated_offsets, _ = _column_offsets(tokens, EXPERTS * RANK, EXPERTS, RANK, PADDED_EXPERTS, PADDED_RANK)
    low_rank = tl.load(projected + input_offsets, mask=valid_column, other=0.0).to(tl.float32)
    grad_gated = tl.load(grad_output + gated_offsets, mask=valid_column, other=0.0).to(tl.float32)
    input_width = EXPERTS * (RANK + 1)
    output_offsets, _ = _column_offsets(tokens, input_width, EXPERTS, RANK, PADDED_EXPERTS, PADDED_RANK)
    stored = valid_column & valid_token[:, None, None]
    tl.store(grad_projected + output_offsets, (grad_gated * gates[:, :, None]).to(dtype), mask=stored)
    grad_probs = tl.sum(grad_gated * low_rank, 2) * gate_scale
    grad_logits = probs * (grad_probs - tl.sum(probs * grad_probs, 1)[:, None])
    expert_ids = tl.arange(0, PADDED_EXPERTS)[None, :]
    tl.store(
        grad_projected + tokens[:, None] * input_width + EXPERTS * RANK + expert_ids, grad_logits.to(dtype),
        mask=(expert_ids < EXPERTS) & valid_token[:, None],
    )  # fmt: skip
