"""ASR, Analytic Subspace Routing (arXiv 2503.13575): one LoRA per task, and a closed-form router without forgetting.

What trains: a LoRA in the decoder layers from `router.layer` on, which is frozen into a bank when the task ends. What
may not change: all layers below, so that a prompt's router features stay the same for ever. At inference a ridge
regression on the prompt's features chooses the task. The features are collected during training passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscl.config.methods import AsrPreset
from dscl.data.batches import Batch, PromptBatch
from dscl.methods.base import TaskContext, TaskSummary
from dscl.methods.lora_per_task import LoraPerTask
from dscl.methods.rls_router import Router
from dscl.methods.task_router import TaskRouter, make_router_spec, resolve_feature_layer, resolve_num_features
from dscl.model.adapters.routing import hook_feature_layer, match_targets_from_layer
from dscl.utils.errors import UserError


class Asr(LoraPerTask):
    """ASR: LoRA per task with task inference by `TaskRouter`."""

    Config = AsrPreset
    config: AsrPreset
    infers_task_id = True
    task_router: TaskRouter

    def prepare(self, model: nn.Module) -> nn.Module:
        if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
            raise UserError(
                "method.name: asr needs a model whose layers stand in model.layers (llama, mistral, qwen2, ...); "
                f"this is a {type(model).__name__}"
            )
        device = next(model.parameters()).device
        kind = "paper" if self.config.paper_preset else "exact"
        shape: Any = model.config
        layer = resolve_feature_layer(self.config.router.layer, shape.num_hidden_layers)
        num_features = resolve_num_features(self.config.router.num_features, shape.hidden_size)
        spec = make_router_spec(kind, layer, num_features, shape.hidden_size, self.run_info)
        router = Router(spec, self.config.router.ridge, bool(self.config.router.ood_fallback), device)
        self.task_router = TaskRouter(router, self.routing)
        self.add_adapters(model, match_targets_from_layer(model, layer, self.lora.targets))
        hook_feature_layer(model, self.routing, layer)
        return model

    def estimate_memory(self) -> dict[str, float]:
        return self.task_router.estimate_memory()

    def task_end_bytes(self) -> float:
        return self.task_router.solve_bytes()

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.task_router.loss_with_features(model, batch)

    def end_task(self, index: int, name: str, context: TaskContext) -> TaskSummary:
        message = self.task_router.add_task(name, context)
        metrics = super().end_task(index, name, context).metrics
        return TaskSummary(message, {**metrics, "router_bytes": self.task_router.statistics_bytes()})

    def save_task_artifacts(self, folder: Path, name: str) -> list[Path]:
        return [*super().save_task_artifacts(folder, name), self.task_router.save_task_artifacts(folder, name)]

    def load_task_artifacts(self, folder: Path, names: Sequence[str]) -> None:
        super().load_task_artifacts(folder, names)
        for name in names:
            self.task_router.load_task_artifacts(folder, name)

    def inference_context(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        if task is not None:
            return super().inference_context(batch, task)
        return self.task_router.inference_context(batch, self.bank.get_slot)

    def row_state_dict(self) -> dict[str, torch.Tensor]:
        return self.task_router.row_state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        self.task_router.load_row_state(rows)
