"""What a model's linear layers are given: second moments of their inputs, and how much each decoder layer changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dscl.maths.subspace import cosines


class Moments:
    """Sums of w·xxᵀ over the inputs x of linear layers, in fp64, so that the order of the sums is not seen in them.

    Layers that are given the very same tensor (q, k and v; gate and up) share one sum: `site` says whose it is.
    """

    def __init__(self) -> None:
        self.site: dict[str, str] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self.weights = torch.empty(0)  # of the tokens of the present pass, [rows, length]
        self._last: tuple[torch.Tensor, str] | None = None

    @contextmanager
    def gathering(self, model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
        """Within, every pass adds to the sums of these layers."""
        modules = dict(model.named_modules())
        hooks = [modules[name].register_forward_pre_hook(self._hook(name)) for name in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._last = None

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            given = inputs[0]
            if self._last is not None and given is self._last[0]:
                self.site[name] = self._last[1]
                return
            self._last = given, name
            self.site[name] = name
            rows = given.detach().flatten(0, 1).double()
            part = rows.T @ (rows * self.weights.flatten()[:, None])
            self.sums[name] = self.sums[name] + part if name in self.sums else part

        return hook


class Changes:
    """The paper's importance, of decoder layers: the mean cosine between what goes into a layer and what comes out."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.sums = torch.zeros(layers + 1, dtype=torch.float64, device=device)  # the last: how many tokens
        self.weights = torch.empty(0)

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
            counted = self.weights.flatten() > 0
            after = output[0] if isinstance(output, tuple) else output
            before, after = (x.detach().flatten(0, 1)[counted] for x in (inputs[0], after))
            self.sums[index] += cosines(before, after)
            if index == 0:
                self.sums[-1] += counted.sum()

        return hook

    def means(self) -> torch.Tensor:
        return self.sums[:-1] / self.sums[-1].clamp_min(1)
