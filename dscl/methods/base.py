"""What a method is: it decides what trains, computes a loss, and may keep something from task to task.

A method never calls backward, step, a collective or DeepSpeed, and it never logs. The trainer calls, in this order:
`prepare` once; then for every task `begin_task`, `loss` for every micro-batch, `end_task`. A run that is killed and
started again calls `prepare`, then `load_state` with what `state` gave when the checkpoint was written, and goes on in
the middle: `begin_task` is not called a second time for a task that had begun.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from dscl.data.batches import Batch


class Method(ABC):
    Config: ClassVar[type]  # a frozen dataclass whose first field is `name`; the recipe's `method:` is parsed into it

    def __init__(self, config: Any, seed: int) -> None:
        self.config = config
        self.seed = seed

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """Decide what trains (`requires_grad`), adding modules where needed. Called before the engine is built."""

    def begin_task(self, index: int, name: str) -> None:  # noqa: B027 - optional
        """A task starts. The optimizer has been reset; the weights are as the previous task left them."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum (not the mean) over the batch's target tokens; the engine divides by the global count."""
        return answer_loss(model, batch)

    def end_task(self, index: int, name: str) -> None:  # noqa: B027 - optional
        """The task's last step is done; the task has not been evaluated yet."""

    def state(self) -> dict[str, torch.Tensor]:
        """What must survive a restart besides the trainable tensors; the same on every rank."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        assert not state, f"{type(self).__name__} keeps no state, yet the checkpoint holds {sorted(state)}"


def answer_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over the answers' tokens; logits are made only in the columns where a target follows."""
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,  # with a cache, packed samples would see each other
        logits_to_keep=batch.keep,
    ).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )
