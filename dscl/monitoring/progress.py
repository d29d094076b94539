"""The progress of a run on stderr: a live line that overwrites itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import bisect
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from dscl.utils.formatting import display_width, format_count, format_duration, truncate_end

PLAIN_LINE_INTERVAL = 5.0  # seconds between two plain lines, at least
SMOOTHING = 0.1  # weight of the newest step time in the moving average


class TimeEstimator:
    """Estimates the remaining time from the time that steps and evaluations took so far.

    An evaluation here is the whole one after a task, over all tasks that are evaluated then.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._last_call = now()
        self._step_seconds: float | None = None  # moving average
        self._is_provisional = True  # the average is that of a warm-up step
        self._evaluation_seconds = 0.0

    def add_steps(self, number: int, warming_up: bool) -> None:
        """Count the time since the last call of any method as that of `number` steps.

        The first step of a task (`warming_up`) is slower than the others: its time is replaced by the next one.
        """
        seconds = self._lap() / number
        if self._step_seconds is None or self._is_provisional:
            self._step_seconds, self._is_provisional = seconds, warming_up
        elif not warming_up:
            self._step_seconds += (1.0 - (1.0 - SMOOTHING) ** number) * (seconds - self._step_seconds)

    def end_evaluation(self) -> None:
        """Count the time since the last call of any method as that of an evaluation."""
        self._evaluation_seconds = self._lap()

    def skip_time(self) -> None:
        """Ignore the time since the last call of any method."""
        self._lap()

    def remaining_seconds(self, steps: int, evaluations: int) -> float | None:
        """Seconds for that many more steps and evaluations; None before the first step was timed."""
        if self._step_seconds is None:
            return None
        return steps * self._step_seconds + evaluations * self._evaluation_seconds

    def _lap(self) -> float:
        now = self._now()
        lap, self._last_call = now - self._last_call, now
        return lap


class Progress:
    """Shows where the run is. `tasks`: (name, steps) of the whole stream; a record's `step` counts over all of it."""

    def __init__(
        self,
        tasks: Sequence[tuple[str, int]],
        every: int,
        live: str = "auto",
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tasks = tasks
        self._ends = list(itertools.accumulate(steps for _, steps in tasks))
        self._every = every
        self._stream = stream or sys.stderr
        self._overwrite = live == "on" or (live == "auto" and _is_terminal(self._stream))
        self._is_shown = live != "off"
        self._now = now
        self._estimator = TimeEstimator(now)
        self._activity = "", 0.0  # its name and its start
        self._line = ""
        self._last_plain = -PLAIN_LINE_INTERVAL

    def show_steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._estimator.add_steps(len(records), warming_up=any(self._is_first(record["step"]) for record in records))
        due = [record for record in records if self._is_due(record["step"])]
        if due:
            at_task_edge = any(self._is_task_edge(record["step"]) for record in due)
            self._show(self._format_step(due[-1]), force=at_task_edge)

    def show_evaluation(self, task: str, done: int, total: int) -> None:
        self._show(f"evaluating {task} · {done}/{total}")

    def show_activity(self, activity: str, done: int, total: int) -> None:
        self._estimator.skip_time()
        now = self._now()
        if activity != self._activity[0] or done == 1:
            self._activity = activity, now
        remaining_seconds = (now - self._activity[1]) / (done - 1) * (total - done) if done > 1 else None
        remaining = f" · {format_duration(remaining_seconds)} left" if remaining_seconds is not None else ""
        self._show(f"{activity} · {done}/{total}{remaining}")

    def end_evaluation(self) -> None:
        self._estimator.end_evaluation()

    def print_message(self, text: str) -> None:
        """Print a line of its own; the live line is erased and written again below it."""
        line = self._line
        self._erase()
        self._write(text + "\n")
        if line:
            self._overwrite_with(line)

    def close(self) -> None:
        if self._line:
            self._write("\n")
            self._line = ""

    def _is_due(self, step: int) -> bool:
        return step % self._every == 0 or self._is_task_edge(step)

    def _is_task_edge(self, step: int) -> bool:
        """Whether the step is the first or the last one of its task."""
        return step in self._ends or self._is_first(step)

    def _is_first(self, step: int) -> bool:
        return step - 1 in (0, *self._ends)

    def _format_step(self, record: Mapping[str, Any]) -> str:
        step = record["step"]
        index = bisect.bisect_left(self._ends, step)
        name, steps = self._tasks[index]
        step_in_task = step - self._ends[index] + steps
        parts = [f"task {index + 1}/{len(self._tasks)} {name}", f"step {step_in_task}/{steps}"]
        if record.get("loss") is not None:
            parts.append(f"loss {record['loss']:.3f}")
        if record.get("tokens_per_s") is not None:
            parts.append(f"{format_count(record['tokens_per_s'])} tokens/s")
        remaining_seconds = self._estimator.remaining_seconds(self._ends[-1] - step, len(self._tasks) - index)
        if remaining_seconds is not None:
            parts.append(f"{format_duration(remaining_seconds)} left")
        return " · ".join(parts)

    def _show(self, line: str, force: bool = False) -> None:
        """Overwrite the live line, or print a plain one if the last one is old enough or `force` asks for it."""
        if not self._is_shown:
            return
        if self._overwrite:
            self._overwrite_with(line)
        elif force or self._now() - self._last_plain >= PLAIN_LINE_INTERVAL:
            self._last_plain = self._now()
            self._write(line + "\n")

    def _overwrite_with(self, line: str) -> None:
        # Leave the last column empty: filling it would make the terminal wrap.
        line = truncate_end(line, _columns(self._stream) - 1)
        self._write("\r" + line + " " * (display_width(self._line) - display_width(line)))
        self._line = line

    def _erase(self) -> None:
        if self._line:
            self._write("\r" + " " * display_width(self._line) + "\r")
            self._line = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
