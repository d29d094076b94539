"""Analytic Subspace Routing (arXiv 2503.13575): a LoRA a task, and a router in closed form that forgets nothing.

What trains: one LoRA in the layers from `feature_layer` on; what a task has learnt is frozen into the bank. What may
not change: everything below, so that a prompt's features are the same for ever. Who decides at inference: ridge
regression on the features of the prompt, which the training pass yields on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscl.config.methods import ASR_PAPER as PAPER
from dscl.config.methods import AsrConfig
from dscl.data.batches import Batch, PromptBatch
from dscl.methods.base import Ended, Ranks
from dscl.methods.lora_per_task import LoraPerTask
from dscl.methods.rls_router import Router
from dscl.methods.task_router import Deciding, feature_layer_of, spec_of, width_of
from dscl.model.adapters.routing import pool_at, targets_above
from dscl.utils.errors import UserError

__all__ = ["PAPER", "Asr", "AsrConfig"]


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
