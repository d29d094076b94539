"""Weight overlays: trained dense tensors that replace those of the base model. An export keeps them as one file.

Tensors are read and written one at a time, because an overlay may be as large as the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from dscl.model.weights import FLOAT_DTYPES, open_safetensors
from dscl.utils.atomic_io import FileChecksum, file_checksum
from dscl.utils.errors import UserError

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ReadSlice = Callable[
    [str, torch.Size, int, int], torch.Tensor
]  # (name, shape, start, stop) → elements [start, stop) of a flattened tensor


class WeightOverlay(Protocol):
    """Tensors that replace those of a backbone."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]: ...  # by the tensors' names in the plain backbone

    def read(self, name: str) -> torch.Tensor: ...


class OverlayFile:
    """The safetensors file that `write_overlay` wrote."""

    def __init__(self, path: Path, checksum: FileChecksum) -> None:
        """Refuses a file with another size or checksum."""
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file; it holds the weights that were trained, so copy it again")
        if file_checksum(path) != checksum:
            raise UserError(f"{path}: damaged, or of another export; its checksum is not the one noted; copy it again")
        with open_safetensors(path) as file:
            self.shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> torch.Tensor:
        with open_safetensors(self.path) as file:
            tensor_slice = file.get_slice(name)
            assert tensor_slice.get_dtype() in FLOAT_DTYPES
            tensor: torch.Tensor = tensor_slice[...]
            return tensor


def overlay_weights(read: ReadSlice, overlay: WeightOverlay | None) -> ReadSlice:
    """A function that reads the overlay's tensors where it has them, and calls `read` for all others."""
    if overlay is None:
        return read
    return lambda name, shape, start, stop: (
        overlay.read(name).flatten()[start:stop] if name in overlay.shapes else read(name, shape, start, stop)
    )


def check_overlay(overlay: WeightOverlay, shapes: Mapping[str, torch.Size], where: str) -> None:
    """Refuse an overlay with tensors that the backbone lacks or has in another shape; `where` names the overlay."""
    for name, shape in overlay.shapes.items():
        if shapes.get(name) != shape:
            expected = f"the model's is {list(shapes[name])}" if name in shapes else "the model has no such tensor"
            raise UserError(
                f"{where}: holds {name} of shape {list(shape)}, {expected}; use the model that the tasks were trained "
                "on"
            )


def write_overlay(path: Path, overlay: WeightOverlay, dtype: torch.dtype) -> FileChecksum:
    """Write the overlay as a safetensors file of this dtype, tensors ordered by name; returns size and checksum."""
    element_size = torch.empty(0, dtype=dtype).element_size()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop_offset = 0
    for name, shape in sorted(overlay.shapes.items()):
        start, stop_offset = stop_offset, stop_offset + element_size * math.prod(shape)
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, stop_offset]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(overlay.shapes):
            file.write(overlay.read(name).to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)
    return file_checksum(path)
