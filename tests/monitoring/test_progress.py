"""The progress line on a simulated terminal, and on a stream that is no terminal."""

from __future__ import annotations

import io
import re

import pytest

from dscl.monitoring import progress as module
from dscl.monitoring.progress import Progress

TASKS = [("sst2", 40), ("agnews", 60)]


class Screen(io.StringIO):
    """A terminal whose `lines` are its visible text, with carriage returns and wrapped lines."""

    def __init__(self, columns: int = 80, terminal: bool = True) -> None:
        super().__init__()
        self.columns, self.terminal = columns, terminal
        self.lines, self.column = [""], 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        for character in text:
            if character == "\n":
                self.lines.append("")
                self.column = 0
            elif character == "\r":
                self.column = 0
            else:
                if self.column == self.columns:
                    self.lines.append("")
                    self.column = 0
                now = self.lines[-1].ljust(self.column)
                self.lines[-1] = now[: self.column] + character + now[self.column + 1 :]
                self.column += 1
        return super().write(text)

    def visible_lines(self) -> list[str]:
        return [line.rstrip() for line in self.lines]


class FakeClock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def record(step: int, loss: float = 0.5321) -> dict:
    return {"step": step, "task": "x", "loss": loss, "tokens_per_s": 3412.0}


def make_progress(screen: Screen, every: int = 10, live: str = "auto", tasks=TASKS):  # type: ignore[no-untyped-def]
    now = FakeClock()
    return Progress(tasks, every, live, screen, now), now


def run_steps(progress: Progress, now: FakeClock, steps: range, seconds: float) -> None:
    for step in steps:
        now.at += seconds
        progress.show_steps([record(step)])


def seconds_left(line: str) -> int:
    match = re.search(r"(?:(\d+)m)?(\d+)s left", line)
    assert match, line
    return int(match[1] or 0) * 60 + int(match[2])


def test_the_line_says_where_the_run_is() -> None:
    screen = Screen()
    progress, now = make_progress(screen)
    run_steps(progress, now, range(1, 21), 2.0)
    line = "task 1/2 sst2 · step 20/40 · loss 0.532 · 3.4k tokens/s · 2m40s left"  # for both tasks
    assert screen.visible_lines() == [line]
    run_steps(progress, now, range(21, 61), 2.0)
    assert screen.visible_lines() == ["task 2/2 agnews · step 20/60 · loss 0.532 · 3.4k tokens/s · 1m20s left"]
    progress.close()
    assert screen.visible_lines()[1:] == [""]


def test_a_shorter_line_leaves_nothing_of_a_longer_one() -> None:
    screen = Screen()
    progress, _ = make_progress(screen)
    progress.show_evaluation("a long name of a task", 1, 100)
    progress.show_evaluation("b", 1, 2)
    assert screen.visible_lines() == ["evaluating b · 1/2"]


