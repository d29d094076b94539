"""The progress of a run on stderr: a live line on a terminal, which overwrites itself; plain lines elsewhere."""

from __future__ import annotations

import bisect
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from dscl.utils.formatting import cells, clip, count, duration

PLAIN_SECONDS = 5.0  # between two plain lines, at least
SMOOTHING = 0.1  # weight of the newest step time in the smoothed one


class Clock:
    """Time left, from the time that steps and evaluations took so far.

    A pass is the evaluation after one task, of all the tasks that are evaluated then.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._mark = now()
        self._step_seconds: float | None = None
        self._provisional = True
        self._pass_seconds = 0.0

    def steps(self, number: int, warming_up: bool) -> None:
        """`number` steps have passed since the last call of any kind.

        The first step of a task pays for more than itself, so its time only stands in until another is known.
        """
        seconds = self._lap() / number
        if self._step_seconds is None or self._provisional:
            self._step_seconds, self._provisional = seconds, warming_up
        elif not warming_up:
            self._step_seconds += (1.0 - (1.0 - SMOOTHING) ** number) * (seconds - self._step_seconds)

    def evaluated(self) -> None:
        """A pass is over; it took the time since the last call of any kind."""
        self._pass_seconds = self._lap()

    def worked(self) -> None:
        """The time since the last call of any kind belongs to neither a step nor a pass."""
        self._lap()

    def left(self, steps: int, passes: int) -> float | None:
        """Seconds for that many more steps and passes; None before any step was timed."""
        return None if self._step_seconds is None else steps * self._step_seconds + passes * self._pass_seconds

    def _lap(self) -> float:
        now = self._now()
        lap, self._mark = now - self._mark, now
        return lap


class Progress:
    """Says where the run is. `tasks` are the (name, steps) of the whole stream, over which a record's step counts."""

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
        self._shown = live != "off"
        self._now = now
        self._clock = Clock(now)
        self._doing = "", 0.0  # and since when
        self._line = ""
        self._last_plain = -PLAIN_SECONDS

    def steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._clock.steps(len(records), warming_up=any(self._first(record["step"]) for record in records))
        due = [record for record in records if self._due(record["step"])]
        if due:
            edge = any(self._edge(record["step"]) for record in due)
            self._show(self._step_line(due[-1]), must=edge)

    def evaluating(self, task: str, done: int, total: int) -> None:
        self._show(f"evaluating {task} · {done}/{total}")

    def working(self, doing: str, done: int, total: int) -> None:
        self._clock.worked()
        now = self._now()
        if doing != self._doing[0] or done == 1:
            self._doing = doing, now
        left = (now - self._doing[1]) / (done - 1) * (total - done) if done > 1 else None
        self._show(f"{doing} · {done}/{total}" + (f" · {duration(left)} left" if left is not None else ""))

    def evaluated(self) -> None:
        self._clock.evaluated()

    def note(self, text: str) -> None:
        """A line of its own; the live line steps aside for it."""
        line = self._line
        self._erase()
        self._write(text + "\n")
        if line:
            self._overwrite_with(line)

    def close(self) -> None:
        if self._line:
            self._write("\n")
            self._line = ""

    def _due(self, step: int) -> bool:
        return step % self._every == 0 or self._edge(step)

    def _edge(self, step: int) -> bool:
        """Whether the step is the first or the last one of its task."""
        return step in self._ends or self._first(step)

    def _first(self, step: int) -> bool:
        return step - 1 in (0, *self._ends)

    def _step_line(self, record: Mapping[str, Any]) -> str:
        step = record["step"]
        index = bisect.bisect_left(self._ends, step)
        name, steps = self._tasks[index]
        within = step - self._ends[index] + steps
        parts = [f"task {index + 1}/{len(self._tasks)} {name}", f"step {within}/{steps}"]
        if record.get("loss") is not None:
            parts.append(f"loss {record['loss']:.3f}")
        if record.get("tokens_per_s") is not None:
            parts.append(f"{count(record['tokens_per_s'])} tokens/s")
        left = self._clock.left(self._ends[-1] - step, len(self._tasks) - index)
        if left is not None:
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)

    def _show(self, line: str, must: bool = False) -> None:
        if not self._shown:
            return
        if self._overwrite:
            self._overwrite_with(line)
        elif must or self._now() - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = self._now()
            self._write(line + "\n")

    def _overwrite_with(self, line: str) -> None:
        # one column less than there is: a terminal wraps when its last column is filled
        line = clip(line, _columns(self._stream) - 1)
        self._write("\r" + line + " " * (cells(self._line) - cells(line)))
        self._line = line

    def _erase(self) -> None:
        if self._line:
            self._write("\r" + " " * cells(self._line) + "\r")
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
