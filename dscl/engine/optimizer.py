"""AdamW with hooks around its step, and a rank's shard of a trained tensor.

Nothing here depends on DeepSpeed, which shards the optimizer's tensors and calls its step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParamShard:
    """This rank's shard of one trainable tensor: the fp32 master and the optimizer's moments, as flat views."""

    name: str
    shape: torch.Size  # of the whole tensor
    start: int  # of this shard, in the flattened tensor
    master: torch.Tensor
    moments: dict[str, torch.Tensor]
    optimizer_tensor: torch.Tensor  # the tensor in the optimizer's param_groups; `master` is a view of it
    extra_state: dict[str, torch.Tensor] = field(default_factory=dict)  # the method's tensors, of the same length

    @property
    def gradient(self) -> torch.Tensor:
        """The shard's gradient that the optimizer is about to use."""
        assert self.optimizer_tensor.grad is not None
        offset = self.master.storage_offset() - self.optimizer_tensor.storage_offset()
        return self.optimizer_tensor.grad.view(-1).narrow(0, offset, self.master.numel())

    @property
    def stop(self) -> int:
        """The end of this shard in the flattened tensor."""
        return self.start + self.master.numel()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that a checkpoint stores for this shard, by kind."""
        return {"master": self.master, **self.moments, **self.extra_state}


def _do_nothing(tensors: Sequence[torch.Tensor]) -> None:
    pass


class HookedAdamW(torch.optim.AdamW):
    """AdamW whose step can be skipped, replaced, or surrounded by hooks.

    The hooks see the fp32 masters and their gradients, before ZeRO casts the result and gathers it. When a step is
    skipped, ZeRO clears the gradients and nothing else changes.
    """

    skip_step = False
    step_override: Callable[[Sequence[torch.Tensor]], None] | None = None
    before_step: Callable[[Sequence[torch.Tensor]], None] = staticmethod(_do_nothing)
    after_step: Callable[[Sequence[torch.Tensor]], None] = staticmethod(_do_nothing)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        step_tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if self.step_override is not None:
            self.step_override(step_tensors)
            return None
        if self.skip_step:
            return None
        self.before_step(step_tensors)
        result = super().step(closure)
        self.after_step(step_tensors)
        return result
