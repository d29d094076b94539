"""Any slice of the weights: from safetensors files of any layout, and from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dscl.model.weights import DRAW_BLOCK, RandomWeights, SafetensorsWeights, draw_normal
from dscl.utils.errors import UserError

TENSORS = {
    "matrix": torch.arange(42.0).view(6, 7),
    "stack": torch.arange(60.0).view(5, 3, 4),
    "vector": torch.arange(11.0),
    "scalar": torch.tensor(3.0),
}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    files = {name: f"model-{i}.safetensors" for i, name in enumerate(tensors)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_shards(tmp_path, TENSORS)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_any_slice_of_any_tensor(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    if layout == "single":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        write_shards(tmp_path, tensors)
    weights = SafetensorsWeights(tmp_path)
    weights.check_shapes(SHAPES)
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for start in range(len(flat)):
            for stop in range(start + 1, len(flat) + 1):
                read = weights.read(name, tensor.shape, start, stop)
                assert read.dtype == dtype
                assert torch.equal(read, flat[start:stop])


def test_single_file_is_preferred_to_an_index(sharded: Path) -> None:
    save_file({"matrix": torch.zeros(2, 2)}, sharded / "model.safetensors")
    assert torch.equal(SafetensorsWeights(sharded).read("matrix", torch.Size((2, 2)), 0, 4), torch.zeros(4))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        SafetensorsWeights(folder).check_shapes(SHAPES)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:5]), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 a pickle" * 9), "not a readable safetensors file"),
        (lambda path: path.unlink(), "missing; copy or download it again"),
        (lambda path: save_file({"other": torch.zeros(1)}, path), "says that tensor matrix is in it, and it is not"),
        (
            lambda path: save_file({"matrix": torch.zeros(7, 6)}, path),
            r"shape [7, 6], the configuration asks for [6, 7]",
        ),
        (lambda path: save_file({"matrix": torch.zeros(6, 7, dtype=torch.int8)}, path), "is of type I8; allowed"),
    ],
)
def test_damaged_files_are_refused(damage: Callable[[Path], None], message: str, sharded: Path) -> None:
    damage(sharded / "model-0.safetensors")
    error_message = refusal(sharded)
    assert message in error_message
    assert "model-0.safetensors" in error_message


@pytest.mark.parametrize("outside", ["../{}", "{}/../x/model-0.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_outside_the_folder_is_refused(outside: str, sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["matrix"] = outside.format(sharded.name)
    (sharded / INDEX).write_text(json.dumps(index))
    assert "only files of its own folder" in refusal(sharded)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"matrix": 3}}', "\xff"]
)
def test_broken_index_is_refused(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(content.encode("latin-1"))
    assert "not a readable index of weights" in refusal(sharded)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    torch.save({"matrix": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert "weights are read from safetensors only" in refusal(tmp_path)


def test_missing_tensors_are_refused(sharded: Path) -> None:
    with pytest.raises(UserError, match=r"lack 1 of the 2 tensors .*, first matrx \(did you mean 'matrix'\?\)"):
        SafetensorsWeights(sharded).check_shapes({"matrix": SHAPES["matrix"], "matrx": SHAPES["matrix"]})


def test_random_norms_are_one_and_biases_zero() -> None:
    weights = RandomWeights(0, 0.02)
    assert torch.equal(weights.read("layer.norm.weight", torch.Size((5,)), 1, 4), torch.ones(3))
    assert torch.equal(weights.read("layer.bias", torch.Size((5,)), 1, 4), torch.zeros(3))


def test_random_slices_equal_the_full_tensor() -> None:
    shape = torch.Size((3, DRAW_BLOCK // 2 + 7))
    weights = RandomWeights(4, 0.5)
    whole = weights.read("w", shape, 0, shape.numel())
    assert whole.shape == (shape.numel(),)
    for start, stop in [
        (0, 1),
        (5, 9),
        (DRAW_BLOCK - 1, DRAW_BLOCK + 1),
        (DRAW_BLOCK, shape.numel()),
        (3, shape.numel() - 1),
        (7, 7),
    ]:
        assert torch.equal(weights.read("w", shape, start, stop), whole[start:stop])


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = draw_normal(0, "a", 0, 100, 1.0)
    torch.manual_seed(2)
    assert torch.equal(draw_normal(0, "a", 0, 100, 1.0), first)
    others = [
        draw_normal(1, "a", 0, 100, 1.0),
        draw_normal(0, "b", 0, 100, 1.0),
        draw_normal(0, "a", DRAW_BLOCK, DRAW_BLOCK + 100, 1.0),
    ]
    assert all((other - first).abs().max() > 0.1 for other in others)
    state = torch.get_rng_state()
    draw_normal(0, "a", 0, 100, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_are_normal() -> None:
    values = draw_normal(0, "a", 0, 4 * DRAW_BLOCK, 0.3)
    assert abs(values.mean()) < 0.003
    assert abs(values.std() - 0.3) < 0.003
    inside = [(values.abs() < 0.3 * k).float().mean().item() for k in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.004)
