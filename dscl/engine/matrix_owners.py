"""Every constrained matrix has one owner rank, which does the work that needs the whole matrix.

Owners are assigned so that the work is balanced over the ranks. The matrices are processed in rounds: one all-to-all
sends the shards of a few matrices to each owner. If the owners changed the matrices, a second all-to-all returns the
shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dscl.distributed import comm

MAX_ROUND_ELEMENTS = 1 << 25  # per owner and round; a larger matrix is processed alone


class Constraint(Protocol):
    """A constraint on some of the trained matrices. `project_weight` and `project_gradient` are called on a matrix's
    owner only."""

    project_every: int  # steps between projections; one always comes before a checkpoint and at the end of a task
    project_gradients: bool  # whether gradients are projected too, before every step

    def matrix_costs(self) -> Mapping[str, float]:
        """The work per projection of each constrained matrix, by its name."""

    def set_owned(self, names: Sequence[str], device: torch.device) -> None:
        """Receive the names of the matrices that this rank owns, and the device on which they will be passed."""

    def project_weight(self, name: str, weight: torch.Tensor) -> None:
        """Change a weight in place so that it satisfies the constraint."""

    def project_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Change a gradient in place so that a step along it would satisfy the constraint."""


def assign_owners(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """An owner rank for every matrix. Greedy: the most expensive matrix first, each to the least loaded rank."""
    load = [0.0] * ranks
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owner] += costs[name]
        owners[name] = owner
    return owners


def load_imbalance(costs: Mapping[str, float], ranks: int) -> float:
    """The most loaded rank's work divided by the mean over the ranks, with the owners of `assign_owners`."""
    load = dict.fromkeys(range(ranks), 0.0)
    for name, owner in assign_owners(costs, ranks).items():
        load[owner] += costs[name]
    return max(load.values()) * ranks / sum(load.values())


@dataclass(frozen=True)
class ShardSlice:
    """The range of a flattened matrix's elements that a rank holds."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ExchangeRound:
    """This rank's part in one round: names of matrices, in the order in which their shards are packed."""

    owned: list[str]  # this rank's matrices in the round
    needs_gather: bool  # whether any owner lacks a part of its matrix
    gather_sends: list[list[str]]  # for each rank: the matrices of which this rank sends it a shard
    gather_receives: list[list[str]]  # for each rank: the matrices of which it sends this rank a shard
    return_sends: list[list[str]]  # for each rank: this rank's matrices whose changed shards it gets back
    return_receives: list[list[str]]  # for each rank: its matrices whose changed shards this rank gets back


