"""O-LoRA: each task's LoRA is kept orthogonal to those of earlier tasks, and all are added (Wang et al., 2023).

What trains: a fresh LoRA for every task. The LoRAs of ended tasks are frozen. A penalty on the loss keeps the new
LoRA's input directions orthogonal to theirs:

    λ Σ |A_ended A_newᵀ|      over all elements, layers and ended tasks

This is the form in the authors' code. The paper squares the elements, so its λ has another scale.

Inference needs no task id: the model is the base model with all LoRAs added.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from dscl.config.methods import OloraPreset
from dscl.data.batches import Batch, PromptBatch
from dscl.methods.base import RunInfo
from dscl.methods.lora_per_task import LoraPerTask
from dscl.model.adapters.lora_bank import inject_stacked_bank
from dscl.model.lm_head import answer_loss


class Olora(LoraPerTask):
    """O-LoRA."""

    Config: ClassVar[type] = OloraPreset
    uses_task_id = False

    def __init__(self, config: Any, run_info: RunInfo) -> None:
        super().__init__(config, run_info)
        self._overlaps: list[torch.Tensor] = []  # of the layers of the current forward pass

    def add_adapters(self, model: nn.Module, targets: Sequence[str]) -> nn.Module:
        self.bank = inject_stacked_bank(model, self.routing, targets, self._overlaps.append)
        for layer in self.bank.layers.values():
            layer.make_trainable(self.lora)
        return model

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self._overlaps.clear()
        loss = answer_loss(model, batch)
        # Sum the overlaps before the backward pass, in which activation checkpointing runs the layers again.
        overlap = torch.stack(self._overlaps).sum()
        targets = (batch.labels != -100).sum()  # the engine divides the loss by the global number of targets
        return loss + self.config.constraint.orthogonality * targets * overlap

    def inference_context(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        return nullcontext()
