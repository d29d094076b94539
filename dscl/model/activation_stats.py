"""What a model's linear layers are given: second moments of their inputs, and how much each decoder layer changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dscl.maths.subspace import cosines


class Moments:
    """Sums of w·xxᵀ over the inputs x of linear layers: fp32 within a pass, fp64 over them, whose order is not seen.

    A token's weight is 1 if its input counts, or, `felt`, how much the loss feels the layer's output there: the squared
    norm of its gradient. Not felt, layers that are given the very same tensor (q, k and v; gate and up) share a sum.
    """

    def __init__(self, felt: bool) -> None:
        self.felt = felt
        self.sums: dict[str, torch.Tensor] = {}
        self.site: dict[str, str] = {}  # whose sum is a layer's
        self.counted = torch.empty(0)  # [rows, length] of the present pass: which tokens count
        self._last: tuple[torch.Tensor, str] | None = None

    @contextmanager
    def gathering(self, model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
        """Within, every pass (with `felt`, forward and back) adds to the sums of these layers."""
        modules = dict(model.named_modules())
        hook = self._feel if self.felt else self._see
        hooks = [modules[name].register_forward_hook(hook(name)) for name in layers]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
            self._last = None

    def of(self, layer: str) -> torch.Tensor | None:
        return self.sums[self.site[layer]] if layer in self.site else None

    def _see(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if self._last is None or inputs[0] is not self._last[0]:
                self._last = inputs[0], name
                self._add(name, inputs[0], self.counted)
            self.site[name] = self._last[1]

        return hook

    def _feel(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            given = inputs[0].detach()
            output.register_hook(lambda gradient: self._add(name, given, gradient.double().square().sum(-1)))

        self.site[name] = name
        return hook

    def _add(self, name: str, given: torch.Tensor, weights: torch.Tensor) -> None:
        rows = given.detach().flatten(0, 1).float() * weights.flatten().sqrt().float()[:, None]
        part = (rows.T @ rows).double()
        self.sums[name] = self.sums[name].add_(part) if name in self.sums else part


class Changes:
    """The paper's importance, of decoder layers: the mean cosine between what goes into a layer and what comes out."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.sums = torch.zeros(layers + 1, dtype=torch.float64, device=device)  # the last: how many tokens
        self.counted = torch.empty(0)

    @contextmanager
    def gathering(self, layers: nn.ModuleList) -> Iterator[None]:
        hooks = [layer.register_forward_hook(self._hook(index)) for index, layer in enumerate(layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            counted = self.counted.flatten() > 0
            after = output[0] if isinstance(output, tuple) else output
            before, after = (x.detach().flatten(0, 1)[counted] for x in (inputs[0], after))
            self.sums[index] += cosines(before, after)
            if index == 0:
                self.sums[-1] += counted.sum()

        return hook

    def means(self) -> torch.Tensor:
        return self.sums[:-1] / self.sums[-1].clamp_min(1)
