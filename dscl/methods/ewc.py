"""EWC, online: what mattered for ended tasks is held by a spring (Kirkpatrick et al., 2017; Schwarz et al., 2018).

What trains: all weights, or one LoRA for all tasks. What may change how much is said by a penalty that is added to the
loss, whose gradient is made element by element, where the fp32 masters are:

    λ/2 Σ F (θ - θ*)²      F ← μ F + F_task,  θ* ← θ   when a task ends

F_task is the empirical Fisher information's diagonal: the mean, over samples of the task with the answers that they
have there (not with such as the model would give), of each one's squared gradient. The
gradient of a group whose samples are summed with signs of chance has that as its expected square, so that a group costs
one pass and it does not matter how its samples are shared out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dscl.config.methods import EwcConfig
from dscl.data.batches import Batch
from dscl.engine.gradient_hooks import Held
from dscl.methods.base import Ended, Ranks
from dscl.methods.sequential import Sequential
from dscl.model.lm_head import answer_logits

GROUP = 8  # samples whose gradients are summed before they are squared: with more, chance has a greater part in it


class Ewc(Sequential):
    Config = EwcConfig
    config: EwcConfig
    kinds: tuple[str, ...] = ("fisher", "anchor")  # F and θ*
    at_once = False

    def steering(self) -> Ewc:
        return self

    def steer(self, stretches: Sequence[Held], sum_: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for stretch in stretches:
            moved = stretch.master - stretch.kept["anchor"]
            stretch.gradient.addcmul_(stretch.kept["fisher"], moved, value=self.config.strength)

    def end_task(self, index: int, name: str, ranks: Ranks) -> Ended:
        groups = ranks.groups(self.config.samples, GROUP)
        lengths = torch.from_numpy(np.asarray(ranks.samples().answer_lengths))
        count = min(self.config.samples, len(lengths))
        signs = chances(len(lengths), self.facts.seed, name)
        with torch.no_grad():
            for stretch in ranks.stretches():
                stretch.kept["fisher"].mul_(self.config.memory)

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            own = torch.tensor(batch.samples, dtype=torch.int64)
            return signed_loss(model, batch, signs[own].repeat_interleave(lengths[own]))

        def add(stretches: Sequence[Held]) -> None:
            for stretch in stretches:
                stretch.kept["fisher"].addcmul_(stretch.gradient, stretch.gradient, value=1.0 / count)

        torch.manual_seed(zlib.crc32(f"{self.facts.seed} {name}".encode()))  # dropout's, whenever the run was started
        for done, batches in enumerate(groups, 1):
            ranks.sense(loss, batches, add)
            ranks.said("information", done, len(groups))
        with torch.no_grad():
            for stretch in ranks.stretches():
                stretch.kept["anchor"].copy_(stretch.master)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in ranks.module.parameters() if p.requires_grad)
        return Ended(numbers={"capacity_bytes": 8.0 * trained})


def chances(samples: int, seed: int, task: str) -> torch.Tensor:
    """+1 or -1 for each sample."""
    drawn = np.random.default_rng([seed, zlib.crc32(task.encode())]).integers(0, 2, samples)
    return torch.from_numpy(2.0 * drawn - 1.0).float()


def signed_loss(model: nn.Module, batch: Batch, signs: torch.Tensor) -> torch.Tensor:
    """The sum of the samples' losses, each with a sign: `signs` has one for every target, sample by sample."""
    logits = answer_logits(model, batch)
    wanted = batch.labels != -100
    losses = functional.cross_entropy(logits[wanted], batch.labels[wanted], reduction="none")
    return (losses * signs.to(losses)).sum() + 0.0 * logits.sum()  # a gradient on every rank, also without targets
