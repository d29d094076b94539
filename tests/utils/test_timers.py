"""The clock of a step: parts count for themselves alone, collectives with their bytes, and nothing outside of parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from dscl.utils import timers


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Time]:
    made = Time()
    monkeypatch.setattr(timers.time, "perf_counter", made)
    timers.use(torch.device("cpu"))
    yield made
    timers.use(torch.device("cpu"))


def test_a_part_within_a_part_counts_for_itself_alone(time: Time) -> None:
    for _ in range(2):
        with timers.part("forward"):
            time.now += 1.0
            with timers.part("router"):
                time.now += 0.25
                with timers.collective("all_reduce", torch.zeros(3)):
                    time.now += 2.0
            time.now += 4.0
    seconds, sent, waited = timers.taken()
    assert {name: value for name, value in seconds.items() if value} == {
        "forward": 10.0,
        "router": 0.5,
        "communication": 4.0,
    }
    assert sent["all_reduce"] == 2 * 12
    assert waited["all_reduce"] == 4.0
    assert tuple(seconds) == timers.PARTS
    assert tuple(sent) == tuple(waited) == timers.KINDS
    assert not any(timers.taken().seconds.values()), "what was taken counts once"


def test_what_is_outside_of_all_parts_is_not_a_steps(time: Time) -> None:
    with timers.collective("broadcast", torch.zeros(8)):
        time.now += 1.0
    with timers.part("optimizer"):
        time.now += 1.0
    seconds, sent, waited = timers.taken()
    assert sum(seconds.values()) == seconds["optimizer"] == 1.0
    assert not any(sent.values())
    assert not any(waited.values())


def test_a_part_ends_with_what_it_fails_with(time: Time) -> None:
    with suppress(ValueError), timers.part("backward"):
        time.now += 1.0
        raise ValueError
    assert timers.taken().seconds["backward"] == 1.0


def test_a_collective_that_goes_on_beside_the_step_costs_what_is_waited_for(time: Time) -> None:
    class Work:
        def wait(self) -> str:
            time.now += 0.5
            return "done"

        def is_completed(self) -> bool:
            return False

    def gather(output: torch.Tensor, part: torch.Tensor, more: int = 0) -> Work:
        time.now += 0.125
        return Work()

    counted = timers.counted("all_gather", gather, 1, "part")
    with timers.part("forward"):
        started = counted(torch.zeros(8), torch.zeros(4, dtype=torch.bfloat16))
        named = counted(torch.zeros(8), part=[torch.zeros(2), torch.zeros(1)])
        time.now += 8.0
        assert not started.is_completed()
        assert started.wait() == named.wait() == "done"
    seconds, sent, waited = timers.taken()
    assert (seconds["forward"], seconds["communication"]) == (8.0, 1.25)
    assert sent["all_gather"] == 8 + 12
    assert waited["all_gather"] == 1.25


def test_a_collective_that_is_over_gives_what_it_gives() -> None:
    assert timers.counted("broadcast", lambda tensor: None, 0, "tensor")(torch.zeros(1)) is None
