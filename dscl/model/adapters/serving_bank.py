"""What tasks have left beside a model's projections, ready to answer: adapters, or claimed sub-experts.

Either gives every task a slot, by which the rows of a batch are routed, and says why tasks may not come and go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dscl.model.adapters.lora_bank import Bank, RoutedLinear, add_routed
from dscl.model.adapters.peft_files import Adapter, Pair, read_adapter
from dscl.model.adapters.routing import Routing, empty_like, layer_of, pool_at, put
from dscl.model.adapters.sub_experts import SubExperts, add_experts
from dscl.model.adapters.task_masks import open_claims, read_claims
from dscl.utils.errors import UserError


class Adapters:
    """A bank of adapters, which grows in layers and rank where they need more."""

    fixed = ""

    def __init__(self, module: Any, routing: Routing, layer: int, folders: Mapping[str, Path]) -> None:
        """`layer`: where prompts are routed."""
        self._module, self._routing, self._like = module, routing, empty_like(module)
        self._shapes = linear_shapes(module)
        self._folders: dict[str, Path] = {}
        self._bank = add_routed(module, routing, ())
        pool_at(module, routing, layer)
        self._hold(folders)

    @property
    def lowest(self) -> int:
        """The first decoder layer with something of a task's."""
        return min(map(layer_of, self._bank.layers), default=len(self._module.model.layers))

    def slot(self, name: str | None) -> int | None:
        return self._bank.slot(name)

    def add(self, name: str, folder: Path) -> None:
        self._hold({name: folder})

    def remove(self, name: str) -> None:
        self._bank.remove(name)
        del self._folders[name]

    def _hold(self, folders: Mapping[str, Path]) -> None:
        adapters = [self._read(name, folder) for name, folder in folders.items()]
        pairs = {path: pair for adapter in adapters for path, pair in adapter.layers.items()}
        rank = max([self._routing.rank, *(len(p.a) for adapter in adapters for p in adapter.layers.values())])
        if rank > self._routing.rank or not set(pairs) <= set(self._bank.layers):
            adapters = [*(self._read(name, self._folders[name]) for name in self._bank.names), *adapters]
            self._routing.rank = rank
            for path in {**self._bank.layers, **pairs}:
                plain = self._module.get_submodule(path)
                put(self._module, path, RoutedLinear(plain, self._routing, self._like))
            self._bank = Bank(self._module, self._routing)
        for adapter in adapters:
            self._bank.add(adapter)
        self._folders.update(folders)

    def _read(self, name: str, folder: Path) -> Adapter:
        return dataclasses.replace(read_adapter(folder, self._shapes), name=name)


class Claimed:
    """Sub-experts, with what the tasks claimed of them one after the other."""

    fixed = "what tasks claim of their sub-experts is shared, and depends on the tasks before"

    def __init__(self, module: Any, routing: Routing, layer: int | None, files: Mapping[str, Path]) -> None:
        """`files`: of the tasks in the order in which they ended. `layer`: where prompts are routed, if they are."""
        path = next(iter(files.values()))
        first = open_claims(path)
        if strangers := sorted(set(first.layers) - set(linear_shapes(module))):
            raise UserError(
                f"{path}: holds sub-experts of {strangers[0]}, and the model has no such linear layer; use the model "
                "of the training"
            )
        self._experts = add_experts(module, first.shape, routing, first.layers)
        if layer is not None:
            pool_at(module, routing, layer)
        for name, file in files.items():
            claims = read_claims(file, name, tuple(self._experts.names), self._experts)
            self._experts.take(name, claims.layers)

    @property
    def lowest(self) -> int:
        return min(map(layer_of, self._experts.layers))

    def slot(self, name: str | None) -> int | None:
        return self._experts.slot(name)

    def add(self, name: str, folder: Path) -> None:
        raise AssertionError(self.fixed)

    def remove(self, name: str) -> None:
        raise AssertionError(self.fixed)

    @property
    def sent(self) -> str:
        """How tokens are sent to sub-experts, in words; empty if all of them count for every token alike."""
        shape = self._experts.shape
        return f"sends every token to {shape.top} sub-experts of its own" if shape.top else ""

    def adapter(self, name: str, base: str) -> Adapter:
        """A task's masked sub-experts as one LoRA, gates as for a token without preference; exact if none is sent."""
        slot = self._experts.slot(name)
        assert slot is not None
        masked = {path: _masked(layer, slot) for path, layer in self._experts.layers.items()}
        rank = max(1, *(len(a) for a, _ in masked.values()))  # PEFT likes one for all: zeros change nothing
        shape, seats = self._experts.shape, int(next(iter(self._experts.layers.values())).seats[slot].sum())
        # Gates come to as much as there were experts at first, shared among those that there are; but few are asked.
        mean = shape.experts / seats * min(1.0, shape.top / seats) if shape.top else 1.0
        layers = {}
        for path, (a, b) in masked.items():
            lacking = rank - len(a)
            a, b = functional.pad(a, (0, 0, 0, lacking)), functional.pad(b, (0, lacking))
            layers[path] = Pair(a, b, shape.scale * mean)
        return Adapter(name, base, layers)


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer."""
    return {n: (m.out_features, m.in_features) for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def _masked(layer: SubExperts, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as a task's masks leave them, without the columns that are zero."""
    opens = {name: getattr(layer, f"opens_{name}")[slot] for name in layer.mask_shapes}
    rows, columns = (opens["atoms"][:, None], opens["atoms"]) if layer.shape.atoms else (opens["a"], opens["b"])
    a, b = layer.held_a * rows, layer.held_b * columns
    used = (a != 0).any(1) & (b != 0).any(0)
    return a[used], b[:, used]
