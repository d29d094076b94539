"""Shared by the model tests: tiny model folders as transformers writes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from dscl.model.tokenizer import train_tokenizer
from tests.support.small_models import PIECES, SHAPE, TEXT


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
