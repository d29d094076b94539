"""Access to a rank's shards of the trainable tensors at every ZeRO stage.

DeepSpeed stores master weights and optimizer state differently at each stage. `ZeroShards` presents them uniformly, as
flat fp32 masters with their moments, which can be read, written, and copied back into the model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from dscl.distributed import comm
from dscl.engine.matrix_owners import ShardSlice
from dscl.engine.optimizer import MOMENT_NAMES, ParamShard


class ZeroShards:
    """The shards of all trainable tensors of a DeepSpeed engine that was built around the given torch optimizer."""

    def __init__(self, deepspeed: Any, optimizer: torch.optim.Optimizer, stage: int) -> None:
        self.stage = stage
        self._module: nn.Module = deepspeed.module
        self._zero_optimizer: Any = deepspeed.optimizer
        self._adamw = optimizer
        self._extra_state: dict[str, dict[str, torch.Tensor]] = {}
        self._create_missing_moments()
        self.reset_moments()

    def trainable_parameters(self) -> Iterator[tuple[str, Any]]:
        """Names and trainable parameters. They are typed `Any` because DeepSpeed adds attributes to them."""
        return ((name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad)

    def full_shapes(self) -> dict[str, torch.Size]:
        """The shape of every trainable tensor before sharding, by name."""
        return {name: _full_shape(parameter) for name, parameter in self.trainable_parameters()}

    def num_trainable(self) -> int:
        """The number of trainable elements."""
        return sum(map(math.prod, self.full_shapes().values()))

    def local_shards(self) -> Iterator[ParamShard]:
        """This rank's shards of all trainable tensors. They are views: writing into a shard changes the trained
        tensor."""
        masters = self._full_masters() if self.stage == 0 else {}
        for name, parameter in self.trainable_parameters():
            extra_state = self._extra_state.get(name, {})
            if self.stage == 0:
                master = masters[parameter]
                state = self._adamw.state[master]
                moments = {kind: state[kind].view(-1) for kind in MOMENT_NAMES}
                yield ParamShard(name, parameter.shape, 0, master.detach().view(-1), moments, master, extra_state)
            elif self.stage == 3:
                start, stop = shard_slice(parameter)
                if start < stop:
                    read = parameter._z3_optimizer._get_fp32_opt_state_partition
                    views = [read(parameter, True, kind)[0][: stop - start] for kind in (None, *MOMENT_NAMES)]
                    moments = dict(zip(MOMENT_NAMES, views[1:], strict=True))
                    optimizer_tensor = self.sub_group_tensors()[self.sub_group_index(parameter)]
                    yield ParamShard(
                        name, parameter.ds_shape, start, views[0].detach(), moments, optimizer_tensor, extra_state
                    )
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                flat_tensor = self._adamw.param_groups[mapping.param_group_index]["params"][0]
                offset = mapping.hp_fragment_address
                views = [
                    self._adamw.state[flat_tensor][kind].narrow(0, offset.start, offset.numel) for kind in MOMENT_NAMES
                ]
                moments = dict(zip(MOMENT_NAMES, views, strict=True))
                master, start = mapping.hp_fragment.detach(), mapping.lp_fragment_address.start
                yield ParamShard(name, parameter.shape, start, master, moments, flat_tensor, extra_state)

    def disjoint_shards(self) -> Iterator[ParamShard]:
        """Shards that cover every tensor exactly once over all ranks. At ZeRO 0, where every rank holds all tensors,
        each rank yields its part of each tensor."""
        for shard in self.local_shards():
            if self.stage != 0:
                yield shard
                continue
            num_elements = shard.master.numel()
            start, stop = (num_elements * r // comm.world_size() for r in (comm.rank(), comm.rank() + 1))
            if start < stop:
                moments = {kind: value[start:stop] for kind, value in shard.moments.items()}
                extra_state = {kind: value[start:stop] for kind, value in shard.extra_state.items()}
                yield replace(
                    shard, start=start, master=shard.master[start:stop], moments=moments, extra_state=extra_state
                )

    def add_extra_state(self, names: Iterable[str]) -> None:
        """Create, for each of these names, a zero tensor beside every shard and of its length."""
        self._extra_state = {
            shard.name: {name: torch.zeros_like(shard.master) for name in names} for shard in self.local_shards()
        }

    def sub_group_index(self, parameter: Any) -> int:
        """The index, in `sub_group_tensors`, of the tensor that holds this rank's shard of a parameter; 0 below ZeRO
        3."""
        if self.stage != 3:
            return 0
        return int(self._zero_optimizer.grad_position[self._zero_optimizer.get_param_id(parameter)][0])

    def sub_group_tensors(self) -> list[torch.Tensor]:
        """ZeRO-3's sub-groups: the optimizer's tensors that are stepped one after the other. Empty below ZeRO 3, where
        all are stepped together."""
        return list(self._zero_optimizer.fp32_partitioned_groups_flat) if self.stage == 3 else []

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
        if self.stage == 0:
            for parameter, master in self._full_masters().items():
                parameter.data.copy_(master)
        elif self.stage == 3:
            parameters = dict(self.trainable_parameters())
            for shard in self.local_shards():
                parameters[shard.name].ds_tensor[: shard.master.numel()].copy_(shard.master)
            persistent = self._zero_optimizer.persistent_parameters  # small ones, of which every rank has the whole
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
        else:
            self._zero_optimizer.update_lp_params()

    def reset_moments(self) -> None:
        """Set the optimizer's moments and step counters to zero, as in a new optimizer."""
        for state in self._adamw.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def step_count(self) -> int:
        """The optimizer's step counter, on which Adam's bias correction depends."""
        return max((int(state["step"]) for state in self._adamw.state.values() if "step" in state), default=0)

    def peer_slices(self, requested: Collection[str]) -> list[dict[str, ShardSlice]] | None:
        """Every rank's slices of the requested tensors at ZeRO 1 and 2, computed without communication from the
        tensors' positions in DeepSpeed's flat groups. None at the other stages, where all ranks hold as much as this
        one."""
        if self.stage not in (1, 2):
            return None
        ranks, wrapper = range(comm.world_size()), self._zero_optimizer
        names = {id(parameter): name for name, parameter in self.trainable_parameters()}
        slices: list[dict[str, ShardSlice]] = [{} for _ in ranks]
        if hasattr(wrapper, "bf16_groups"):  # BF16_Optimizer (ZeRO 1 with bf16) packs tensors one after another
            offsets = [list(accumulate((p.numel() for p in group[:-1]), initial=0)) for group in wrapper.bf16_groups]
            groups = wrapper.bf16_groups, offsets, wrapper.bf16_groups_flat
        else:
            groups = wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, wrapper.bit16_groups_flat
        for group, group_offsets, flat_tensor in zip(*groups, strict=True):
            chunk = flat_tensor.numel() // comm.world_size()
            for parameter, offset in zip(group, group_offsets, strict=True):
                size, name = parameter.numel(), names[id(parameter)]
                for rank in ranks if name in requested else ():
                    start, stop = (min(max(rank * chunk + length - offset, 0), size) for length in (0, chunk))
                    if start < stop:
                        slices[rank][name] = ShardSlice(start, stop)
        return slices

    def _full_masters(self) -> dict[nn.Parameter, torch.Tensor]:
        """At ZeRO 0: the fp32 master of each trainable parameter. In fp32 it is the parameter itself."""
        if not hasattr(self._zero_optimizer, "fp32_groups"):
            return {p: p for group in self._adamw.param_groups for p in group["params"]}
        pairs: Iterable[tuple[Sequence[Any], Sequence[Any]]]
        pairs = zip(self._zero_optimizer.fp16_groups, self._zero_optimizer.fp32_groups, strict=True)
        return {p: master for low, high in pairs for p, master in zip(low, high, strict=True)}

    def _create_missing_moments(self) -> None:
        """Allocate the moments now. torch would allocate them at the first step, but they are read and written before
        it."""
        masters = self.sub_group_tensors() or [p for group in self._adamw.param_groups for p in group["params"]]
        for master in masters:
            state = self._adamw.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                for kind in MOMENT_NAMES:
                    state[kind] = torch.zeros_like(master, requires_grad=False)


def shard_slice(parameter: Any) -> tuple[int, int]:
    """This rank's (start, stop) in a flattened parameter that ZeRO-3 shards. The last ranks may hold fewer elements,
    or none."""
    chunk, num_elements = parameter.ds_tensor.numel(), parameter.ds_numel
    return min(chunk * comm.rank(), num_elements), min(chunk * (comm.rank() + 1), num_elements)


def _full_shape(parameter: Any) -> torch.Size:
    """The parameter's shape before sharding. ZeRO-3 replaces the parameter itself by an empty tensor."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
