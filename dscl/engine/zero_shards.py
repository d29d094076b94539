"""A rank's stretches of what trains: where a DeepSpeed engine keeps them at each ZeRO stage, and how to write them.

DeepSpeed holds them in another place and form at every stage. Here all of it is the same: stretches of flat fp32
masters with their moments, which may be read, written, and brought into the model again.
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
from dscl.engine.matrix_owners import Stretch
from dscl.engine.optimizer import MOMENTS, Fragment


class Shards:
    """Of the trainable tensors of an engine that `deepspeed.initialize` made, around this optimizer of torch's."""

    def __init__(self, deepspeed: Any, optimizer: torch.optim.Optimizer, stage: int) -> None:
        self.stage = stage
        self._module: nn.Module = deepspeed.module
        self._wrapper: Any = deepspeed.optimizer
        self._optimizer = optimizer
        self._kept: dict[str, dict[str, torch.Tensor]] = {}
        self._make_missing_moments()
        self.reset_moments()

    def named(self) -> Iterator[tuple[str, Any]]:
        """The trainable parameters; DeepSpeed hangs attributes on them that torch's type does not have."""
        return ((name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad)

    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole tensors."""
        return {name: _shape(parameter) for name, parameter in self.named()}

    def trainable(self) -> int:
        """How many numbers train."""
        return sum(map(math.prod, self.shapes().values()))

    def fragments(self) -> Iterator[Fragment]:
        """This rank's stretches of all trainable tensors, at any stage. Views: writing into them is training them."""
        masters = self._whole_masters() if self.stage == 0 else {}
        for name, parameter in self.named():
            kept = self._kept.get(name, {})
            if self.stage == 0:
                master = masters[parameter]
                state = self._optimizer.state[master]
                moments = {kind: state[kind].view(-1) for kind in MOMENTS}
                yield Fragment(name, parameter.shape, 0, master.detach().view(-1), moments, master, kept)
            elif self.stage == 3:
                start, stop = stretch(parameter)
                if start < stop:
                    read = parameter._z3_optimizer._get_fp32_opt_state_partition
                    views = [read(parameter, True, kind)[0][: stop - start] for kind in (None, *MOMENTS)]
                    moments = dict(zip(MOMENTS, views[1:], strict=True))
                    holder = self.stepped_apart()[self.sub_group(parameter)]
                    yield Fragment(name, parameter.ds_shape, start, views[0].detach(), moments, holder, kept)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
                place = mapping.hp_fragment_address
                views = [self._optimizer.state[flat][kind].narrow(0, place.start, place.numel) for kind in MOMENTS]
                moments = dict(zip(MOMENTS, views, strict=True))
                master, start = mapping.hp_fragment.detach(), mapping.lp_fragment_address.start
                yield Fragment(name, parameter.shape, start, master, moments, flat, kept)

    def shares(self) -> Iterator[Fragment]:
        """Fragments that together cover every tensor once: where all ranks hold all of it, each gives a part."""
        for fragment in self.fragments():
            if self.stage != 0:
                yield fragment
                continue
            whole = fragment.master.numel()
            start, stop = (whole * r // comm.world() for r in (comm.rank(), comm.rank() + 1))
            if start < stop:
                moments = {kind: value[start:stop] for kind, value in fragment.moments.items()}
                kept = {kind: value[start:stop] for kind, value in fragment.kept.items()}
                yield replace(fragment, start=start, master=fragment.master[start:stop], moments=moments, kept=kept)

    def keep(self, kinds: Iterable[str]) -> None:
        """Further tensors beside every stretch, as long as it; zero at first."""
        self._kept = {f.name: {kind: torch.zeros_like(f.master) for kind in kinds} for f in self.fragments()}

    def sub_group(self, parameter: Any) -> int:
        """Which of the optimizer's tensors, stepped one after the other, holds this rank's part of a parameter."""
        return int(self._wrapper.grad_position[self._wrapper.get_param_id(parameter)][0]) if self.stage == 3 else 0

    def stepped_apart(self) -> list[torch.Tensor]:
        """The optimizer's tensors that are stepped one after the other; none where all are stepped at once."""
        return list(self._wrapper.fp32_partitioned_groups_flat) if self.stage == 3 else []

    @torch.no_grad()
    def whole(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The trainable tensors' masters (all, or these), complete, on every rank. For methods that train little."""
        wanted = None if names is None else set(names)
        shapes = {name: shape for name, shape in self.shapes().items() if wanted is None or name in wanted}
        tensors = {name: torch.zeros(math.prod(shape), device=comm.device()) for name, shape in shapes.items()}
        for share in self.shares():
            if share.name in tensors:
                tensors[share.name][share.start : share.stop] = share.master
        for tensor in tensors.values():  # summed as whole numbers, so that not even the sign of a zero is lost
            comm.sum_(tensor.view(torch.int32))
        return {name: tensor.view(shapes[name]) for name, tensor in tensors.items()}

    def fingerprints(self) -> dict[str, int]:
        """For every trainable tensor a whole number that changes when any of its bits does (but for rare chance)."""
        sums = dict.fromkeys(self.shapes(), 0)
        for share in self.shares():
            sums[share.name] = int(share.master.view(torch.int32).sum(dtype=torch.int64))
        values = comm.sum_(torch.tensor(list(sums.values()), dtype=torch.int64))
        return dict(zip(sums, values.tolist(), strict=True))

    @torch.no_grad()
    def restore(self, read: Callable[[str, str, int, int], torch.Tensor], steps: int) -> None:
        """Write back all that fragments hold; `read(name, kind, start, stop)` gives it, of moments that saw `steps`."""
        for fragment in self.fragments():
            for kind, values in fragment.tensors().items():
                values.copy_(read(fragment.name, kind, fragment.start, fragment.stop))
        for state in self._optimizer.state.values():
            if "step" in state:
                count = state["step"]
                state["step"] = torch.full_like(count, steps) if torch.is_tensor(count) else steps
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the model's own copy of the weights up to the masters, on every rank."""
        if self.stage == 0:
            for parameter, master in self._whole_masters().items():
                parameter.data.copy_(master)
        elif self.stage == 3:
            parameters = dict(self.named())
            for fragment in self.fragments():
                parameters[fragment.name].ds_tensor[: fragment.master.numel()].copy_(fragment.master)
            whole = self._wrapper.persistent_parameters  # small ones, which every rank keeps in full
            if whole:
                whole[0].partition(whole)
                whole[0].all_gather(whole)
        else:
            self._wrapper.update_lp_params()

    def reset_moments(self) -> None:
        """A fresh start of the same optimizer: moments and step counters zero, as if just built."""
        for state in self._optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()

    def steps(self) -> int:
        """How many steps the moments have seen (Adam's bias correction depends on it)."""
        return max((int(state["step"]) for state in self._optimizer.state.values() if "step" in state), default=0)

    def of_others(self, wanted: Collection[str]) -> list[dict[str, Stretch]] | None:
        """What each rank holds of these tensors at stages 1 and 2, without asking: it follows from where they stand in
        their flat group. None at the others, where all ranks hold as much as this one."""
        if self.stage not in (1, 2):
            return None
        ranks, wrapper = range(comm.world()), self._wrapper
        names = {id(parameter): name for name, parameter in self.named()}
        held: list[dict[str, Stretch]] = [{} for _ in ranks]
        if hasattr(wrapper, "bf16_groups"):  # DeepSpeed's other wrapper of stage 1, for bf16: one after the other
            placed = [list(accumulate((p.numel() for p in group[:-1]), initial=0)) for group in wrapper.bf16_groups]
            groups = wrapper.bf16_groups, placed, wrapper.bf16_groups_flat
        else:
            groups = wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, wrapper.bit16_groups_flat
        for group, places, flat in zip(*groups, strict=True):
            share = flat.numel() // comm.world()
            for parameter, place in zip(group, places, strict=True):
                size, name = parameter.numel(), names[id(parameter)]
                for rank in ranks if name in wanted else ():
                    start, stop = (min(max(rank * share + by - place, 0), size) for by in (0, share))
                    if start < stop:
                        held[rank][name] = Stretch(start, stop)
        return held

    def _whole_masters(self) -> dict[nn.Parameter, torch.Tensor]:
        """ZeRO 0: the fp32 tensor behind each trainable parameter (the parameter itself in fp32)."""
        if not hasattr(self._wrapper, "fp32_groups"):
            return {p: p for group in self._optimizer.param_groups for p in group["params"]}
        pairs: Iterable[tuple[Sequence[Any], Sequence[Any]]]
        pairs = zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups, strict=True)
        return {p: master for low, high in pairs for p, master in zip(low, high, strict=True)}

    def _make_missing_moments(self) -> None:
        """torch makes moments at the first step; make them now, so that they can be read and written from the start."""
        held = self.stepped_apart() or [p for group in self._optimizer.param_groups for p in group["params"]]
        for master in held:
            state = self._optimizer.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                for kind in MOMENTS:
                    state[kind] = torch.zeros_like(master, requires_grad=False)


def stretch(parameter: Any) -> tuple[int, int]:
    """What this rank holds of a parameter that ZeRO-3 shards: the last ranks may hold less, or nothing."""
    chunk, whole = parameter.ds_tensor.numel(), parameter.ds_numel
    return min(chunk * comm.rank(), whole), min(chunk * (comm.rank() + 1), whole)


def _shape(parameter: Any) -> torch.Size:
    """Of the whole parameter, of which ZeRO-3 leaves a stand-in."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
