"""One owner a matrix: work that needs a whole matrix is done by one rank, which the stretches reach in rounds.

The matrices are dealt so that the ranks' work is balanced. In a round every owner gets its next few, all at once, by
one exchange; where its work changed them, a second exchange brings the stretches back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dscl.distributed import comm

BUCKET = 1 << 25  # elements that an owner takes in at once, if one matrix is not larger already


class Constraint(Protocol):
    """What must hold for some of the trained matrices. Each call is made on the matrix's owner alone."""

    every: int  # optimizer steps after which it is made to hold; it always is where a checkpoint or a task's end comes
    gradients: bool  # whether gradients are changed as well, before every step

    def costs(self) -> Mapping[str, float]:
        """The matrices by name, and how much work each makes."""

    def own(self, names: Sequence[str], device: torch.device) -> None:
        """These matrices are this rank's, and will be shown to it on this device."""

    def hold(self, name: str, weight: torch.Tensor) -> None:
        """Change a weight in place so that it meets the constraint."""

    def free(self, name: str, gradient: torch.Tensor) -> None:
        """Change a gradient in place so that a step along it would meet the constraint."""


def deal(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """An owner for every matrix: the most work first, each to the rank that has least so far."""
    load = [0.0] * ranks
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owner] += costs[name]
        owners[name] = owner
    return owners


def busiest(costs: Mapping[str, float], ranks: int) -> float:
    """The work of the owner that has most, over the mean."""
    load = dict.fromkeys(range(ranks), 0.0)
    for name, owner in deal(costs, ranks).items():
        load[owner] += costs[name]
    return max(load.values()) * ranks / sum(load.values())


@dataclass(frozen=True)
class Stretch:
    """What part of a matrix's elements (flat) a rank holds."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Round:
    """One exchange there and one back: names of matrices, in the order in which their stretches are packed."""

    mine: list[str]
    travels: bool  # whether anything has to reach its owner first
    out: list[list[str]]  # what I send each rank, which owns it
    coming: list[list[str]]  # what each rank sends me
    back: list[list[str]]  # what of mine each rank gets back
    returning: list[list[str]]  # what each rank gives me back


class Rounds:
    """The way of the stretches of some matrices to their owners and back."""

    def __init__(
        self,
        owners: Mapping[str, int],
        shapes: Mapping[str, torch.Size],
        held: Mapping[str, Stretch],
        device: torch.device,
    ) -> None:
        """`held`: what this rank holds of each matrix, or nothing."""
        self.owners, self.shapes, self.device = owners, shapes, device
        self._sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self.held: list[dict[str, Stretch]] = comm.gather(dict(held))
        self._plans: dict[tuple[tuple[str, ...], int], list[Round]] = {}

    def visit(
        self,
        names: Sequence[str],
        views: Mapping[str, torch.Tensor],
        act: Callable[[str, torch.Tensor], None],
        *,
        change: bool,
        at_once: int = BUCKET,
        said: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Every named matrix is shown, complete, to its owner's `act`, which may write into it if it is to `change`.

        `views` are this rank's stretches, flat; all ranks call with the same names.
        """
        key = tuple(names), at_once
        if key not in self._plans:
            self._plans[key] = [self._round(part) for part in self._parts(names, at_once)]
        plan = self._plans[key]
        for number, turn in enumerate(plan):
            whole = self._collect(turn, views)
            for name, values in whole.items():
                act(name, values.view(self.shapes[name]))
            if change:
                self._return(turn, views, whole)
            del whole
            said(number + 1, len(plan))

    def _parts(self, names: Sequence[str], at_once: int) -> list[list[str]]:
        """The names in parts, in each of which no owner takes more than `at_once` elements, if not by one matrix."""
        parts: list[list[str]] = []
        place: dict[int, int] = {}  # of each owner's present part
        taken: dict[int, int] = {}
        for name in names:
            owner, size = self.owners[name], self._sizes[name]
            if owner not in place or taken[owner] + size > at_once:
                place[owner], taken[owner] = place.get(owner, -1) + 1, 0
            taken[owner] += size
            if place[owner] == len(parts):
                parts.append([])
            parts[place[owner]].append(name)
        return parts

    def _round(self, names: Sequence[str]) -> Round:
        """Who sends what. Where all ranks hold everything (ZeRO 0), nobody sends the owner anything."""
        me, ranks = comm.rank(), range(comm.world())
        there = [name for name in names if not self._complete(name)]
        return Round(
            mine=[name for name in names if self.owners[name] == me],
            travels=bool(there),
            out=[[name for name in there if self.owners[name] == rank and self._size(me, name)] for rank in ranks],
            coming=[[name for name in there if self.owners[name] == me and self._size(rank, name)] for rank in ranks],
            back=[[name for name in names if self.owners[name] == me and self._lacks(rank, name)] for rank in ranks],
            returning=[
                [name for name in names if self.owners[name] == rank and self._lacks(me, name)] for rank in ranks
            ],
        )

    def _size(self, rank: int, name: str) -> int:
        return self.held[rank][name].size if name in self.held[rank] else 0

    def _complete(self, name: str) -> bool:
        """Whether the owner holds all of it anyway."""
        return self._size(self.owners[name], name) == self._sizes[name]

    def _lacks(self, rank: int, name: str) -> bool:
        """Whether a rank must be sent its stretch after the owner changed the matrix."""
        return bool(self._size(rank, name)) and not (rank == self.owners[name] and self._complete(name))

    def _collect(self, turn: Round, views: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole matrices of this round that are this rank's, flat; its own memory where it holds all of one."""
        whole = {
            name: views[name].to(self.device)
            if self._complete(name)
            else torch.empty(self._sizes[name], device=self.device)
            for name in turn.mine
        }
        if not turn.travels:
            return whole
        arrived = self._exchange(
            [[views[name] for name in names] for names in turn.out],
            [[self._size(rank, name) for name in names] for rank, names in enumerate(turn.coming)],
        )
        for rank, names in enumerate(turn.coming):
            for name, values in zip(names, arrived[rank], strict=True):
                part = self.held[rank][name]
                whole[name][part.start : part.stop] = values
        return whole

    def _return(self, turn: Round, views: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor]) -> None:
        """Each rank gets its stretches of the changed matrices back."""
        me = comm.rank()
        for name, values in whole.items():
            if self._complete(name) and values.data_ptr() != views[name].data_ptr():
                views[name].copy_(values)  # it was on another device
        sent = []
        for rank, names in enumerate(turn.back):
            held = self.held[rank]
            sent.append([whole[name][held[name].start : held[name].stop] for name in names])
        arrived = self._exchange(sent, [[self._size(me, name) for name in names] for names in turn.returning])
        for names, stretches in zip(turn.returning, arrived, strict=True):
            for name, values in zip(names, stretches, strict=True):
                views[name].copy_(values)

    def _exchange(
        self, sent: Sequence[Sequence[torch.Tensor]], sizes: Sequence[Sequence[int]]
    ) -> list[tuple[torch.Tensor, ...]]:
        """Stretches for each rank against stretches of these sizes from each rank."""
        if comm.world() == 1:
            return [()]
        packed = [
            torch.cat([part.to(self.device) for part in parts]) if parts else torch.empty(0, device=self.device)
            for parts in sent
        ]
        arrived = comm.exchange(packed, [sum(of) for of in sizes])
        return [values.split(list(of)) if of else () for values, of in zip(arrived, sizes, strict=True)]
