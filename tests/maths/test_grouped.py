"""The grouped mixture of experts against a loop over tokens; experts without tokens; the choice by size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from dscl.maths import grouped

IN, OUT = 24, 16


def grouped_mm_loop(rows: torch.Tensor, sides: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """`grouped_mm` as a loop; torch has none in fp64."""
    ends = offs.tolist()
    return torch.cat([rows[i:j] @ side for i, j, side in zip([0, *ends], ends, sides, strict=False)])


def make_inputs(tokens: int, experts: int, rank: int, top: int, kind: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(tokens + experts)
    factors = [torch.randn(experts, rank, width, dtype=kind, requires_grad=True) for width in (IN, OUT)]
    gate = torch.rand(tokens, experts, dtype=kind)
    gate[:, experts // 2] = 0.0  # an expert that no token selects
    gates, selected = gate.topk(top, sorted=False)
    return [torch.randn(tokens, IN, dtype=kind, requires_grad=True), *factors, selected, gates.requires_grad_()]


def loop_over_tokens(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, selected: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    rows = []
    for token, experts, weights in zip(x, selected.tolist(), gates, strict=True):
        rows.append(sum(g * (b[e].T @ (a[e] @ token)) for e, g in zip(experts, weights, strict=True)))
    return torch.stack(rows)


def results_of_both(inputs: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of outputs and gradients: of the grouped mixture and of the loop."""
    grad_output = torch.randn(len(inputs[0]), OUT, dtype=inputs[0].dtype)
    leaves = [inputs[i] for i in (0, 1, 2, 4)]
    results = [
        [y.detach(), *torch.autograd.grad(y, leaves, grad_output)]
        for y in (grouped.grouped_mixture(*inputs), loop_over_tokens(*inputs))
    ]
    return list(zip(*results, strict=True))


@pytest.mark.parametrize(
    ("tokens", "experts", "rank", "top"), [(37, 8, 4, 1), (37, 8, 4, 3), (5, 16, 4, 2), (1, 4, 8, 3)]
)
def test_equals_token_after_token_and_so_do_its_gradients(
    tokens: int, experts: int, rank: int, top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ours, loop in results_of_both(make_inputs(tokens, experts, rank, top, torch.float32)):
        torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(functional, "grouped_mm", grouped_mm_loop)
    for ours, loop in results_of_both(make_inputs(tokens, experts, rank, top, torch.float64)):
        torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)


def test_one_graph_and_no_host_that_waits() -> None:
    inputs = make_inputs(37, 8, 8, 2, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(grouped.grouped_mixture, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), grouped.grouped_mixture(*inputs))
    assert grouped.grouped_mixture(*(each.detach().to("meta") for each in inputs)).shape == (37, OUT)


@pytest.mark.parametrize(
    ("kind", "experts", "rank", "top", "expected"),
    [
        (torch.float32, 32, 8, 2, True),
        (torch.float32, 31, 8, 2, False),  # too few columns
        (torch.float32, 8, 64, 3, False),  # a token uses too many of them
        (torch.float32, 64, 8, 0, False),  # or all
        (torch.float64, 64, 8, 2, False),
        (torch.bfloat16, 128, 4, 2, False),  # rows of eight bytes
        (torch.bfloat16, 64, 8, 2, True),
    ],
)
def test_size_decides(kind: torch.dtype, experts: int, rank: int, top: int, expected: bool) -> None:
    assert grouped.grouped_is_faster(torch.device("cpu"), kind, experts, rank, top) is expected


def test_on_a_gpu_it_needs_bf16_and_more_columns() -> None:
    def is_faster(kind: Any, experts: int) -> bool:
        return grouped.grouped_is_faster(torch.device("cuda"), kind, experts, 8, 2)

    assert is_faster(torch.bfloat16, 64)
    assert not is_faster(torch.bfloat16, 63)
    assert not is_faster(torch.float32, 64)
