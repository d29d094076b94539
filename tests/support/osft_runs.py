"""What OSFT leaves in checkpoints, and how far weights are from what it protects."""

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

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


Tensors = dict[str, torch.Tensor]
Stretches = dict[str, list[tuple[int, torch.Tensor]]]


def is_target(name: str) -> bool:
    return name.split(".")[-2] in SEVEN


def leak(projection: str, change: torch.Tensor, right: torch.Tensor, left: torch.Tensor) -> float:
    """How large the part of a change is that may not be, in fp64."""
    change, right, left = change.double(), right.double(), left.double()
    if projection == "paper":
        return float((left.T @ change @ right).norm())
    rest = left.T @ (change - change @ right @ right.T) if projection == "two_sided" else torch.zeros(1)
    return math.hypot(float((change @ right).norm()), float(rest.norm()))


def quick(function: Callable[..., Any], *arguments: Any) -> Any:
    """On a rank: with few and short texts of the model's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(osft, "NUM_TEXTS", 40)
        patch.setattr(osft, "TEXT_LENGTH", 8)
        return function(*arguments)


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").iterdir())


def stored(checkpoint: Path) -> tuple[Tensors, Tensors]:
    """The masters, flat, and what the owners kept, of all ranks."""
    parts: list[Stretches] = []
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


def excess(projection: str, weight: torch.Tensor, kept: Tensors) -> float:
    """How far a weight is from what was fixed of it, relative to its size."""
    right, left = kept["right"].double(), kept["left"].double()
    exact = weight.double().view(len(left), len(right))
    if projection == "paper":
        off = float((left.T @ exact @ right - kept["core"]).norm())
    else:
        off = math.hypot(
            float((exact @ right - kept["image"]).norm()), float((left.T @ exact - kept["coimage"]).norm())
        )
    return off / float(exact.norm())


def of_matrices(owned: Tensors) -> dict[str, Tensors]:
    """What is kept of each matrix."""
    found: dict[str, Tensors] = {}
    for name, tensor in owned.items():
        matrix, what = name.rsplit("|", 1)
        found.setdefault(matrix, {})[what] = tensor
    return found


def worst(projection: str, weights: Tensors, owned: Tensors) -> float:
    kept = of_matrices(owned)
    assert len(kept) == 2 * len(SEVEN)
    return max(excess(projection, weights[name], tensors) for name, tensors in kept.items())
