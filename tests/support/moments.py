"""Second moments of what layers are given, by plain hooks and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from dscl.model.adapters.injection import LLAMA_PROJECTIONS, match_target_layers
from tests.support.toy_model import Toy, model, summed_loss


@contextmanager
def watching(module: Any) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What every constrained layer is given and answers in the last pass, by plain hooks."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with ExitStack() as stack:
        for name in match_target_layers(module, LLAMA_PROJECTIONS):

            def hook(_: Any, given: Any, output: torch.Tensor, name: str = name) -> None:
                seen[name] = given[0], output

            stack.callback(module.get_submodule(name).register_forward_hook(hook).remove)
        yield seen


def second_moment(given: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    exact = given.detach().double().flatten(0, 1)
    return torch.einsum("t,ti,tj->ij", weights.double().flatten(), exact, exact)


def felt_moments(toys: list[Toy]) -> dict[str, torch.Tensor]:
    """Σ |∂loss/∂y|² xxᵀ over the inputs x and outputs y of every constrained layer, by autograd."""
    module, sums = model(), dict[str, torch.Tensor]()
    for toy in toys:
        with watching(module) as seen:
            loss = summed_loss(module, toy)
        gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
        for (layer, (given, _)), gradient in zip(seen.items(), gradients, strict=True):
            part = second_moment(given, gradient.double().square().sum(-1))
            sums[layer] = sums[layer] + part if layer in sums else part
    return sums