class OwnerExchange:
    """Moves shards of matrices to the matrices' owners and back."""

    def __init__(
        self,
        owners: Mapping[str, int],
        shapes: Mapping[str, torch.Size],
        local_slices: Mapping[str, ShardSlice],
        device: torch.device,
    ) -> None:
        """`local_slices`: this rank's slice of each matrix; a matrix of which it holds nothing is left out."""
        self.owners, self.shapes, self.device = owners, shapes, device
        self._num_elements = {name: math.prod(shape) for name, shape in shapes.items()}
        self.rank_slices: list[dict[str, ShardSlice]] = comm.all_gather_objects(dict(local_slices))
        self._planned_rounds: dict[tuple[tuple[str, ...], int], list[ExchangeRound]] = {}

    def apply_on_owners(
        self,
        names: Sequence[str],
        local_tensors: Mapping[str, torch.Tensor],
        matrix_fn: Callable[[str, torch.Tensor], None],
        *,
        write_back: bool,
        max_elements: int = MAX_ROUND_ELEMENTS,
        on_progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Call `matrix_fn(name, matrix)` for every named matrix, on its owner. All ranks pass the same names.

        `local_tensors`: this rank's shards, flat. With `write_back`, changes that `matrix_fn` makes to the matrix are
        returned into `local_tensors`. `max_elements`: per owner and round.
        """
        key = tuple(names), max_elements
        if key not in self._planned_rounds:
            self._planned_rounds[key] = [
                self._plan_round(part) for part in self._split_into_rounds(names, max_elements)
            ]
        plan = self._planned_rounds[key]
        for number, round_ in enumerate(plan):
            matrices = self._gather_owned_matrices(round_, local_tensors)
            for name, values in matrices.items():
                matrix_fn(name, values.view(self.shapes[name]))
            if write_back:
                self._return_shards(round_, local_tensors, matrices)
            del matrices
            on_progress(number + 1, len(plan))

    def _split_into_rounds(self, names: Sequence[str], max_elements: int) -> list[list[str]]:
        """Split the names so that no owner gets more than `max_elements` in a round, unless by a single matrix."""
        rounds: list[list[str]] = []
        current_round: dict[int, int] = {}  # of each owner
        num_elements: dict[int, int] = {}  # of each owner, in its current round
        for name in names:
            owner, size = self.owners[name], self._num_elements[name]
            if owner not in current_round or num_elements[owner] + size > max_elements:
                current_round[owner], num_elements[owner] = current_round.get(owner, -1) + 1, 0
            num_elements[owner] += size
            if current_round[owner] == len(rounds):
                rounds.append([])
            rounds[current_round[owner]].append(name)
        return rounds

    def _plan_round(self, names: Sequence[str]) -> ExchangeRound:
        """Plan which shards this rank sends and receives. An owner that holds its whole matrix (ZeRO 0) is sent
        nothing."""
        me, ranks = comm.rank(), range(comm.world_size())
        incomplete = [name for name in names if not self._is_complete_at_owner(name)]
        return ExchangeRound(
            owned=[name for name in names if self.owners[name] == me],
            needs_gather=bool(incomplete),
            gather_sends=[
                [name for name in incomplete if self.owners[name] == rank and self._slice_size(me, name)]
                for rank in ranks
            ],
            gather_receives=[
                [name for name in incomplete if self.owners[name] == me and self._slice_size(rank, name)]
                for rank in ranks
            ],
            return_sends=[
                [name for name in names if self.owners[name] == me and self._needs_write_back(rank, name)]
                for rank in ranks
            ],
            return_receives=[
                [name for name in names if self.owners[name] == rank and self._needs_write_back(me, name)]
                for rank in ranks
            ],
        )

    def _slice_size(self, rank: int, name: str) -> int:
        """How many elements of a matrix a rank holds."""
        return self.rank_slices[rank][name].size if name in self.rank_slices[rank] else 0

    def _is_complete_at_owner(self, name: str) -> bool:
        """Whether the matrix's owner holds all of its elements."""
        return self._slice_size(self.owners[name], name) == self._num_elements[name]

    def _needs_write_back(self, rank: int, name: str) -> bool:
        """Whether a rank must receive its shard after the owner changed the matrix."""
        return bool(self._slice_size(rank, name)) and not (
            rank == self.owners[name] and self._is_complete_at_owner(name)
        )

    def _gather_owned_matrices(
        self, round_: ExchangeRound, local_tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """This rank's matrices of a round, whole and flat. A matrix that this rank holds completely is not copied."""
        matrices = {
            name: local_tensors[name].to(self.device)
            if self._is_complete_at_owner(name)
            else torch.empty(self._num_elements[name], device=self.device)
            for name in round_.owned
        }
        if not round_.needs_gather:
            return matrices
        received = self._all_to_all(
            [[local_tensors[name] for name in names] for names in round_.gather_sends],
            [[self._slice_size(rank, name) for name in names] for rank, names in enumerate(round_.gather_receives)],
        )
        for rank, names in enumerate(round_.gather_receives):
            for name, values in zip(names, received[rank], strict=True):
                shard = self.rank_slices[rank][name]
                matrices[name][shard.start : shard.stop] = values
        return matrices

    def _return_shards(
        self, round_: ExchangeRound, local_tensors: Mapping[str, torch.Tensor], matrices: Mapping[str, torch.Tensor]
    ) -> None:
        """Send every rank its shards of the changed matrices, and write the received ones into `local_tensors`."""
        me = comm.rank()
        for name, values in matrices.items():
            if self._is_complete_at_owner(name) and values.data_ptr() != local_tensors[name].data_ptr():
                local_tensors[name].copy_(values)  # the matrix was copied to another device
        sends = []
        for rank, names in enumerate(round_.return_sends):
            slices = self.rank_slices[rank]
            sends.append([matrices[name][slices[name].start : slices[name].stop] for name in names])
        received = self._all_to_all(
            sends, [[self._slice_size(me, name) for name in names] for names in round_.return_receives]
        )
        for names, shards in zip(round_.return_receives, received, strict=True):
            for name, values in zip(names, shards, strict=True):
                local_tensors[name].copy_(values)

    def _all_to_all(
        self, sends: Sequence[Sequence[torch.Tensor]], receive_sizes: Sequence[Sequence[int]]
    ) -> list[tuple[torch.Tensor, ...]]:
        """Send each rank its list of shards; return the list of shards, of these sizes, that each rank sent."""
        if comm.world_size() == 1:
            return [()]
        packed = [
            torch.cat([shard.to(self.device) for shard in shards]) if shards else torch.empty(0, device=self.device)
            for shards in sends
        ]
        received = comm.all_to_all(packed, [sum(sizes) for sizes in receive_sizes])
        return [
            values.split(list(sizes)) if sizes else () for values, sizes in zip(received, receive_sizes, strict=True)
        ]
