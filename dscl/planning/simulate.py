"""A simulated training step: the real engine, DeepSpeed included, on fake tensors that have a size but no data.

The memory of a rank is counted rather than computed from formulas: every tensor that the engine, the method and the
model allocate is tracked from allocation to release. Other ranks do not exist; collectives return at once but count
their bytes. A model of any size can be simulated within seconds, because nothing is stored and nothing is computed.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dscl.data.batches import Batch
from dscl.distributed import comm
from dscl.engine.deepspeed_patches import without_cross_rank_asserts
from dscl.engine.engine import Engine
from dscl.methods.base import Method
from dscl.methods.registry import find_method
from dscl.model.flops import FlopCount, count_flops
from dscl.training.setup import RunSetup, TaskData
from dscl.utils import timers

MAX_STEPS_SEARCHED = 500  # of a task, for its largest micro-batch


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one rank (in bytes), its communication in a step, and sizes of the model."""

    weights: int
    optimizer: int  # the optimizer's state, and master weights where they are tensors of their own
    method_state: int  # what the method keeps on the device: adapter banks, protected subspaces, ...
    gradients: int  # including the buckets in which they are reduced
    activations: int  # and everything else that is released within a step: its share of the peak
    peak: int  # in a step
    host: int  # what the method keeps in the host's memory
    checkpoint: int  # size of a checkpoint, over all ranks
    bytes_sent: Mapping[str, float]  # put into each kind of collective, in a step
    later_tasks: Mapping[str, float]  # what finished tasks will add, by name
    task_end: int  # what the method allocates on the device at a task's end, besides what it keeps
    flop_count: FlopCount | None
    num_parameters: int
    num_trainable: int
    load_imbalance: float | None  # of matrix owners: the work of the busiest rank over the mean


def simulate_step(
    setup: RunSetup, settings: dict[str, Any], micro_batches: Sequence[Batch], micro_batches_per_step: int
) -> MemoryEstimate:
    """Simulate steps of one or two micro-batches under these DeepSpeed settings, with `comm.world_size()` ranks.

    `micro_batches_per_step`: of the real run; the bytes sent are extrapolated to it.
    """
    method = find_method(setup.recipe.method.name)(setup.recipe.method, setup.run_info)
    fake_mode, tracker = FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        for context in (without_cross_rank_asserts(), _keep_parameter_objects(), fake_mode, tracker):
            stack.enter_context(context)
        engine = _build_engine(setup, settings, method)
        engine.simulate_peers()
        later_tasks = method.estimate_memory()
        batches = [to_fake(batch, fake_mode) for batch in micro_batches]
        steps = _run_steps(engine, method, batches, tracker)
        # The first step also allocates and gathers what later steps reuse, so communication is taken from the others.
        sent_by_one, sent_by_all = steps.bytes_sent[1], steps.bytes_sent[-1]
        further = (micro_batches_per_step - 1) * (len(batches) > 1)
        persistent = _measure_persistent_bytes(engine, method)
        persistent_on_device = persistent.weights + persistent.optimizer + persistent.method_state
        gradients = max(0, steps.bytes_before_step - persistent_on_device - persistent.host)
        estimate = MemoryEstimate(
            **persistent._asdict(),
            gradients=gradients,
            activations=max(0, steps.peak - persistent_on_device - gradients - persistent.host),
            peak=steps.peak - persistent.host,
            checkpoint=_checkpoint_bytes(engine, method),
            bytes_sent={kind: size + further * (sent_by_all[kind] - size) for kind, size in sent_by_one.items()},
            later_tasks=later_tasks,
            task_end=int(method.task_end_bytes()),
            flop_count=count_flops(engine.module),
            num_parameters=sum(shape.numel() for shape in engine.full_shapes().values()),
            num_trainable=engine.shards.num_trainable(),
            load_imbalance=engine.load_imbalance(),
        )
        engine.close()
    return estimate


def _build_engine(setup: RunSetup, settings: dict[str, Any], method: Method) -> Engine:
    train = setup.recipe.train
    return Engine(
        settings,
        build=setup.backbone.build,
        read=lambda _name, _shape, start, stop: torch.empty(stop - start),
        prepare=method.prepare,
        constraint=method.constraint,
        gradient_hook=method.gradient_hook,
        precision=train.precision,
        micro_batch=train.micro_batch,
        weight_decay=train.weight_decay,
        grad_clip=train.grad_clip,
    )


class _SimulatedSteps(NamedTuple):
    peak: int  # bytes
    bytes_before_step: int  # allocated when the optimizer's step begins, at most
    bytes_sent: Sequence[Mapping[str, float]]  # in each step, by kind of collective


def _run_steps(engine: Engine, method: Method, batches: Sequence[Batch], tracker: MemoryTracker) -> _SimulatedSteps:
    """Two steps of the first micro-batch, and one of all micro-batches if there are several."""
    before_step, bytes_before_step = engine.optimizer.before_step, 0

    def track_before_step(stepped: Sequence[torch.Tensor]) -> None:
        nonlocal bytes_before_step
        bytes_before_step = max(bytes_before_step, tracker.current)
        if before_step is not None:
            before_step(stepped)

    engine.optimizer.before_step = track_before_step
    peaks, bytes_sent = [], []
    for step_batches in (batches[:1], batches[:1], *([batches] if len(batches) > 1 else [])):
        timers.collect_timings()
        tracker.peak = tracker.current
        engine.step(method.loss, step_batches, targets=1, lr=1e-4)
        peaks.append(tracker.peak)
        bytes_sent.append(timers.collect_timings().bytes_sent)
    return _SimulatedSteps(max(peaks), bytes_before_step, bytes_sent)


