"""Timers: a part excludes its nested parts, collectives count their bytes, and nothing counts outside of parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from dscl.utils import timers


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClock]:
    clock = FakeClock()
    monkeypatch.setattr(timers.time, "perf_counter", clock)
    timers.set_device(torch.device("cpu"))
    yield clock
    timers.set_device(torch.device("cpu"))


def test_the_time_of_a_part_excludes_nested_parts(time: FakeClock) -> None:
    for _ in range(2):
        with timers.timed_part("forward"):
            time.now += 1.0
            with timers.timed_part("router"):
                time.now += 0.25
                with timers.timed_collective("all_reduce", torch.zeros(3)):
                    time.now += 2.0
            time.now += 4.0
    seconds, sent, waited = timers.collect_timings()
    assert {name: value for name, value in seconds.items() if value} == {
        "forward": 10.0,
        "router": 0.5,
        "communication": 4.0,
    }
    assert sent["all_reduce"] == 2 * 12
    assert waited["all_reduce"] == 4.0
    assert tuple(seconds) == timers.PARTS
    assert tuple(sent) == tuple(waited) == timers.COLLECTIVES
    assert not any(timers.collect_timings().seconds.values()), "collected timings must not be returned again"


def test_nothing_is_measured_outside_of_all_parts(time: FakeClock) -> None:
    with timers.timed_collective("broadcast", torch.zeros(8)):
        time.now += 1.0
    with timers.timed_part("optimizer"):
        time.now += 1.0
    seconds, sent, waited = timers.collect_timings()
    assert sum(seconds.values()) == seconds["optimizer"] == 1.0
    assert not any(sent.values())
    assert not any(waited.values())


def test_a_part_is_timed_when_it_raises(time: FakeClock) -> None:
    with suppress(ValueError), timers.timed_part("backward"):
        time.now += 1.0
        raise ValueError
    assert timers.collect_timings().seconds["backward"] == 1.0


def test_an_asynchronous_collective_costs_only_the_wait(time: FakeClock) -> None:
    class Work:
        def wait(self) -> str:
            time.now += 0.5
            return "done"

        def is_completed(self) -> bool:
            return False

    def gather(output: torch.Tensor, part: torch.Tensor, more: int = 0) -> Work:
        time.now += 0.125
        return Work()

    counted = timers.wrap_collective("all_gather", gather, 1, "part")
    with timers.timed_part("forward"):
        started = counted(torch.zeros(8), torch.zeros(4, dtype=torch.bfloat16))
        named = counted(torch.zeros(8), part=[torch.zeros(2), torch.zeros(1)])
        time.now += 8.0
        assert not started.is_completed()
        assert started.wait() == named.wait() == "done"
    seconds, sent, waited = timers.collect_timings()
    assert (seconds["forward"], seconds["communication"]) == (8.0, 1.25)
    assert sent["all_gather"] == 8 + 12
    assert waited["all_gather"] == 1.25


def test_a_synchronous_collective_returns_its_result() -> None:
    assert timers.wrap_collective("broadcast", lambda tensor: None, 0, "tensor")(torch.zeros(1)) is None
