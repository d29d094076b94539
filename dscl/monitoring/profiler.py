"""Traces of some steps, for Perfetto or Chrome; and what was in a GPU's memory when it ran out.

A trace holds what ran on the CPU and the GPU, under the names of the parts that dscl/utils/timers.py measures.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dscl.config.schema import ProfileConfig
from dscl.distributed import comm
from dscl.utils import timers
from dscl.utils.errors import Failure, UserError

FOLDER = "traces"


class Tracer:
    """Of one rank; a context around all that it may have to trace, or to tell of when memory runs out."""

    def __init__(self, run_dir: Path, config: ProfileConfig) -> None:
        self._folder, self._ranks = run_dir / FOLDER, config.ranks
        self._first, self._last = config.steps or (0, -1)
        if config.steps and max(config.ranks) >= comm.world():
            raise UserError(
                f"observe.profile.ranks: given {list(config.ranks)}; this run has the ranks 0 to {comm.world() - 1}"
            )
        self._shapes = config.shapes
        self._began = 0  # the first step of the trace that is being made; the same on all ranks
        self._profiler: Any = None
        self._on_gpu = comm.device().type == "cuda"
        if config.memory and self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def missed(self, done: int, steps: int) -> str:
        """What to tell where no step that was asked for is still to come."""
        if self._last < self._first or (done < self._last and self._first <= steps):
            return ""
        asked = [self._first, self._last]
        return f"observe.profile.steps: given {asked}; steps {done + 1} to {steps} are to come, so nothing is traced"

    def before(self, step: int) -> None:
        """This step of the run comes next."""
        if self._began or not self._first <= step <= self._last:
            return
        self._began = step
        if comm.rank() in self._ranks:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
            self._profiler = profile(activities=activities, record_shapes=self._shapes)
            self._profiler.start()
            timers.name_ranges(True)

    def after(self, step: int, last: bool) -> str:
        """It is over; `last` where no other follows in this task. What to tell, if that ends a trace."""
        if not self._began or (step < self._last and not last):
            return ""
        name, self._began = f"steps-{self._began}-{step}", 0
        if self._profiler is not None:
            timers.name_ranges(False)
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            path = self._folder / f"rank-{comm.rank()}-{name}.json.gz"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(path))
            except OSError as error:
                told = f"{path}: cannot be written ({error.strerror}); make room and run again to go on"
                raise Failure(told) from None
        return f"traced: {self._folder}/rank-*-{name}.json.gz; open at ui.perfetto.dev or chrome://tracing"

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._profiler is not None:  # left in the middle; another step may still be open in it
            timers.name_ranges(False)
            self._profiler.stop()
            self._profiler = None
        if isinstance(error, torch.OutOfMemoryError):
            raise Failure(self._out_of_memory(error)) from None

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> str:
        told = f"rank {comm.rank()}: {str(error).split('. ')[0]}."
        path = self._folder / f"rank-{comm.rank()}-out-of-memory.pickle"
        with suppress(OSError, RuntimeError):  # what ran out matters more than that this failed as well
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            told += f" What was in its memory: {path} (open it at pytorch.org/memory_viz; observe.profile.memory=true "
            told += "adds who allocated it)."
        return (
            f"{told} Lower train.micro_batch, train.max_length or evaluate.batch, set model.activation_checkpointing="
            "true, take a higher ZeRO stage or offload, or more GPUs"
        )
