"""What one sees of a run: metrics.jsonl, TensorBoard and the progress line, all behind one `Observer`."""

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
    from dscl.methods.base import Ended
    from dscl.monitoring.tensorboard import Board

__all__ = ["ObserveConfig", "Observer", "ProfileConfig", "score_table"]


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
        self._between: dict[str, float] = {}  # seconds of checkpoints and evaluations that no record tells yet
        self._settings: dict[str, Any] = {}
        self._step = resume_step
        self._board: Board | None = None
        if config.tensorboard:
            from dscl.monitoring.tensorboard import Board  # slow to import, and needless without it

            self._board = Board(run_dir / "tensorboard", resume_step)

    def step(self, *records: Mapping[str, Any]) -> None:
        """One or more optimizer steps, in order; each record holds plain numbers and its global `step`."""
        if not self._main or not records:
            return
        if self._between:
            records = ({**records[0], **self._between}, *records[1:])
            self._between = {}
        self._step = records[-1]["step"]
        self._metrics.write(records)
        self._progress.steps(records)
        if self._board is not None:
            for record in records:
                if record["step"] % self._every == 0 or record["step"] == 1:
                    self._board.step(record)

    def saved(self, seconds: float) -> None:
        """A checkpoint is whole; a record says how long that took since it was begun: the next, or else the last."""
        if self._main:
            self._add("save_seconds", seconds)

    def evaluating(self, task: str, done: int, total: int) -> None:
        """The evaluation of `task` has come that far."""
        if self._main:
            self._progress.evaluating(task, done, total)

    def working(self, doing: str, done: int, total: int) -> None:
        """Work between two tasks has come that far."""
        if self._main:
            self._progress.working(doing, done, total)

    def scores(self, document: Mapping[str, Any], seconds: float | None = None) -> None:
        """An evaluation of the tasks is over; `document` is the content of scores.json with its row."""
        if not self._main:
            return
        if document["matrix"] and any(score is not None for score in document["matrix"][-1]):
            self._progress.evaluated()
        step = sum(self._steps[: len(document["matrix"])])
        if seconds is not None:
            self._add("evaluate_seconds", seconds)
        if self._board is not None:
            self._board.scores(document, step)
            if document.get("complete"):
                self._board.settled(self._settings, document["summary"])

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
            self._settings = flat(yaml.safe_load(text))

    def _add(self, name: str, seconds: float) -> None:
        self._between[name] = self._between.get(name, 0.0) + seconds
        if self._board is not None:
            self._board.took(name, seconds, self._step)

    def note(self, text: str) -> None:
        """Tell the user something, without tearing the progress line."""
        if self._main:
            self._progress.note(text)

    def close(self) -> None:
        if not self._main:
            return
        self._progress.close()
        if self._between:  # no step came after them
            self._metrics.amend(self._between)
        self._metrics.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """By dotted name, those that are single values."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        elif isinstance(value, bool | int | float | str):
            found[f"{before}{name}"] = value
    return found
