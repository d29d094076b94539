"""Everything a run shows and logs (metrics.jsonl, TensorBoard, the progress line), behind one class, `Observer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from dscl.config.schema import ObserveConfig, ProfileConfig
from dscl.monitoring.metrics_file import MetricsFile
from dscl.monitoring.progress import Progress
from dscl.monitoring.score_table import score_table

if TYPE_CHECKING:
    from dscl.methods.base import TaskSummary
    from dscl.monitoring.score_board import ScoreBoard
    from dscl.monitoring.tensorboard import TensorBoardWriter

__all__ = ["ObserveConfig", "Observer", "ProfileConfig", "score_table"]


class Observer:
    """Logs and shows the progress of a run on the main rank; on other ranks every call does nothing.

    `tasks`: (name, optimizer steps) of the whole stream. Records of a killed run after `resume_step` are dropped; the
    caller must therefore log all records up to a step before it saves a checkpoint of that step.
    """

    def __init__(
        self,
        run_dir: Path,
        config: ObserveConfig,
        is_main: bool,
        tasks: Sequence[tuple[str, int]],
        resume_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self._is_main = is_main
        if not is_main:
            return
        self._every = config.every
        self._steps = [steps for _, steps in tasks]
        self._resume_step = resume_step
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._metrics.truncate_after(resume_step)
        self._progress = Progress(tasks, config.every, config.live, stream)
        self._unlogged_seconds: dict[str, float] = {}  # of checkpoints and evaluations; added to the next record
        self._settings: dict[str, Any] = {}
        self._step = resume_step
        self._tensorboard: TensorBoardWriter | None = None
        if config.tensorboard:
            from dscl.monitoring.tensorboard import TensorBoardWriter  # imported here because it is slow

            self._tensorboard = TensorBoardWriter(run_dir / "tensorboard", resume_step)

    def log_steps(self, *records: Mapping[str, Any]) -> None:
        """Log one or more optimizer steps, in order; each record holds plain numbers and its `step` in the run."""
        if not self._is_main or not records:
            return
        if self._unlogged_seconds:
            records = ({**records[0], **self._unlogged_seconds}, *records[1:])
            self._unlogged_seconds = {}
        self._step = records[-1]["step"]
        self._metrics.write(records)
        self._progress.show_steps(records)
        if self._tensorboard is not None:
            for record in records:
                if record["step"] % self._every == 0 or record["step"] == 1:
                    self._tensorboard.add_step(record)

    def log_save_time(self, seconds: float) -> None:
        """Log how long a checkpoint took, in the next step's record, or in the last one if the run ends."""
        if self._is_main:
            self._log_seconds("save_seconds", seconds)

    def show_evaluation(self, task: str, done: int, total: int) -> None:
        """Show the progress of the evaluation of `task`."""
        if self._is_main:
            self._progress.show_evaluation(task, done, total)

    def show_activity(self, activity: str, done: int, total: int) -> None:
        """Show the progress of work between the steps, at a task's beginning or end."""
        if self._is_main:
            self._progress.show_activity(activity, done, total)

    def log_scores(self, scores: ScoreBoard, seconds: float | None = None) -> None:
        """Log the scores after an evaluation that took `seconds`."""
        if not self._is_main:
            return
        if scores.rows and any(scores.rows[-1]):
            self._progress.end_evaluation()
        step = sum(self._steps[: len(scores.rows)])
        if seconds is not None:
            self._log_seconds("evaluate_seconds", seconds)
        if self._tensorboard is not None:
            self._tensorboard.add_scores(scores, step)
            if scores.is_complete:
                self._tensorboard.add_hparams(self._settings, scores.summary)

    def log_task_summary(self, task: str, summary: TaskSummary, step: int) -> None:
        """Print and log what the method reports at the end of a task, at this step of the run."""
        if not self._is_main:
            return
        if summary.message:
            self._progress.print_message(f"task {task}: {summary.message}")
        if self._tensorboard is not None:
            self._tensorboard.add_task_summary(summary, step)

    def log_recipe(self, text: str) -> None:
        """Log the resolved recipe (YAML) in TensorBoard."""
        if self._is_main and self._tensorboard is not None:
            self._tensorboard.add_text("recipe", f"```yaml\n{text}\n```", self._resume_step)
            self._settings = flatten_settings(yaml.safe_load(text))

    def _log_seconds(self, name: str, seconds: float) -> None:
        self._unlogged_seconds[name] = self._unlogged_seconds.get(name, 0.0) + seconds
        if self._tensorboard is not None:
            self._tensorboard.add_seconds(name, seconds, self._step)

    def print_message(self, text: str) -> None:
        """Print a line for the user without breaking the live progress line."""
        if self._is_main:
            self._progress.print_message(text)

    def close(self) -> None:
        if not self._is_main:
            return
        self._progress.close()
        if self._unlogged_seconds:  # no step follows
            self._metrics.add_to_last_record(self._unlogged_seconds)
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted name: value}; values that are no single numbers, texts or booleans are left out."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values |= flatten_settings(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            values[f"{prefix}{name}"] = value
    return values
