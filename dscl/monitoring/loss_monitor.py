"""Monitoring of one task's training: losses must be finite, weights must change, and every step gets a record.

Losses stay on the device until `flush`, so that monitoring never synchronizes a GPU within a step.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from dscl.data.batches import StepPlan
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.monitoring.throughput import Throughput
from dscl.utils.errors import ExternalFailure

MOVEMENT_CHECK_STEPS = 10  # steps after which a trainable tensor must have changed
MAX_LISTED = 8  # tensor names or records in one message
SPIKE_WINDOW, SPIKE_MIN_STEPS = 100, 50  # a spike is judged by the last 100 losses, once there are 50
# A loss is a spike if it exceeds the window's median by more than this factor times the largest rise in the window ...
SPIKE_FACTOR = 2.5
SPIKE_MIN_RISE = 1.0  # ... and by more than this (nats): small losses fluctuate by single samples


@dataclass
class LossMonitor:
    """Monitors one task's training. `write_record` gets one dict per step, `print_message` the lines for the user."""

    engine: Engine
    task: str
    every: int  # steps between two synchronizations with the device
    skip_non_finite: bool  # warn of a loss that is not finite instead of stopping the run
    sample_sources: Callable[[int], list[str]]  # step of the task → where its samples come from
    write_record: Callable[[dict[str, Any]], None]
    print_message: Callable[[str], None]
    peak_flops: float | None = None  # of one device, per second; None: looked up by the device's name
    tokens_seen: int = 0  # tokens trained on in the whole run so far
    _pending: list[dict[str, Any]] = field(default_factory=list)
    _steps: int = 0
    _initial_weights: dict[str, int] = field(default_factory=dict)  # fingerprints by tensor name
    _last_record: dict[str, Any] = field(default_factory=dict)  # of the task's last step; written by `end_task`
    _flushed_at: float = 0.0  # time of the last flush, moved on by what `outside_step` took
    _throughput: Throughput | None = None
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))

    def start_task(self) -> None:
        self._initial_weights = self.engine.shards.weight_fingerprints()
        self._throughput = Throughput(self.engine, self.task, self.peak_flops, self.print_message)
        self._flushed_at = time.perf_counter()

    def record_step(
        self,
        number: int,
        step: int,
        plan: StepPlan,
        lr: float,
        loss: torch.Tensor,
        is_last: bool,
        padded_tokens: int,
        reference_plan: StepPlan | None = None,
    ) -> None:
        """Record a finished step: the task's `number`-th (from 0), and the run's `step`-th (from 1).

        `loss`: this rank's sum over its target tokens. `padded_tokens`: of this rank's batches, padding included.
        `reference_plan`: the samples whose gradient was computed beside the step's own (A-GEM).
        """
        self.tokens_seen += plan.num_tokens
        self._pending.append(
            {
                "number": number,
                "step": step,
                "plan": plan,
                "lr": lr,
                "loss": loss,
                "grad_norm": self.engine.last_grad_norm,
                "padded_tokens": padded_tokens,
                "reference_plan": reference_plan,
                "tokens_seen": self.tokens_seen,
            }
        )
        self._steps += 1
        if len(self._pending) >= self.every or is_last:
            self.flush(is_last)
        # After a restart near a task's end there are only a few steps, whose learning rates may be too small to move
        # any weight: the check then needs all steps of the task.
        if self._steps == MOVEMENT_CHECK_STEPS or (is_last and self._steps == number + 1 < MOVEMENT_CHECK_STEPS):
            with self.outside_step():
                self._check_weights_moved()

    @contextmanager
    def outside_step(self) -> Iterator[None]:
        """The time within this context does not count as step time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._flushed_at += time.perf_counter() - started

    def end_task(self, numbers: Mapping[str, float]) -> None:
        """Write the record of the task's last step, with the method's `numbers` and the peak memory added."""
        task_numbers = {
            "trainable_parameters": float(self.engine.shards.num_trainable()),
            "peak_memory_bytes": comm.max_peak_memory(),
        }
        self.write_record({**self._last_record, **task_numbers, **numbers})

    def flush(self, is_last: bool = False) -> None:
        """Synchronize with the device; check and write the records of all steps since the last flush."""
        if not self._pending or self._throughput is None:
            return
        entries, self._pending = self._pending, []
        losses = torch.stack([entry["loss"] for entry in entries]).double()
        measurements = self._throughput.measure_rank(sum(entry["padded_tokens"] for entry in entries))
        sums = comm.all_reduce_sum(torch.cat([losses, measurements.flatten().to(losses.device)])).cpu()
        now = time.perf_counter()
        elapsed, self._flushed_at = now - self._flushed_at, now
        plans = [entry["plan"] for entry in entries]
        reference_plans = [entry["reference_plan"] for entry in entries if entry["reference_plan"] is not None]
        all_measurements = sums[len(entries) :].view_as(measurements)
        common = self._throughput.summarize(all_measurements, elapsed, plans, reference_plans)
        for entry, total in zip(entries, sums[: len(entries)].tolist(), strict=True):
            plan, norm = entry["plan"], entry["grad_norm"]
            loss = total / plan.num_targets
            problem = "" if math.isfinite(loss) else f"the loss is {loss}"
            if not problem and norm is not None and _finite_norm(norm) is None and not self.engine.uses_loss_scaling:
                problem = "the gradient is not finite"
            record = {
                "step": entry["step"],
                "task": self.task,
                "epoch": plan.epoch,
                "loss": loss if math.isfinite(loss) else None,
                "lr": entry["lr"],
                "grad_norm": _finite_norm(norm),
                "tokens": plan.num_tokens,
                "targets": plan.num_targets,
                "tokens_seen": entry["tokens_seen"],
                **common,
            }
            is_last_record = is_last and entry is entries[-1]
            if is_last_record:
                self._last_record = record
            if not is_last_record or (problem and not self.skip_non_finite):
                self.write_record(record)
            if problem:
                self._handle_non_finite(entry["number"], entry["step"], problem)
            else:
                self._check_for_spike(entry["number"], entry["step"], loss)

    def _check_for_spike(self, number: int, step: int, loss: float) -> None:
        """Report a loss far above its usual fluctuations.

        Fluctuations are measured by rises from step to step, so a steep fall at the task's start does not hide a spike.
        """
        previous = list(self._losses)
        if len(previous) >= SPIKE_MIN_STEPS:
            median, largest_rise = statistics.median(previous), max(b - a for a, b in pairwise(previous))
            if loss > median + max(SPIKE_MIN_RISE, SPIKE_FACTOR * largest_rise):
                self._losses.clear()  # report a spike that lasts several steps only once
                self.print_message(
                    f"task {self.task}, step {step}: the loss leaps to {loss:.3g}, after a median of {median:.3g}; its "
                    f"records: {self._list_sources(number)}"
                )
        self._losses.append(loss)

    def _handle_non_finite(self, number: int, step: int, problem: str) -> None:
        """Report the step's samples; raise unless such steps are skipped."""
        message = f"task {self.task}, step {step}: {problem}; its records: {self._list_sources(number)}"
        if not self.skip_non_finite:
            raise ExternalFailure(
                f"{message}. The run stops and no checkpoint is written from it; lower train.lr, look at these "
                "records, or set train.non_finite=skip to leave such steps out"
            )
        self.print_message(f"{message}. The step is skipped")

    def _list_sources(self, number: int) -> str:
        """Where the samples of the task's step `number` come from, as text."""
        sources = self.sample_sources(number)
        more = f"; and {len(sources) - MAX_LISTED} more" if len(sources) > MAX_LISTED else ""
        return "; ".join(sources[:MAX_LISTED]) + more

    def _check_weights_moved(self) -> None:
        """Raise if no trainable tensor has changed since the start; report those that have not."""
        weights = self.engine.shards.weight_fingerprints()
        unchanged = [name for name, value in weights.items() if value == self._initial_weights[name]]
        if len(unchanged) == len(weights):
            raise ExternalFailure(
                f"task {self.task}: after {self._steps} steps no trainable tensor has moved, so nothing is being "
                "learned; check train.lr and what method trains"
            )
        if unchanged and self._steps > 1:  # in the first step LoRA's A has no gradient, as B is still zero
            more = f" and {len(unchanged) - MAX_LISTED} more" if len(unchanged) > MAX_LISTED else ""
            self.print_message(
                f"task {self.task}: after {self._steps} steps {len(unchanged)} of {len(weights)} trainable tensors "
                f"have never moved: {', '.join(unchanged[:MAX_LISTED])}{more}"
            )


def _finite_norm(norm: Any) -> float | None:
    """A gradient norm as a number; None if it is not finite, for which DeepSpeed gives -1."""
    number = float("nan") if norm is None else float(norm)
    return number if math.isfinite(number) and number >= 0.0 else None
