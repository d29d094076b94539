"""How ZeRO distributes weights, fp32 masters and optimizer state over the ranks: one class for each layout.

    class                     ZeRO            a rank holds
    ReplicatedLayout       0 in bf16/fp16  all weights, and an fp32 master of each
    ReplicatedFp32Layout   0 in fp32       all weights, which are their own masters
    FlatPartitionLayout    1 and 2         all weights, and a slice of the masters, packed into flat tensors
    ParamPartitionLayout   3               a slice of every weight, and of its master

`choose_layout` alone looks at the stage. A layout is a class that builds and loads the module first; it is instantiated
with the DeepSpeed engine around that module. The attributes of DeepSpeed's optimizers and parameters that are read here
were checked against DeepSpeed 0.19.8, and a test looks them up in the installed one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
from torch import nn

from dscl.distributed import comm
from dscl.engine.full_shape import full_shape
from dscl.engine.matrix_owners import ShardSlice
from dscl.engine.optimizer import MOMENT_NAMES, ParamShard

ReadWeights = Callable[[str, torch.Size, int, int], torch.Tensor]  # (name, shape, start, stop) -> flat values


def choose_layout(zero_stage: int, precision: str) -> type[ZeroLayout]:
    """The layout that DeepSpeed uses at this stage."""
    if zero_stage == 0:
        return ReplicatedFp32Layout if precision == "fp32" else ReplicatedLayout
    return ParamPartitionLayout if zero_stage == 3 else FlatPartitionLayout


@torch.no_grad()
def load_parameters(module: nn.Module, read: ReadWeights) -> None:
    """Load every parameter of a module that is not sharded from `read(name, shape, start, stop)`."""
    for name, parameter in module.named_parameters():
        parameter.copy_(read(name, parameter.shape, 0, parameter.numel()).view(parameter.shape))


class ZeroLayout(ABC):
    """The interface of the layouts, with the answers that most of them give."""

    deepspeed_clips = True  # whether DeepSpeed clips gradients within its step, and returns their norm
    forward_needs_all_ranks = False  # whether a forward pass is a collective

    def __init__(self, deepspeed_engine: Any, adamw: torch.optim.Optimizer) -> None:
        self._module: nn.Module = deepspeed_engine.module
        self._zero_optimizer: Any = deepspeed_engine.optimizer
        self._adamw = adamw

    # ---- before the DeepSpeed engine is built

    @staticmethod
    def build_module(build: Callable[[], nn.Module], config: Mapping[str, Any], device: torch.device) -> nn.Module:
        """Build the module on the device. `config`: DeepSpeed's."""
        return build().to(device)

    @staticmethod
    def load_parameters(module: nn.Module, read: ReadWeights) -> None:
        """Load the parameters of `build_module`'s result, of each only this rank's part."""
        load_parameters(module, read)

    # ---- what this rank holds

    def trainable_parameters(self) -> Iterator[tuple[str, Any]]:
        """Names and trainable parameters. They are typed `Any` because DeepSpeed adds attributes to them."""
        return ((name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad)

    def weight_tensors(self) -> list[torch.Tensor]:
        """The tensors in which this rank stores the model's own weights."""
        return [parameter.data for parameter in self._module.parameters()]

    @abstractmethod
    def local_shards(self) -> Iterator[ParamShard]:
        """This rank's shards of all trainable tensors. They are views: writing into a shard changes the trained
        tensor."""

    def disjoint_shards(self, shards: Iterable[ParamShard]) -> Iterator[ParamShard]:
        """Of these local shards, the parts that together cover every tensor exactly once over all ranks."""
        yield from shards

    @abstractmethod
    def sync_model_weights(self) -> None:
        """Copy the fp32 masters into the model's own weights, on every rank."""

    def sum_over_shards(self, values: torch.Tensor) -> torch.Tensor:
        """Sum results that every rank has computed from its local shards, so that the sum covers whole tensors."""
        return comm.all_reduce_sum(values.to(comm.device())).to(values.device)

    def peer_slices(self, names: Collection[str]) -> list[dict[str, ShardSlice]] | None:
        """Every rank's slices of these tensors, computed without communication; None if every rank holds as much as
        this one."""
        return None

    # ---- how the optimizer steps

    def step_groups(self) -> list[list[torch.Tensor]]:
        """The optimizer's tensors, in groups that are stepped one after the other."""
        return [[tensor for group in self._adamw.param_groups for tensor in group["params"]]]

    def step_group_of(self, parameter: Any) -> int:
        """The index of the group in `step_groups` to which the parameter's master belongs."""
        return 0

    def clip_gradients(self, max_norm: float) -> torch.Tensor | None:
        """Clip gradients (0: only measure them) and return their norm, before DeepSpeed's step; None where DeepSpeed
        clips."""
        return None

    @contextmanager
    def without_clipping(self) -> Iterator[None]:
        """A context in which DeepSpeed's step does not clip."""
        original = self._zero_optimizer.clip_grad
        self._zero_optimizer.clip_grad = 0.0
        try:
            yield
        finally:
            self._zero_optimizer.clip_grad = original

    def loss_scaler(self) -> Any:
        """DeepSpeed's object for fp16's loss scaling."""
        return self._zero_optimizer.loss_scaler


class ReplicatedLayout(ZeroLayout):
    """ZeRO 0 in bf16 or fp16: every rank holds all tensors, and in DeepSpeed's `FP16_UnfusedOptimizer` an fp32 master
    of each."""

    def local_shards(self) -> Iterator[ParamShard]:
        masters = self._masters()
        for name, parameter in self.trainable_parameters():
            master = masters[parameter]
            state = self._adamw.state[master]
            moments = {kind: state[kind].view(-1) for kind in MOMENT_NAMES}
            yield ParamShard(name, parameter.shape, 0, master.detach().view(-1), moments, master)

    def disjoint_shards(self, shards: Iterable[ParamShard]) -> Iterator[ParamShard]:
        """Every rank yields its part of each tensor."""
        for shard in shards:
            num_elements = shard.master.numel()
            start, stop = (num_elements * r // comm.world_size() for r in (comm.rank(), comm.rank() + 1))
            if start < stop:
                moments = {kind: value[start:stop] for kind, value in shard.moments.items()}
                extra_state = {kind: value[start:stop] for kind, value in shard.extra_state.items()}
                yield replace(
                    shard, start=start, master=shard.master[start:stop], moments=moments, extra_state=extra_state
                )

    def sync_model_weights(self) -> None:
        for parameter, master in self._masters().items():
            parameter.data.copy_(master)

    def sum_over_shards(self, values: torch.Tensor) -> torch.Tensor:
        """Every rank has all shards, so there is nothing to add."""
        return values

    def loss_scaler(self) -> Any:
        return self._zero_optimizer.loss_scale_config

    def _masters(self) -> dict[nn.Parameter, torch.Tensor]:
        """The fp32 master of each trainable parameter."""
        pairs: Iterable[tuple[Sequence[Any], Sequence[Any]]]
        pairs = zip(self._zero_optimizer.fp16_groups, self._zero_optimizer.fp32_groups, strict=True)
        return {p: master for low, high in pairs for p, master in zip(low, high, strict=True)}


class ReplicatedFp32Layout(ReplicatedLayout):
    """ZeRO 0 in fp32: the parameters are their own masters, and DeepSpeed steps AdamW itself. It would clip without
    returning the gradient's norm, so it is told not to, and `clip_gradients` does."""

    deepspeed_clips = False

    def clip_gradients(self, max_norm: float) -> torch.Tensor | None:
        return nn.utils.clip_grad_norm_(self._module.parameters(), max_norm or math.inf)

    @contextmanager
    def without_clipping(self) -> Iterator[None]:
        yield

    def _masters(self) -> dict[nn.Parameter, torch.Tensor]:
        return {p: p for group in self._adamw.param_groups for p in group["params"]}


class FlatPartitionLayout(ZeroLayout):
    """ZeRO 1 and 2: DeepSpeed packs the parameters into flat tensors, and every rank holds the masters of one slice of
    each flat tensor. A parameter's `_hp_mapping` says where its part of this rank's slice is."""

    def local_shards(self) -> Iterator[ParamShard]:
        for name, parameter in self.trainable_parameters():
            mapping = parameter._hp_mapping
            if mapping is None:  # this rank holds nothing of the parameter
                continue
            flat_tensor = self._adamw.param_groups[mapping.param_group_index]["params"][0]
            offset, state = mapping.hp_fragment_address, self._adamw.state[flat_tensor]
            moments = {kind: state[kind].narrow(0, offset.start, offset.numel) for kind in MOMENT_NAMES}
            master, start = mapping.hp_fragment.detach(), mapping.lp_fragment_address.start
            yield ParamShard(name, parameter.shape, start, master, moments, flat_tensor)

    def sync_model_weights(self) -> None:
        self._zero_optimizer.update_lp_params()

    def peer_slices(self, names: Collection[str]) -> list[dict[str, ShardSlice]] | None:
        """Read from the tensors' positions in the flat tensors."""
        ranks = range(comm.world_size())
        name_of = {id(parameter): name for name, parameter in self.trainable_parameters()}
        slices: list[dict[str, ShardSlice]] = [{} for _ in ranks]
        for group, group_offsets, flat_tensor in self._flat_groups():
            chunk = flat_tensor.numel() // comm.world_size()
            for parameter, offset in zip(group, group_offsets, strict=True):
                size, name = parameter.numel(), name_of[id(parameter)]
                for rank in ranks if name in names else ():
                    start, stop = (min(max(rank * chunk + length - offset, 0), size) for length in (0, chunk))
                    if start < stop:
                        slices[rank][name] = ShardSlice(start, stop)
        return slices

    def _flat_groups(self) -> Iterable[tuple[Sequence[nn.Parameter], Sequence[int], torch.Tensor]]:
        """The parameters of each flat tensor, their offsets in it, and the flat tensor."""
        optimizer = self._zero_optimizer
        if isinstance(optimizer, BF16_Optimizer):  # ZeRO 1 in bf16 with fp32 gradients: one tensor after another
            offsets = [list(accumulate((p.numel() for p in group[:-1]), initial=0)) for group in optimizer.bf16_groups]
            return zip(optimizer.bf16_groups, offsets, optimizer.bf16_groups_flat, strict=True)
        return zip(
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.bit16_groups_flat,
            strict=True,
        )


class ParamPartitionLayout(ZeroLayout):
    """ZeRO 3: every rank holds one slice of each flattened parameter (`ds_tensor`) and of its master. The masters are
    packed into sub-groups, which are stepped one after the other."""

    forward_needs_all_ranks = True

    @staticmethod
    def build_module(build: Callable[[], nn.Module], config: Mapping[str, Any], device: torch.device) -> nn.Module:
        """Shard every layer when it is created, so that no rank ever holds the whole model."""
        # Override the device only. A dtype override would also round the rotary embedding's frequencies.
        with deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[DeepSpeedTensorOverride.device]):
            return build()

    @staticmethod
    @torch.no_grad()
    def load_parameters(module: nn.Module, read: ReadWeights) -> None:
        parameters: Iterable[tuple[str, Any]] = module.named_parameters()
        for name, parameter in parameters:
            start, stop = _local_slice(parameter)
            parameter.ds_tensor.zero_()  # the last rank's padding
            if start < stop:
                parameter.ds_tensor[: stop - start].copy_(read(name, parameter.ds_shape, start, stop))

    def weight_tensors(self) -> list[torch.Tensor]:
        parameters: Iterable[Any] = self._module.parameters()  # their data is empty, unless a small one stays gathered
        return [tensor for parameter in parameters for tensor in (parameter.data, parameter.ds_tensor)]

    def local_shards(self) -> Iterator[ParamShard]:
        for name, parameter in self.trainable_parameters():
            start, stop = _local_slice(parameter)
            if start == stop:
                continue
            read = self._zero_optimizer._get_fp32_opt_state_partition
            views = [read(parameter, True, kind)[0][: stop - start] for kind in (None, *MOMENT_NAMES)]
            moments = dict(zip(MOMENT_NAMES, views[1:], strict=True))
            sub_group = self._zero_optimizer.fp32_partitioned_groups_flat[self.step_group_of(parameter)]
            yield ParamShard(name, full_shape(parameter), start, views[0].detach(), moments, sub_group)

    def sync_model_weights(self) -> None:
        parameters = dict(self.trainable_parameters())
        for shard in self.local_shards():
            parameters[shard.name].ds_tensor[: shard.master.numel()].copy_(shard.master)
        persistent = self._zero_optimizer.persistent_parameters  # small ones, of which every rank has the whole
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def step_groups(self) -> list[list[torch.Tensor]]:
        return [[sub_group] for sub_group in self._zero_optimizer.fp32_partitioned_groups_flat]

    def step_group_of(self, parameter: Any) -> int:
        return int(self._zero_optimizer.grad_position[self._zero_optimizer.get_param_id(parameter)][0])


def _local_slice(parameter: Any) -> tuple[int, int]:
    """This rank's (start, stop) in a flattened parameter that ZeRO-3 shards. The last ranks may hold fewer elements,
    or none."""
    chunk, num_elements = parameter.ds_tensor.numel(), parameter.ds_numel
    return min(chunk * comm.rank(), num_elements), min(chunk * (comm.rank() + 1), num_elements)
