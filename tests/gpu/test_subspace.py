"""Projections on a GPU: gradients with fast matrix products, weights with exact ones. Skipped without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dscl.maths.subspace import PROJECTIONS, ProtectedSubspace

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here (torch.cuda.is_available() is false)"
)


@pytest.fixture(params=["none", "ieee", "tf32"])
def otherwise(request: pytest.FixtureRequest) -> Iterator[str]:
    """Torch's fp32 precision of matrix products during the test."""
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, request.param
    yield request.param
    setting.fp32_precision = before


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_gradients_are_freed_to_a_thousandth_and_the_weight_is_held_exactly(projection: str, otherwise: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, step = (torch.randn(512, 768, generator=generator).cuda() for _ in range(2))
    right, left = (
        torch.linalg.qr(torch.randn(n, 256, generator=generator, dtype=torch.float64))[0] for n in (768, 512)
    )
    space = ProtectedSubspace.empty(projection, weight)
    space.add_directions(weight, right.cuda(), left.cuda())
    gradient = step.clone()
    space.project_gradient_(gradient)
    assert space.protected_norm(gradient) < (4e-3 if projection == "paper" else 2e-3) * space.protected_norm(
        step
    )  # of four products, or two
    assert torch.backends.cuda.matmul.fp32_precision == otherwise
    changed_weight = weight + step
    space.project_weight_(changed_weight)
    assert space.protected_norm(changed_weight - weight) < 1e-6 * float(weight.norm())
