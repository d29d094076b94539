"""O-LoRA: every task gets a LoRA in directions of its own, and all of them act together (Wang et al., 2023).

What trains: a fresh LoRA for every task, whose input directions are kept apart from those of all ended tasks' LoRAs,
which are frozen, by a penalty on the loss:

    λ Σ |A_ended A_newᵀ|      over all elements, layers and ended tasks

as in its authors' program; the paper squares the elements, so that its λ is another one.

Who decides at inference: nobody; the answer is the base model's with all LoRAs added.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from dscl.config.methods import OloraConfig
from dscl.data.batches import Batch, PromptBatch
from dscl.methods.base import Facts
from dscl.methods.lora_per_task import LoraPerTask
from dscl.model.adapters.lora_bank import add_stacked
from dscl.model.lm_head import answer_loss


class Olora(LoraPerTask):
    Config: ClassVar[type] = OloraConfig
    by_task = False

    def __init__(self, config: Any, facts: Facts) -> None:
        super().__init__(config, facts)
        self._overlaps: list[torch.Tensor] = []  # of the layers that the present pass has come by

    def adapt(self, model: nn.Module, targets: Sequence[str]) -> nn.Module:
        self.bank = add_stacked(model, self.routing, targets, self._overlaps.append)
        for layer in self.bank.layers.values():
            layer.make_trainable(self.lora)
        return model

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self._overlaps.clear()
        loss = answer_loss(model, batch)
        overlap = torch.stack(self._overlaps).sum()  # now: activation checkpointing will pass once more
        targets = (batch.labels != -100).sum()  # by all of which the engine divides
        return loss + self.config.orthogonality * targets * overlap

    def answering(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        return nullcontext()
