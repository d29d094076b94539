"""Masks: the largest allowed magnitudes, trained with a straight-through gradient, and packed into bits."""

from __future__ import annotations

import pytest
import torch

from dscl.maths.masks import mask_size, pack_bits, top_k_mask, trainable_top_k_mask, unpack_bits


def make_scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1,), (12,), (5, 7)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_largest_magnitudes_are_opened(shape: tuple[int, ...], kind: torch.dtype) -> None:
    scores = make_scores(*shape).to(kind)
    everything = torch.ones(shape, dtype=torch.bool)
    size = scores.numel()
    for count in range(1, size + 1):
        mask = top_k_mask(scores, everything, count)
        assert int(mask.sum()) == count  # also where rounded values tie
        selected, others = scores.abs()[mask], scores.abs()[~mask]
        assert not others.numel() or selected.min() >= others.max()


def test_only_what_is_allowed_is_opened() -> None:
    scores, allowed = make_scores(6, 6), torch.zeros(6, 6, dtype=torch.bool)
    allowed[2:4, 1:] = True
    mask = top_k_mask(scores, allowed, 4)
    assert int(mask.sum()) == 4
    assert not (mask & ~allowed).any()
    assert torch.equal(top_k_mask(scores, allowed, 30), allowed)  # fewer are allowed than asked for
    assert not top_k_mask(scores, torch.zeros_like(allowed), 3).any()


def test_the_masks_gradient_goes_to_the_magnitudes() -> None:
    """∂L/∂|s| = ∂L/∂m for every score, open or not."""
    scores, weight = make_scores(9).requires_grad_(), make_scores(9, seed=1)
    mask = trainable_top_k_mask(scores, torch.ones(9, dtype=torch.bool), 3)
    assert mask.dtype == scores.dtype
    assert torch.equal(mask.bool(), top_k_mask(scores, torch.ones(9, dtype=torch.bool), 3))
    (mask * weight).sum().backward()
    torch.testing.assert_close(scores.grad, weight * scores.detach().sign(), rtol=0, atol=0)


def test_scores_that_may_open_nothing_have_no_gradient() -> None:
    scores, allowed = make_scores(9).requires_grad_(), torch.arange(9) % 3 > 0
    trainable_top_k_mask(scores, allowed, 3).sum().backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.where(allowed, scores.detach().sign(), 0.0))


def test_scores_learn_which_parameters_help() -> None:
    """Three of twelve parameters make the loss small; the mask selects them."""
    target = torch.zeros(12)
    target[[2, 5, 11]] = 1.0
    scores = make_scores(12).mul_(0.1).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        mask = trainable_top_k_mask(scores, torch.ones(12, dtype=torch.bool), 3)
        (mask - target).square().sum().backward()
        optimizer.step()
    assert torch.equal(top_k_mask(scores, torch.ones(12, dtype=torch.bool), 3), target.bool())


@pytest.mark.parametrize(("share", "size", "count"), [(0.29, 100, 29), (0.25, 64, 16), (1.0, 7, 7), (0.01, 7, 1)])
def test_count(share: float, size: int, count: int) -> None:
    assert mask_size(share, size) == count


@pytest.mark.parametrize("shape", [(1,), (8,), (13,), (3, 5), (16, 9)])
def test_bits_are_an_eighth_of_a_byte_and_come_back(shape: tuple[int, ...]) -> None:
    mask = make_scores(*shape) > 0
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(bits, shape), mask)
