"""A model that dscl builds and fills equals the one that transformers loads, whole or sharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscl.engine.engine import Engine
from dscl.engine.zero_layouts import load_parameters
from dscl.model.backbone import Backbone, ModelConfig, resolve_backbone
from tests.support.small_models import PIECES, SHAPE

KINDS = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RankState = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]
IDS = torch.randint(0, PIECES, (2, 24), generator=torch.Generator().manual_seed(3))


def open_backbone(config: ModelConfig, dtype: torch.dtype, cache: Path) -> Backbone:
    return resolve_backbone(config, seed=7, dtype=dtype, cache=cache, texts=lambda: [])


def load_whole_model(backbone: Backbone) -> nn.Module:
    model = backbone.build().eval()
    load_parameters(model, backbone.weights.read)
    return model


def compute_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_model_as_transformers(
    kind: str, tied: bool, precision: str, save: Callable[..., Path], tmp_path: Path, tokenizer_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[precision]
    # Some files have the other precision: files of any precision are read.
    folder = save(kind, torch.bfloat16 if tied else torch.float32, "100KB" if tied else "1GB", tie_word_embeddings=tied)
    assert (folder / "model.safetensors.index.json").is_file() == tied
    model = load_whole_model(
        open_backbone(ModelConfig(name=str(folder), tokenizer=str(tokenizer_folder)), dtype, tmp_path)
    )
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    state, expected = model.state_dict(keep_vars=True), reference.state_dict(keep_vars=True)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name
    buffers, expected = dict(model.named_buffers()), dict(reference.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(buffers[name].dtype == v.dtype and torch.equal(buffers[name], v) for name, v in expected.items())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied  # type: ignore[operator]
    assert torch.equal(compute_logits(model), compute_logits(reference))


def build_on_rank(config: ModelConfig, precision: str, persistent: int, cache: Path) -> RankState:
    """The state of one rank at ZeRO-3: its shard of every parameter, the buffers, and the logits."""
    backbone = open_backbone(config, DTYPES[precision], cache)
    zero = {"stage": 3, "stage3_param_persistence_threshold": persistent}
    engine = Engine(
        {"zero_optimization": zero},
        build=backbone.build,
        read=backbone.weights.read,
        prepare=lambda model: model.requires_grad_(True),
        precision=precision,
    )
    shards = {name: p.ds_tensor.clone() for name, p in engine.module.named_parameters()}  # type: ignore[attr-defined]
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    engine.module.eval()
    out = compute_logits(engine.module)
    engine.close()
    return shards, buffers, out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["llama", "qwen2", "drawn"])
def test_sharded_model_equals_the_full_one(
    source: str, precision: str, save: Callable[..., Path], tmp_path: Path, tokenizer_folder: Path, ranks: Any
) -> None:
    if source == "drawn":
        config = ModelConfig(shape={**SHAPE, "initializer_range": 0.1}, tokenizer=str(tokenizer_folder))
    else:
        folder = save(source, tie_word_embeddings=source == "llama")
        config = ModelConfig(name=str(folder), tokenizer=str(tokenizer_folder))
    model = load_whole_model(open_backbone(config, DTYPES[precision], tmp_path))
    expected = compute_logits(model)
    persistent = 1000 if source == "drawn" else 0  # the size up to which a tensor is kept whole on every rank
    results = ranks(2)(build_on_rank, config, precision, persistent, tmp_path)
    for name, parameter in model.named_parameters():
        rank_shards = [shards[name] for shards, _, _ in results]
        assert rank_shards[0].numel() == rank_shards[1].numel() == -(-parameter.numel() // 2)
        assert torch.equal(torch.cat(rank_shards)[: parameter.numel()], parameter.flatten()), name
    # DeepSpeed adds a linear layer's bias in a step of its own, which in bf16 is one more rounding.
    tolerance = 2e-2 if (source, precision) == ("qwen2", "bf16") else 1e-6
    for _, buffers, out in results:
        assert buffers.keys() == dict(model.named_buffers()).keys()
        for name, buffer in model.named_buffers():
            assert buffers[name].dtype == torch.float32
            assert torch.equal(buffers[name], buffer), name
        assert (out - expected).abs().max() <= tolerance * expected.abs().max()
