"""Rows of unlike lengths on a GPU: loss and gradients are finite, and as on the CPU. Skipped where there is no GPU."""

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


def built(dtype: torch.dtype, device: str) -> nn.Module:
    backbone = Backbone(ModelConfig(shape={}), SHAPE, None, RandomWeights(0, 0.1), dtype)  # type: ignore[arg-type]
    model = backbone.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(backbone.weights.read(name, parameter.shape, 0, parameter.numel()).view(parameter.shape))
        for layer in model.model.layers:  # scores far below zero are what some kernels stumble over
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
    found = []
    for kind, device in ((torch.float32, "cpu"), (dtype, "cuda")):
        model = built(kind, device)
        loss = answer_loss(model, batch.to(torch.device(device))) / len(batch.labels)
        loss.backward()
        found.append((loss.item(), [p.grad.float().cpu() for p in model.parameters()]))
    (wanted, theirs), (loss, ours) = found
    close = 0.02 if dtype == torch.bfloat16 else 1e-4
    assert loss == pytest.approx(wanted, rel=close)
    whole = torch.stack([grad.norm() for grad in theirs]).norm()
    for got, grad in zip(ours, theirs, strict=True):
        assert torch.isfinite(got).all()
        assert (got - grad).norm() <= 5 * close * whole
