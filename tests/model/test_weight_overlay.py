"""Trained weights: written one at a time as safetensors, laid over those of the base model, refused if damaged."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dscl.model.weight_overlay import OverlayFile, check_overlay, overlay_weights, write_overlay
from dscl.utils.errors import UserError

SHAPES: Mapping[str, torch.Size] = {"a": torch.Size((5, 3)), "b": torch.Size((7,)), "c.weight": torch.Size((2, 9))}


class OneTensorSource:
    """Creates each tensor when it is read, and asserts that no other one is alive then."""

    def __init__(self) -> None:
        self.shapes = SHAPES
        self.alive: list[weakref.ref[torch.Tensor]] = []

    def read(self, name: str) -> torch.Tensor:
        assert not [ref for ref in self.alive if ref() is not None], "another one is still there"
        tensor = values(name)
        self.alive.append(weakref.ref(tensor))
        return tensor


def values(name: str) -> torch.Tensor:
    torch.manual_seed(ord(name[0]))
    return torch.randn(SHAPES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_overlay_file_is_safetensors_of_the_models_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    entry = write_overlay(tmp_path / "w", OneTensorSource(), dtype)
    tensors = load_file(tmp_path / "w")
    assert set(tensors) == set(SHAPES)
    again = OverlayFile(tmp_path / "w", entry)
    assert dict(again.shapes) == dict(SHAPES)
    for name in SHAPES:
        assert tensors[name].dtype == again.read(name).dtype == dtype
        assert torch.equal(tensors[name], values(name).to(dtype))
        assert torch.equal(again.read(name), tensors[name])


def test_overlay_replaces_only_its_own_tensors(tmp_path: Path) -> None:
    def base(name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        return torch.full((stop - start,), float(len(shape)))

    read = overlay_weights(
        base, OverlayFile(tmp_path / "w", write_overlay(tmp_path / "w", OneTensorSource(), torch.float32))
    )
    for name, shape in SHAPES.items():
        for start, stop in ((0, math.prod(shape)), (2, 5)):
            assert torch.equal(read(name, shape, start, stop), values(name).flatten()[start:stop])
    assert read("d", torch.Size((2, 2)), 1, 4).tolist() == [2.0, 2.0, 2.0]
    assert overlay_weights(base, None) is base


def test_other_file_is_refused(tmp_path: Path) -> None:
    entry = write_overlay(tmp_path / "w", OneTensorSource(), torch.float32)
    content = bytearray((tmp_path / "w").read_bytes())
    content[-3] ^= 1
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(UserError, match="damaged, or of another export"):
        OverlayFile(tmp_path / "w", entry)
    with pytest.raises(UserError, match="no such file"):
        OverlayFile(tmp_path / "none", entry)


def test_weights_of_another_model_are_refused() -> None:
    check_overlay(OneTensorSource(), {**SHAPES, "more": torch.Size((1,))}, "here")
    with pytest.raises(UserError, match=r"here: holds a of shape \[5, 3\], the model's is \[3, 5\]"):
        check_overlay(OneTensorSource(), {**SHAPES, "a": torch.Size((3, 5))}, "here")
    with pytest.raises(UserError, match=r"holds b of shape .*, the model has no such tensor"):
        check_overlay(OneTensorSource(), {name: shape for name, shape in SHAPES.items() if name != "b"}, "here")
