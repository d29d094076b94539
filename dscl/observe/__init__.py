"""What one sees of a run: metrics.jsonl, TensorBoard and the progress line, all behind one `Observer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from dscl.config import key
from dscl.observe.metrics import MetricsFile
from dscl.observe.progress import Progress
from dscl.observe.table import score_table

if TYPE_CHECKING:
    from dscl.methods import Ended
    from dscl.observe.board import Board

__all__ = ["ObserveConfig", "Observer", "score_table"]


@dataclass(frozen=True)
class ObserveConfig:
    every: int = key(10, at_least=1, help="steps between two updates of TensorBoard and of the progress line")
    tensorboard: bool = key(True, help="write TensorBoard events into run_dir/tensorboard")
    live: str = key(
        "auto",
        choices=("auto", "on", "off"),
        help="progress; auto: one live line on a terminal, plain lines elsewhere; on: always live; off: none",
    )


class Observer:
    """Writes down what the loop tells it, on the main rank; on every other rank each call does nothing.

    `tasks` are the (name, optimizer steps) of the whole stream. What a killed run wrote after `resume_step` is dropped,
    so the caller passes on all records of up to a step before it saves a checkpoint of that step.
    """

    def __init__(
        self,
        run_dir: Path,
        config: ObserveConfig,
        main: bool,
        tasks: Sequence[tuple[str, int]],
        resume_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self._main = main
        if not main:
            return
        self._every = config.every
        self._steps = [steps for _, steps in tasks]
        self._resume_step = resume_step
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._metrics.rewind(resume_step)
        self._progress = Progress(tasks, config.every, config.live, stream)
        self._saving = 0.0  # seconds of checkpoints that no record tells yet
        self._board: Board | None = None
        if config.tensorboard:
            from dscl.observe.board import Board  # slow to import, and needless without it

            self._board = Board(run_dir / "tensorboard", resume_step)

    def step(self, *records: Mapping[str, Any]) -> None:
        """One or more optimizer steps, in order; each record holds plain numbers and its global `step`."""
        if not self._main or not records:
            return
        if self._saving:
            records = ({**records[0], "save_seconds": self._saving}, *records[1:])
            self._saving = 0.0
        self._metrics.write(records)
        self._progress.steps(records)
        if self._board is not None:
            for record in records:
                if record["step"] % self._every == 0 or record["step"] == 1:
                    self._board.step(record)

    def saved(self, seconds: float) -> None:
        """A checkpoint is whole; the next step's record says how long that took since it was begun."""
        if self._main:
            self._saving += seconds

    def evaluating(self, task: str, done: int, total: int) -> None:
        """The evaluation of `task` has come that far."""
        if self._main:
            self._progress.evaluating(task, done, total)

    def working(self, doing: str, done: int, total: int) -> None:
        """Work between two tasks has come that far."""
        if self._main:
            self._progress.working(doing, done, total)

    def scores(self, document: Mapping[str, Any]) -> None:
        """An evaluation of the tasks is over; `document` is the content of scores.json with its row."""
        if not self._main:
            return
        self._progress.evaluated()
        if self._board is not None:
            self._board.scores(document, sum(self._steps[: len(document["matrix"])]))

    def ended(self, task: str, ended: Ended, step: int) -> None:
        """A task has ended, at this step of the run."""
        if not self._main:
            return
        if ended.told:
            self._progress.note(f"task {task}: {ended.told}")
        if self._board is not None:
            self._board.ended(ended, step)

    def recipe(self, text: str) -> None:
        """The resolved recipe, as YAML."""
        if self._main and self._board is not None:
            self._board.text("recipe", f"```yaml\n{text}\n```", self._resume_step)

    def note(self, text: str) -> None:
        """Tell the user something, without tearing the progress line."""
        if self._main:
            self._progress.note(text)

    def close(self) -> None:
        if not self._main:
            return
        self._progress.close()
        self._metrics.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
