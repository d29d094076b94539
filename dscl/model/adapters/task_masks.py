"""The file of a task's sub-experts: its masks, its token routers, and the parameters that were frozen for it.

A task's masks may include parameters that were frozen for earlier tasks. Their values are in the earlier tasks' files.
So the files of a run are read in the order in which the tasks ended, and each file names the tasks before it. A file
that is damaged, out of order, or of sub-experts of another shape is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dscl.config.parsing import to_plain_data
from dscl.maths.masks import unpack_bits
from dscl.model.adapters.sub_expert_bank import SubExpertBank
from dscl.model.adapters.sub_experts import SubExpertLinear, SubExpertShape, Tensors
from dscl.utils.checksummed import read_checksummed, write_checksummed
from dscl.utils.errors import UserError

FORMAT = 1
KIND = "dscl_task_masks"


@dataclass(frozen=True)
class TaskMasks:
    """The contents of one file."""

    task: str
    previous_tasks: tuple[str, ...]  # the tasks that ended earlier, in order
    shape: SubExpertShape
    layers: dict[str, Tensors]  # by the projection's path: what `SubExpertLinear.freeze_task_params` returned
    training: Mapping[str, Any] = field(
        default_factory=dict
    )  # fingerprints of the base model and the tokenizer, and further settings

    def byte_sizes(self) -> dict[str, int]:
        """Bytes of the parameters, masks and token routers."""
        total_bytes = {"parameters": 0, "masks": 0, "routers": 0}
        for tensors in self.layers.values():
            for name, tensor in tensors.items():
                kind = "parameters" if name in ("a", "b") else "routers" if name == "router" else "masks"
                total_bytes[kind] += tensor.numel() * tensor.element_size()
        return total_bytes


def write_task_masks(path: Path, task_masks: TaskMasks) -> None:
    """Write the file with a checksum."""
    tensors = {
        f"{layer}|{name}": tensor.cpu().contiguous()
        for layer, task_tensors in task_masks.layers.items()
        for name, tensor in task_tensors.items()
    }
    header = {
        "task": task_masks.task,
        "previous_tasks": list(task_masks.previous_tasks),
        "shape": to_plain_data(task_masks.shape),
    }
    write_checksummed(path, KIND, FORMAT, {**header, "training": dict(task_masks.training)}, tensors)


def read_matching_masks(path: Path, task: str, previous_tasks: tuple[str, ...], experts: SubExpertBank) -> TaskMasks:
    """Read the file of this task, and check that it fits these sub-experts and the tasks before it."""
    task_masks = read_task_masks(path)
    if (task_masks.task, task_masks.previous_tasks) != (task, previous_tasks):
        after = ", ".join(task_masks.previous_tasks) or "no other"
        raise UserError(
            f"{path}: of task {task_masks.task!r} after {after}, here {task!r} after "
            f"{', '.join(previous_tasks) or 'no other'} is needed; a task's sub-experts depend on the order of the "
            "tasks, so use the files of one run"
        )
    if task_masks.shape != experts.shape:
        stored, expected = to_plain_data(task_masks.shape), to_plain_data(experts.shape)
        name = next(name for name in stored if stored[name] != expected[name])
        raise UserError(
            f"{path}: its sub-experts have {name} {stored[name]}, here it is {expected[name]}; use one run's files"
        )
    if set(task_masks.layers) != set(experts.layers):
        name = sorted(set(task_masks.layers) ^ set(experts.layers))[0]
        raise UserError(f"{path}: {name} has sub-experts either there or here, not both; use the model of the training")
    for name, layer in experts.layers.items():
        problem = _find_mismatch(layer, task_masks.layers[name])
        if problem:
            raise UserError(f"{path}: {name}: {problem}; use the model of the training, and one run's files")
    return task_masks


def read_task_masks(path: Path) -> TaskMasks:
    """Read a file without checking which run it belongs to."""
    header, tensors = read_checksummed(path, KIND, FORMAT, "a task's sub-experts file")
    layers: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        layer, _, tensor_name = name.rpartition("|")
        layers.setdefault(layer, {})[tensor_name] = tensor
    return TaskMasks(
        header["task"], tuple(header["previous_tasks"]), SubExpertShape(**header["shape"]), layers, header["training"]
    )


def _find_mismatch(layer: SubExpertLinear, task_tensors: Mapping[str, torch.Tensor]) -> str:
    """How the tensors in a file differ from what the layer needs; empty if they fit."""
    sizes: dict[str, Any] = {f"mask_{name}": -(-math.prod(s) // 8) for name, s in layer.mask_shapes.items()}
    sizes["expert_mask"] = layer.shape.max_experts
    if layer.shape.top_k and "expert_mask" in task_tensors:
        sizes["router"] = int(task_tensors["expert_mask"].sum()) * layer.in_features
    for name, size in sizes.items():
        if name not in task_tensors or task_tensors[name].numel() != size:
            stored = task_tensors[name].numel() if name in task_tensors else "nothing"
            return f"{name} holds {stored}, the layer needs {size}"
    masks = {
        name: unpack_bits(task_tensors[f"mask_{name}"], s).to(layer.frozen_a.device)
        for name, s in layer.mask_shapes.items()
    }
    for side, count in zip("ab", layer.count_new_params(masks), strict=True):
        if side not in task_tensors or task_tensors[side].numel() != count:
            stored = task_tensors[side].numel() if side in task_tensors else "no"
            return f"{stored} values of {side}, the mask needs {count}"
        if not task_tensors[side].isfinite().all():
            return f"values of {side} that are not finite"
    if layer.shape.top_k and not task_tensors["router"].isfinite().all():
        return "values of its token router that are not finite"
    return ""
