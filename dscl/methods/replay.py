"""Replay: sequential fine-tuning in which stored samples of ended tasks are mixed into every later task.

What trains: all weights, or one LoRA for all tasks. What is kept: randomly chosen samples of every ended task. They are
saved in files of their own, so that a resumed run does not need the data of earlier tasks. They are shuffled among the
new task's samples and have the same weight in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from dscl.config.methods import ReplayPreset
from dscl.data.replay_buffer import ReplayBuffer
from dscl.methods.base import RunInfo, TaskContext, TaskSummary
from dscl.methods.sequential import Sequential
from dscl.model.adapters.peft_files import task_file_name
from dscl.utils.errors import UserError


class Replay(Sequential):
    """Experience replay."""

    Config: ClassVar[type] = ReplayPreset
    config: ReplayPreset
    size_key = "method.replay.size"  # the recipe key that error messages name

    def __init__(self, config: ReplayPreset, run_info: RunInfo) -> None:
        super().__init__(config, run_info)
        self.ratio, self.size = self.buffer_limits()
        if self.size is not None and self.size < len(run_info.task_names) - 1:
            raise UserError(
                f"{self.size_key}: given {self.size}; each of the {len(run_info.task_names) - 1} tasks that end before "
                "the last keeps a sample at least, so give as many or more"
            )
        self._buffers: list[ReplayBuffer] = []  # one for each ended task; its samples are in random order

    def buffer_limits(self) -> tuple[float | None, int | None]:
        """The share of each task's samples that is stored, or the size of the whole buffer; the other one is None."""
        return self.config.replay.ratio, self.config.replay.size

    def replay_counts(self, task_sizes: Sequence[int]) -> list[int]:
        return [self._samples_per_task(task_size, len(task_sizes)) for task_size in task_sizes]

    def replay_samples(self) -> list[ReplayBuffer]:
        return self._buffers

    def _samples_per_task(self, task_size: int, num_ended: int) -> int:
        """How many of a task's samples are replayed when this number of tasks has ended."""
        count = round((self.ratio or 0.0) * task_size) if self.size is None else self.size // num_ended
        return min(task_size, max(1, count))

    def end_task(self, index: int, name: str, context: TaskContext) -> TaskSummary:
        samples = context.task_samples()
        order = np.random.default_rng([self.run_info.seed, index]).permutation(len(samples))
        chosen = order[: self._samples_per_task(len(samples), index + 1)]
        self._buffers.append(ReplayBuffer(name, tuple(samples[int(i)] for i in chosen)))
        self._shrink_buffers()
        return TaskSummary(metrics={"capacity_bytes": float(sum(buffer.num_bytes for buffer in self._buffers))})

    def _shrink_buffers(self) -> None:
        """Drop samples of earlier tasks so that all tasks together stay within the maximum."""
        if self.size is not None and self._buffers:
            max_samples = max(1, self.size // len(self._buffers))
            self._buffers = [ReplayBuffer(buffer.task, buffer.samples[:max_samples]) for buffer in self._buffers]

    def save_task_artifacts(self, folder: Path, name: str) -> list[Path]:
        path = _artifact_path(folder, name)
        next(buffer for buffer in self._buffers if buffer.task == name).write(path)
        return [path]

    def load_task_artifacts(self, folder: Path, names: Sequence[str]) -> None:
        self._buffers = [ReplayBuffer.read(_artifact_path(folder, name), name) for name in names]
        self._shrink_buffers()  # the files keep all samples, because an older checkpoint may need them


def _artifact_path(folder: Path, name: str) -> Path:
    """The file of a task's stored samples in the run's folder."""
    return folder / "samples" / f"{task_file_name(name)}.safetensors"
