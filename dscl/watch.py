"""What is watched while a task trains: losses that are finite, weights that move, and the numbers that are shown.

Losses stay on the device until `flush`, so that watching never makes a GPU wait within a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dscl import dist
from dscl.data.batches import Step
from dscl.engine import Engine
from dscl.errors import Failure

MUST_HAVE_MOVED = 10  # steps after which a tensor that never changed is worth a warning
SHOWN = 8  # names or records in one message


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
    _pending: list[dict[str, Any]] = field(default_factory=list)
    _seen: int = 0
    _start: dict[str, int] = field(default_factory=dict)
    _last: dict[str, Any] = field(default_factory=dict)  # the task's last record, until the task has ended
    _clock: float = 0.0

    def begin(self) -> None:
        self._start = self.engine.fingerprints()
        self._clock = time.perf_counter()

    def add(self, number: int, step: int, plan: Step, lr: float, loss: torch.Tensor, last: bool) -> None:
        """Step `step` of the run, which is the task's `number`-th (from 0), is done."""
        self._pending.append(
            {"number": number, "step": step, "plan": plan, "lr": lr, "loss": loss, "grad_norm": self.engine.last_norm}
        )
        self._seen += 1
        if len(self._pending) >= self.every or last:
            self.flush(last)
        # A few steps at the end of a task, after a restart, prove nothing: their rates may be too small to be seen.
        if self._seen == MUST_HAVE_MOVED or (last and self._seen == number + 1 < MUST_HAVE_MOVED):
            self._check_movement()

    def finish(self, numbers: Mapping[str, float]) -> None:
        """The task has ended; `numbers` join the record of its last step, and so does what it took."""
        taken = {"trainable_parameters": float(self.engine.trainable()), "peak_memory_bytes": dist.peak_memory()}
        self.record({**self._last, **taken, **numbers})

    def flush(self, last: bool = False) -> None:
        """Wait for the device, check and report what has gathered since the last time."""
        if not self._pending:
            return
        sums = dist.sum_(torch.stack([entry["loss"] for entry in self._pending]).double()).tolist()
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        rate = sum(entry["plan"].tokens for entry in self._pending) / max(elapsed, 1e-9)
        entries, self._pending = self._pending, []
        for entry, total in zip(entries, sums, strict=True):
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
                "tokens_per_s": rate,
                "seconds": elapsed / len(entries),
            }
            held = last and entry is entries[-1]
            if held:
                self._last = record
            if not held or (trouble and not self.skipping):
                self.record(record)
            if trouble:
                self._not_finite(entry["number"], entry["step"], trouble)

    def _not_finite(self, number: int, step: int, trouble: str) -> None:
        sources = self.sources(number)
        records = "; ".join(sources[:SHOWN]) + (f"; and {len(sources) - SHOWN} more" if len(sources) > SHOWN else "")
        told = f"task {self.task}, step {step}: {trouble}; its records: {records}"
        if not self.skipping:
            raise Failure(
                f"{told}. The run stops and no checkpoint is written from it; lower train.lr, look at these records, "
                "or set train.non_finite=skip to leave such steps out"
            )
        self.say(f"{told}. The step is skipped")

    def _check_movement(self) -> None:
        now = self.engine.fingerprints()
        still = [name for name, value in now.items() if value == self._start[name]]
        if len(still) == len(now):
            raise Failure(
                f"task {self.task}: after {self._seen} steps no trainable tensor has moved, so nothing is being "
                "learned; check train.lr and what method trains"
            )
        if still and self._seen > 1:  # LoRA's A has no gradient before B has moved, which takes a step
            more = f" and {len(still) - SHOWN} more" if len(still) > SHOWN else ""
            self.say(
                f"task {self.task}: after {self._seen} steps {len(still)} of {len(now)} trainable tensors have never "
                f"moved: {', '.join(still[:SHOWN])}{more}"
            )


def _finite(norm: Any) -> float | None:
    """A gradient's norm as a number; DeepSpeed says -1 for one that is not finite."""
    number = float("nan") if norm is None else float(norm)
    return number if math.isfinite(number) and number >= 0.0 else None
