"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(step: int, steps: int, *, peak: float, kind: str, warmup: float) -> float:
    """The rate of step `step` (from 0) of `steps`: a linear rise over the share `warmup`, then the decay `kind`.

    Never zero while there are steps to make: the first step of the rise has its first fraction, the last of the decay
    its last.
    """
    assert kind in SCHEDULES
    rise = math.ceil(warmup * steps - 1e-9)  # 0.07 * 100 is a little more than 7
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    if kind == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    if kind == "linear":
        return peak * (1.0 - done)
    return peak
