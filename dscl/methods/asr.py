"""Analytic Subspace Routing (arXiv 2503.13575): a LoRA a task, and a router in closed form that forgets nothing.

What trains: one LoRA in the layers from `feature_layer` on; what a task has learnt is frozen into the bank. What may
not change: everything below, so that a prompt's features are the same for ever. Who decides at inference: ridge
regression on the features of the prompt, which the training pass yields on its way.
"""

from __future__ import annotations

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
from dscl.methods.base import Ended, Ranks
from dscl.methods.deciding import Deciding, feature_layer_of, spec_of, width_of
from dscl.methods.lora_per_task import LoraPerTask
from dscl.model.routing import pool_at, targets_above
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


class Asr(LoraPerTask):
    Config = AsrConfig
    config: AsrConfig
    decides = True
    deciding: Deciding

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
        self.adapt(model, targets_above(model, layer, self.lora.targets))
        pool_at(model, self.routing, layer)
        return model

    def rehearse(self) -> dict[str, float]:
        return self.deciding.later()

    def ending(self) -> float:
        return self.deciding.solving()

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.deciding.loss(model, batch)

    def end_task(self, index: int, name: str, ranks: Ranks) -> Ended:
        told = self.deciding.learn(name, ranks)
        numbers = super().end_task(index, name, ranks).numbers
        return Ended(told, {**numbers, "deciding_bytes": self.deciding.kept()})

    def leave(self, folder: Path, name: str) -> list[Path]:
        return [*super().leave(folder, name), self.deciding.leave(folder, name)]

    def recall(self, folder: Path, names: Sequence[str]) -> None:
        super().recall(folder, names)
        for name in names:
            self.deciding.recall(folder, name)

    def answering(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        if task is not None:
            return super().answering(batch, task)
        return self.deciding.answering(batch, self.bank.slot)

    def rows(self) -> dict[str, torch.Tensor]:
        return self.deciding.rows()

    def load_state(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        self.deciding.load_rows(rows)
