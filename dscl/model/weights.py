"""Where a backbone's weights come from: safetensors files, or a seed. Any stretch of any tensor, without the rest.

A sharded model is filled rank by rank: each asks only for the elements that it will hold, so nobody needs the whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from dscl.errors import UserError


class Weights(Protocol):
    def names(self) -> set[str] | None:
        """The tensors that exist, or None where any name can be served."""

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor."""


class StoredWeights:
    """The safetensors files of a model folder (one file, or several with an index)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = self._find()

    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Reads only the rows that the stretch touches: the files are memory-mapped."""
        with safe_open(self._file_of[name], framework="pt") as file:
            part = file.get_slice(name)
            stored = list(part.get_shape())
            if stored != list(shape):
                raise UserError(
                    f"{self.folder}: tensor {name} has shape {stored}, the configuration asks for {list(shape)}; "
                    "config.json and the weights do not belong together"
                )
            if not stored:
                return file.get_tensor(name).reshape(1)[start:stop]
            width = math.prod(stored[1:])
            first, last = start // width, -(-stop // width)
            return part[first:last].reshape(-1)[start - first * width : stop - first * width]

    def _find(self) -> dict[str, Path]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        try:
            if index.is_file():
                files: Mapping[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
                found = {name: self.folder / file for name, file in files.items()}
            elif single.is_file():
                with safe_open(single, framework="pt") as file:
                    found = dict.fromkeys(file.keys(), single)
            else:
                raise UserError(
                    f"{self.folder}: no model.safetensors (and no model.safetensors.index.json) there; weights are "
                    "read from safetensors only, so convert the model with save_pretrained(safe_serialization=True)"
                )
        except (SafetensorError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.folder}: the weights cannot be read ({error}); copy or download them again") from None
        missing = sorted({path.name for path in found.values() if not path.is_file()})
        if missing:
            raise UserError(f"{self.folder}: {missing[0]} is named in the index but missing; copy or download it again")
        return found


class DrawnWeights:
    """Fresh weights, each tensor from its own seed, so they are the same for any number of ranks and any sharding."""

    def __init__(self, seed: int, std: float) -> None:
        self.seed, self.std = seed, std

    def names(self) -> None:
        return None

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Normal matrices, ones for the scales of norms, zeros for biases."""
        if len(shape) > 1:
            return draw_normal(self.seed, name, shape, self.std).reshape(-1)[start:stop]
        return torch.full((stop - start,), 0.0 if name.endswith("bias") else 1.0)


def draw_normal(seed: int, name: str, shape: torch.Size, std: float) -> torch.Tensor:
    """A normal tensor that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std
