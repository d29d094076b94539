"""Online EWC: parameters that matter for ended tasks are penalized for changing (Kirkpatrick et al., 2017; Schwarz et
al., 2018).

What trains: all weights, or one LoRA for all tasks. The penalty is added to the loss. Its gradient is computed element
by element on the fp32 masters:

    λ/2 Σ F (θ - θ*)²      F ← gamma F + F_task,  θ* ← θ   when a task ends

F_task is the diagonal of the empirical Fisher information: the mean squared gradient of single samples, with the
answers in the data (not answers sampled from the model). The samples of a group are summed with random signs; the
expected square of this gradient is the sum of the samples' squared gradients. So a group costs one pass, and the result
does not depend on how the group's samples are distributed over ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dscl.config.methods import EwcPreset
from dscl.data.batches import Batch
from dscl.engine.full_shape import full_shape
from dscl.engine.gradient_hooks import LocalShard
from dscl.methods.base import TaskContext, TaskSummary
from dscl.methods.sequential import Sequential
from dscl.model.lm_head import answer_logits

GROUP_SIZE = 8  # samples per group; larger groups cost less and give a noisier estimate


class Ewc(Sequential):
    """Online EWC. The method object itself is the engine's `GradientHook`."""

    Config = EwcPreset
    config: EwcPreset
    extra_state_names: tuple[str, ...] = ("fisher", "anchor")  # F and θ*
    needs_all_shards = False

    def gradient_hook(self) -> Ewc:
        return self

    def modify_gradients(
        self, shards: Sequence[LocalShard], all_reduce_sum: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        for shard in shards:
            change = shard.master - shard.extra_state["anchor"]
            shard.gradient.addcmul_(shard.extra_state["fisher"], change, value=self.config.constraint.ewc_lambda)

    def end_task(self, index: int, name: str, context: TaskContext) -> TaskSummary:
        groups = context.sample_groups(self.config.constraint.fisher_samples, GROUP_SIZE)
        lengths = torch.from_numpy(np.asarray(context.task_samples().answer_lengths))
        count = min(self.config.constraint.fisher_samples, len(lengths))
        signs = random_signs(len(lengths), self.run_info.seed, name)  # [samples]
        with torch.no_grad():
            for shard in context.local_shards():
                shard.extra_state["fisher"].mul_(self.config.constraint.gamma)

        def signed_batch_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            sample_ids = torch.tensor(batch.sample_ids, dtype=torch.int64)
            return signed_loss(model, batch, signs[sample_ids].repeat_interleave(lengths[sample_ids]))

        def add_squared_gradients(shards: Sequence[LocalShard]) -> None:
            for shard in shards:
                shard.extra_state["fisher"].addcmul_(shard.gradient, shard.gradient, value=1.0 / count)

        # Seeds dropout, so that the result does not depend on whether the run was resumed.
        torch.manual_seed(zlib.crc32(f"{self.run_info.seed} {name}".encode()))
        for done, batches in enumerate(groups, 1):
            context.compute_gradients(signed_batch_loss, batches, add_squared_gradients)
            context.report_progress("information", done, len(groups))
        with torch.no_grad():
            for shard in context.local_shards():
                shard.extra_state["anchor"].copy_(shard.master)
        num_trained = sum(full_shape(p).numel() for p in context.model.parameters() if p.requires_grad)
        return TaskSummary(metrics={"capacity_bytes": 8.0 * num_trained})


def random_signs(samples: int, seed: int, task: str) -> torch.Tensor:
    """A random +1 or -1 for each sample of a task."""
    bits = np.random.default_rng([seed, zlib.crc32(task.encode())]).integers(0, 2, samples)
    return torch.from_numpy(2.0 * bits - 1.0).float()


def signed_loss(model: nn.Module, batch: Batch, signs: torch.Tensor) -> torch.Tensor:
    """The sum of the target tokens' losses, each multiplied by its sign. `signs`: [target tokens], in batch order."""
    logits = answer_logits(model, batch)
    is_target = batch.labels != -100
    losses = functional.cross_entropy(logits[is_target], batch.labels[is_target], reduction="none")
    return (
        losses * signs.to(losses)
    ).sum() + 0.0 * logits.sum()  # the zero term gives a gradient also to ranks without targets
