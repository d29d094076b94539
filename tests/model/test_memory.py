"""While a model is loaded at ZeRO-3, no rank ever holds more than its share of it and a layer besides."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscl.engine.engine import Engine
from dscl.model.backbone import ModelConfig, resolve_backbone
from tests.support.memory import PeakMemory
from tests.support.pool import Pool

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured through /proc")

WORLD = 3
SHAPE: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 512, "num_hidden_layers": 32, "num_attention_heads": 8, "intermediate_size": 1280,
}  # fmt: skip


class Placed(Exception):
    """The weights are in place: the end of what is measured."""


def growth(config: ModelConfig, stage: int, cache: Path) -> tuple[int, int]:
    """(peak bytes beyond the start, the model's bytes) of loading on this rank, until the weights are in place."""
    backbone = resolve_backbone(config, seed=0, dtype=torch.float32, cache=cache, texts=lambda: [])

    def stop(_model: nn.Module) -> nn.Module:
        raise Placed

    with PeakMemory() as peak, pytest.raises(Placed):
        Engine(
            {"zero_optimization": {"stage": stage}},
            build=backbone.build,
            read=backbone.weights.read,
            prepare=stop,
            precision="fp32",
        )
    return peak.growth, 4 * backbone.count_parameters()


@pytest.fixture(scope="module")
def fresh_ranks() -> Iterator[Pool]:
    """Processes in which no earlier test has left memory."""
    pool = Pool(WORLD)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("source", "stage"), [("drawn", 3), ("stored", 3), ("stored", 0)])
def test_no_rank_holds_the_model_while_loading(
    source: str, stage: int, fresh_ranks: Pool, stored: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    place = {"shape": SHAPE} if source == "drawn" else {"name": str(stored)}
    config = ModelConfig(**place, tokenizer=str(tokenizer_folder))
    for peak, model in fresh_ranks(growth, config, stage, tmp_path):
        assert model > 350e6
        if stage == 3:
            assert 0.95 * model / WORLD < peak < model / WORLD + 0.06 * model
        else:  # the same measurement sees it where every rank does hold it all
            assert peak > 0.95 * model
