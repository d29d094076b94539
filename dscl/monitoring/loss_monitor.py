"""What is watched while a task trains: losses that are finite, weights that move, and the numbers that are shown.

Losses stay on the device until `flush`, so that watching never makes a GPU wait within a step.
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

from dscl.data.batches import Step
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.monitoring.throughput import Pace
from dscl.utils.errors import Failure

MUST_HAVE_MOVED = 10  # steps after which a tensor that never changed is worth a warning
SHOWN = 8  # names or records in one message
LOOKED_BACK, FEW = 100, 50  # losses that a leap is judged by, and from how many on
FAR = 2.5  # times as far above the median of them as the loss rose at most from one of them to the next
LEAP = 1.0  # nats, at least: small losses are tossed about by single samples


@dataclass
class Watch:
    """One task's training as seen from outside. `record` receives one dict a step, `say` the lines for the user."""

    engine: Engine
    task: str
    every: int
    skipping: bool
    sources: Callable[[int], list[str]]
    record: Callable[[dict[str, Any]], None]
    say: Callable[[str], None]
    peak: float | None = None  # operations a second of one device at most, where they are known
    seen: int = 0  # tokens of the run before this task, or before this start of it
    _pending: list[dict[str, Any]] = field(default_factory=list)
    _steps: int = 0
    _start: dict[str, int] = field(default_factory=dict)
    _last: dict[str, Any] = field(default_factory=dict)  # the task's last record, until the task has ended
    _clock: float = 0.0
    _pace: Pace | None = None
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=LOOKED_BACK))

    def begin(self) -> None:
        self._start = self.engine.shards.fingerprints()
        self._pace = Pace(self.engine, self.task, self.peak, self.say)
        self._clock = time.perf_counter()

    def add(
        self,
        number: int,
        step: int,
        plan: Step,
        lr: float,
        loss: torch.Tensor,
        last: bool,
        computed: int,
        reviewed: Step | None = None,
    ) -> None:
        """Step `step` of the run, which is the task's `number`-th (from 0), is done.

        `computed`: tokens that this rank's batches have, with padding. `reviewed`: what else went through the model.
        """
        self.seen += plan.tokens
        self._pending.append(
            {
                "number": number,
                "step": step,
                "plan": plan,
                "lr": lr,
                "loss": loss,
                "grad_norm": self.engine.last_norm,
                "computed": computed,
                "reviewed": reviewed,
                "seen": self.seen,
            }
        )
        self._steps += 1
        if len(self._pending) >= self.every or last:
            self.flush(last)
        # A few steps at the end of a task, after a restart, prove nothing: their rates may be too small to be seen.
        if self._steps == MUST_HAVE_MOVED or (last and self._steps == number + 1 < MUST_HAVE_MOVED):
            with self.aside():
                self._check_movement()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens within is no part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - began

    def finish(self, numbers: Mapping[str, float]) -> None:
        """The task has ended; `numbers` join the record of its last step, and so does what it took."""
        taken = {"trainable_parameters": float(self.engine.shards.trainable()), "peak_memory_bytes": comm.peak_memory()}
        self.record({**self._last, **taken, **numbers})

    def flush(self, last: bool = False) -> None:
        """Wait for the device, check and report what has gathered since the last time."""
        if not self._pending or self._pace is None:
            return
        entries, self._pending = self._pending, []
        losses = torch.stack([entry["loss"] for entry in entries]).double()
        ranks = self._pace.mine(sum(entry["computed"] for entry in entries))
        sums = comm.sum_(torch.cat([losses, ranks.flatten().to(losses.device)])).cpu()
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        plans = [entry["plan"] for entry in entries]
        reviewed = [entry["reviewed"] for entry in entries if entry["reviewed"] is not None]
        common = self._pace.numbers(sums[len(entries) :].view_as(ranks), elapsed, plans, reviewed)
        for entry, total in zip(entries, sums[: len(entries)].tolist(), strict=True):
            plan, norm = entry["plan"], entry["grad_norm"]
            loss = total / plan.targets
            trouble = "" if math.isfinite(loss) else f"the loss is {loss}"
            if not trouble and norm is not None and _finite(norm) is None and not self.engine.scales_loss:
                trouble = "the gradient is not finite"
            record = {
                "step": entry["step"],
                "task": self.task,
                "epoch": plan.epoch,
                "loss": loss if math.isfinite(loss) else None,
                "lr": entry["lr"],
                "grad_norm": _finite(norm),
                "tokens": plan.tokens,
                "targets": plan.targets,
                "tokens_seen": entry["seen"],
                **common,
            }
            held = last and entry is entries[-1]
            if held:
                self._last = record
            if not held or (trouble and not self.skipping):
                self.record(record)
            if trouble:
                self._not_finite(entry["number"], entry["step"], trouble)
            else:
                self._look_for_spike(entry["number"], entry["step"], loss)

    def _look_for_spike(self, number: int, step: int, loss: float) -> None:
        """Tell of a loss beyond all tossing about, of which it says nothing how far losses fell at the task's start."""
        before = list(self._losses)
        if len(before) >= FEW:
            usual, rise = statistics.median(before), max(b - a for a, b in pairwise(before))
            if loss > usual + max(LEAP, FAR * rise):
                self._losses.clear()  # one line for what may go on for some steps
                self.say(
                    f"task {self.task}, step {step}: the loss leaps to {loss:.3g}, after a median of {usual:.3g}; its "
                    f"records: {self._records(number)}"
                )
        self._losses.append(loss)

    def _not_finite(self, number: int, step: int, trouble: str) -> None:
        told = f"task {self.task}, step {step}: {trouble}; its records: {self._records(number)}"
        if not self.skipping:
            raise Failure(
                f"{told}. The run stops and no checkpoint is written from it; lower train.lr, look at these records, "
                "or set train.non_finite=skip to leave such steps out"
            )
        self.say(f"{told}. The step is skipped")

    def _records(self, number: int) -> str:
        """Which a step learnt from."""
        sources = self.sources(number)
        return "; ".join(sources[:SHOWN]) + (f"; and {len(sources) - SHOWN} more" if len(sources) > SHOWN else "")

    def _check_movement(self) -> None:
        now = self.engine.shards.fingerprints()
        still = [name for name, value in now.items() if value == self._start[name]]
        if len(still) == len(now):
            raise Failure(
                f"task {self.task}: after {self._steps} steps no trainable tensor has moved, so nothing is being "
                "learned; check train.lr and what method trains"
            )
        if still and self._steps > 1:  # LoRA's A has no gradient before B has moved, which takes a step
            more = f" and {len(still) - SHOWN} more" if len(still) > SHOWN else ""
            self.say(
                f"task {self.task}: after {self._steps} steps {len(still)} of {len(now)} trainable tensors have never "
                f"moved: {', '.join(still[:SHOWN])}{more}"
            )


def _finite(norm: Any) -> float | None:
    """A gradient's norm as a number; DeepSpeed says -1 for one that is not finite."""
    number = float("nan") if norm is None else float(norm)
    return number if math.isfinite(number) and number >= 0.0 else None
