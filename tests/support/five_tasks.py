"""Five small tasks with disjoint vocabularies, and an ASR recipe for them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support.runs import merge_parts, recipe_of

NAMES = ("colour", "animal", "weather", "music", "food")


LABELS = ("yes", "no", "maybe")


SIZES = (37, 30, 21, 26, 33)


def words_of(task: str) -> list[str]:
    generator = random.Random(task)
    return ["".join(generator.choices("aeioubdfgklmnprst", k=4)) for _ in range(14)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small tasks, each with words of its own; the label depends on the first word."""
    folder = tmp_path_factory.mktemp("asr")
    for task, size in zip(NAMES, SIZES, strict=True):
        generator, words = random.Random(task), words_of(task)
        (folder / task).mkdir()
        (folder / task / "labels.json").write_text(json.dumps(LABELS))
        for split, count in (("train", size), ("test", 11)):
            texts = [generator.choices(words, k=generator.randint(3, 9)) for _ in range(count)]
            records = [{"label": LABELS[words.index(t[0]) % 3], "sentence": " ".join(t)} for t in texts]
            (folder / task / f"{split}.json").write_text(json.dumps(records))
    return folder


def recipe(folder: Path, name: str, stage: int = 0, names: tuple[str, ...] = NAMES[:2], **changes: Any) -> Any:
    document = recipe_of(folder, name, stage)
    document["model"]["shape"]["num_hidden_layers"] = changes.pop("layers", 4)
    asr = {"name": "asr", "tune": {"rank": 4}, "router": {"layer": 1, "num_features": 128}}
    document["method"] = merge_parts(asr, changes.pop("asr", {}))
    document["stream"] = [{"name": task, "path": str(folder / task)} for task in names]
    document["train"]["lr"] = 1e-2
    for section, values in changes.items():
        document[section] = {**document.get(section, {}), **values}
    return document


def artifact_checksums(run_dir: Path) -> dict[str, str]:
    """The checksums of the artifacts of ended tasks, by path."""
    files = sorted(p for kind in ("adapters", "router") for p in (run_dir / kind).rglob("*") if p.is_file())
    return {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def router_statistics(run_dir: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted((run_dir / "router").iterdir()):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensors[f"{path.stem}: {name}"] = file.get_tensor(name)
    return tensors


def read_scores(run_dir: Path) -> Any:
    return json.loads((run_dir / "scores.json").read_text())
