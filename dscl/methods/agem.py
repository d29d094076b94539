"""A-GEM: gradients are projected so that the loss on stored samples does not increase (Chaudhry et al., 2019).

What trains: all weights, or one LoRA for all tasks. What is kept: samples of ended tasks, as in `replay`; they are not
trained on. Before every step, the gradient r of a batch of stored samples is computed. If g · r < 0, the step's own
gradient g is replaced, over all trained tensors at once, by

    g - (g · r) / (r · r) r

The step itself may still increase the stored samples' loss a little, because AdamW applies its moments afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from dscl.config.methods import AgemPreset
from dscl.data.replay_buffer import ReplayBuffer
from dscl.engine.gradient_hooks import LocalShard
from dscl.methods.base import RunInfo
from dscl.methods.replay import Replay


class Agem(Replay):
    """A-GEM. The method object itself is the engine's `GradientHook`."""

    Config: ClassVar[type] = AgemPreset
    size_key = "method.constraint.memory_size"
    extra_state_names: tuple[str, ...] = ()
    needs_all_shards = True

    def __init__(self, config: AgemPreset, run_info: RunInfo) -> None:
        self.constraint_config = config.constraint
        super().__init__(config, run_info)  # type: ignore[arg-type]  # its limits come from `buffer_limits`
        self._reference_gradients: dict[str, torch.Tensor] | None = None  # r, by shard

    def buffer_limits(self) -> tuple[float | None, int | None]:
        return self.constraint_config.memory_ratio, self.constraint_config.memory_size

    def replay_counts(self, task_sizes: Sequence[int]) -> list[int]:
        return []

    def replay_samples(self) -> list[ReplayBuffer]:
        return []

    def reference_samples(self) -> list[ReplayBuffer]:
        return super().replay_samples()

    def on_reference_gradients(self, shards: Sequence[LocalShard]) -> None:
        self._reference_gradients = {shard.name: shard.gradient.clone() for shard in shards}

    def gradient_hook(self) -> Agem:
        return self

    def modify_gradients(
        self, shards: Sequence[LocalShard], all_reduce_sum: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        if self._reference_gradients is None:  # in the first task, or if r overflowed in fp16; the same on all ranks
            return
        pairs = [(shard.gradient, self._reference_gradients[shard.name]) for shard in shards]
        dots = torch.zeros(2, dtype=torch.float64, device=pairs[0][0].device if pairs else "cpu")
        for gradient, reference in pairs:
            dots += torch.stack(
                [(gradient * reference).sum(dtype=dots.dtype), reference.square().sum(dtype=dots.dtype)]
            )
        dot_product, squared_norm = all_reduce_sum(dots)
        scale = dot_product.clamp(max=0.0) / squared_norm.clamp_min(torch.finfo(squared_norm.dtype).tiny)
        for gradient, reference in pairs:
            gradient.sub_(reference * scale.to(reference))
        self._reference_gradients = None
