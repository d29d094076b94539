"""Dense weights that training has changed, to lay over the base model's; an export keeps them as one safetensors file.

They are read and written one tensor at a time: there may be as many of them as of the whole model.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from dscl.model.weights import NUMBERS, open_safetensors
from dscl.utils.errors import UserError

KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
BLOCK = 1 << 22  # bytes of a file that are read at once
Read = Callable[[str, torch.Size, int, int], torch.Tensor]  # elements [start, stop) of a tensor
Sum = dict[str, int]  # of a file: its bytes and its checksum


class Trained(Protocol):
    """Some of a backbone's tensors."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]: ...  # by their names in the plain backbone

    def read(self, name: str) -> torch.Tensor: ...


class TrainedFile:
    """What `write_trained` wrote."""

    def __init__(self, path: Path, expected: Sum) -> None:
        """Refused if the file is not the one with these bytes and this checksum."""
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file; it holds the weights that were trained, so copy it again")
        if _sum(path) != expected:
            raise UserError(f"{path}: damaged, or of another export; its checksum is not the one noted; copy it again")
        with open_safetensors(path) as file:
            self.shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> torch.Tensor:
        with open_safetensors(self.path) as file:
            part = file.get_slice(name)
            assert part.get_dtype() in NUMBERS
            tensor: torch.Tensor = part[...]
            return tensor


def laid_over(read: Read, trained: Trained | None) -> Read:
    """How a backbone's tensors are read where some of them were trained."""
    if trained is None:
        return read
    return lambda name, shape, start, stop: (
        trained.read(name).flatten()[start:stop] if name in trained.shapes else read(name, shape, start, stop)
    )


def check_trained(trained: Trained, shapes: Mapping[str, torch.Size], where: str) -> None:
    """Refuse what is not of this backbone."""
    for name, shape in trained.shapes.items():
        if shapes.get(name) != shape:
            there = f"the model's is {list(shapes[name])}" if name in shapes else "the model has no such tensor"
            raise UserError(
                f"{where}: holds {name} of shape {list(shape)}, {there}; use the model that the tasks were trained on"
            )


def write_trained(path: Path, trained: Trained, dtype: torch.dtype) -> Sum:
    """As safetensors, in the model's own type and by name; returns the file's bytes and checksum."""
    width = torch.empty(0, dtype=dtype).element_size()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(trained.shapes.items()):
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(trained.shapes):
            file.write(trained.read(name).to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)
    return _sum(path)


def _sum(path: Path) -> Sum:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}
