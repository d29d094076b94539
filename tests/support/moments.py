"""Second moments of layer inputs, computed with plain hooks and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from dscl.model.adapters.injection import LLAMA_PROJECTIONS, match_target_layers
from tests.support.toy_model import Toy, summed_loss, toy_model


@contextmanager
def record_layer_calls(module: Any) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield the input and the output of each constrained layer in the last forward pass, by layer name."""
    layer_calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with ExitStack() as stack:
        for name in match_target_layers(module, LLAMA_PROJECTIONS):

            def hook(_: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
                layer_calls[name] = inputs[0], output

            stack.callback(module.get_submodule(name).register_forward_hook(hook).remove)
        yield layer_calls


def second_moment(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows = inputs.detach().double().flatten(0, 1)
    return torch.einsum("t,ti,tj->ij", weights.double().flatten(), rows, rows)


def gradient_weighted_moments(toys: list[Toy]) -> dict[str, torch.Tensor]:
    """Σ |∂loss/∂y|² xxᵀ over the inputs x and outputs y of every constrained layer, by autograd."""
    module, sums = toy_model(), dict[str, torch.Tensor]()
    for toy in toys:
        with record_layer_calls(module) as layer_calls:
            loss = summed_loss(module, toy)
        gradients = torch.autograd.grad(loss, [output for _, output in layer_calls.values()])
        for (layer, (inputs, _)), gradient in zip(layer_calls.items(), gradients, strict=True):
            moment = second_moment(inputs, gradient.double().square().sum(-1))
            sums[layer] = sums[layer] + moment if layer in sums else moment
    return sums
