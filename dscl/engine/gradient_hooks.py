"""The interface through which a method reads gradients, and changes them before an optimizer step.

A rank sees the shards of the trained tensors whose fp32 masters it holds, at every ZeRO stage. A method may keep extra
tensors of the same length beside each shard; checkpoints include them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class LocalShard(Protocol):
    """This rank's shard of a trained tensor, as flat views: writing into a view changes the trained tensor."""

    @property
    def name(self) -> str: ...
    @property
    def master(self) -> torch.Tensor: ...
    @property
    def gradient(self) -> torch.Tensor:
        """The gradient that the optimizer is about to use. Available only inside `modify_gradients` and inside a
        `GradientCallback`."""
        ...

    @property
    def extra_state(self) -> dict[str, torch.Tensor]:
        """The method's extra tensors for this shard, by name; zero at first."""
        ...


GradientCallback = Callable[[Sequence[LocalShard]], None]  # receives shards that have a gradient


class GradientHook(Protocol):
    """Changes gradients in place, after clipping and before AdamW's step."""

    extra_state_names: tuple[str, ...]  # one fp32 tensor of each name is kept beside every shard
    needs_all_shards: bool  # whether one call must receive all shards of a step

    def modify_gradients(
        self, shards: Sequence[LocalShard], all_reduce_sum: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Change `shard.gradient` of each shard in place.

        `all_reduce_sum` adds up per-shard results over the ranks, so that the sum covers whole tensors. All ranks must
        call it equally often.
        """
