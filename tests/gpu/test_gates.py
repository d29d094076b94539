"""The kernel of sub-experts' gates on a GPU, against the torch form. Skipped without a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from dscl.maths import gates
from tests.support.gates import SIZES, check_against_reference, outputs_and_gradients, random_inputs

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here (torch.cuda.is_available() is false)"
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_used_and_equals_the_torch_form(size: tuple[int, ...], kind: torch.dtype) -> None:
    tokens, experts, rank, top = size
    inputs, gradient = (tensor.cuda() for tensor in random_inputs(tokens, experts, rank, kind))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sub-experts")  # the warning that the kernel is not used
        results = outputs_and_gradients(gates.apply_gates, inputs, gradient, experts, top, 1.5)
    assert gates.kernel_fits(inputs, experts, rank)
    # The kernel uses fast exponentials, hence the tolerance.
    check_against_reference(results, inputs, gradient, experts, top, 1.5, tolerance=1e-6)
