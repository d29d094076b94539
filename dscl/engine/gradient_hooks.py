"""What a method may do with gradients: look at those of some samples, and change each step's, stretch by stretch.

Every rank sees the stretches of the trained tensors whose fp32 masters it holds, whatever the stage, and may keep more
tensors of their length beside them, which checkpoints carry along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Held(Protocol):
    """A stretch of a trained tensor that this rank holds, as flat views: writing into them changes what is held."""

    @property
    def name(self) -> str: ...
    @property
    def master(self) -> torch.Tensor: ...
    @property
    def gradient(self) -> torch.Tensor:
        """As the optimizer is about to use it; there only in `steer`, and where a gradient is shown."""
        ...

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """What the method keeps beside it, by kind; zero at first."""
        ...


Shown = Callable[[Sequence[Held]], None]  # is shown stretches with a gradient


class Steering(Protocol):
    """Changes gradients in place, after they were clipped and before AdamW makes a step of them."""

    kinds: tuple[str, ...]  # of what is kept beside every trained tensor, in fp32
    at_once: bool  # whether a step's stretches have to be seen together

    def steer(self, stretches: Sequence[Held], sum_: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`sum_` adds up what the ranks find in their stretches, so that the sum is over whole tensors; all call it."""
