"""TensorBoard: the curves of training, every task's scores, and the score matrix as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dscl.methods import Ended
from dscl.observe.picture import score_picture, share_picture

_TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "tokens_per_s": "perf/tokens_per_s",
    "save_seconds": "perf/save_seconds",
}


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
                self._writer.add_scalar(f"summary/{name}", value, step)
        if document.get("heldout"):
            self._writer.add_scalar("summary/heldout_loss", document["heldout"][-1], step)
        self._writer.add_image("scores", score_picture(document), step, dataformats="HWC")
        self._writer.flush()

    def ended(self, ended: Ended, step: int) -> None:
        """What a method has to show when a task has ended."""
        for name, value in ended.numbers.items():
            self._writer.add_scalar(f"method/{name}", value, step)
        if ended.picture is not None:
            self._writer.add_image(
                f"method/{ended.picture.title}", share_picture(ended.picture), step, dataformats="HWC"
            )
        self._writer.flush()

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()
