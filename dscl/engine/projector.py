"""Enforces a constraint on the trained matrices: projects weights after a step and gradients before it, at the
matrices' owners."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from dscl.distributed import comm
from dscl.engine.full_shape import full_shape
from dscl.engine.matrix_owners import Constraint, OwnerExchange, ShardSlice, assign_owners, load_imbalance
from dscl.engine.optimizer import ParamShard
from dscl.engine.zero_layouts import ZeroLayout
from dscl.utils import timers


class ConstraintProjector:
    """Assigns every constrained matrix to an owner rank, and projects the matrices there."""

    def __init__(
        self, constraint: Constraint, layout: ZeroLayout, shards: Iterable[ParamShard], device: torch.device
    ) -> None:
        """`shards`: this rank's shards of the trainable tensors."""
        self._constraint, self._layout = constraint, layout
        self.has_unprojected_steps = False  # whether there were steps since the last projection of the weights
        parameters = dict(layout.trainable_parameters())
        costs = constraint.matrix_costs()
        owners = assign_owners(costs, comm.world_size())
        constrained_shards = {f.name: f for f in shards if f.name in costs}
        local_slices = {name: ShardSlice(f.start, f.stop) for name, f in constrained_shards.items()}
        self._masters = {
            name: constrained_shards[name].master if name in constrained_shards else torch.empty(0) for name in costs
        }
        shapes = {name: full_shape(parameters[name]) for name in costs}
        self._exchange = OwnerExchange(owners, shapes, local_slices, device)
        constraint.set_owned([name for name, owner in owners.items() if owner == comm.rank()], device)
        self._step_group = {name: layout.step_group_of(parameters[name]) for name in costs}

    def before_step(self, step_tensors: Sequence[torch.Tensor], step_shards: Sequence[ParamShard]) -> None:
        """Project the gradients of the tensors that the optimizer is about to step, if the constraint asks for it."""
        if self._constraint.project_gradients:
            with timers.timed_part("projection"):
                gradients = {f.name: f.gradient for f in step_shards if f.name in self._step_group}
                self._exchange.apply_on_owners(
                    self._names_in(step_tensors), gradients, self._constraint.project_gradient, write_back=True
                )

    def after_step(self, step_tensors: Sequence[torch.Tensor], *, project: bool) -> None:
        """Project the weights that were stepped, or (without `project`) leave it to a later step."""
        self.has_unprojected_steps = True
        if project:
            self.project_weights(self._names_in(step_tensors))

    def project_weights(self, names: Iterable[str] | None = None) -> None:
        """Project the fp32 masters of these matrices (None: of all) so that they satisfy the constraint."""
        with timers.timed_part("projection"):
            self._exchange.apply_on_owners(
                self._all_or(names), self._masters, self._constraint.project_weight, write_back=True
            )
        self.has_unprojected_steps = False

    def apply_on_owners(
        self,
        matrix_fn: Callable[[str, torch.Tensor], None],
        names: Iterable[str] | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Call `matrix_fn(name, matrix)` for each of these matrices (None: for all) on its owner, one at a time."""
        self._exchange.apply_on_owners(
            self._all_or(names), self._masters, matrix_fn, write_back=False, max_elements=1, on_progress=on_progress
        )

    def simulate_peers(self) -> None:
        """Compute the slices of constrained matrices that the other ranks would hold if they existed (`dscl plan`)."""
        slices = self._layout.peer_slices(self._step_group)
        if slices is not None:
            self._exchange.rank_slices = slices

    def load_imbalance(self) -> float:
        """The most loaded rank's work on constrained matrices divided by the mean."""
        return load_imbalance(self._constraint.matrix_costs(), comm.world_size())

    def _all_or(self, names: Iterable[str] | None) -> list[str]:
        return list(self._masters if names is None else names)

    def _names_in(self, step_tensors: Sequence[torch.Tensor]) -> list[str]:
        """The constrained matrices in the group of tensors that the optimizer is about to step."""
        groups = self._layout.step_groups()
        number = next((i for i, group in enumerate(groups) if group[0] is step_tensors[0]), 0)
        return [name for name, group in self._step_group.items() if group == number]
