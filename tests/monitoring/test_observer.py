"""The Observer: all output of a run, only on the main rank."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from dscl.config.parsing import parse_config
from dscl.monitoring.observer import ObserveConfig, Observer
from dscl.monitoring.score_board import ScoreBoard
from dscl.utils.errors import UserError
from tests.support.score_boards import make_score_board

TASKS = [("a", 4), ("b", 6)]


def record(step: int) -> dict:
    return {"step": step, "task": "a", "loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "tokens": 8, "tokens_per_s": 80.0}


def scores(rows: int) -> ScoreBoard:
    return make_score_board([[0.5, 0.25]] * rows, [0.0, 0.0])


def observe_steps(observer: Observer, steps: range) -> None:
    with observer:
        observer.log_recipe("seed: 1")
        if steps.start == 1:
            observer.log_scores(scores(0))
        for step in steps:
            observer.log_steps(record(step))
            for name, num_done in TASKS:
                observer.show_evaluation(name, 1, num_done)
            if step in (4, 10):
                observer.log_scores(scores(1 if step == 4 else 2))
        observer.print_message("the end")


def test_the_main_rank_writes_and_the_others_leave_no_trace(tmp_path: Path) -> None:
    config, main_output, other_output = ObserveConfig(every=2), io.StringIO(), io.StringIO()
    observe_steps(Observer(tmp_path / "main", config, True, TASKS, stream=main_output), range(1, 11))
    observe_steps(Observer(tmp_path / "other", config, False, TASKS, stream=other_output), range(1, 11))
    assert not (tmp_path / "other").exists()
    assert other_output.getvalue() == ""
    lines = (tmp_path / "main" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(step) for step in range(1, 11)]
    assert "task 2/2 b · step 6/6" in main_output.getvalue()
    assert main_output.getvalue().endswith("the end\n")


def test_scores_stand_at_the_end_of_their_task_and_curves_at_every_so_many_steps(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, resumed in ((7, 0), (10, 5)):  # killed after step 6, resumed from 5
        observer = Observer(tmp_path, ObserveConfig(every=2, live="off"), True, TASKS, resumed, io.StringIO())
        observe_steps(observer, range(resumed + 1, first if not resumed else 11))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 4, 6, 8, 10]
    assert [e.step for e in events.Scalars("task/a/score")] == [0, 4, 10]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))


def test_several_records_at_once_are_as_good_as_one_by_one(tmp_path: Path) -> None:
    config = ObserveConfig(tensorboard=False, live="off")
    for name, size in (("singly", 1), ("together", 5)):
        with Observer(tmp_path / name, config, True, TASKS, stream=io.StringIO()) as observer:
            for start in range(1, 11, size):
                observer.log_steps(*(record(s) for s in range(start, start + size)))
            observer.log_steps()
    singly, together = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("singly", "together"))
    assert singly == together
    assert not (tmp_path / "singly" / "tensorboard").exists()


def test_seconds_between_steps_stand_in_the_next_record_or_else_in_the_last(tmp_path: Path) -> None:
    config = ObserveConfig(tensorboard=False, live="off")
    with Observer(tmp_path, config, True, TASKS, stream=io.StringIO()) as observer:
        observer.log_scores(scores(0), 4.0)
        for step in range(1, 5):
            observer.log_steps(record(step))
        observer.log_save_time(0.5)
        observer.log_scores(scores(1), 2.0)
    with Observer(tmp_path, config, True, TASKS, 4, stream=io.StringIO()) as observer:
        observer.log_scores(scores(1), 1.0)
        observer.log_save_time(0.25)
        for step in range(5, 11):
            observer.log_steps(record(step))
        observer.log_scores(scores(2), 3.0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in records] == list(range(1, 11))
    assert {each["step"]: each["evaluate_seconds"] for each in records if "evaluate_seconds" in each} == {
        1: 4.0, 4: 2.0, 5: 1.0, 10: 3.0,
    }  # fmt: skip
    assert {each["step"]: each["save_seconds"] for each in records if "save_seconds" in each} == {4: 0.5, 5: 0.25}


def test_settings_are_checked() -> None:
    assert parse_config(ObserveConfig, {"every": 5}, "observe") == ObserveConfig(every=5)
    for wrong in ({"every": 0}, {"live": "of"}, {"tensorbord": True}):
        with pytest.raises(UserError, match=r"observe\."):
            parse_config(ObserveConfig, wrong, "observe")
