"""Traces of some steps, for Perfetto or Chrome; and what was in a GPU's memory when it ran out.

A trace holds what ran on the CPU and the GPU, under the names of the parts that dscl/clock.py measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dscl import clock, dist
from dscl.errors import Failure, UserError
from dscl.observe import ProfileConfig

FOLDER = "traces"


class Tracer:
    """Of one rank. `say` hears where a trace lies."""

    def __init__(self, run_dir: Path, config: ProfileConfig) -> None:
        self._folder = run_dir / FOLDER
        self._first, self._last = config.steps or (0, -1)
        if config.steps and max(config.ranks) >= dist.world():
            raise UserError(
                f"observe.profile.ranks: given {list(config.ranks)}; this run has the ranks 0 to {dist.world() - 1}"
            )
        self._shapes, self._mine = config.shapes, dist.rank() in config.ranks
        self._profiler: Any = None
        self._on_gpu = dist.device().type == "cuda"
        if config.memory and self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def before(self, step: int) -> None:
        """This step of the run comes next."""
        if self._profiler is None and self._mine and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
            self._profiler = profile(activities=activities, record_shapes=self._shapes)
            self._profiler.start()
            self._began = step
            clock.name_ranges(True)

    def after(self, step: int, last: bool) -> str:
        """It is over; `last` where no other follows in this task. Where its trace lies now, if one has ended."""
        if self._profiler is None or (step < self._last and not last):
            return ""
        clock.name_ranges(False)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self._folder / f"rank-{dist.rank()}-steps-{self._began}-{step}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except OSError as error:
            raise Failure(f"{path}: cannot be written ({error.strerror}); make room and run again to go on") from None
        return f"trace of steps {self._began} to {step}: {path}; open it at ui.perfetto.dev or chrome://tracing"

    @contextmanager
    def memory_told(self) -> Iterator[None]:
        """When a GPU's memory runs out within, what was in it is written down, and the message says where."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            path = self._folder / f"rank-{dist.rank()}-out-of-memory.pickle"
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            first = str(error).split(". ")[0]
            raise Failure(
                f"rank {dist.rank()}: {first}. What was in its memory: {path} (open it at pytorch.org/memory_viz; "
                "observe.profile.memory=true adds who allocated it). Lower train.micro_batch or train.max_length, set "
                "model.activation_checkpointing=true, take a higher ZeRO stage or offload, or more GPUs"
            ) from None
