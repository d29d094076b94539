"""The pace of training: what steps spend their time on, how much of the device they use, and who holds the others up.

Every rank has its numbers since the last time, which meet in one sum; what comes out is the same on every rank.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dscl.data.batches import Step
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.model.flops import cost_of
from dscl.utils import hardware, timers

SLOW, WORTH = 1.25, 0.05  # a rank that takes so much longer than the others, if that is such a share of the step
LATE_DATA = 0.1  # the share of a step's time that making its batches may take before it is told
IN_A_ROW = 3  # times: a single one may mean anything
MEMORY = ("allocated", "reserved", "peak", "host")


def measured(name: str) -> bool:
    """Whether a record's number of that name was measured, and so differs from run to run; all others do not."""
    return (
        name.endswith("seconds")
        or name.startswith(("tokens_per_s", "tflops", "mfu", "padding", "memory_", "peak_memory", "step_spread"))
        or name.removesuffix("_bytes") in timers.KINDS
    )


class Pace:
    """Of one task. `say` gets a line for the user, once for each thing that is odd."""

    def __init__(self, engine: Engine, task: str, peak: float | None, say: Callable[[str], None]) -> None:
        self._task, self._say = task, say
        self._cost = cost_of(engine.module)
        self._peak = hardware.peak(engine.device, engine.dtype) if peak is None else peak
        self._hosts = comm.gather(socket.gethostname())
        self._odd: dict[int | str, int] = {}  # how often in a row a rank was slow, or the data late
        timers.taken()  # what was before does not belong to this task

    def mine(self, computed: int) -> torch.Tensor:
        """This rank's numbers, in a row of its own among the others', to be added up. `computed`: with padding."""
        taken = timers.taken()
        memory = comm.memory()
        own = [*taken.seconds.values(), *taken.sent.values(), *taken.waited.values()]
        own += [*(memory.get(name, 0.0) for name in MEMORY), float(computed)]
        ranks = torch.zeros(comm.world(), len(own), dtype=torch.float64)
        ranks[comm.rank()] = torch.tensor(own, dtype=torch.float64)
        return ranks

    def numbers(
        self, ranks: torch.Tensor, elapsed: float, plans: Sequence[Step], reviewed: Sequence[Step]
    ) -> dict[str, Any]:
        """What goes into the records of these steps, which took so many seconds; `reviewed`: passes beside them."""
        steps, world = len(plans), comm.world()
        kinds = len(timers.KINDS)
        seconds, sent, waited, memory, computed = ranks.split([len(timers.PARTS), kinds, kinds, len(MEMORY), 1], dim=1)
        by_part = dict(zip(timers.PARTS, seconds.T.tolist(), strict=True))
        # Not the backward pass, in which those that are done wait for the others.
        own = [sum(both) for both in zip(by_part["data"], by_part["forward"], strict=True)]
        self._compare(max(by_part["data"]), own, computed[:, 0].tolist(), elapsed)
        tokens = sum(plan.tokens for plan in plans)
        rate = tokens / elapsed
        found = {"tokens_per_s": rate, "tokens_per_s_per_device": rate / world, "seconds": elapsed / steps}
        if world > 1:
            found["step_spread"] = (max(own) - min(own)) / elapsed
        parts = zip(timers.PARTS, (seconds.mean(0) / steps).tolist(), strict=True)
        found |= {f"{part}_seconds": value for part, value in parts if value}
        for kind, amount, wait in zip(timers.KINDS, sent.mean(0).tolist(), waited.mean(0).tolist(), strict=True):
            if amount:
                found |= {f"{kind}_bytes": amount / steps, f"{kind}_seconds": wait / steps}
        found |= {f"memory_{name}_bytes": v for name, v in zip(MEMORY, memory.amax(0).tolist(), strict=True) if v}
        found["padding"] = 1 - (tokens + sum(plan.tokens for plan in reviewed)) / float(computed.sum())
        if self._cost is not None:
            passed = [*plans, *reviewed]
            useful = sum(self._cost.of(plan.tokens, plan.pairs, plan.targets) for plan in passed)
            again = sum(self._cost.again(plan.tokens, plan.pairs) for plan in passed)
            found["tflops_per_device"] = useful / (elapsed * world) / 1e12
            if again:
                found["tflops_with_recomputation"] = (useful + again) / (elapsed * world) / 1e12
            if self._peak is not None:
                found["mfu"] = useful / (elapsed * world) / self._peak
        return found

    def _compare(self, late: float, own: Sequence[float], computed: Sequence[float], elapsed: float) -> None:
        """Tell of a rank that the others wait for, and of batches that the device waits for.

        `late`: seconds for batches, at most; `own`: each rank's for batches and forward passes.
        """
        if self._again("data", late > LATE_DATA * elapsed):
            self._say(
                f"task {self._task}: making batches takes {late / elapsed:.0%} of the time, in which the device waits; "
                "give every rank more CPU cores, or train larger batches"
            )
        if len(own) == 1:
            return
        for rank, (took, had) in enumerate(zip(own, computed, strict=True)):
            usual, many = (statistics.median([*all_[:rank], *all_[rank + 1 :]]) for all_ in (own, computed))
            fair = usual * max(1.0, had / many)  # what its tokens explain
            if self._again(rank, took > SLOW * fair and took - fair > WORTH * elapsed):
                self._say(
                    f"task {self._task}: rank {rank} on {self._hosts[rank]} is slow: its batches and forward passes "
                    f"take {took / fair:.1f} times as long as the others', who wait for it; look at that machine"
                )

    def _again(self, what: int | str, odd: bool) -> bool:
        """Whether it has just become odd for long enough to be told; it is told once."""
        count = self._odd.get(what, 0)
        self._odd[what] = count + 1 if odd else (0 if count < IN_A_ROW else count)
        return odd and self._odd[what] == IN_A_ROW
