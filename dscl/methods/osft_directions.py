"""The protected directions of OSFT's weight matrices: which directions matter, and how many of them are protected.

The sources of directions are the weights, their change within a task, and the second moments of the layers' inputs,
which activation passes collect. The number of directions follows from a ratio, from the paper's layer importance or
from an energy threshold. `dscl.maths.subspace` has the decompositions and the projections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from dscl.config.parts import OsftConfig
from dscl.maths.subspace import (
    Directions,
    ProtectedSubspace,
    left_singular_vectors,
    moment_eigenvectors,
    protected_ratios_from_importance,
    rank_from_energy,
    rank_from_ratio,
    right_singular_directions,
)
from dscl.methods.base import MatrixFn, TaskContext
from dscl.model.activation_stats import ActivationStats, LayerImportance, ProbePass
from dscl.model.adapters.routing import layer_index
from dscl.utils.errors import UserError

# The free directions are divided in advance: the ended task gets this weight, each later task 1. Later tasks need less,
# because fewer tasks follow them.
CURRENT_TASK_WEIGHT = 1.5
MAX_MOMENT_BYTES = 1 << 31  # of second moments collected at once; further matrices need further passes


ProbePasses = Callable[[], Iterable[ProbePass]]  # starts the passes anew at every call
# (matrix name, candidate directions, protected basis, total energy) → how many of the candidates to protect
CountFn = Callable[[str, Directions, torch.Tensor, float], int]


class ProtectedDirections:
    """The protected directions of all constrained matrices. A rank holds those of the matrices that it owns."""

    def __init__(self, settings: OsftConfig) -> None:
        self.settings = settings
        self.matrix_shapes: dict[str, tuple[int, int]] = {}  # of all constrained weights
        self.module_names: dict[str, str] = {}  # constrained weight → its linear layer; others have none
        # Of the matrices that this rank owns:
        self.subspaces: dict[str, ProtectedSubspace] = {}
        self.task_start_weights: dict[str, torch.Tensor] = {}  # weights at the start of the current task
        # [right, left base directions that are still protected; right, left directions that were free at first]
        self.base_counts: dict[str, torch.Tensor] = {}

    # ---- adding and releasing directions

    def protect_base(self, context: TaskContext, passes: ProbePasses) -> None:
        """Protect the most important directions of the current model, up to the configured ratio."""
        assert self.settings.protected_ratio is not None
        ratio = self.settings.protected_ratio
        ratios = self._ratios_by_importance(context, passes) if self.settings.rank_allocation == "importance" else {}

        def count_base_directions(
            matrix: str, directions: Directions, protected: torch.Tensor, total_energy: float
        ) -> int:
            if self.settings.rank_allocation != "energy":
                return max(
                    0, rank_from_ratio(ratios.get(matrix, ratio), *self.matrix_shapes[matrix]) - protected.shape[1]
                )
            rest = float(directions.energies.sum())
            return rank_from_energy(directions, max(0.0, 1.0 - (1.0 - ratio) * total_energy / rest)) if rest else 0

        assert self.settings.protect_base is not None
        self._protect_directions(context, self.settings.protect_base, passes, count_base_directions)

    def protect_task(self, context: TaskContext, passes: ProbePasses, num_later_tasks: int) -> None:
        """Protect the directions that the ended task needs, up to the energy threshold."""

        def count_task_directions(
            matrix: str, directions: Directions, protected: torch.Tensor, total_energy: float
        ) -> int:
            count = rank_from_energy(directions, self.settings.energy_threshold or 0.0)
            num_free = len(protected) - protected.shape[1]
            limit = int(num_free * CURRENT_TASK_WEIGHT / (CURRENT_TASK_WEIGHT + num_later_tasks))
            return min(count, limit) if self.settings.on_full == "fair_share" else count

        if self.settings.protect_task:
            self._protect_directions(context, self.settings.protect_task, passes, count_task_directions)
            self.task_start_weights = {}

    def save_task_start_weights(self, context: TaskContext) -> None:
        """Keep the weights at the start of a task, on the CPU, for its `updates`."""

        def save_start_weight(matrix: str, weight: torch.Tensor) -> None:
            self.task_start_weights[matrix] = weight.to("cpu", copy=True)

        context.apply_on_owners(save_start_weight, list(self.matrix_shapes))

    def record_base_counts(self) -> None:
        """Record the present directions as those of the base model."""
        for matrix, subspace in self.subspaces.items():
            sides = subspace.right, subspace.left
            self.base_counts[matrix] = torch.tensor([s.shape[1] for s in sides] + [len(s) - s.shape[1] for s in sides])

    def release_base_directions(self, num_tasks: int) -> None:
        """Release the weakest base directions of matrices whose free directions have become fewer than an equal part,
        per task, of those that were free at first."""
        for matrix, subspace in self.subspaces.items():
            released: list[slice] = []
            for side, basis in enumerate((subspace.right, subspace.left)):
                num_base, initially_free = (int(self.base_counts[matrix][i]) for i in (side, side + 2))
                missing = initially_free // num_tasks - (len(basis) - basis.shape[1])
                released.append(slice(num_base - min(num_base, max(0, missing)), num_base))
                self.base_counts[matrix][side] = released[-1].start
            if any(columns.start < columns.stop for columns in released):
                subspace.remove_directions(*released)

    def _protect_directions(
        self, context: TaskContext, sources: Sequence[str], passes: ProbePasses, count_fn: CountFn
    ) -> None:
        """Protect further directions of every matrix: the strongest ones by these sources, and `count_fn` of them."""
        for number, names in enumerate(name_groups := self._split_by_memory()):
            stats_by_source = self._collect_stats(context, sources, passes, names)
            if stats_by_source:
                context.report_progress("passes", number + 1, len(name_groups))

            def protect_matrix(
                name: str, weight: torch.Tensor, stats_by_source: dict[str, ActivationStats] = stats_by_source
            ) -> None:
                module_name = self.module_names.get(name, "")
                moments = {kind: stats.second_moment(module_name) for kind, stats in stats_by_source.items()}
                self._protect_matrix(
                    name, weight, sources, {k: moment for k, moment in moments.items() if moment is not None}, count_fn
                )

            _apply_on_owners_checked(context, names, protect_matrix)

    def _collect_stats(
        self, context: TaskContext, sources: Sequence[str], passes: ProbePasses, names: Sequence[str]
    ) -> dict[str, ActivationStats]:
        """The activation statistics of these matrices' layers, summed over all ranks, by the source that needs them."""
        layers = [self.module_names[name] for name in names if name in self.module_names]
        stats_by_source = {
            kind: ActivationStats(gradient_weighted=kind == "sensitivity")
            for kind in ("activations", "sensitivity")
            if kind in sources
        }
        with ExitStack() as stack:
            for stats in stats_by_source.values():
                stack.enter_context(stats.collect_stats(context.model, layers))
            for probe_pass in passes() if stats_by_source else ():
                for stats in stats_by_source.values():
                    stats.token_mask = probe_pass.token_weights
                context.probe_activations(probe_pass.loss_fn, "sensitivity" in stats_by_source)
        for stats in stats_by_source.values():
            for layer in sorted(stats.sums):
                context.all_reduce_sum(stats.sums[layer])
        return stats_by_source

    def _protect_matrix(
        self,
        name: str,
        weight: torch.Tensor,
        sources: Sequence[str],
        input_moments: Mapping[str, torch.Tensor],
        count_fn: CountFn,
    ) -> None:
        """Add directions to the subspace of a weight [m, n]. `input_moments`: second moments [n, n] by source."""
        subspace = self.subspaces.setdefault(name, ProtectedSubspace.empty(str(self.settings.projection), weight))
        factors = {"weights": weight}
        if name in self.task_start_weights:
            factors["updates"] = weight - self.task_start_weights[name].to(weight)
        # A matrix without a linear layer (embedding) has no input statistics, so its weights are used.
        used_factors = {
            kind: factors[kind] for kind in factors if kind in sources or not (input_moments or "updates" in sources)
        }
        count = functools.partial(count_fn, name)
        right = strongest_directions(list(used_factors.values()), list(input_moments.values()), subspace.right, count)
        left = subspace.left[:, :0]
        is_empty = not subspace.right.numel() and not subspace.left.numel()
        only_weights = list(used_factors) == ["weights"] and not input_moments
        if subspace.projection != "input" and is_empty and only_weights:
            left = left_singular_vectors(weight, right)
        elif subspace.projection != "input":
            weight64 = weight.double()
            output_moments = [weight64 @ moment @ weight64.T for moment in input_moments.values()]  # [m, m]
            transposed = [factor.T for factor in used_factors.values()]
            left = strongest_directions(transposed, output_moments, subspace.left, count).vectors
        subspace.add_directions(weight, right.vectors, left)

    def _split_by_memory(self) -> list[list[str]]:
        """Split the matrices into groups whose second moments fit into memory together. A decoder layer's matrices stay
        in one group."""
        name_groups: list[list[str]] = [[]]
        free_bytes, layer = MAX_MOMENT_BYTES, None
        for name, (_, columns) in self.matrix_shapes.items():
            free_bytes -= 8 * columns**2
            if free_bytes < 0 and layer != layer_index(name):
                name_groups.append([])
                free_bytes = MAX_MOMENT_BYTES - 8 * columns**2
            layer = layer_index(name)
            name_groups[-1].append(name)
        return name_groups

    def _ratios_by_importance(self, context: TaskContext, passes: ProbePasses) -> dict[str, float]:
        """The paper's protected ratio of each matrix, by the importance of its decoder layer."""
        layers: Any = context.model.get_submodule("model.layers")
        importance = LayerImportance(len(layers), context.device)
        with importance.collect_stats(layers):
            for probe_pass in passes():
                importance.token_mask = probe_pass.token_weights
                context.probe_activations(probe_pass.loss_fn, False)
        context.all_reduce_sum(importance.sums)
        assert self.settings.min_protected is not None
        assert self.settings.protected_ratio is not None
        try:
            ratios = protected_ratios_from_importance(
                importance.mean_similarity(), self.settings.min_protected, self.settings.protected_ratio
            ).tolist()
        except ArithmeticError as error:
            raise UserError(
                f"method.constraint.rank_allocation: given importance, but {error}; set it to fixed"
            ) from None
        return {
            name: ratios[layer_index(name)] if layer_index(name) >= 0 else self.settings.protected_ratio
            for name in self.matrix_shapes
        }

    # ---- what is left

    def check_free_directions(self, task: str, context: TaskContext) -> None:
        """Refuse to begin a task if no matrix has free directions, or if any has none and the recipe says to stop."""
        num_full = sum(subspace.is_full for subspace in self.subspaces.values())
        count = int(context.all_reduce_sum(torch.tensor([num_full], dtype=torch.int64, device=context.device)))
        if count == len(self.matrix_shapes) or (count and self.settings.on_full == "stop"):
            raise UserError(
                f"method osft: task {task} finds no free direction in {count} of {len(self.matrix_shapes)} matrices; "
                "run again with method.constraint.on_full=release_base, or start anew with a lower "
                "method.constraint.protected_ratio or method.constraint.energy_threshold"
            )

    def protected_bytes(self, context: TaskContext) -> int:
        """The bytes of all protected directions, summed over all ranks."""
        rank_bytes = sum(
            tensor.numel() * tensor.element_size()
            for subspace in self.subspaces.values()
            for tensor in subspace.state_dict().values()
        )
        return int(context.all_reduce_sum(torch.tensor([rank_bytes], dtype=torch.int64, device=context.device)))

    def describe_protection(self, context: TaskContext) -> str:
        """A message with the protected part of all directions, over all ranks."""
        counts = [(subspace.num_free, subspace.num_directions) for subspace in self.subspaces.values()]
        free, total = context.all_reduce_sum(
            torch.tensor([(0, 0), *counts], dtype=torch.int64, device=context.device).sum(0)
        ).tolist()
        return f"{1 - free / total:.1%} of the directions are protected from now on"

    # ---- checkpoints

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors of this rank's matrices, with keys `matrix name|kind`."""
        state = {
            f"{name}|{kind}": tensor
            for name, subspace in self.subspaces.items()
            for kind, tensor in subspace.state_dict().items()
        }
        state |= {f"{name}|base": counts for name, counts in self.base_counts.items()}
        return state | {f"{name}|start": weight for name, weight in self.task_start_weights.items()}

    def load_matrix_state(self, name: str, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Restore a matrix from its tensors of `state_dict`, by kind."""
        if "start" in tensors:
            self.task_start_weights[name] = tensors.pop("start")
        if "base" in tensors:
            self.base_counts[name] = tensors.pop("base")
        if tensors:
            moved = {kind: tensor.to(device) for kind, tensor in tensors.items()}
            self.subspaces[name] = ProtectedSubspace.from_state_dict(str(self.settings.projection), moved)


def strongest_directions(
    factors: Sequence[torch.Tensor],
    moments: Sequence[torch.Tensor],
    protected: torch.Tensor,
    count_fn: Callable[[Directions, torch.Tensor, float], int],
) -> Directions:
    """The strongest directions orthogonal to the protected ones, in the sum of `factorᵀ factor` and of second moments.

    Several sources are scaled to equal unprotected energy.
    """
    if len(factors) == 1 and not moments:
        (factor,) = factors
        directions = right_singular_directions(factor, protected)
        total_energy = float(factor.double().square().sum())
    else:
        parts = [*moments, *(factor.double().T @ factor.double() for factor in factors)]
        moment = (
            sum((_normalize_unprotected_energy(part, protected) for part in parts), torch.zeros_like(parts[0]))
            if parts[1:]
            else parts[0]
        )
        directions, total_energy = moment_eigenvectors(moment, protected), float(moment.trace())
    count = count_fn(directions, protected, total_energy)
    return Directions(directions.energies[:count], directions.vectors[:, :count])


def _normalize_unprotected_energy(second_moment: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
    """Scale a second moment [n, n] so that its energy outside of the protected directions [n, k] is 1."""
    basis, total_energy = protected.to(second_moment), second_moment.trace()
    unprotected_energy = total_energy - (basis * (second_moment @ basis)).sum()
    rounding = 1e-10 * float(total_energy) + torch.finfo(second_moment.dtype).tiny
    return second_moment / unprotected_energy.clamp_min(rounding)


def _apply_on_owners_checked(context: TaskContext, names: Sequence[str], matrix_fn: MatrixFn) -> None:
    """Call `matrix_fn` on the matrices' owners. A numerical error on one owner stops all ranks with one message."""
    problem = ""

    def call_and_catch(name: str, weight: torch.Tensor) -> None:
        nonlocal problem
        try:
            matrix_fn(name, weight)
        except ArithmeticError as error:
            problem = problem or f"method osft: {name}: {error}; start from weights, and a rate, that stay finite"

    context.apply_on_owners(call_and_catch, names)
    context.raise_on_all_ranks(problem)
