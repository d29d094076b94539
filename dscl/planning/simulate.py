"""A training step rehearsed: the real engine, DeepSpeed included, on tensors that have a size and no contents.

What a rank will hold is not put into formulas but counted: every tensor that the engine, the method and the model make
is seen as it comes and goes. Other ranks are not there; collectives return at once, and count their bytes as always.
A model of any size fits, since nothing is stored, and seconds are enough, since nothing is computed.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dscl.data.batches import Batch
from dscl.distributed import comm
from dscl.engine.engine import Engine, unchecked
from dscl.methods.base import Method
from dscl.methods.registry import find_method
from dscl.model.flops import Cost, cost_of
from dscl.training.setup import Job, Lesson
from dscl.utils import timers

LOOKED_AT = 500  # steps of a task, among which its largest micro-batch is looked for


@dataclass(frozen=True)
class Rehearsed:
    """Bytes of one rank, and what a step makes it send."""

    weights: int
    optimizer: int  # its moments, and the masters where they are not the weights themselves
    beside: int  # what the method keeps: banks, bases, springs
    gradients: int  # with the buckets in which they travel
    passing: int  # activations, and all else that is gone when the step is over: the peak's share of it
    peak: int
    host: int  # what the method keeps in the host's memory
    saved: int  # a checkpoint of all ranks
    sent: Mapping[str, float]  # by kind of collective, in a step
    later: Mapping[str, float]  # what comes when tasks have ended
    ending: int  # of the device, while a task ends: beside what is kept
    cost: Cost | None
    parameters: int
    trained: int
    busiest: float | None  # of the owners of matrices: the work of the one that has most, over the mean


def rehearse(job: Job, settings: dict[str, Any], micro_batches: Sequence[Batch], a_step: int) -> Rehearsed:
    """Steps of these micro-batches (one or two) under this DeepSpeed configuration, in a world as large as
    `dist.world()`; `a_step`: how many a step of the run has, for what is sent in it."""
    train = job.recipe.train
    method = find_method(job.recipe.method.name)(job.recipe.method, job.facts)
    mode, storages = FakeTensorMode(allow_non_fake_inputs=True), Storages()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        for each in (unchecked(), _modules_as_they_are(), mode, storages):
            stack.enter_context(each)
        engine = Engine(
            settings,
            build=job.backbone.build,
            read=lambda _name, _shape, start, stop: torch.empty(stop - start),
            prepare=method.prepare,
            constraint=method.constraint,
            steering=method.steering,
            precision=train.precision,
            micro_batch=train.micro_batch,
            weight_decay=train.weight_decay,
            grad_clip=train.grad_clip,
        )
        engine.imagine_others()
        later = method.rehearse()
        batches = [hollow(batch, mode) for batch in micro_batches]
        before, at_step = engine.optimizer.before, 0

        def noting(stepped: Sequence[torch.Tensor]) -> None:
            nonlocal at_step
            at_step = max(at_step, storages.now)
            if before is not None:
                before(stepped)

        engine.optimizer.before = noting
        peaks, sent = [], []
        for some in (batches[:1], batches[:1], *([batches] if len(batches) > 1 else [])):
            timers.taken()
            storages.peak = storages.now
            engine.step(method.loss, some, targets=1, lr=1e-4)
            peaks.append(storages.peak)
            sent.append(timers.taken().sent)
        once, more = sent[1], sent[-1]  # the first step makes, and gathers, what all others find
        further = (a_step - 1) * (len(batches) > 1)
        parameters: list[Any] = list(engine.module.parameters())
        host = {id(t) for name, t in method.owned().items() if name.endswith("|start")}
        weights = _storages(t for p in parameters for t in (p.data, getattr(p, "ds_tensor", None)))
        trained = [t for f in engine.shards.fragments() for t in (f.master, *f.moments.values())]
        optimizer = _storages(trained) - weights
        kept = [*engine.module.buffers(), *(t for f in engine.shards.fragments() for t in f.kept.values())]
        kept += [t for t in method.owned().values() if id(t) not in host]
        beside = _storages(kept) - weights - optimizer
        aside = sum(t.untyped_storage().nbytes() for t in method.owned().values() if id(t) in host)
        sizes = [sum(storage.nbytes() for storage in each) for each in (weights, optimizer, beside)]
        gradients = max(0, at_step - sum(sizes) - aside)
        peak = max(peaks)
        found = Rehearsed(
            weights=sizes[0],
            optimizer=sizes[1],
            beside=sizes[2],
            gradients=gradients,
            passing=max(0, peak - sum(sizes) - gradients - aside),
            peak=peak - aside,
            host=aside,
            saved=_saved(engine, method),
            sent={kind: size + further * (more[kind] - size) for kind, size in once.items()},
            later=later,
            ending=int(method.ending()),
            cost=cost_of(engine.module),
            parameters=sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
            trained=sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad),
            busiest=engine.busiest(),
        )
        engine.close()
    return found


def largest(job: Job) -> list[Batch]:
    """A step of the micro-batch that takes most memory among those of the stream; several, if steps have several."""
    best: tuple[int, Lesson, int, int] | None = None
    for index in range(1 if job.method.together else len(job.lessons)):
        lesson = job.lesson(index)
        for step in range(min(lesson.schedule.steps_per_epoch, LOOKED_AT)):
            for place, rows in enumerate(lesson.schedule.micro_batches(step, comm.rank())):
                lengths = [sum(lesson.schedule.length(sample) for sample in row) for row in rows]
                size = len(rows) * max(lengths, default=0)
                if best is None or size > best[0]:
                    best = size, lesson, step, place
    assert best is not None
    _, lesson, step, place = best
    found = lesson.micro_batches(step)
    return [found[place]] * min(2, len(found))


class Storages(TorchDispatchMode):
    """Counts the bytes of all tensors that there are, as they are made and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._there: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _any_number(args[0].dtype)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        known, of = self._there.get(place, (0, None))
        if of is not None and of() is storage:
            if known != size:  # it was resized
                self._there[place] = size, of
                self._add(size - known)
            return

        def gone(dead: weakref.ref[Any]) -> None:
            size, of = self._there.get(place, (0, None))
            if of is dead:  # else another storage has its place by now
                del self._there[place]
                self.now -= size

        self._there[place] = size, weakref.ref(storage, gone)
        self._add(size)

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def hollow(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The same, of tensors without contents."""
    tensors: dict[str, Any] = {n: mode.from_tensor(t) for n, t in vars(batch).items() if isinstance(t, torch.Tensor)}
    return replace(batch, **tensors)


def _any_number(kind: torch.dtype) -> bool | float | int:
    """In place of one that a tensor without contents cannot give: no flag is up, nothing overflows, and of what is
    counted there is one."""
    if kind.is_floating_point:
        return 0.0
    return 0 if kind.itemsize == 1 else 1


def _saved(engine: Engine, method: Method) -> int:
    """Bytes of a checkpoint: of what every rank writes, this one's part counts as everybody's. The features that a
    router gathers while a task trains are left out: they are small, and how many depends on what they hold."""
    shared = (values for fragment in engine.shards.shares() for values in fragment.tensors().values())
    mine = (*shared, *method.owned().values())
    alone = method.state().values()
    return comm.world() * sum(t.nbytes for t in mine) + sum(t.nbytes for t in alone)


def _storages(tensors: Iterable[torch.Tensor | None]) -> set[torch.UntypedStorage]:
    return {tensor.untyped_storage() for tensor in tensors if tensor is not None}


@contextmanager
def _modules_as_they_are() -> Iterator[None]:
    """A module that is moved keeps its parameters where nothing about them changes; torch would put others in their
    place, which tensors without contents do not allow."""
    original = nn.Module._apply

    def apply(self: nn.Module, move: Any, recurse: bool = True) -> nn.Module:
        for child in self.children():
            child._apply(move)
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None:
                moved = move(tensor.data)
                if (moved.dtype, moved.device) != (tensor.dtype, tensor.device):
                    tensor.data = moved
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]
