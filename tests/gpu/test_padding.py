"""Rows of different lengths on a GPU: loss and gradients are finite and equal those of the CPU. Skipped without a
GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from dscl.data.batches import collate
from dscl.model.backbone import Backbone, ModelConfig
from dscl.model.lm_head import answer_loss
from dscl.model.weights import RandomWeights

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here (torch.cuda.is_available() is false)"
)

WORDS = 160
SHAPE = LlamaConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192, vocab_size=WORDS
)


def build_model(dtype: torch.dtype, device: str) -> nn.Module:
    backbone = Backbone(ModelConfig(shape={}), SHAPE, None, RandomWeights(0, 0.1), dtype)  # type: ignore[arg-type]
    model = backbone.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(backbone.weights.read(name, parameter.shape, 0, parameter.numel()).view(parameter.shape))
        for layer in model.model.layers:  # some kernels fail with scores far below zero
            layer.self_attn.q_proj.weight.mul_(10)
    return model.to(device)


@pytest.mark.parametrize("width", [64, 128, 192])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_padded_and_packed_rows_are_as_on_the_cpu(width: int, packing: bool, dtype: torch.dtype) -> None:
    lengths = [width - 6, width // 2 - 9, width // 3, 5]
    encoded = {i: ([7 + i] * (length - 4), [3 + i, 2, 9, 1]) for i, length in enumerate(lengths)}
    batch = collate([[0], [1, 2, 3]] if packing else [[0], [1], [2], [3]], encoded, 0, packing)
    assert batch.input_ids.shape[1] == width
    results = []
    for kind, device in ((torch.float32, "cpu"), (dtype, "cuda")):
        model = build_model(kind, device)
        loss = answer_loss(model, batch.to(torch.device(device))) / len(batch.labels)
        loss.backward()
        results.append((loss.item(), [p.grad.float().cpu() for p in model.parameters()]))
    (expected_loss, expected_gradients), (loss, gradients) = results
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    total_norm = torch.stack([expected_gradient.norm() for expected_gradient in expected_gradients]).norm()
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.isfinite(gradient).all()
        assert (gradient - expected_gradient).norm() <= 5 * tolerance * total_norm
