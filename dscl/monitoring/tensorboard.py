"""TensorBoard: curves of training, time and memory, the scores of every task, and score matrices as images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dscl.methods.base import TaskSummary
from dscl.monitoring.score_board import ScoreBoard
from dscl.monitoring.score_picture import routing_picture, score_picture, task_matrix_picture
from dscl.utils.timers import COLLECTIVES, PARTS

_TAGS = {
    **{name: f"train/{name}" for name in ("loss", "lr", "grad_norm", "epoch", "tokens_seen")},
    "seconds": "perf/step_seconds",
    **{
        name: f"perf/{name}"
        for name in (
            "tokens_per_s", "tokens_per_s_per_device", "tflops_per_device", "tflops_with_recomputation", "mfu",
            "padding", "step_spread",
        )
    },
    **{f"{part}_seconds": f"perf/parts/{part}_seconds" for part in PARTS},
    **{f"memory_{name}_bytes": f"mem/{name}_bytes" for name in ("allocated", "reserved", "peak", "host")},
    **{f"{kind}_{what}": f"comm/{kind}_{what}" for kind in COLLECTIVES for what in ("bytes", "seconds")},
}  # fmt: skip


class TensorBoardWriter:
    """Writes events into `folder`; on resume, TensorBoard discards events after `resume_step`."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        # A run that starts from the beginning writes its scores at step 0 again, so step 0 is purged too.
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def add_step(self, record: Mapping[str, Any]) -> None:
        for name, tag in _TAGS.items():
            if record.get(name) is not None:
                self._writer.add_scalar(tag, record[name], record["step"])
        self._writer.flush()  # otherwise a killed run would leave a gap in the curves

    def add_scores(self, scores: ScoreBoard, step: int) -> None:
        """Add the newest scores, their summary, and images of the score and confusion matrices."""
        row = scores.matrix[-1] if scores.rows else scores.zero_shot
        for name, score in zip(scores.tasks, row or (), strict=False):
            if score is not None:
                self._writer.add_scalar(f"task/{name}/score", score, step)
        for name, value in scores.summary.items():
            if value is not None:
                self._writer.add_scalar(f"task/{name}", value, step)
        if scores.heldout_losses:
            self._writer.add_scalar("task/heldout_loss", scores.heldout_losses[-1], step)
        self._writer.add_image("task/scores", score_picture(scores), step, dataformats="HWC")
        if (confusion := scores.confusion) is not None:
            self._writer.add_image("task/routing", routing_picture(confusion), step, dataformats="HWC")
        self._writer.flush()

    def add_hparams(self, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Add the run's settings and final summary, for TensorBoard's HParams table of runs."""
        metrics = {f"task/{name}": value for name, value in summary.items() if value is not None}
        for part in hparams(dict(settings), metrics):
            self._writer._get_file_writer().add_summary(part)
        self._writer.flush()

    def add_task_summary(self, summary: TaskSummary, step: int) -> None:
        """Add the numbers and the image that a method reports at the end of a task."""
        for name, value in summary.metrics.items():
            self._writer.add_scalar(f"task/{name}", value, step)
        if summary.task_matrix is not None:
            self._writer.add_image(
                f"task/{summary.task_matrix.title}", task_matrix_picture(summary.task_matrix), step, dataformats="HWC"
            )
        self._writer.flush()

    def add_seconds(self, name: str, seconds: float, step: int) -> None:
        """Add the time of work outside the steps (checkpoints, evaluations), at this step of the run."""
        self._writer.add_scalar(f"perf/{name}", seconds, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()
