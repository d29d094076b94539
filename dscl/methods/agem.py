"""A-GEM: no gradient may point to where samples of ended tasks fare worse (Chaudhry et al., 2019).

What trains: all weights, or one LoRA for all tasks. What is kept: samples, as in `replay`. Before every step the
gradient r of a batch of them is looked at; the step's own gradient g becomes

    g - (g · r) / (r · r) r      where g · r < 0

over all trained tensors at once. Learning sees the kept samples in no other way. What AdamW makes of that gradient,
with its moments, may still point there a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dscl.config.methods import AgemConfig
from dscl.data.replay_buffer import Kept
from dscl.engine.gradient_hooks import Held
from dscl.methods.base import Facts
from dscl.methods.replay import Replay


class Agem(Replay):
    Config = AgemConfig
    kinds: tuple[str, ...] = ()
    at_once = True

    def __init__(self, config: AgemConfig, facts: Facts) -> None:
        super().__init__(config, facts)
        self._reference: dict[str, torch.Tensor] | None = None  # r, stretch by stretch

    def mixes(self, ended: Sequence[int]) -> list[int]:
        return []

    def mixed_in(self) -> list[Kept]:
        return []

    def reviews(self) -> list[Kept]:
        return super().mixed_in()

    def reviewed(self, stretches: Sequence[Held]) -> None:
        self._reference = {stretch.name: stretch.gradient.clone() for stretch in stretches}

    def steering(self) -> Agem:
        return self

    def steer(self, stretches: Sequence[Held], sum_: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._reference is None:  # the first task; or its loss overflowed in fp16, on all ranks alike
            return
        pairs = [(stretch.gradient, self._reference[stretch.name]) for stretch in stretches]
        dots = torch.zeros(2, dtype=torch.float64, device=pairs[0][0].device if pairs else "cpu")
        for gradient, reference in pairs:
            dots += torch.stack(
                [(gradient * reference).sum(dtype=dots.dtype), reference.square().sum(dtype=dots.dtype)]
            )
        along, size = sum_(dots)
        against = along.clamp(max=0.0) / size.clamp_min(torch.finfo(size.dtype).tiny)
        for gradient, reference in pairs:
            gradient.sub_(reference * against.to(reference))
        self._reference = None
