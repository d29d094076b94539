"""Timers for the parts of a training step and for its collectives.

A process is one rank and has one recorder, so this module has plain functions. The time of a part excludes the parts
nested in it. On a GPU, a part's begin and end are CUDA events; only `collect_timings` waits for them. While a profiler
writes a trace, every part is a named range in it.

For a collective the recorder counts the bytes sent and the time that the step waits for it. A collective that overlaps
with other work costs the step nothing until the step waits for its result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

PARTS = ("data", "forward", "backward", "communication", "optimizer", "projection", "gradient_hook", "router")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all")


class Timings(NamedTuple):
    """What this rank has measured since the last call of `collect_timings`."""

    seconds: dict[str, float]  # by part
    bytes_sent: dict[str, float]  # the size of this rank's inputs, by kind of collective
    wait_seconds: dict[str, float]  # how long the steps waited, by kind of collective


class _Recorder:
    def __init__(self) -> None:
        self.on_gpu = False
        self.trace_ranges = False  # whether a profiler's trace shows the parts
        self.open_spans: list[int] = []  # the indices in `spans` of the parts in progress, the innermost last
        self.clear()

    def clear(self) -> None:
        # each span: [part, kind of collective or "", index of the enclosing span or -1, begin, end]
        self.spans: list[list[Any]] = []
        self.bytes_sent = dict.fromkeys(COLLECTIVES, 0.0)

    def timestamp(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


_recorder = _Recorder()


def set_device(device: torch.device) -> None:
    """Measure on this device from now on; must be called outside of all parts."""
    _recorder.on_gpu = device.type == "cuda"
    _recorder.clear()


def enable_trace_ranges(enabled: bool) -> None:
    """Show parts as named ranges in a profiler's trace, or stop showing them."""
    _recorder.trace_ranges = enabled


@contextmanager
def timed_part(name: str, kind: str = "") -> Iterator[None]:
    """Time this context as the part `name` (one of PARTS); `kind` is the collective that it waits for, if any."""
    recorder = _recorder
    parent = recorder.open_spans[-1] if recorder.open_spans else -1
    span = [name, kind, parent, recorder.timestamp(), None]
    recorder.open_spans.append(len(recorder.spans))
    recorder.spans.append(span)
    label = f"{name}: {kind}" if kind else name
    trace_range = torch.profiler.record_function(label) if recorder.trace_ranges else None
    if trace_range is not None:
        trace_range.__enter__()
    try:
        yield
    finally:
        if trace_range is not None:
            trace_range.__exit__(None, None, None)
        recorder.open_spans.pop()
        span[4] = recorder.timestamp()


@contextmanager
def timed_collective(kind: str, *tensors: torch.Tensor) -> Iterator[None]:
    """Count `tensors` as sent by a collective of this kind, and time this context as the wait for it.

    Outside of all parts nothing is counted.
    """
    if not _recorder.open_spans:
        yield
        return
    _recorder.bytes_sent[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if _recorder.on_gpu and torch.cuda.current_stream() != torch.cuda.default_stream():
        yield  # on a side stream the collective overlaps with the step, which waits for it later, if at all
        return
    with timed_part("communication", kind):
        yield


def wrap_wait(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that waits for a collective started before, so that the wait is timed."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        with timed_collective(kind):
            return function(*args, **kwargs)

    return timed


def wrap_collective(
    kind: str, function: Callable[..., Any], input_position: int, input_name: str
) -> Callable[..., Any]:
    """Wrap a function that runs or starts a collective, so that its bytes and its wait are counted.

    The tensor (or list of tensors) that it sends is the positional argument `input_position`, or the keyword argument
    `input_name`.
    """

    def timed(*args: Any, **kwargs: Any) -> Any:
        tensors = args[input_position] if len(args) > input_position else kwargs[input_name]
        with timed_collective(kind, *(tensors if isinstance(tensors, list | tuple) else [tensors])):
            result = function(*args, **kwargs)
        return _TimedWork(result, kind) if hasattr(result, "wait") else result

    return timed


class _TimedWork:
    """torch's handle of an asynchronous collective, except that `wait` is timed."""

    def __init__(self, work: Any, kind: str) -> None:
        self._work, self._kind = work, kind

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with timed_collective(self._kind):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def collect_timings() -> Timings:
    """The timings since the last call. Waits for the device; must be called outside of all parts."""
    spans, bytes_sent = _recorder.spans, _recorder.bytes_sent
    assert not _recorder.open_spans, "a part is still in progress"
    _recorder.clear()
    seconds, wait_seconds = dict.fromkeys(PARTS, 0.0), dict.fromkeys(COLLECTIVES, 0.0)
    if _recorder.on_gpu and spans:
        torch.cuda.synchronize()
    for name, kind, parent, begin, end in spans:
        elapsed = begin.elapsed_time(end) / 1000 if _recorder.on_gpu else end - begin
        seconds[name] += elapsed
        if kind:
            wait_seconds[kind] += elapsed
        if parent >= 0:  # the time of a part excludes the parts nested in it
            parent_name, parent_kind, *_ = spans[parent]
            seconds[parent_name] -= elapsed
            if parent_kind:
                wait_seconds[parent_kind] -= elapsed
    return Timings(seconds, bytes_sent, wait_seconds)
