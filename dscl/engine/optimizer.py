"""The optimizer: AdamW with calls around its step; and a rank's stretch of what it trains.

It knows no DeepSpeed, which shards its tensors and calls its step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """This rank's stretch of one trainable tensor: the fp32 master and the optimizer's moments, as flat views."""

    name: str
    shape: torch.Size
    start: int
    master: torch.Tensor
    moments: dict[str, torch.Tensor]
    holder: torch.Tensor  # the optimizer's own tensor, of which the master is a view
    kept: dict[str, torch.Tensor]  # what the method keeps beside it, of the same length

    @property
    def gradient(self) -> torch.Tensor:
        """Of this stretch, as the optimizer is about to use it."""
        assert self.holder.grad is not None
        at = self.master.storage_offset() - self.holder.storage_offset()
        return self.holder.grad.view(-1).narrow(0, at, self.master.numel())

    @property
    def stop(self) -> int:
        return self.start + self.master.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds of it, by kind."""
        return {"master": self.master, **self.moments, **self.kept}


def _nothing(tensors: Sequence[torch.Tensor]) -> None:
    pass


class HookedAdamW(torch.optim.AdamW):
    """AdamW whose step can be left out (ZeRO then clears the gradients and nothing else changes), and with calls
    before and after it, or instead of it: on the fp32 masters and their gradients, before ZeRO casts and gathers what
    came out."""

    skip = False
    instead: Callable[[Sequence[torch.Tensor]], None] | None = None
    before: Callable[[Sequence[torch.Tensor]], None] = staticmethod(_nothing)
    after: Callable[[Sequence[torch.Tensor]], None] = staticmethod(_nothing)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        stepped = [tensor for group in self.param_groups for tensor in group["params"]]
        if self.instead is not None:
            self.instead(stepped)
            return None
        if self.skip:
            return None
        self.before(stepped)
        result = super().step(closure)
        self.after(stepped)
        return result
