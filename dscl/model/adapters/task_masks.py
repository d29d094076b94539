"""What a task's sub-experts leave behind, as a file: its masks, its token routers, and the values that it claimed.

A task's masks may open what earlier tasks claimed, whose values stand in those tasks' files. So the files of a run are
read in the order in which the tasks ended, and each says which tasks came before it. One that is damaged, out of order
or of sub-experts of another shape is refused whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dscl.config.parsing import plain
from dscl.maths.masks import unpack
from dscl.model.adapters.sub_experts import Experts, Shape, SubExperts, Tensors
from dscl.utils.checksummed import read_stamped, write_stamped
from dscl.utils.errors import UserError

FORMAT = 1
KIND = "dscl_claims"


@dataclass(frozen=True)
class Claims:
    task: str
    before: tuple[str, ...]  # the tasks that ended earlier, in their order
    shape: Shape
    layers: dict[str, Tensors]  # by the projection's path: what `SubExperts.claim` gave
    training: Mapping[str, Any] = field(default_factory=dict)  # fingerprints of the base and of how prompts were read

    def sizes(self) -> dict[str, int]:
        """Bytes by kind."""
        found = {"parameters": 0, "masks": 0, "routers": 0}
        for tensors in self.layers.values():
            for name, tensor in tensors.items():
                kind = "parameters" if name in ("a", "b") else "routers" if name == "router" else "masks"
                found[kind] += tensor.numel() * tensor.element_size()
        return found


def write_claims(path: Path, claims: Claims) -> None:
    tensors = {
        f"{layer}|{name}": tensor.cpu().contiguous()
        for layer, kept in claims.layers.items()
        for name, tensor in kept.items()
    }
    header = {"task": claims.task, "before": list(claims.before), "shape": plain(claims.shape)}
    write_stamped(path, KIND, FORMAT, {**header, "training": dict(claims.training)}, tensors)


def read_claims(path: Path, task: str, before: tuple[str, ...], experts: Experts) -> Claims:
    """What `write_claims` wrote of this task, for these sub-experts."""
    claims = open_claims(path)
    if (claims.task, claims.before) != (task, before):
        after = ", ".join(claims.before) or "no other"
        raise UserError(
            f"{path}: of task {claims.task!r} after {after}, here {task!r} after {', '.join(before) or 'no other'} is "
            "needed; what tasks claim depends on their order, so use the files of one run"
        )
    if claims.shape != experts.shape:
        there, here = plain(claims.shape), plain(experts.shape)
        name = next(name for name in there if there[name] != here[name])
        raise UserError(
            f"{path}: its sub-experts have {name} {there[name]}, here it is {here[name]}; use one run's files"
        )
    if set(claims.layers) != set(experts.layers):
        name = sorted(set(claims.layers) ^ set(experts.layers))[0]
        raise UserError(f"{path}: {name} has sub-experts either there or here, not both; use the model of the training")
    for name, layer in experts.layers.items():
        problem = _misfit(layer, claims.layers[name])
        if problem:
            raise UserError(f"{path}: {name}: {problem}; use the model of the training, and one run's files")
    return claims


def open_claims(path: Path) -> Claims:
    """What a file holds, whichever run it is of."""
    header, tensors = read_stamped(path, KIND, FORMAT, "what sub-experts leave")
    layers: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        layer, _, what = name.rpartition("|")
        layers.setdefault(layer, {})[what] = tensor
    return Claims(header["task"], tuple(header["before"]), Shape(**header["shape"]), layers, header["training"])


def _misfit(layer: SubExperts, kept: Mapping[str, torch.Tensor]) -> str:
    """How what is there differs from what this layer needs; empty if it fits."""
    sizes: dict[str, Any] = {f"mask_{name}": -(-math.prod(s) // 8) for name, s in layer.mask_shapes.items()}
    sizes["open"] = layer.shape.most
    if layer.shape.top and "open" in kept:
        sizes["router"] = int(kept["open"].sum()) * layer.in_features
    for name, size in sizes.items():
        if name not in kept or kept[name].numel() != size:
            there = kept[name].numel() if name in kept else "nothing"
            return f"{name} holds {there}, the layer needs {size}"
    masks = {name: unpack(kept[f"mask_{name}"], s).to(layer.held_a.device) for name, s in layer.mask_shapes.items()}
    for side, count in zip("ab", layer.unclaimed(masks), strict=True):
        if side not in kept or kept[side].numel() != count:
            there = kept[side].numel() if side in kept else "no"
            return f"{there} values of {side}, the mask claims {count}"
        if not kept[side].isfinite().all():
            return f"values of {side} that are not finite"
    if layer.shape.top and not kept["router"].isfinite().all():
        return "values of its token router that are not finite"
    return ""
