"""Shared by the model tests: tiny model folders as transformers writes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from dscl.model.tokenizer import train_tokenizer

SENTENCE = "the cat sat on a mat while dogs ran over green hills and birds sang of rain or snow in every town"
WORDS = SENTENCE.split()
TEXT = [" ".join(WORDS[(7 * i + j * (i % 3 + 1)) % len(WORDS)] for j in range(12)) for i in range(300)]
PIECES = 320
SHAPE: dict[str, Any] = {
    "vocab_size": PIECES, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, PIECES, folder)
    return folder


@pytest.fixture
def no_text() -> Callable[[], Iterable[str]]:
    def texts() -> Iterable[str]:
        raise AssertionError("no text is needed where a tokenizer is there")

    return texts


@pytest.fixture
def save(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """save(kind, dtype, shard, **configuration): a model with random weights, and a tokenizer beside it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def put(kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **more: Any) -> Path:
        folder = tmp_path / "model"
        torch.manual_seed(5)
        config = AutoConfig.for_model(kind, **{**SHAPE, "initializer_range": 0.1, **more})
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms start at one and biases at zero, which many a mistake would leave so
                    parameter.add_(0.1 * torch.randn_like(parameter))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder, max_shard_size=shard)
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return put
