"""The arithmetic of the benchmark against torch's FLOP counter and the tensors of a method."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dscl.maths.subspace import PROJECTIONS, projection_flops
from dscl.model.lm_head import answer_loss
from tools import bench_osft as bench


def test_operations_of_a_step_are_those_that_torch_counts() -> None:
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=2, intermediate_size=320, num_attention_heads=2, vocab_size=500
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # its products are counted on every machine
    options = argparse.Namespace(rows=3, length=64, vocab=500)
    with FlopCounterMode(display=False) as counter:
        answer_loss(model, bench.batches(options, 1)[0]).backward()
    assert bench.step_flops(config, 3, 64, bench.ANSWER) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_bytes_of_bases_are_those_of_the_tensors(projection: str) -> None:
    weight = torch.randn(24, 36)
    space = bench.ProtectedSubspace.empty(projection, weight)
    space.add_directions(
        weight, *(torch.linalg.qr(torch.randn(width, 12, dtype=torch.float64))[0] for width in (36, 24))
    )
    assert bench.basis_bytes(projection, 24, 36, 12) == sum(map(bench.size, space.state_dict().values()))


def test_projection_in_parts_is_the_projection() -> None:
    space, weight, moved = bench.case(24, 36, 0)
    expected = moved.clone()
    space.project_weight_(expected)
    bench.hold_in(space, moved, "fp32", "fp32")
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-7)
    assert space.protected_norm(moved - weight) < 1e-6


def test_share_of_a_7b_step_is_that_of_the_arithmetic() -> None:
    """For square matrices 8k of 6 operations a token; half of that for one side."""
    config = LlamaConfig(**bench.SHAPES["7b"])
    shapes = bench.targets(config)
    assert len(shapes) == 224
    step = bench.step_flops(config, 16, 256, bench.ANSWER)
    for projection, share in (("two_sided", 8 * 2048 / (6 * 4096)), ("input", 4 * 2048 / (6 * 4096))):
        projection_cost = sum(projection_flops(projection, m, n, 2048, 2048) for m, n in shapes.values())
        assert projection_cost / step == pytest.approx(share, rel=0.03)