@pytest.mark.parametrize("columns", [20, 40, 79, 80])
def test_the_line_never_wraps(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_columns", lambda stream: columns)
    screen = Screen(columns)
    progress, _ = make_progress(screen, every=1, tasks=[("x" * 70, 10)])
    progress.show_steps([record(1)])
    progress.show_steps([record(2)])
    assert len(screen.lines) == 1
    assert len(screen.visible_lines()[0]) == columns - 1
    assert screen.visible_lines()[0].endswith("…")


def test_a_note_stands_whole_above_the_live_line() -> None:
    screen = Screen()
    progress, now = make_progress(screen)
    run_steps(progress, now, range(1, 11), 1.0)
    live = screen.visible_lines()[-1]
    progress.print_message("saved")
    assert screen.visible_lines() == ["saved", live]
    run_steps(progress, now, range(11, 21), 1.0)
    assert screen.visible_lines()[0] == "saved"
    assert "step 20/40" in screen.visible_lines()[1]
    progress.close()
    progress.print_message("done")
    assert screen.visible_lines()[2:] == ["done", ""]


def test_time_left_counts_all_tasks_and_their_evaluations() -> None:
    screen = Screen()
    progress, now = make_progress(screen)
    now.at += 500.0  # the model is built; this time belongs to no step
    run_steps(progress, now, range(1, 41), 2.0)
    assert seconds_left(screen.visible_lines()[-1]) == 60 * 2
    for num_done in range(1, 6):
        now.at += 6.0
        progress.show_evaluation("sst2", num_done, 5)
    progress.end_evaluation()
    run_steps(progress, now, range(41, 51), 2.0)
    assert seconds_left(screen.visible_lines()[-1]) == 50 * 2 + 30


def test_the_first_step_of_a_task_does_not_spoil_the_estimate() -> None:
    screen = Screen()
    progress, now = make_progress(screen)
    now.at += 100.0
    progress.show_steps([record(1)])
    run_steps(progress, now, range(2, 41), 1.0)
    now.at += 300.0
    progress.show_steps([record(41)])
    assert seconds_left(screen.visible_lines()[-1]) == 59


def test_a_changed_pace_is_followed_whether_steps_come_singly_or_together() -> None:
    estimates = []
    for steps_at_once in (1, 10):
        screen = Screen()
        progress, now = make_progress(screen, tasks=[("t", 400)])
        for start in range(1, 301, steps_at_once):
            now.at += (1.0 if start <= 150 else 3.0) * steps_at_once
            progress.show_steps([record(s) for s in range(start, start + steps_at_once)])
        estimates.append(seconds_left(screen.visible_lines()[-1]))
    assert estimates[0] == pytest.approx(300, abs=2)
    assert estimates[1] == pytest.approx(300, abs=2)


def test_plain_lines_come_now_and_then_and_at_both_ends_of_a_task() -> None:
    screen = Screen(terminal=False)
    progress, now = make_progress(screen)
    run_steps(progress, now, range(1, 101), 0.125)
    text = screen.getvalue()
    assert "\r" not in text
    lines = text.splitlines()
    ends = ["task 1/2 sst2 · step 1/40", "task 1/2 sst2 · step 40/40", "task 2/2 agnews · step 1/60"]
    ends.append("task 2/2 agnews · step 60/60")
    for end in ends:
        assert sum(line.startswith(end) for line in lines) == 1
    assert len(lines) == len(ends) + 1  # and the first tenth step that is 5 seconds after step 41: the 90th
    assert "step 60/60" in lines[-1]
    assert lines[-1].endswith(" 0s left")


def test_a_slow_run_has_a_plain_line_every_so_many_steps() -> None:
    screen = Screen(terminal=False)
    progress, now = make_progress(screen)
    run_steps(progress, now, range(1, 41), 6.0)
    assert re.findall(r"step (\d+)/", screen.getvalue()) == ["1", "10", "20", "30", "40"]


def test_live_on_overwrites_anywhere_and_off_shows_notes_alone() -> None:
    on, off = Screen(terminal=False), Screen()
    for screen, live in ((on, "on"), (off, "off")):
        progress, now = make_progress(screen, live=live)
        run_steps(progress, now, range(1, 21), 1.0)
        progress.print_message("a note")
        progress.close()
    assert on.getvalue().count("\r") >= 3
    assert off.getvalue() == "a note\n"


def test_a_record_without_loss_or_pace_is_shown_as_far_as_it_goes() -> None:
    screen = Screen()
    progress, _ = make_progress(screen)
    progress.show_steps([{"step": 1, "loss": None}])
    assert re.fullmatch(r"task 1/2 sst2 · step 1/40 · \d+s left", screen.visible_lines()[-1])


def test_work_between_tasks_has_an_estimate_and_is_no_steps_time() -> None:
    screen = Screen()
    progress, now = make_progress(screen)
    for num_done in range(1, 4):
        now.at += 10.0
        progress.show_activity("beginning sst2, matrices", num_done, 5)
    assert screen.visible_lines()[-1] == "beginning sst2, matrices · 3/5 · 20s left"
    run_steps(progress, now, range(1, 2), 0.5)
    assert seconds_left(screen.visible_lines()[-1]) == pytest.approx(99 * 0.5, abs=1)
