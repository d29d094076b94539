"""The clock of a step on a GPU: parts last as long as the device works on them, and measuring them makes nobody wait.
Skipped where there is no GPU."""

from __future__ import annotations

import time

import pytest
import torch

from dscl.utils import timers

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here (torch.cuda.is_available() is false)"
)


def busy(side: torch.Tensor, times: int) -> None:
    for _ in range(times):
        torch.mm(side, side)


def test_parts_are_timed_on_the_device_and_the_host_goes_on() -> None:
    side = torch.randn(4096, 4096, device="cuda")
    busy(side, 3)
    torch.cuda.synchronize()
    timers.set_device(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    began = time.perf_counter()
    try:
        with timers.timed_part("forward"):
            busy(side, 20)
            with timers.timed_collective("all_reduce", side):
                busy(side, 10)
        launched = time.perf_counter() - began
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds, sent, waited = timers.collect_timings()
    whole = time.perf_counter() - began
    timers.set_device(torch.device("cpu"))
    assert seconds["forward"] == pytest.approx(2 * seconds["communication"], rel=0.3)
    assert seconds["forward"] + seconds["communication"] <= whole
    assert launched < 0.5 * whole, "the host waited for the device"
    assert waited["all_reduce"] == seconds["communication"]
    assert sent["all_reduce"] == 4096 * 4096 * 4


def test_what_goes_on_in_another_stream_is_no_part_of_the_step() -> None:
    side = torch.randn(2048, 2048, device="cuda")
    timers.set_device(torch.device("cuda"))
    with (
        timers.timed_part("backward"),
        torch.cuda.stream(torch.cuda.Stream()),
        timers.timed_collective("all_reduce", side),
    ):
        busy(side, 50)
    seconds, sent, _ = timers.collect_timings()
    timers.set_device(torch.device("cpu"))
    assert seconds["communication"] == 0.0
    assert sent["all_reduce"] == 2048 * 2048 * 4
