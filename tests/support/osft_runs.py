"""OSFT's tensors in checkpoints, and the distance of weights from the protected subspace's values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dscl.methods import osft
from tests.support.toy_model import assemble

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


Tensors = dict[str, torch.Tensor]
Shards = dict[str, list[tuple[int, torch.Tensor]]]


def is_target(name: str) -> bool:
    return name.split(".")[-2] in TARGETS


def protected_change_norm(projection: str, change: torch.Tensor, right: torch.Tensor, left: torch.Tensor) -> float:
    """The norm of a weight change within the protected subspace, in fp64."""
    change, right, left = change.double(), right.double(), left.double()
    if projection == "paper":
        return float((left.T @ change @ right).norm())
    rest = left.T @ (change - change @ right @ right.T) if projection == "two_sided" else torch.zeros(1)
    return math.hypot(float((change @ right).norm()), float(rest.norm()))


def with_few_texts(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on a rank; OSFT samples few and short texts from the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(osft, "NUM_TEXTS", 40)
        patch.setattr(osft, "TEXT_LENGTH", 8)
        return function(*arguments)


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").iterdir())


def read_checkpoint_tensors(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """The flat master weights and the tensors of the matrix owners, of all ranks."""
    parts: list[Shards] = []
    owned: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        parts.append({})
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if path.name.startswith("owned-"):
                    assert name not in owned
                    owned[name] = file.get_tensor(name)
                elif name.startswith("master|"):
                    _, start, parameter = name.split("|")
                    parts[-1].setdefault(parameter, []).append((int(start), file.get_tensor(name)))
    return assemble(parts), owned


def constraint_error(projection: str, weight: torch.Tensor, subspace: Tensors) -> float:
    """The distance of a weight from its protected values, relative to the weight's norm."""
    right, left = subspace["right"].double(), subspace["left"].double()
    values = weight.double().view(len(left), len(right))
    if projection == "paper":
        error = float((left.T @ values @ right - subspace["core"]).norm())
    else:
        error = math.hypot(
            float((values @ right - subspace["image"]).norm()), float((left.T @ values - subspace["coimage"]).norm())
        )
    return error / float(values.norm())


def group_by_matrix(owned: Tensors) -> dict[str, Tensors]:
    """The owned tensors by matrix and kind."""
    by_matrix: dict[str, Tensors] = {}
    for name, tensor in owned.items():
        matrix, kind = name.rsplit("|", 1)
        by_matrix.setdefault(matrix, {})[kind] = tensor
    return by_matrix


def max_constraint_error(projection: str, weights: Tensors, owned: Tensors) -> float:
    by_matrix = group_by_matrix(owned)
    assert len(by_matrix) == 2 * len(TARGETS)
    return max(constraint_error(projection, weights[name], subspace) for name, subspace in by_matrix.items())
