"""Sources of a backbone's weights: safetensors files, or a random seed. Any slice of a tensor can be read by itself.

Each rank of a sharded model reads only the elements of its shard, so no process needs the whole model.
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

from dscl.config.parsing import did_you_mean
from dscl.utils.errors import UserError

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # any other dtype is quantised
DRAW_BLOCK = 1 << 16  # elements drawn with one generator


class WeightSource(Protocol):
    """Where a backbone's weights come from."""

    def check_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse, with a reason, if these tensors cannot all be read."""

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor."""


class SafetensorsWeights:
    """The safetensors files of a model folder (one file, or several with an index)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = self._map_tensors_to_files()

    def check_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """Reads only the headers of the files. Tensors that the model does not use are ignored."""
        missing = sorted(set(shapes) - set(self._file_of))
        if missing:
            raise UserError(
                f"{self.folder}: the weights lack {len(missing)} of the {len(shapes)} tensors that config.json asks "
                f"for, first {missing[0]}{did_you_mean(missing[0], self._file_of)}; use one that save_pretrained wrote"
            )
        for name, shape in shapes.items():
            with self._open_tensor(name, shape):
                pass

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Reads only the rows that contain the slice; the files are memory-mapped."""
        with self._open_tensor(name, shape) as tensor_slice:
            if not shape:
                return tensor_slice[...].reshape(1)[start:stop]
            row_size = math.prod(shape[1:])
            first, last = start // row_size, -(-stop // row_size)
            return tensor_slice[first:last].reshape(-1)[start - first * row_size : stop - first * row_size]

    @contextmanager
    def _open_tensor(self, name: str, shape: torch.Size) -> Iterator[Any]:
        """The stored tensor as a lazy slice, after its shape and dtype are checked."""
        path = self._file_of[name]
        with open_safetensors(path) as file:
            try:
                tensor_slice = file.get_slice(name)
            except SafetensorError:
                raise UserError(
                    f"{path}: {INDEX_FILE} says that tensor {name} is in it, and it is not; copy both again"
                ) from None
            if list(tensor_slice.get_shape()) != list(shape):
                raise UserError(
                    f"{path}: tensor {name} has shape {tensor_slice.get_shape()}, the configuration asks for "
                    f"{list(shape)}; config.json and the weights do not belong together"
                )
            if tensor_slice.get_dtype() not in FLOAT_DTYPES:
                raise UserError(
                    f"{path}: tensor {name} is of type {tensor_slice.get_dtype()}; allowed: {', '.join(FLOAT_DTYPES)}; "
                    "quantised weights cannot be trained, use the original model"
                )
            yield tensor_slice

    def _map_tensors_to_files(self) -> dict[str, Path]:
        single, index = self.folder / WEIGHTS_FILE, self.folder / INDEX_FILE
        if single.is_file():  # transformers prefers it too
            with open_safetensors(single) as file:
                return dict.fromkeys(file.keys(), single)
        if not index.is_file():
            raise UserError(
                f"{self.folder}: no {WEIGHTS_FILE} (and no {INDEX_FILE}) there; weights are read from safetensors "
                "only, so load the model with transformers where you trust it, and write it with save_pretrained"
            )
        try:
            files: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            outside_files = [file for file in files.values() if Path(file).name != file]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not a readable index of weights ({error}); copy or download it again") from None
        if outside_files:
            raise UserError(f"{index}: names {outside_files[0]!r}; only files of its own folder are allowed there")
        missing = sorted(file for file in set(files.values()) if not (self.folder / file).is_file())
        if missing:
            raise UserError(f"{self.folder / missing[0]}: named in {INDEX_FILE} but missing; copy or download it again")
        return {name: self.folder / file for name, file in files.items()}


class RandomWeights:
    """Random initial weights. Each tensor has its own seed, so the values do not depend on ranks or sharding."""

    def __init__(self, seed: int, std: float) -> None:
        self.seed, self.std = seed, std

    def check_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        pass

    def read(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        """Matrices are normal, norm scales one, biases zero."""
        if len(shape) > 1:
            return draw_normal(self.seed, name, start, stop, self.std)
        return torch.full((stop - start,), 0.0 if name.endswith("bias") else 1.0)


def draw_normal(seed: int, name: str, start: int, stop: int, std: float) -> torch.Tensor:
    """Elements [start, stop) of an endless sequence of normal samples, determined by `seed` and `name`.

    The sequence is drawn in blocks with a seed each, so the cost depends on the length of the slice, not on its start.
    """
    values = torch.empty(stop - start)
    for block in range(start // DRAW_BLOCK, -(-stop // DRAW_BLOCK)):
        digest = hashlib.sha256(f"{seed}:{name}:{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        samples = torch.randn(DRAW_BLOCK, generator=generator)
        first, last = max(start, block * DRAW_BLOCK), min(stop, (block + 1) * DRAW_BLOCK)
        values[first - start : last - start] = samples[first - block * DRAW_BLOCK : last - block * DRAW_BLOCK]
    return values * std


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading; refuses an unreadable one."""
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from None
    with file:
        yield file
