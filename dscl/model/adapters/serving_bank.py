"""Serving banks: the trained LoRA adapters or sub-experts of all tasks, loaded beside a model's projections.

Both classes have the same interface. `get_slot` gives a task's slot, and `fixed_reason` says why no task can be added
or removed (empty if tasks can).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dscl.model.adapters.lora_bank import LoraBank, RoutedLoraLinear, inject_lora_bank
from dscl.model.adapters.peft_files import LoraAdapter, LoraWeights, read_adapter
from dscl.model.adapters.routing import Routing, hook_feature_layer, layer_index, make_template_tensor, replace_module
from dscl.model.adapters.sub_expert_bank import inject_sub_experts
from dscl.model.adapters.sub_experts import SubExpertLinear
from dscl.model.adapters.task_masks import read_matching_masks, read_task_masks
from dscl.utils.errors import UserError


class LoraServingBank:
    """LoRA adapters of tasks. The bank is rebuilt if a new adapter needs further layers or a larger rank."""

    fixed_reason = ""

    def __init__(self, module: Any, routing: Routing, layer: int, folders: Mapping[str, Path]) -> None:
        """`layer`: the feature layer, where prompts are routed. `folders`: the adapter of each task."""
        self._module, self._routing, self._template = module, routing, make_template_tensor(module)
        self._shapes = linear_shapes(module)
        self._folders: dict[str, Path] = {}
        self._bank = inject_lora_bank(module, routing, ())
        hook_feature_layer(module, routing, layer)
        self._load_adapters(folders)

    @property
    def first_adapted_layer(self) -> int:
        """The index of the first decoder layer that has adapters."""
        return min(map(layer_index, self._bank.layers), default=len(self._module.model.layers))

    def get_slot(self, name: str | None) -> int | None:
        return self._bank.get_slot(name)

    def add(self, name: str, folder: Path) -> None:
        self._load_adapters({name: folder})

    def remove(self, name: str) -> None:
        self._bank.remove(name)
        del self._folders[name]

    def _load_adapters(self, folders: Mapping[str, Path]) -> None:
        adapters = [self._read_adapter(name, folder) for name, folder in folders.items()]
        loras = {path: lora for adapter in adapters for path, lora in adapter.layers.items()}
        rank = max([self._routing.rank, *(len(lora.a) for adapter in adapters for lora in adapter.layers.values())])
        if rank > self._routing.rank or not set(loras) <= set(self._bank.layers):
            adapters = [*(self._read_adapter(name, self._folders[name]) for name in self._bank.names), *adapters]
            self._routing.rank = rank
            for path in {**self._bank.layers, **loras}:
                base_layer = self._module.get_submodule(path)
                replace_module(self._module, path, RoutedLoraLinear(base_layer, self._routing, self._template))
            self._bank = LoraBank(self._module, self._routing)
        for adapter in adapters:
            self._bank.add(adapter)
        self._folders.update(folders)

    def _read_adapter(self, name: str, folder: Path) -> LoraAdapter:
        return dataclasses.replace(read_adapter(folder, self._shapes), name=name)


class SubExpertServingBank:
    """Sub-experts with the masks, parameters and token routers of all tasks."""

    fixed_reason = "tasks share sub-expert parameters, and each task depends on the tasks before it"

    def __init__(self, module: Any, routing: Routing, layer: int | None, files: Mapping[str, Path]) -> None:
        """`layer`: the feature layer, where prompts are routed; None: the caller names each prompt's task.

        `files`: the task-mask file of each task, in the order in which the tasks ended.
        """
        path = next(iter(files.values()))
        first_task = read_task_masks(path)
        if unknown_layers := sorted(set(first_task.layers) - set(linear_shapes(module))):
            raise UserError(
                f"{path}: holds sub-experts of {unknown_layers[0]}, and the model has no such linear layer; use the "
                "model of the training"
            )
        self._experts = inject_sub_experts(module, first_task.shape, routing, first_task.layers)
        if layer is not None:
            hook_feature_layer(module, routing, layer)
        for name, file in files.items():
            task_masks = read_matching_masks(file, name, tuple(self._experts.names), self._experts)
            self._experts.load_task_params(name, task_masks.layers)

    @property
    def first_adapted_layer(self) -> int:
        """The index of the first decoder layer that has sub-experts."""
        return min(map(layer_index, self._experts.layers))

    def get_slot(self, name: str | None) -> int | None:
        return self._experts.get_slot(name)

    def add(self, name: str, folder: Path) -> None:
        raise AssertionError(self.fixed_reason)

    def remove(self, name: str) -> None:
        raise AssertionError(self.fixed_reason)

    @property
    def token_routing(self) -> str:
        """How tokens are routed to sub-experts, for messages; empty if every token uses all of them equally."""
        shape = self._experts.shape
        return f"sends every token to {shape.top_k} sub-experts of its own" if shape.top_k else ""

    def to_lora_adapter(self, name: str, base_model: str) -> LoraAdapter:
        """A task's masked sub-experts as one LoRA adapter.

        The LoRA is exact if every token uses all sub-experts equally. With a token router it is an approximation, which
        replaces each gate by its value for a token whose router logits are all equal, averaged over the experts.
        """
        slot = self._experts.get_slot(name)
        assert slot is not None
        masked = {path: _masked_matrices(layer, slot) for path, layer in self._experts.layers.items()}
        rank = max(1, *(len(a) for a, _ in masked.values()))  # one rank for all layers, padded with zeros
        shape, num_used = self._experts.shape, int(next(iter(self._experts.layers.values())).expert_mask[slot].sum())
        # Equal logits: each of the `top_k` chosen gates is shape.num_experts / num_used, the others are zero.
        mean_gate = shape.num_experts / num_used * min(1.0, shape.top_k / num_used) if shape.top_k else 1.0
        layers = {}
        for path, (a, b) in masked.items():
            num_padding = rank - len(a)
            a, b = functional.pad(a, (0, 0, 0, num_padding)), functional.pad(b, (0, num_padding))
            layers[path] = LoraWeights(a, b, shape.scale * mean_gate)
        return LoraAdapter(name, base_model, layers)


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """The shape (out, in) of every linear layer, by its name."""
    return {n: (m.out_features, m.in_features) for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def _masked_matrices(layer: SubExpertLinear, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B multiplied by a task's masks, without the rows of A and columns of B whose product is zero."""
    masks = {name: getattr(layer, f"task_mask_{name}")[slot] for name in layer.mask_shapes}
    mask_a, mask_b = (masks["rank1"][:, None], masks["rank1"]) if layer.shape.rank1 else (masks["a"], masks["b"])
    a, b = layer.frozen_a * mask_a, layer.frozen_b * mask_b
    is_nonzero = (a != 0).any(1) & (b != 0).any(0)
    return a[is_nonzero], b[:, is_nonzero]
