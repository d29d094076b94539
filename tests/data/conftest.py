"""Shared by the data tests: task folders on disk, a way to read them, and a small sentencepiece tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dscl.config.parsing import parse_config
from dscl.data.stream import load_stream
from dscl.data.task import DataConfig, Task, TaskConfig

TEXT = "the cat sat on a mat while dogs ran over green hills and birds sang of rain or snow in every town"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """write(name, content): a list or mapping becomes JSON (.jsonl: one record a line); text and bytes stay so."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Task]:
    """read(path, key=value, ...) loads a path as the only task of a stream."""

    def read_task(path: Path | str, bad_records: str = "stop", seed: int = 0, **settings: Any) -> Task:
        config = parse_config(TaskConfig, {"name": "t", "path": str(path), **settings})
        return load_stream([config], DataConfig(bad_records, str(tmp_path / "cache")), seed)[0]

    return read_task


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("tokenizer")
    words = TEXT.split()
    text = [" ".join(words[(7 * i + j * (i % 3 + 1)) % len(words)] for j in range(12)) for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True, "legacy": False}))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tokenizer_folder))
