"""Sequential fine-tuning: one task after another, without any measure against forgetting. The simplest method."""

from __future__ import annotations

from torch import nn

from dscl.config.methods import LoraConfig, SequentialConfig
from dscl.methods.base import Method
from dscl.model.adapters.injection import inject_lora


class Sequential(Method):
    """Sequential fine-tuning of all weights or of one LoRA."""

    Config = SequentialConfig
    config: SequentialConfig

    def prepare(self, model: nn.Module) -> nn.Module:
        if self.config.tune == "lora":
            return inject_lora(model, self.config.lora or LoraConfig(), self.run_info.seed)
        return model.requires_grad_(True)
