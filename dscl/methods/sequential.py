"""Sequential fine-tuning: one task after another, nothing kept. The baseline, and the template for a method."""

from __future__ import annotations

from torch import nn

from dscl.config.methods import LoraConfig, SequentialConfig
from dscl.methods.base import Method
from dscl.model.adapters.injection import add_lora


class Sequential(Method):
    Config = SequentialConfig
    config: SequentialConfig

    def prepare(self, model: nn.Module) -> nn.Module:
        if self.config.tune == "lora":
            return add_lora(model, self.config.lora or LoraConfig(), self.facts.seed)
        return model.requires_grad_(True)
