"""Changes to a backbone: freeze it, and put one plain LoRA into it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import nn

from dscl.config import key
from dscl.errors import UserError
from dscl.model.weights import draw_normal

LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = key(8, at_least=1, help="rank of the adapters")
    alpha: float = key(16.0, above=0.0, help="the adapter's output is scaled by alpha / rank")
    dropout: float = key(0.0, at_least=0.0, at_most=0.99, help="dropout on the adapters' input")
    targets: tuple[str, ...] = key(LLAMA_PROJECTIONS, help="names (or endings of names) of the layers that get one")


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """Freeze the model and give every target a trainable LoRA: A drawn from the seed by name, B zero."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in config.targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(
                f"method.lora.targets: given {target!r}, which no layer matches; layers here: {', '.join(endings)}"
            )
    peft = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # hinted as a whole number; any serves
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    model = inject_adapter_in_model(peft, model)  # which freezes the rest, and starts with B zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # the spread of PEFT's own initialisation: uniform on ±1/√d has this deviation
                deviation = 1.0 / math.sqrt(3 * parameter.shape[1])
                parameter.copy_(draw_normal(seed, name, 0, parameter.numel(), deviation).view_as(parameter))
    return model
