"""Where a backbone's weights come from: safetensors files, or a seed. Any stretch of any tensor, without the rest.

A sharded model is filled rank by rank: each asks only for the elements that it will hold, so nobody needs the whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from dscl.config.parsing import nearest
from dscl.utils.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NUMBERS = ("F64", "F32", "F16", "BF16")  # whatever else a file holds is quantised
BLOCK = 1 << 16  # elements that are drawn at once


class Weights(Protocol):
    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse, naming what is wrong, if these tensors cannot all be read."""

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor."""


class StoredWeights:
    """The safetensors files of a model folder (one file, or several with an index)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = self._find()

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Reads the files' headers only. Tensors that the model does not use are harmless."""
        missing = sorted(set(shapes) - set(self._file_of))
        if missing:
            raise UserError(
                f"{self.folder}: the weights lack {len(missing)} of the {len(shapes)} tensors that config.json asks "
                f"for, first {missing[0]}{nearest(missing[0], self._file_of)}; use one that save_pretrained wrote"
            )
        for name, shape in shapes.items():
            with self._tensor(name, shape):
                pass

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Reads only the rows that the stretch touches: the files are memory-mapped."""
        with self._tensor(name, shape) as part:
            if not shape:
                return part[...].reshape(1)[start:stop]
            width = math.prod(shape[1:])
            first, last = start // width, -(-stop // width)
            return part[first:last].reshape(-1)[start - first * width : stop - first * width]

    @contextmanager
    def _tensor(self, name: str, shape: torch.Size) -> Iterator[Any]:
        """The stored tensor, not read yet, when it is of the expected shape and kind."""
        path = self._file_of[name]
        with open_safetensors(path) as file:
            try:
                part = file.get_slice(name)
            except SafetensorError:
                raise UserError(
                    f"{path}: {INDEX} says that tensor {name} is in it, and it is not; copy both again"
                ) from None
            if list(part.get_shape()) != list(shape):
                raise UserError(
                    f"{path}: tensor {name} has shape {part.get_shape()}, the configuration asks for {list(shape)}; "
                    "config.json and the weights do not belong together"
                )
            if part.get_dtype() not in NUMBERS:
                raise UserError(
                    f"{path}: tensor {name} is of type {part.get_dtype()}; allowed: {', '.join(NUMBERS)}; "
                    "quantised weights cannot be trained, use the original model"
                )
            yield part

    def _find(self) -> dict[str, Path]:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.is_file():  # the same preference as transformers'
            with open_safetensors(single) as file:
                return dict.fromkeys(file.keys(), single)
        if not index.is_file():
            raise UserError(
                f"{self.folder}: no {SINGLE} (and no {INDEX}) there; weights are read from safetensors only, "
                "so load the model with transformers where you trust it, and write it with save_pretrained"
            )
        try:
            files: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            strange = [file for file in files.values() if Path(file).name != file]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not a readable index of weights ({error}); copy or download it again") from None
        if strange:
            raise UserError(f"{index}: names {strange[0]!r}; only files of its own folder are allowed there")
        missing = sorted(file for file in set(files.values()) if not (self.folder / file).is_file())
        if missing:
            raise UserError(f"{self.folder / missing[0]}: named in {INDEX} but missing; copy or download it again")
        return {name: self.folder / file for name, file in files.items()}


class DrawnWeights:
    """Fresh weights, each tensor from its own seed, so they are the same for any number of ranks and any sharding."""

    def __init__(self, seed: int, std: float) -> None:
        self.seed, self.std = seed, std

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        pass

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Normal matrices, ones for the scales of norms, zeros for biases."""
        if len(shape) > 1:
            return draw_normal(self.seed, name, start, stop, self.std)
        return torch.full((stop - start,), 0.0 if name.endswith("bias") else 1.0)


def draw_normal(seed: int, name: str, start: int, stop: int, std: float) -> torch.Tensor:
    """Elements [start, stop) of an endless normal sequence that depends on the seed and the name alone.

    It is drawn in blocks with a seed each, so that a stretch costs what it is long, wherever it starts.
    """
    values = torch.empty(stop - start)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        digest = hashlib.sha256(f"{seed}:{name}:{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.randn(BLOCK, generator=generator)
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        values[first - start : last - start] = drawn[first - block * BLOCK : last - block * BLOCK]
    return values * std


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None
    with file:
        yield file
