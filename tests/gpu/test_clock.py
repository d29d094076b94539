"""Timers of a step on a GPU: they measure the device time of parts, and do not synchronize. Skipped without a GPU."""

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
        launch_seconds = time.perf_counter() - began
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds, bytes_sent, wait_seconds = timers.collect_timings()
    total_seconds = time.perf_counter() - began
    timers.set_device(torch.device("cpu"))
    assert seconds["forward"] == pytest.approx(2 * seconds["communication"], rel=0.3)
    assert seconds["forward"] + seconds["communication"] <= total_seconds
    assert launch_seconds < 0.5 * total_seconds, "the host waited for the device"
    assert wait_seconds["all_reduce"] == seconds["communication"]
    assert bytes_sent["all_reduce"] == 4096 * 4096 * 4


def test_what_goes_on_in_another_stream_is_no_part_of_the_step() -> None:
    side = torch.randn(2048, 2048, device="cuda")
    timers.set_device(torch.device("cuda"))
    with (
        timers.timed_part("backward"),
        torch.cuda.stream(torch.cuda.Stream()),
        timers.timed_collective("all_reduce", side),
    ):
        busy(side, 50)
    seconds, bytes_sent, _ = timers.collect_timings()
    timers.set_device(torch.device("cpu"))
    assert seconds["communication"] == 0.0
    assert bytes_sent["all_reduce"] == 2048 * 2048 * 4
