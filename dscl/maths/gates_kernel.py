"""The kernels of `dscl.maths.gates`, in Triton. A program has some tokens, with all columns and logits of theirs.

With TRITON_INTERPRET=1, set before Triton is imported, they run on CPUs, slowly.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dscl.maths.gates import TILE


def start(
    kernel: Any, read: torch.Tensor, other: torch.Tensor, out: torch.Tensor | None, experts: int, rank: int, top: int,
    factor: float,
) -> None:  # fmt: skip
    """`weigh` writes `other`; `weigh_back` reads it and writes `out`."""
    sizes = sizes_of(experts, rank, top)
    given = (read, other) if out is None else (read, other, out)
    with torch.cuda.device_of(read):  # Triton starts it on the current one
        kernel[(triton.cdiv(len(read), sizes["BLOCK"]),)](*given, len(read), read.stride(0), factor, **sizes)


def sizes_of(experts: int, rank: int, top: int) -> dict[str, int]:
    """What is fixed when a kernel is built."""
    places, ranks = triton.next_power_of_2(experts), triton.next_power_of_2(rank)
    block = max(1, min(32, TILE // 4 // (places * ranks)))  # small ones, so that there are many
    return {"EXPERTS": experts, "RANK": rank, "TOP": top, "PLACES": places, "RANKS": ranks, "BLOCK": block}


@triton.jit
def _tokens(count, BLOCK: tl.constexpr):
    """Which tokens these are, and whether there are so many: what is beyond stands in for the last one."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tl.minimum(tokens, count - 1), tokens < count


@triton.jit
def _shares(read, tokens, width, EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP: tl.constexpr, PLACES: tl.constexpr):
    """[tokens, places]: softmax of the logits, and whether it is one of the largest."""
    places = tl.arange(0, PLACES)
    logits = tl.load(
        read + tokens[:, None] * width + EXPERTS * RANK + places[None, :],
        mask=(places < EXPERTS)[None, :], other=-float("inf"),
    ).to(tl.float32)  # fmt: skip
    shares = tl.exp(logits - tl.max(logits, 1)[:, None])
    shares = shares / tl.sum(shares, 1)[:, None]
    left = shares
    few = left < 0
    for _ in tl.static_range(TOP):
        best = places[None, :] == tl.argmax(left, 1)[:, None]
        few = few | best
        left = tl.where(best, -1.0, left)
    return shares, few


@triton.jit
def _columns(tokens, width, EXPERTS: tl.constexpr, RANK: tl.constexpr, PLACES: tl.constexpr, RANKS: tl.constexpr):
    """[tokens, places, ranks]: where each column stands, and [1, places, ranks]: whether there is such a one."""
    places, ranks = tl.arange(0, PLACES)[None, :, None], tl.arange(0, RANKS)[None, None, :]
    return tokens[:, None, None] * width + places * RANK + ranks, (places < EXPERTS) & (ranks < RANK)


@triton.jit(do_not_specialize=["count"])  # however many tokens: one build
def weigh(
    read, weighed, count, width, factor,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP: tl.constexpr,
    PLACES: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens, there = _tokens(count, BLOCK)
    shares, few = _shares(read, tokens, width, EXPERTS, RANK, TOP, PLACES)
    kind = weighed.dtype.element_ty
    gate = (shares * tl.where(few, factor, 0.0)).to(kind).to(tl.float32)
    at, real = _columns(tokens, width, EXPERTS, RANK, PLACES, RANKS)
    low = tl.load(read + at, mask=real, other=0.0).to(tl.float32)
    to, _ = _columns(tokens, EXPERTS * RANK, EXPERTS, RANK, PLACES, RANKS)
    tl.store(weighed + to, (low * gate[:, :, None]).to(kind), mask=real & there[:, None, None])


@triton.jit(do_not_specialize=["count"])
def weigh_back(
    read, gradient, to_read, count, width, factor,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP: tl.constexpr,
    PLACES: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens, there = _tokens(count, BLOCK)
    shares, few = _shares(read, tokens, width, EXPERTS, RANK, TOP, PLACES)
    kind = to_read.dtype.element_ty
    some = tl.where(few, factor, 0.0)
    gate = (shares * some).to(kind).to(tl.float32)
    at, real = _columns(tokens, width, EXPERTS, RANK, PLACES, RANKS)
    of, _ = _columns(tokens, EXPERTS * RANK, EXPERTS, RANK, PLACES, RANKS)
    low = tl.load(read + at, mask=real, other=0.0).to(tl.float32)
    toward = tl.load(gradient + of, mask=real, other=0.0).to(tl.float32)
    made = EXPERTS * (RANK + 1)
    to, _ = _columns(tokens, made, EXPERTS, RANK, PLACES, RANKS)
    tl.store(to_read + to, (toward * gate[:, :, None]).to(kind), mask=real & there[:, None, None])
    to_share = tl.sum(toward * low, 2) * some
    to_logit = shares * (to_share - tl.sum(shares * to_share, 1)[:, None])
    places = tl.arange(0, PLACES)[None, :]
    tl.store(
        to_read + tokens[:, None] * made + EXPERTS * RANK + places, to_logit.to(kind),
        mask=(places < EXPERTS) & there[:, None],
    )  # fmt: skip
