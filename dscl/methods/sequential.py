"""Fine-tuning without any measure against forgetting, sequential or joint.

Sequential fine-tuning, one task after another, is the simplest method. Joint training on all tasks at once is the upper
bound that continual-learning methods are compared with.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from dscl.config.methods import JointPreset, SequentialPreset
from dscl.config.parts import LoraConfig
from dscl.methods.base import Method
from dscl.model.adapters.injection import inject_lora


class Sequential(Method):
    """Sequential fine-tuning of all weights or of one LoRA."""

    Config: ClassVar[type] = SequentialPreset
    config: SequentialPreset

    def prepare(self, model: nn.Module) -> nn.Module:
        if isinstance(self.config.tune, LoraConfig):
            return inject_lora(model, self.config.tune, self.run_info.seed)
        return model.requires_grad_(True)


class Joint(Sequential):
    """Joint training on all tasks at once."""

    Config = JointPreset
    joint = True
