"""Learning-rate schedules: the learning rate as a function of the step."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(step: int, steps: int, *, peak: float, kind: str, warmup: float) -> float:
    """The learning rate of step `step` of `steps`, counted from 0: linear warmup, then the decay `kind`.

    `warmup` is the fraction of all steps. The rate is never zero: the first warmup step has 1 / (warmup steps) of the
    peak, and the decay would reach zero one step after the last.
    """
    assert kind in SCHEDULES
    warmup_steps = math.ceil(warmup * steps - 1e-9)  # 0.07 * 100 is slightly more than 7
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if kind == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    if kind == "linear":
        return peak * (1.0 - progress)
    return peak
