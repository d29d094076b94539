"""Throughput: what steps spend their time on, how much of the device they use, and which rank slows the others down.

Every rank measures for itself; one sum over all ranks joins the measurements, so the results are the same on each.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dscl.data.batches import StepPlan
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.model.flops import count_flops
from dscl.utils import hardware, timers

SLOW_FACTOR = 1.25  # a rank is slow if it takes this many times as long as the others ...
SLOW_MIN_SHARE = 0.05  # ... and the difference is at least this share of the step's time
MAX_DATA_SHARE = 0.1  # the share of a step's time that making its batches may take
CONSECUTIVE_REPORTS = 3  # a problem is reported once it was seen this many times in a row
MEMORY = ("allocated", "reserved", "peak", "host")


def is_measured_metric(name: str) -> bool:
    """Whether this number of a record is a measurement, which differs from run to run; all others are reproducible."""
    return (
        name.endswith("seconds")
        or name.startswith(("tokens_per_s", "tflops", "mfu", "padding", "memory_", "peak_memory", "step_spread"))
        or name.removesuffix("_bytes") in timers.COLLECTIVES
    )


class Throughput:
    """Measures one task's steps. `print_message` gets a line for the user, once for every persistent problem."""

    def __init__(
        self, engine: Engine, task: str, peak_flops: float | None, print_message: Callable[[str], None]
    ) -> None:
        self._task, self._print_message = task, print_message
        self._flop_count = count_flops(engine.module)
        self._peak_flops = hardware.peak_flops(engine.device, engine.dtype) if peak_flops is None else peak_flops
        self._hosts = comm.all_gather_objects(socket.gethostname())
        self._repeats: dict[int | str, int] = {}  # by slow rank, or "data": how often in a row it was seen
        timers.collect_timings()  # drop what was measured before this task

    def measure_rank(self, padded_tokens: int) -> torch.Tensor:
        """This rank's measurements since the last call, as [ranks, measurements]: zero in the rows of other ranks.

        Summing over ranks gives everybody's. `padded_tokens`: tokens of this rank's batches, padding included.
        """
        timings = timers.collect_timings()
        memory = comm.memory_in_use()
        row = [*timings.seconds.values(), *timings.bytes_sent.values(), *timings.wait_seconds.values()]
        row += [*(memory.get(name, 0.0) for name in MEMORY), float(padded_tokens)]
        measurements = torch.zeros(comm.world_size(), len(row), dtype=torch.float64)
        measurements[comm.rank()] = torch.tensor(row, dtype=torch.float64)
        return measurements

    def summarize(
        self, measurements: torch.Tensor, elapsed: float, plans: Sequence[StepPlan], reference_plans: Sequence[StepPlan]
    ) -> dict[str, Any]:
        """The numbers that the records of these steps share; reports slow ranks and slow data.

        `measurements`: [ranks, measurements], summed over ranks. `elapsed`: seconds that the steps took together.
        """
        num_steps, world_size = len(plans), comm.world_size()
        kinds = len(timers.COLLECTIVES)
        seconds, sent, waited, memory, padded_tokens = measurements.split(
            [len(timers.PARTS), kinds, kinds, len(MEMORY), 1], dim=1
        )
        by_part = dict(zip(timers.PARTS, seconds.T.tolist(), strict=True))
        # The backward pass does not show which rank is slow: in it, the fast ranks wait for the others.
        own_seconds = [sum(parts) for parts in zip(by_part["data"], by_part["forward"], strict=True)]
        self._report_slowness(max(by_part["data"]), own_seconds, padded_tokens[:, 0].tolist(), elapsed)
        tokens = sum(plan.num_tokens for plan in plans)
        rate = tokens / elapsed
        numbers = {"tokens_per_s": rate, "tokens_per_s_per_device": rate / world_size, "seconds": elapsed / num_steps}
        if world_size > 1:
            numbers["step_spread"] = (max(own_seconds) - min(own_seconds)) / elapsed
        parts = zip(timers.PARTS, (seconds.mean(0) / num_steps).tolist(), strict=True)
        numbers |= {f"{part}_seconds": value for part, value in parts if value}
        for kind, size, wait in zip(timers.COLLECTIVES, sent.mean(0).tolist(), waited.mean(0).tolist(), strict=True):
            if size:
                numbers |= {f"{kind}_bytes": size / num_steps, f"{kind}_seconds": wait / num_steps}
        numbers |= {f"memory_{name}_bytes": v for name, v in zip(MEMORY, memory.amax(0).tolist(), strict=True) if v}
        all_tokens = tokens + sum(plan.num_tokens for plan in reference_plans)
        numbers["padding"] = 1 - all_tokens / float(padded_tokens.sum())
        if self._flop_count is not None:
            passes = [*plans, *reference_plans]
            flops = sum(
                self._flop_count.total_flops(plan.num_tokens, plan.attention_pairs, plan.num_targets) for plan in passes
            )
            recomputed = sum(self._flop_count.recompute_flops(plan.num_tokens, plan.attention_pairs) for plan in passes)
            numbers["tflops_per_device"] = flops / (elapsed * world_size) / 1e12
            if recomputed:
                numbers["tflops_with_recomputation"] = (flops + recomputed) / (elapsed * world_size) / 1e12
            if self._peak_flops is not None:
                numbers["mfu"] = flops / (elapsed * world_size) / self._peak_flops
        return numbers

    def _report_slowness(
        self, data_seconds: float, own_seconds: Sequence[float], padded_tokens: Sequence[float], elapsed: float
    ) -> None:
        """Report making batches that takes too long, and ranks that the others wait for.

        `data_seconds`: of the slowest rank. `own_seconds`: of each rank, for making batches and forward passes.
        """
        if self._is_persistent("data", data_seconds > MAX_DATA_SHARE * elapsed):
            self._print_message(
                f"task {self._task}: making batches takes {data_seconds / elapsed:.0%} of the time, in which the "
                "device waits; give every rank more CPU cores, or train larger batches"
            )
        if len(own_seconds) == 1:
            return
        for rank, (seconds, tokens) in enumerate(zip(own_seconds, padded_tokens, strict=True)):
            median_seconds, median_tokens = (
                statistics.median([*values[:rank], *values[rank + 1 :]]) for values in (own_seconds, padded_tokens)
            )
            expected = median_seconds * max(1.0, tokens / median_tokens)  # more tokens explain more time
            if self._is_persistent(
                rank, seconds > SLOW_FACTOR * expected and seconds - expected > SLOW_MIN_SHARE * elapsed
            ):
                self._print_message(
                    f"task {self._task}: rank {rank} on {self._hosts[rank]} is slow: its batches and forward passes "
                    f"take {seconds / expected:.1f} times as long as the others', who wait for it; look at that machine"
                )

    def _is_persistent(self, problem: int | str, seen: bool) -> bool:
        """Whether the problem has now been seen `CONSECUTIVE_REPORTS` times in a row; True once, then never again."""
        count = self._repeats.get(problem, 0)
        self._repeats[problem] = count + 1 if seen else (0 if count < CONSECUTIVE_REPORTS else count)
        return seen and self._repeats[problem] == CONSECUTIVE_REPORTS
