"""Profiler traces of selected steps (for Perfetto or Chrome), and GPU memory snapshots after out-of-memory errors.

A trace holds the operations on CPU and GPU, in ranges named after the parts that dscl/utils/timers.py measures.
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
from dscl.utils.errors import ExternalFailure, UserError

TRACE_FOLDER = "traces"


class Tracer:
    """Writes the traces of one rank. As a context around the whole training, it also handles out-of-memory errors."""

    def __init__(self, run_dir: Path, config: ProfileConfig) -> None:
        self._folder, self._ranks = run_dir / TRACE_FOLDER, config.ranks
        self._first, self._last = config.steps or (0, -1)
        if config.steps and max(config.ranks) >= comm.world_size():
            raise UserError(
                f"observe.profile.ranks: given {list(config.ranks)}; this run has the ranks 0 to "
                f"{comm.world_size() - 1}"
            )
        self._shapes = config.shapes
        self._trace_start = 0  # first step of the trace in progress, 0 if none; the same on all ranks
        self._profiler: Any = None
        self._on_gpu = comm.device().type == "cuda"
        if config.memory and self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def explain_untraced(self, steps_done: int, total_steps: int) -> str:
        """A message for the user if none of the steps to trace is still to come, else ""."""
        if self._last < self._first or (steps_done < self._last and self._first <= total_steps):
            return ""
        return (
            f"observe.profile.steps: given {[self._first, self._last]}; steps {steps_done + 1} to {total_steps} are to "
            "come, so nothing is traced"
        )

    def begin_step(self, step: int) -> None:
        """Start the trace if this step of the run, about to begin, is among those to trace."""
        if self._trace_start or not self._first <= step <= self._last:
            return
        self._trace_start = step
        if comm.rank() in self._ranks:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_gpu
            self._profiler = profile(activities=activities, record_shapes=self._shapes)
            self._profiler.start()
            timers.enable_trace_ranges(True)

    def end_step(self, step: int, is_last: bool) -> str:
        """Write the trace if it ends with this step or with the task (`is_last`); a message for the user, or ""."""
        if not self._trace_start or (step < self._last and not is_last):
            return ""
        name, self._trace_start = f"steps-{self._trace_start}-{step}", 0
        if self._profiler is not None:
            timers.enable_trace_ranges(False)
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            path = self._folder / f"rank-{comm.rank()}-{name}.json.gz"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(path))
            except OSError as error:
                message = f"{path}: cannot be written ({error.strerror}); make room and run again to go on"
                raise ExternalFailure(message) from None
        return f"traced: {self._folder}/rank-*-{name}.json.gz; open at ui.perfetto.dev or chrome://tracing"

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._profiler is not None:  # an error interrupted a traced step
            timers.enable_trace_ranges(False)
            self._profiler.stop()
            self._profiler = None
        if isinstance(error, torch.OutOfMemoryError):
            raise ExternalFailure(self._explain_out_of_memory(error)) from None

    def _explain_out_of_memory(self, error: torch.OutOfMemoryError) -> str:
        """Dump a snapshot of the GPU's memory; a message that says where it is and what to change."""
        message = f"rank {comm.rank()}: {str(error).split('. ')[0]}."
        path = self._folder / f"rank-{comm.rank()}-out-of-memory.pickle"
        with suppress(OSError, RuntimeError):  # the out-of-memory error matters more than a failed dump
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            message += f" What was in its memory: {path} (open it at pytorch.org/memory_viz; observe.profile.memory="
            message += "true adds who allocated it)."
        return (
            f"{message} Lower train.micro_batch, train.max_length or evaluate.batch, set "
            "model.activation_checkpointing=true, take a higher ZeRO stage or offload, or more GPUs"
        )
