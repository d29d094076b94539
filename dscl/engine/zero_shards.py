"""A rank's shards of the trainable tensors: flat fp32 masters with their moments and a method's extra state.

`ZeroShards` reads, writes, resets, sums and restores them in the same way at every ZeRO stage. Where DeepSpeed stores
them is the layout's business (dscl/engine/zero_layouts.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from dscl.distributed import comm
from dscl.engine.full_shape import full_shape
from dscl.engine.optimizer import MOMENT_NAMES, ParamShard
from dscl.engine.zero_layouts import ZeroLayout


class ZeroShards:
    """The shards of all trainable tensors that the optimizer steps under this layout."""

    def __init__(self, layout: ZeroLayout, optimizer: torch.optim.Optimizer) -> None:
        self._layout = layout
        self._adamw = optimizer
        self._extra_state: dict[str, dict[str, torch.Tensor]] = {}
        self._create_missing_moments()
        self.reset_moments()

    def full_shapes(self) -> dict[str, torch.Size]:
        """The shape of every trainable tensor before sharding, by name."""
        return {name: full_shape(parameter) for name, parameter in self._layout.trainable_parameters()}

    def num_trainable(self) -> int:
        """The number of trainable elements."""
        return sum(map(math.prod, self.full_shapes().values()))

    def local_shards(self) -> Iterator[ParamShard]:
        """This rank's shards of all trainable tensors. They are views: writing into a shard changes the trained
        tensor."""
        for shard in self._layout.local_shards():
            yield replace(shard, extra_state=self._extra_state.get(shard.name, {}))

    def disjoint_shards(self) -> Iterator[ParamShard]:
        """Shards that cover every tensor exactly once over all ranks."""
        return self._layout.disjoint_shards(self.local_shards())

    def add_extra_state(self, names: Iterable[str]) -> None:
        """Create, for each of these names, a zero tensor beside every shard and of its length."""
        self._extra_state = {
            shard.name: {name: torch.zeros_like(shard.master) for name in names} for shard in self.local_shards()
        }

    @torch.no_grad()
    def gather_full_weights(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The whole fp32 masters of the named trainable tensors (None: of all), on every rank. Meant for methods with
        few trainable parameters."""
        requested = None if names is None else set(names)
        shapes = {name: shape for name, shape in self.full_shapes().items() if requested is None or name in requested}
        tensors = {name: torch.zeros(math.prod(shape), device=comm.device()) for name, shape in shapes.items()}
        for shard in self.disjoint_shards():
            if shard.name in tensors:
                tensors[shard.name][shard.start : shard.stop] = shard.master
        for tensor in tensors.values():  # summed as integers, which also preserves the sign of a zero
            comm.all_reduce_sum(tensor.view(torch.int32))
        return {name: tensor.view(shapes[name]) for name, tensor in tensors.items()}

    def weight_fingerprints(self) -> dict[str, int]:
        """A checksum of every trainable tensor, the same on every rank."""
        sums = dict.fromkeys(self.full_shapes(), 0)
        for shard in self.disjoint_shards():
            sums[shard.name] = int(shard.master.view(torch.int32).sum(dtype=torch.int64))
        values = comm.all_reduce_sum(torch.tensor(list(sums.values()), dtype=torch.int64))
        return dict(zip(sums, values.tolist(), strict=True))

    @torch.no_grad()
    def restore_shards(self, read: Callable[[str, str, int, int], torch.Tensor], steps: int) -> None:
        """Load masters, moments and extra state from `read(name, kind, start, stop)`, and set the step count."""
        for shard in self.local_shards():
            for kind, values in shard.state_tensors().items():
                values.copy_(read(shard.name, kind, shard.start, shard.stop))
        for state in self._adamw.state.values():
            if "step" in state:
                count = state["step"]
                state["step"] = torch.full_like(count, steps) if torch.is_tensor(count) else steps
        self.sync_model_weights()

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """Copy the fp32 masters into the model's own weights, on every rank."""
        self._layout.sync_model_weights()

    def reset_moments(self) -> None:
        """Set the optimizer's moments and step counters to zero, as in a new optimizer."""
        for state in self._adamw.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def step_count(self) -> int:
        """The optimizer's step counter, on which Adam's bias correction depends."""
        return max((int(state["step"]) for state in self._adamw.state.values() if "step" in state), default=0)

    def _create_missing_moments(self) -> None:
        """Allocate the moments now. torch would allocate them at the first step, but they are read and written before
        it."""
        for master in itertools.chain.from_iterable(self._layout.step_groups()):
            state = self._adamw.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                for kind in MOMENT_NAMES:
                    state[kind] = torch.zeros_like(master, requires_grad=False)
