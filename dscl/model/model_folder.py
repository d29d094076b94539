"""Write a model as a folder that transformers can load: config.json, and safetensors shards with an index.

Tensors are read and written one at a time, so the whole model is never in memory.
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
from dscl.model.weight_overlay import ReadSlice, WeightOverlay, overlay_weights, write_overlay
from dscl.model.weights import INDEX_FILE, WEIGHTS_FILE

MAX_SHARD_BYTES = 4 << 30  # bytes of a safetensors file


@dataclass(frozen=True)
class FullTensors:
    """Full tensors of a backbone, read with a function for slices."""

    shapes: Mapping[str, torch.Size]
    read_slice: ReadSlice

    def read(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return self.read_slice(name, shape, 0, math.prod(shape)).view(shape)


def write_model(
    folder: Path, backbone: Backbone, overlay: WeightOverlay, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write the backbone with the overlay's tensors in place of its own; returns the file names."""
    with torch.device("meta"):
        module = backbone.build()
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    hf_config = copy.deepcopy(backbone.hf_config)
    hf_config.architectures, hf_config.dtype = [type(module).__name__], backbone.dtype
    (folder / "config.json").write_text(hf_config.to_json_string(), "utf-8")
    tensors = FullTensors(shapes, overlay_weights(backbone.weights.read, overlay))
    element_size = torch.empty(0, dtype=backbone.dtype).element_size()
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        shard_elements = sum(map(math.prod, shards[-1].values()))
        if shards[-1] and element_size * (shard_elements + math.prod(shape)) > max_shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = [WEIGHTS_FILE] if len(shards) == 1 else files
    for file, shard in zip(files, shards, strict=True):
        write_overlay(folder / file, replace(tensors, shapes=shard), backbone.dtype)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        size = element_size * sum(map(math.prod, shapes.values()))
        (folder / INDEX_FILE).write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
        )
        files.append(INDEX_FILE)
    return ["config.json", *files]
