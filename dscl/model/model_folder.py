"""A model as a folder that transformers reads: config.json, and safetensors in pieces with an index.

Tensors are read and written one at a time, so that nobody needs the whole model.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dscl.model.backbone import Backbone
from dscl.model.weight_overlay import Read, Trained, laid_over, write_trained
from dscl.model.weights import INDEX, SINGLE

LARGEST = 4 << 30  # bytes of a piece


@dataclass(frozen=True)
class Whole:
    """All tensors of a backbone, or some."""

    shapes: Mapping[str, torch.Size]
    stretch: Read

    def read(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return self.stretch(name, shape, 0, math.prod(shape)).view(shape)


def write_model(folder: Path, backbone: Backbone, trained: Trained, largest: int = LARGEST) -> list[str]:
    """The backbone with the trained tensors laid over its own; returns the files' names."""
    with torch.device("meta"):
        module = backbone.build()
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    architecture = copy.deepcopy(backbone.architecture)
    architecture.architectures, architecture.dtype = [type(module).__name__], backbone.dtype
    (folder / "config.json").write_text(architecture.to_json_string(), "utf-8")
    whole = Whole(shapes, laid_over(backbone.weights.read, trained))
    width = torch.empty(0, dtype=backbone.dtype).element_size()
    pieces: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        held = sum(map(math.prod, pieces[-1].values()))
        if pieces[-1] and width * (held + math.prod(shape)) > largest:
            pieces.append({})
        pieces[-1][name] = shape
    files = [f"model-{number:05d}-of-{len(pieces):05d}.safetensors" for number in range(1, len(pieces) + 1)]
    files = [SINGLE] if len(pieces) == 1 else files
    for file, piece in zip(files, pieces, strict=True):
        write_trained(folder / file, replace(whole, shapes=piece), backbone.dtype)
    if len(pieces) > 1:
        where = {name: file for file, piece in zip(files, pieces, strict=True) for name in piece}
        size = width * sum(map(math.prod, shapes.values()))
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1))
        files.append(INDEX)
    return ["config.json", *files]
