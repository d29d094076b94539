"""TensorBoard: the curves of training, where time and memory go, every task's scores, and what is best seen as a
picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dscl.methods.base import Ended
from dscl.monitoring.score_picture import routing_picture, score_picture, share_picture
from dscl.utils.timers import KINDS, PARTS

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
    **{f"{kind}_{what}": f"comm/{kind}_{what}" for kind in KINDS for what in ("bytes", "seconds")},
}  # fmt: skip


class Board:
    """Writes into `folder`; on resume, TensorBoard drops what stands there from after `resume_step`."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        # A run that starts over writes its row of step 0 again.
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def step(self, record: Mapping[str, Any]) -> None:
        for name, tag in _TAGS.items():
            if record.get(name) is not None:
                self._writer.add_scalar(tag, record[name], record["step"])
        self._writer.flush()  # a curve without gaps where a killed run was resumed

    def scores(self, document: Mapping[str, Any], step: int) -> None:
        """The newest row of a scores document, its summaries, and the picture of the whole."""
        row = document["matrix"][-1] if document["matrix"] else document.get("before")
        for name, score in zip(document["tasks"], row or (), strict=False):
            if score is not None:
                self._writer.add_scalar(f"task/{name}/score", score, step)
        for name, value in document["summary"].items():
            if value is not None:
                self._writer.add_scalar(f"task/{name}", value, step)
        if document.get("heldout"):
            self._writer.add_scalar("task/heldout_loss", document["heldout"][-1], step)
        self._writer.add_image("task/scores", score_picture(document), step, dataformats="HWC")
        if document.get("confusion"):
            self._writer.add_image("task/routing", routing_picture(document), step, dataformats="HWC")
        self._writer.flush()

    def settled(self, settings: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """The whole stream is learnt: what it was set to, beside what it came to, for the comparison of runs."""
        found = {f"task/{name}": value for name, value in summary.items() if value is not None}
        for part in hparams(dict(settings), found):
            self._writer._get_file_writer().add_summary(part)
        self._writer.flush()

    def ended(self, ended: Ended, step: int) -> None:
        """What a method has to show when a task has ended."""
        for name, value in ended.numbers.items():
            self._writer.add_scalar(f"task/{name}", value, step)
        if ended.picture is not None:
            self._writer.add_image(f"task/{ended.picture.title}", share_picture(ended.picture), step, dataformats="HWC")
        self._writer.flush()

    def took(self, what: str, seconds: float, step: int) -> None:
        """What is no step, at this step of the run."""
        self._writer.add_scalar(f"perf/{what}", seconds, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()
