"""Analytic Subspace Routing (arXiv 2503.13575): a LoRA a task, and a router in closed form that forgets nothing.

What trains: one LoRA in the layers from `feature_layer` on; what a task has learnt is frozen into the bank. What may
not change: everything below, so that a prompt's features are the same for ever. Who decides at inference: ridge
regression on the features of the prompt, which the training pass yields on its way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscl.config import key
from dscl.data.batches import Batch, PromptBatch
from dscl.errors import UserError
from dscl.methods.base import Ended, Facts, Method, Ranks, Reader
from dscl.methods.deciding import Deciding, feature_layer_of, spec_of, width_of
from dscl.model.adapters import Adapter, Pair, file_name, read_adapter, write_adapter
from dscl.model.routed import Bank, add_routed, first_values
from dscl.model.routing import Routing, targets_above
from dscl.model.surgery import LoraConfig
from dscl.router import Router

# The paper's settings; a recipe that asks for them may not ask for others.
PAPER: dict[str, Any] = {
    "feature_layer": 4,
    "width": 10000,
    "ridge": 100.0,
    "reject": False,
    "lora": LoraConfig(rank=8, alpha=32.0, dropout=0.1, targets=("q_proj", "v_proj")),
}


@dataclass(frozen=True)
class AsrConfig:
    name: str = key("asr")
    faithful: bool = key(False, help="the paper's settings and its features in floating point; sets all keys below")
    feature_layer: int | None = key(
        None,
        at_least=1,
        help="layers below are never adapted, the features are its input; default: an eighth of all, from 2",
    )
    width: int | None = key(None, at_least=8, at_most=65536, help="features; default: twice the hidden size, from 2048")
    ridge: float | None = key(
        None, above=0.0, help="in units of the features' mean square; default: chosen from the statistics"
    )
    reject: bool | None = key(None, help="prompts far from every task go to the base model; default: true")
    lora: LoraConfig | None = key(None, help="the adapters; default: as in sequential")

    def __post_init__(self) -> None:
        default = PAPER if self.faithful else {"reject": True, "lora": LoraConfig()}
        for name, value in default.items():
            given = getattr(self, name)
            if self.faithful and given is not None and given != value:
                raise UserError(
                    f"method.{name}: given {given} together with faithful: true, which sets {value}; remove one of them"
                )
            object.__setattr__(self, name, value if given is None else given)


class Asr(Method):
    Config = AsrConfig
    config: AsrConfig
    by_task = decides = True
    bank: Bank
    deciding: Deciding

    def __init__(self, config: AsrConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        assert config.lora is not None
        self.lora = config.lora
        self.routing = Routing(capacity=len(facts.tasks), rank=config.lora.rank)

    def prepare(self, model: nn.Module) -> nn.Module:
        if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
            raise UserError(
                "method.name: asr needs a model whose layers stand in model.layers (llama, mistral, qwen2, ...); "
                f"this is a {type(model).__name__}"
            )
        device = next(model.parameters()).device
        kind = "paper" if self.config.faithful else "exact"
        shape: Any = model.config
        layer = feature_layer_of(self.config.feature_layer, shape.num_hidden_layers)
        spec = spec_of(kind, layer, width_of(self.config.width, shape.hidden_size), shape.hidden_size, self.facts)
        router = Router(spec, self.config.ridge, bool(self.config.reject), device)
        self.deciding = Deciding(router, self.routing)
        targets = targets_above(model, layer, self.lora.targets)
        self.bank = add_routed(model, self.routing, layer, targets)
        for routed in self.bank.layers.values():
            routed.make_trainable(self.lora)
        return model

    def begin_task(self, index: int, name: str, ranks: Ranks) -> Reader:
        # By the task's name, not its place: what a task learns does not depend on the tasks before it.
        return lambda tensor, *stretch: first_values(self.facts.seed, f"{name}:{tensor}", *stretch)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.deciding.loss(model, batch)

    def end_task(self, index: int, name: str, ranks: Ranks) -> Ended:
        told = self.deciding.learn(name, ranks)
        trained = ranks.whole(None)
        layers = {}
        for path, layer in self.bank.layers.items():
            a, b = (trained[f"{path}.lora_{side}"].to(layer.bank_a.dtype) for side in "ab")
            layers[path] = Pair(a, b, layer.scale)
        self._adapter = Adapter(name, self.facts.base, layers)
        self.bank.add(self._adapter, self._slot(name))
        each = sum(t.numel() * t.element_size() for pair in layers.values() for t in (pair.a, pair.b))
        adapters = float(len(self.bank.names) * each)
        return Ended(told, {"capacity_bytes": adapters, "deciding_bytes": self.deciding.kept()})

    def leave(self, folder: Path, name: str) -> list[Path]:
        adapter = folder / "adapters" / file_name(name)
        write_adapter(adapter, self._adapter)
        return [*sorted(adapter.iterdir()), self.deciding.leave(folder, name)]

    def recall(self, folder: Path, names: Sequence[str]) -> None:
        shapes = {path: (m.out_features, m.in_features) for path, m in self.bank.layers.items()}
        for name in names:
            adapter = read_adapter(folder / "adapters" / file_name(name), shapes)
            self.bank.add(dataclasses.replace(adapter, name=name), self._slot(name))
            self.deciding.recall(folder, name)

    def answering(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        if task is not None:
            slot = self.bank.slot(task) if task in self.bank.names else None  # not learned yet: the bare model
            return self.routing.using([slot], self.bank.like)
        return self.deciding.answering(batch, self.bank.slot)

    def rows(self) -> dict[str, torch.Tensor]:
        return self.deciding.rows()

    def load_state(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        self.deciding.load_rows(rows)

    def _slot(self, name: str) -> int:
        """Of the tasks by name, so that the bank is the same in every order of tasks."""
        return sorted(self.facts.tasks).index(name)
