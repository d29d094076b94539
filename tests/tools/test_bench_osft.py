"""The operation and byte counts of the OSFT benchmark, against torch's counter and the tensors of the method."""

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
    model.set_attn_implementation("eager")  # torch counts its products on every machine
    options = argparse.Namespace(rows=3, length=64, vocab=500)
    with FlopCounterMode(display=False) as counter:
        answer_loss(model, bench.random_batches(options, 1)[0]).backward()
    assert bench.step_flops(config, 3, 64, bench.ANSWER) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_bytes_of_bases_are_those_of_the_tensors(projection: str) -> None:
    weight = torch.randn(24, 36)
    space = bench.ProtectedSubspace.empty(projection, weight)
    space.add_directions(
        weight, *(torch.linalg.qr(torch.randn(width, 12, dtype=torch.float64))[0] for width in (36, 24))
    )
    assert bench.basis_bytes(projection, 24, 36, 12) == sum(map(bench.tensor_bytes, space.state_dict().values()))


def test_projection_in_parts_is_the_projection() -> None:
    space, weight, stepped = bench.projection_case(24, 36, 0)
    expected = stepped.clone()
    space.project_weight_(expected)
    bench.project_in_precision(space, stepped, "fp32", "fp32")
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-7)
    assert space.protected_norm(stepped - weight) < 1e-6


def test_share_of_a_7b_step_is_that_of_the_arithmetic() -> None:
    """For square matrices, projections cost 8k of the 6n operations per token and row; `input` costs half of that."""
    config = LlamaConfig(**bench.SHAPES["7b"])
    shapes = bench.target_shapes(config)
    assert len(shapes) == 224
    step = bench.step_flops(config, 16, 256, bench.ANSWER)
    for projection, share in (("two_sided", 8 * 2048 / (6 * 4096)), ("input", 4 * 2048 / (6 * 4096))):
        flops = sum(projection_flops(projection, m, n, 2048, 2048) for m, n in shapes.values())
        assert flops / step == pytest.approx(share, rel=0.03)
