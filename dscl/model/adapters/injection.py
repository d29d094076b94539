"""Changes to a backbone: freeze it, and put one plain LoRA into it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from dscl.config.methods import LLAMA_PROJECTIONS, LoraConfig
from dscl.model.weights import draw_normal
from dscl.utils.errors import UserError

__all__ = ["LLAMA_PROJECTIONS", "LoraConfig", "add_lora", "draw_a", "matching"]


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """Freeze the model and give every target a trainable LoRA: A drawn from the seed by name, B zero."""
    from peft import LoraConfig as PeftLoraConfig  # slow to import, and needless for every other choice of what trains
    from peft import inject_adapter_in_model

    matching(model, config.targets)
    peft = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # hinted as a whole number; any serves
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    model = inject_adapter_in_model(peft, model)  # which freezes the rest, and starts with B zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(draw_a(seed, name, parameter.shape, 0, parameter.numel()).view_as(parameter))
    return model


def draw_a(seed: int, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """Elements of a LoRA's first matrix, with the spread of PEFT's own: uniform on ±1/√d has this deviation."""
    return draw_normal(seed, name, start, stop, 1.0 / math.sqrt(3 * shape[1]))


def matching(model: nn.Module, targets: Iterable[str], setting: str = "method.lora.targets") -> list[str]:
    """The linear layers that the targets (names, or endings of names) mean, in the model's order."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for target in targets:
        meant = [name for name in linear if name == target or name.endswith("." + target)]
        if not meant:
            endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(f"{setting}: given {target!r}, which no layer matches; layers here: {', '.join(endings)}")
        chosen.update(meant)
    return [name for name in linear if name in chosen]
