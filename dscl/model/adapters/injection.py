"""Changes to a backbone: freeze it, and inject one trainable LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from dscl.config.parts import LLAMA_PROJECTIONS, LoraConfig
from dscl.model.weights import draw_normal
from dscl.utils.errors import UserError

__all__ = ["LLAMA_PROJECTIONS", "LoraConfig", "inject_lora", "match_target_layers", "sample_lora_a"]


def inject_lora(model: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """Freeze the model and give every target layer a trainable LoRA: A random by seed and name, B zero."""
    from peft import LoraConfig as PeftLoraConfig  # slow to import
    from peft import inject_adapter_in_model

    match_target_layers(model, config.targets)
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # annotated as int; a float works
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    model = inject_adapter_in_model(peft_config, model)  # also freezes all other parameters, and sets B to zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(sample_lora_a(seed, name, parameter.shape, 0, parameter.numel()).view_as(parameter))
    return model


def sample_lora_a(seed: int, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a LoRA's flattened A [rank, d]: normal samples.

    The standard deviation is that of PEFT's initialisation, which is uniform on ±1/√d.
    """
    return draw_normal(seed, name, start, stop, 1.0 / math.sqrt(3 * shape[1]))


def match_target_layers(model: nn.Module, targets: Iterable[str], setting: str = "method.tune.targets") -> list[str]:
    """The linear layers that match the targets (names, or endings of names), in the model's order.

    Refuses a target that matches no layer; `setting` is the recipe key that the error names.
    """
    linear_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched: set[str] = set()
    for target in targets:
        target_matches = [name for name in linear_names if name == target or name.endswith("." + target)]
        if not target_matches:
            endings = sorted({name.rsplit(".", 1)[-1] for name in linear_names})
            raise UserError(f"{setting}: given {target!r}, which no layer matches; layers here: {', '.join(endings)}")
        matched.update(target_matches)
    return [name for name in linear_names if name in matched]
