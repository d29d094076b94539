"""Sequential fine-tuning: one task after another, nothing kept. The baseline, and the template for a method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dscl.config import key
from dscl.errors import UserError
from dscl.methods.base import Method
from dscl.model.surgery import LoraConfig, add_lora


@dataclass(frozen=True)
class SequentialConfig:
    name: str = key("sequential")
    tune: str = key("full", choices=("full", "lora"), help="all weights, or one LoRA shared by all tasks")
    lora: LoraConfig | None = key(None, help="the LoRA's settings, with tune: lora")

    def __post_init__(self) -> None:
        if self.tune == "full" and self.lora is not None:
            raise UserError("method.lora: given together with tune: full; set method.tune=lora or remove method.lora")


class Sequential(Method):
    Config = SequentialConfig
    config: SequentialConfig

    def prepare(self, model: nn.Module) -> nn.Module:
        if self.config.tune == "lora":
            return add_lora(model, self.config.lora or LoraConfig(), self.facts.seed)
        return model.requires_grad_(True)