class _PersistentBytes(NamedTuple):
    """Bytes that stay allocated from step to step; fields as in `MemoryEstimate`."""

    weights: int
    optimizer: int
    method_state: int
    host: int


def _measure_persistent_bytes(engine: Engine, method: Method) -> _PersistentBytes:
    # The method keeps these tensors in the host's memory; here all tensors are on the CPU.
    on_host = {id(t) for name, t in method.matrix_state_dict().items() if name.endswith("|start")}
    weights = _unique_storages(engine.layout.weight_tensors())
    optimizer_tensors = [t for f in engine.shards.local_shards() for t in (f.master, *f.moments.values())]
    optimizer = _unique_storages(optimizer_tensors) - weights
    shard_state = (t for f in engine.shards.local_shards() for t in f.extra_state.values())
    method_tensors = [*engine.module.buffers(), *shard_state]
    method_tensors += [t for t in method.matrix_state_dict().values() if id(t) not in on_host]
    method_state = _unique_storages(method_tensors) - weights - optimizer
    host_bytes = sum(t.untyped_storage().nbytes() for t in method.matrix_state_dict().values() if id(t) in on_host)
    return _PersistentBytes(
        _storage_bytes(weights), _storage_bytes(optimizer), _storage_bytes(method_state), host_bytes
    )


def largest_micro_batches(setup: RunSetup) -> list[Batch]:
    """The micro-batch of the stream that takes most memory; twice where steps have several micro-batches."""
    best: tuple[int, TaskData, int, int] | None = None
    for task_index in range(1 if setup.method.joint else len(setup.tasks)):
        task_data = setup.training_data(task_index)
        for step in range(min(task_data.sampler.steps_per_epoch, MAX_STEPS_SEARCHED)):
            for index, rows in enumerate(task_data.sampler.micro_batches(step, comm.rank())):
                lengths = [sum(task_data.sampler.sample_length(sample) for sample in row) for row in rows]
                size = len(rows) * max(lengths, default=0)
                if best is None or size > best[0]:
                    best = size, task_data, step, index
    assert best is not None
    _, task_data, step, index = best
    batches = task_data.micro_batches(step)
    return [batches[index]] * min(2, len(batches))


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all tensors alive (`current`) and their maximum (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by the storage's address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _fake_scalar(args[0].dtype)
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._track(tensor.untyped_storage())
        return outputs

    def _track(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        known_size, known = self._sizes.get(address, (0, None))
        if known is not None and known() is storage:
            if known_size != size:  # the storage was resized
                self._sizes[address] = size, known
                self._add(size - known_size)
            return

        def release(reference: weakref.ref[Any]) -> None:
            size, known = self._sizes.get(address, (0, None))
            if known is reference:  # otherwise another storage has this address by now
                del self._sizes[address]
                self.current -= size

        self._sizes[address] = size, weakref.ref(storage, release)
        self._add(size)

    def _add(self, size: int) -> None:
        self.current += size
        self.peak = max(self.peak, self.current)


def to_fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The batch with fake tensors in place of its tensors."""
    tensors: dict[str, Any] = {n: mode.from_tensor(t) for n, t in vars(batch).items() if isinstance(t, torch.Tensor)}
    return replace(batch, **tensors)


def _fake_scalar(dtype: torch.dtype) -> bool | float | int:
    """The number that `.item()` gives for a fake tensor: flags are not set, nothing overflows, counts are one."""
    if dtype.is_floating_point:
        return 0.0
    return 0 if dtype.itemsize == 1 else 1


def _checkpoint_bytes(engine: Engine, method: Method) -> int:
    """Size of a checkpoint, if every rank writes as much as this one.

    The features that a router collects while a task trains are left out: they are small and depend on the data.
    """
    shards = (values for shard in engine.shards.disjoint_shards() for values in shard.state_tensors().values())
    per_rank = (*shards, *method.matrix_state_dict().values())
    main_rank_only = method.state_dict().values()
    return comm.world_size() * sum(t.nbytes for t in per_rank) + sum(t.nbytes for t in main_rank_only)


def _unique_storages(tensors: Iterable[torch.Tensor | None]) -> set[torch.UntypedStorage]:
    return {tensor.untyped_storage() for tensor in tensors if tensor is not None}


def _storage_bytes(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


@contextmanager
def _keep_parameter_objects() -> Iterator[None]:
    """Make `module.to(...)` change parameters in place; torch would swap them, which fake tensors do not allow."""
    original = nn.Module._apply

    def apply_in_place(self: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
        for child in self.children():
            child._apply(convert)
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None:
                converted = convert(tensor.data)
                if (converted.dtype, converted.device) != (tensor.dtype, tensor.device):
                    tensor.data = converted
        return self

    nn.Module._apply = apply_in_place  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]
