"""A mixture of low-rank experts by sorting: every token's row goes to the experts that it chose, and back.

    y = Σ over the chosen e of  gate_e · B_e A_e x      a token's choices are of `top` different experts

Each expert multiplies its own rows only, all experts in one call; so this pays where a token uses few of many columns.
Shapes do not depend on who is chosen and no host waits; every result is gathered by its place instead of added up in
the order of arrival, so that each run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

FROM = {"cpu": 256, "cuda": 512}  # columns of all experts, from which on sorting is taken


def pays(device: torch.device, kind: torch.dtype, experts: int, rank: int, top: int, *widths: int) -> bool:
    """Whether a mixture of this size, beside a projection of these widths, is faster sorted, and can be."""
    # Of fp32 there are grouped products on CPUs alone, and none that can be compiled.
    # GPUs before Hopper have none of their own either: what stands in for them makes the host wait.
    gpu = device.type == "cuda" and torch.cuda.is_available()
    able = not gpu or torch.cuda.get_device_capability(device) >= (9, 0)
    known = (kind == torch.bfloat16 and able) or (
        kind == torch.float32 and device.type == "cpu" and not torch.compiler.is_compiling()
    )
    # A grouped product asks for rows of whole 16 bytes.
    whole = all(size * kind.itemsize % 16 == 0 for size in (rank, *widths))
    few = 4 * top <= experts
    return bool(top) and few and whole and known and experts * rank >= FROM.get(device.type, 1 << 62)


def mixed(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """[tokens, out], of x [tokens, in], A [experts, rank, in], Bᵀ [experts, rank, out]; who is chosen, and how much,
    [tokens, top]."""
    experts, top = len(a), chosen.shape[1]
    dealt, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(dealt, torch.arange(1, experts + 1, device=x.device), out_int32=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    low = functional.grouped_mm(_Deal.apply(x, order, back, top), a.transpose(1, 2), offs=ends)
    low = low * gates.flatten().index_select(0, order)[:, None]
    return _Collect.apply(functional.grouped_mm(low, b, offs=ends), order, back, top)


class _Deal(torch.autograd.Function):
    """Each token's row, once for each of its choices, expert by expert."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor, top: int) -> torch.Tensor:
        ctx.save_for_backward(order, back)
        ctx.top = top
        return _deal(x, order, top)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, back = ctx.saved_tensors
        return _Collect.apply(gradients[0], order, back, ctx.top), None, None, None


class _Collect(torch.autograd.Function):
    """The sum of each token's rows, as `_Deal` laid them out."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, back: torch.Tensor, top: int) -> torch.Tensor:
        ctx.save_for_backward(order, back)
        ctx.top = top
        return rows.index_select(0, back).unflatten(0, (-1, top)).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, back = ctx.saved_tensors
        return _Deal.apply(gradients[0], order, back, ctx.top), None, None, None


def _deal(x: torch.Tensor, order: torch.Tensor, top: int) -> torch.Tensor:
    return x.index_select(0, order.div(top, rounding_mode="floor"))
