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
GateFunction = Callable[..., torch.Tensor]


def random_inputs(tokens: int, experts: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and an output gradient. The logits of a token differ from each other in every dtype."""
    generator = torch.Generator().manual_seed(tokens)
    activations, gradient = (
        torch.randn(tokens, experts * rank, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    logits = torch.rand(tokens, experts, generator=generator).argsort(1) / 16 - 1
    return torch.cat([activations, logits], 1).to(dtype), gradient.to(dtype)


def outputs_and_gradients(
    gate_function: GateFunction, inputs: torch.Tensor, gradient: torch.Tensor, *sizes: Any
) -> list[torch.Tensor]:
    """The outputs, and the gradient of the inputs."""
    leaf = inputs.clone().requires_grad_()
    outputs = gate_function(leaf, *sizes)
    return [outputs.detach(), *torch.autograd.grad(outputs, leaf, gradient)]


def check_against_reference(
    results: list[torch.Tensor], inputs: torch.Tensor, gradient: torch.Tensor, *sizes: Any, tolerance: float = 0
) -> None:
    """Check that the error against fp64 is at most that of the torch reference, plus a relative tolerance."""
    reference = outputs_and_gradients(gates.apply_gates_reference, inputs, gradient, *sizes)
    expected = outputs_and_gradients(gates.apply_gates_reference, inputs.double(), gradient.double(), *sizes)
    for result, reference_tensor, expected_tensor in zip(results, reference, expected, strict=True):
        assert result.dtype == inputs.dtype
        error, reference_error = ((tensor.double() - expected_tensor).norm() for tensor in (result, reference_tensor))
        assert error <= 1.1 * reference_error + (1e-7 + tolerance) * expected_tensor.norm()
