"""Where a training step's time goes: its parts, and the collectives among them.

A process is one rank and has one clock, so these are plain functions. A part is what happens between two points of the
program; a part within a part counts for itself alone. On a GPU the points are events in its stream, which nobody waits
for until `taken` asks. While a trace is written, every part is a named range in it.

A collective counts its bytes, and the time that the step waits for it: what goes on beside other work, in a stream or
on a wire of its own, costs the step nothing until somebody waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

PARTS = ("data", "forward", "backward", "communication", "optimizer", "projection", "steering", "router")
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all")  # of collectives


class Taken(NamedTuple):
    """Of this rank, since it was last asked."""

    seconds: dict[str, float]  # of each part
    sent: dict[str, float]  # bytes that this rank put into each kind of collective
    waited: dict[str, float]  # seconds that its steps waited for each


class _Clock:
    def __init__(self) -> None:
        self.gpu = False
        self.named = False  # whether a trace is being written
        self.open: list[int] = []  # places of the parts that are going on
        self.clear()

    def clear(self) -> None:
        # name, kind of collective, the part around it, its beginning and its end
        self.spans: list[list[Any]] = []
        self.sent = dict.fromkeys(KINDS, 0.0)

    def now(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


_clock = _Clock()


def use(device: torch.device) -> None:
    """Measure what runs on this device; called outside of all parts."""
    _clock.gpu = device.type == "cuda"
    _clock.clear()


def name_ranges(named: bool) -> None:
    """Whether parts show in a profiler's trace."""
    _clock.named = named


@contextmanager
def part(name: str, kind: str = "") -> Iterator[None]:
    clock = _clock
    around = clock.open[-1] if clock.open else -1
    span = [name, kind, around, clock.now(), None]
    clock.open.append(len(clock.spans))
    clock.spans.append(span)
    mark = torch.profiler.record_function(f"{name}: {kind}" if kind else name) if clock.named else None
    if mark is not None:
        mark.__enter__()
    try:
        yield
    finally:
        if mark is not None:
            mark.__exit__(None, None, None)
        clock.open.pop()
        span[4] = clock.now()


@contextmanager
def collective(kind: str, *tensors: torch.Tensor) -> Iterator[None]:
    """One into which this rank puts these tensors; what is waited for is within. Outside of all parts none counts."""
    if not _clock.open:
        yield
        return
    _clock.sent[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if _clock.gpu and torch.cuda.current_stream() != torch.cuda.default_stream():
        yield  # beside the step, which waits for it later, if at all
        return
    with part("communication", kind):
        yield


def waiting(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A function in which the device may wait for a collective that was begun before."""

    def same(*given: Any, **named: Any) -> Any:
        with collective(kind):
            return work(*given, **named)

    return same


def counted(kind: str, work: Callable[..., Any], place: int, name: str) -> Callable[..., Any]:
    """A function that makes a collective, or starts one, and has it counted; where among its arguments stands what it
    sends, and by which name it may be given."""

    def same(*given: Any, **named: Any) -> Any:
        sent = given[place] if len(given) > place else named[name]
        with collective(kind, *(sent if isinstance(sent, list | tuple) else [sent])):
            started = work(*given, **named)
        return _Started(started, kind) if hasattr(started, "wait") else started

    return same


class _Started:
    """A collective that goes on; waiting for it is counted."""

    def __init__(self, work: Any, kind: str) -> None:
        self._work, self._kind = work, kind

    def wait(self, *given: Any, **named: Any) -> Any:
        with collective(self._kind):
            return self._work.wait(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def taken() -> Taken:
    """What has gathered since the last call; waits for the device. Called outside of all parts."""
    spans, sent = _clock.spans, _clock.sent
    assert not _clock.open, "a part is still going on"
    _clock.clear()
    seconds, waited = dict.fromkeys(PARTS, 0.0), dict.fromkeys(KINDS, 0.0)
    if _clock.gpu and spans:
        torch.cuda.synchronize()
    for name, kind, around, begun, ended in spans:
        took = begun.elapsed_time(ended) / 1000 if _clock.gpu else ended - begun
        seconds[name] += took
        if kind:
            waited[kind] += took
        if around >= 0:  # which counts without what is within it
            outer, of, *_ = spans[around]
            seconds[outer] -= took
            if of:
                waited[of] -= took
    return Taken(seconds, sent, waited)
