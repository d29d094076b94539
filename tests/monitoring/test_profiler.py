"""Traces of the requested steps and ranks with the names of the parts; and the report when memory runs out."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dscl.config.parsing import parse_config
from dscl.monitoring.observer import ProfileConfig
from dscl.monitoring.profiler import Tracer
from dscl.utils import timers
from dscl.utils.errors import ExternalFailure, UserError


def trace_step(tracer: Tracer, number: int, last: bool = False) -> str:
    tracer.begin_step(number)
    with timers.timed_part("forward"), timers.timed_collective("all_reduce", torch.zeros(1)):
        torch.ones(4, 4) @ torch.ones(4, 4)
    with timers.timed_part("optimizer"):
        torch.ones(1) + 1
    return tracer.end_step(number, last)


def read_event_names(path: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


def test_a_trace_holds_the_steps_that_were_asked_for_under_the_names_of_their_parts(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, ProfileConfig(steps=(2, 3)))
    messages = [trace_step(tracer, number) for number in range(1, 6)]
    assert [bool(line) for line in messages] == [False, False, True, False, False]
    (path,) = (tmp_path / "traces").iterdir()
    assert f"{tmp_path / 'traces'}/rank-*-steps-2-3" in messages[2]
    event_names = read_event_names(path)
    assert {name: event_names.count(name) for name in ("forward", "optimizer", "communication: all_reduce")} == {
        "forward": 2,
        "optimizer": 2,
        "communication: all_reduce": 2,
    }
    assert "aten::mm" in event_names
    timers.collect_timings()


def test_a_trace_ends_with_its_task(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, ProfileConfig(steps=(2, 9)))
    assert not trace_step(tracer, 1)
    assert not trace_step(tracer, 2)
    assert "steps-2-3" in trace_step(tracer, 3, last=True)
    assert not trace_step(tracer, 10)
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["rank-0-steps-2-3.json.gz"]
    timers.collect_timings()


def test_nothing_is_written_without_being_asked(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, ProfileConfig())
    assert not any(trace_step(tracer, number) for number in range(3))
    assert not list(tmp_path.iterdir())
    timers.collect_timings()


@pytest.mark.parametrize("steps", [[3], [4, 2], [0, 2], [1, 2, 3]])
def test_wrong_steps_are_refused(steps: list[int]) -> None:
    with pytest.raises(UserError, match=r"observe.profile.steps: given \["):
        parse_config(ProfileConfig, {"steps": steps}, "observe.profile")


def test_a_rank_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"observe.profile.ranks: given \[0, 1\]; this run has the ranks 0 to 0"):
        Tracer(tmp_path, ProfileConfig(steps=(1, 2), ranks=(0, 1)))


def test_steps_that_do_not_come_are_told(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, ProfileConfig(steps=(4, 6)))
    assert tracer.explain_untraced(0, 10) == tracer.explain_untraced(5, 10) == ""
    assert "steps 7 to 10 are to come" in tracer.explain_untraced(6, 10)
    assert "given [4, 6]" in tracer.explain_untraced(0, 3)
    assert Tracer(tmp_path, ProfileConfig()).explain_untraced(0, 10) == ""


def test_leaving_within_a_trace_leaves_no_profiler_behind(tmp_path: Path) -> None:
    with suppress(ValueError), Tracer(tmp_path, ProfileConfig(steps=(1, 9))) as tracer:
        trace_step(tracer, 1)
        raise ValueError
    assert not timers._recorder.trace_ranges
    with Tracer(tmp_path, ProfileConfig(steps=(2, 2))) as tracer:
        assert trace_step(tracer, 2)
    timers.collect_timings()


def test_when_memory_runs_out_what_was_in_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("snapshot"))
    tracer = Tracer(tmp_path, ProfileConfig())
    with pytest.raises(ExternalFailure, match=r"CUDA out of memory.*micro_batch") as caught, tracer:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    (path,) = (tmp_path / "traces").iterdir()
    assert str(path) in str(caught.value)
