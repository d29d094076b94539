"""OSFT: full fine-tuning in the orthogonal complement of protected subspaces (after arXiv 2504.07097).

What trains: the dense weights. What may not change: in each target matrix, a protected subspace. It starts with
directions that matter for the base model, and grows with every task. After the optimizer's step, the rank that owns a
matrix projects its fp32 master, so that the weights cannot change in protected directions. Inference needs no task id;
there is one model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from dscl.config.methods import OsftPreset
from dscl.data.batches import Batch
from dscl.engine.full_shape import full_shape
from dscl.maths.subspace import (
    Directions,
    ProtectedSubspace,
    left_singular_vectors,
    moment_eigenvectors,
    placeholder_state,
    projection_flops,
    protected_ratios_from_importance,
    rank_from_energy,
    rank_from_ratio,
    right_singular_directions,
)
from dscl.methods.base import MatrixFn, Method, RunInfo, TaskContext, TaskSummary
from dscl.model.activation_stats import ActivationStats, LayerImportance
from dscl.model.adapters.routing import layer_index, match_targets_from_layer
from dscl.model.generation import TextBlock, sample_texts
from dscl.model.lm_head import answer_loss
from dscl.utils.errors import UserError

NUM_TEXTS, TEXT_LENGTH = 128, 128  # texts sampled from the base model, and tokens of each
NUM_SAMPLES = 512  # training samples of an ended task that are used to find its directions
# The free directions are divided in advance: the ended task gets this weight, each later task 1. Later tasks need less,
# because fewer tasks follow them.
CURRENT_TASK_WEIGHT = 1.5
MAX_MOMENT_BYTES = 1 << 31  # of second moments collected at once; further matrices need further passes
ROWS_PER_PASS = 4  # of sampled texts


class ProbePass(NamedTuple):
    """One forward (and backward) pass that collects activation statistics."""

    token_weights: torch.Tensor  # weight of each token in the statistics, [rows, length]
    loss_fn: Callable[[Any], torch.Tensor]


# (matrix name, candidate directions, protected basis, total energy) → how many of the candidates to protect
CountFn = Callable[[str, Directions, torch.Tensor, float], int]


class Osft(Method):
    """OSFT. The method object itself is the engine's `Constraint`."""

    Config = OsftPreset
    config: OsftPreset

    def __init__(self, config: OsftPreset, run_info: RunInfo) -> None:
        super().__init__(config, run_info)
        self.settings = config.constraint
        self.project_every = self.settings.project_every
        self.project_gradients = bool(self.settings.project_gradients)
        self.from_layer = -1  # decoder layers below this one are frozen
        self._matrix_shapes: dict[str, tuple[int, int]] = {}  # of all constrained weights
        self._module_names: dict[str, str] = {}  # constrained weight → its linear layer; others have none
        self._owned_names: list[str] = []
        # Of the matrices that this rank owns:
        self._subspaces: dict[str, ProtectedSubspace] = {}
        self._task_start_weights: dict[str, torch.Tensor] = {}  # weights at the start of the current task
        # [right, left base directions that are still protected; right, left directions that were free at first]
        self._base_counts: dict[str, torch.Tensor] = {}

    def prepare(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(self.settings.other_params == "free")
        modules = dict(model.named_modules())
        targets, key = self.settings.targets, "method.constraint.targets"
        for layer in match_targets_from_layer(model, self.from_layer, targets, key):
            linear = modules[layer]
            assert isinstance(linear, nn.Linear)
            self._matrix_shapes[f"{layer}.weight"] = linear.out_features, linear.in_features
            self._module_names[f"{layer}.weight"] = layer
            linear.weight.requires_grad_(True)
        if self.settings.other_params == "protected":
            for name, parameter in model.named_parameters():
                shape = full_shape(parameter)
                if len(shape) == 2 and name not in self._matrix_shapes:
                    self._matrix_shapes[name] = int(shape[0]), int(shape[1])
                    parameter.requires_grad_(True)
        return model

    # ---- the constraint

    def constraint(self) -> Osft:
        return self

    def matrix_costs(self) -> dict[str, float]:
        return {
            name: float(self._projection_flops(rows, columns)) for name, (rows, columns) in self._matrix_shapes.items()
        }

    def _projection_flops(self, rows: int, columns: int) -> int:
        """The cost of projecting a matrix, if half of its directions are protected; the true count is not known yet."""
        half = rank_from_ratio(0.5, rows, columns)
        return projection_flops(str(self.settings.projection), rows, columns, half, half)

    def set_owned(self, names: Sequence[str], device: torch.device) -> None:
        self._owned_names, self._device = list(names), device

    def project_weight(self, name: str, weight: torch.Tensor) -> None:
        self._subspaces[name].project_weight_(weight)

    def project_gradient(self, name: str, gradient: torch.Tensor) -> None:
        self._subspaces[name].project_gradient_(gradient)

    def estimate_memory(self) -> dict[str, float]:
        assert self.settings.protected_ratio is not None
        projection, full_bytes = str(self.settings.projection), 0
        for name in self._owned_names:
            rows, columns = self._matrix_shapes[name]
            count = rank_from_ratio(self.settings.protected_ratio, rows, columns)
            self._subspaces[name] = ProtectedSubspace.from_state_dict(
                projection, placeholder_state(projection, rows, columns, count, self._device)
            )
            full_state = placeholder_state(projection, rows, columns, min(rows, columns), torch.device("meta"))
            full_bytes += sum(tensor.numel() * tensor.element_size() for tensor in full_state.values())
            if "updates" in (self.settings.protect_task or ()) and len(self.run_info.task_names) > 1:
                self._task_start_weights[name] = torch.zeros(rows, columns)
        return {"directions of this rank, when all are protected": float(full_bytes)}

    # ---- what is protected

    def begin_task(self, index: int, name: str, context: TaskContext) -> None:
        if index == 0:
            texts = self._sample_general_texts(context)
            self._protect_base(context, lambda: _text_passes(texts))
            for matrix, subspace in self._subspaces.items():
                sides = subspace.right, subspace.left
                self._base_counts[matrix] = torch.tensor(
                    [s.shape[1] for s in sides] + [len(s) - s.shape[1] for s in sides]
                )
        elif self.settings.on_full == "release_base":
            self._release_base_directions()
        self._check_free_directions(name, context)
        if "updates" in (self.settings.protect_task or ()) and name != self.run_info.task_names[-1]:

            def save_start_weight(matrix: str, weight: torch.Tensor) -> None:
                self._task_start_weights[matrix] = weight.to("cpu", copy=True)

            context.apply_on_owners(save_start_weight, list(self._matrix_shapes))

    def end_task(self, index: int, name: str, context: TaskContext) -> TaskSummary:
        num_later_tasks = len(self.run_info.task_names) - index - 1
        if not num_later_tasks:
            return TaskSummary(metrics=self._capacity_metrics(context))

        def passes() -> Iterator[ProbePass]:
            return _task_passes(context.iter_batches(NUM_SAMPLES))

        def count_task_directions(
            matrix: str, directions: Directions, protected: torch.Tensor, total_energy: float
        ) -> int:
            count = rank_from_energy(directions, self.settings.energy_threshold or 0.0)
            num_free = len(protected) - protected.shape[1]
            limit = int(num_free * CURRENT_TASK_WEIGHT / (CURRENT_TASK_WEIGHT + num_later_tasks))
            return min(count, limit) if self.settings.on_full == "fair_share" else count

        if self.settings.protect_task:
            self._protect_directions(context, self.settings.protect_task, passes, count_task_directions)
            self._task_start_weights = {}
        if self.settings.rank_allocation != "fixed":
            self._protect_base(context, passes)
        return TaskSummary(self._describe_protection(context), self._capacity_metrics(context))

    def _capacity_metrics(self, context: TaskContext) -> dict[str, float]:
        """The bytes of all protected directions, summed over all ranks."""
        protected_bytes = sum(
            t.numel() * t.element_size()
            for subspace in self._subspaces.values()
            for t in subspace.state_dict().values()
        )
        total = context.all_reduce_sum(torch.tensor([protected_bytes], dtype=torch.int64, device=context.device))
        return {"capacity_bytes": float(total)}

    def _protect_base(self, context: TaskContext, passes: Callable[[], Iterable[ProbePass]]) -> None:
        """Protect the most important directions of the current model, up to the configured ratio."""
        assert self.settings.protected_ratio is not None
        ratio = self.settings.protected_ratio
        ratios = self._ratios_by_importance(context, passes) if self.settings.rank_allocation == "importance" else {}

        def count_base_directions(
            matrix: str, directions: Directions, protected: torch.Tensor, total_energy: float
        ) -> int:
            if self.settings.rank_allocation != "energy":
                return max(
                    0, rank_from_ratio(ratios.get(matrix, ratio), *self._matrix_shapes[matrix]) - protected.shape[1]
                )
            rest = float(directions.energies.sum())
            return rank_from_energy(directions, max(0.0, 1.0 - (1.0 - ratio) * total_energy / rest)) if rest else 0

        assert self.settings.protect_base is not None
        self._protect_directions(context, self.settings.protect_base, passes, count_base_directions)

    def _protect_directions(
        self, context: TaskContext, sources: Sequence[str], passes: Callable[[], Iterable[ProbePass]], count_fn: CountFn
    ) -> None:
        """Protect further directions of every matrix: the strongest ones by these sources, and `count_fn` of them."""
        for number, names in enumerate(name_groups := self._split_by_memory()):
            layers = [self._module_names[name] for name in names if name in self._module_names]
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
                context.report_progress("passes", number + 1, len(name_groups))

            def protect_matrix(
                name: str, weight: torch.Tensor, stats_by_source: dict[str, ActivationStats] = stats_by_source
            ) -> None:
                empty = ProtectedSubspace.empty(str(self.settings.projection), weight)
                subspace = self._subspaces.setdefault(name, empty)
                factors = {"weights": weight}
                if name in self._task_start_weights:
                    factors["updates"] = weight - self._task_start_weights[name].to(weight)
                input_moments = {
                    kind: stats.second_moment(self._module_names.get(name, ""))
                    for kind, stats in stats_by_source.items()
                }
                inputs = {kind: moment for kind, moment in input_moments.items() if moment is not None}  # [n, n]
                weight64 = weight.double()  # [m, n]
                # A matrix without a linear layer (embedding) has no input statistics, so its weights are used.
                used_factors = {
                    kind: factors[kind] for kind in factors if kind in sources or not (inputs or "updates" in sources)
                }
                right = self._strongest_directions(name, used_factors, inputs, subspace.right, count_fn)
                left = subspace.left[:, :0]
                is_empty = not subspace.right.numel() and not subspace.left.numel()
                if subspace.projection != "input" and is_empty and list(used_factors) == ["weights"] and not inputs:
                    left = left_singular_vectors(weight, right)
                elif subspace.projection != "input":
                    transposed = {kind: factor.T for kind, factor in used_factors.items()}
                    outputs = {kind: weight64 @ moment @ weight64.T for kind, moment in inputs.items()}  # [m, m]
                    left = self._strongest_directions(name, transposed, outputs, subspace.left, count_fn).vectors
                subspace.add_directions(weight, right.vectors, left)

            self._apply_on_owners_checked(context, names, protect_matrix)

    @staticmethod
    def _strongest_directions(
        name: str,
        factors: dict[str, torch.Tensor],
        moments: dict[str, torch.Tensor],
        protected: torch.Tensor,
        count_fn: CountFn,
    ) -> Directions:
        """The strongest directions orthogonal to the protected ones, in the sum of `factorᵀ factor` and of second
        moments. Several sources are scaled to equal unprotected energy."""
        if len(factors) == 1 and not moments:
            (factor,) = factors.values()
            directions = right_singular_directions(factor, protected)
            total_energy = float(factor.double().square().sum())
        else:
            parts = [*moments.values(), *(factor.double().T @ factor.double() for factor in factors.values())]
            moment = (
                sum((_scale_by_unprotected_energy(part, protected) for part in parts), torch.zeros_like(parts[0]))
                if parts[1:]
                else parts[0]
            )
            directions, total_energy = moment_eigenvectors(moment, protected), float(moment.trace())
        count = count_fn(name, directions, protected, total_energy)
        return Directions(directions.energies[:count], directions.vectors[:, :count])

    def _release_base_directions(self) -> None:
        """Release the weakest base directions of matrices whose free directions have become fewer than an equal part,
        per task, of those that were free at first."""
        for matrix, subspace in self._subspaces.items():
            released: list[slice] = []
            for side, basis in enumerate((subspace.right, subspace.left)):
                num_base, initially_free = (int(self._base_counts[matrix][i]) for i in (side, side + 2))
                missing = initially_free // len(self.run_info.task_names) - (len(basis) - basis.shape[1])
                released.append(slice(num_base - min(num_base, max(0, missing)), num_base))
                self._base_counts[matrix][side] = released[-1].start
            if any(columns.start < columns.stop for columns in released):
                subspace.remove_directions(*released)

    def _check_free_directions(self, name: str, context: TaskContext) -> None:
        """Refuse to begin a task if no matrix has free directions, or if any has none and the recipe says to stop."""
        num_full = sum(self._is_full(subspace) for subspace in self._subspaces.values())
        count = int(context.all_reduce_sum(torch.tensor([num_full], dtype=torch.int64, device=context.device)))
        if count == len(self._matrix_shapes) or (count and self.settings.on_full == "stop"):
            raise UserError(
                f"method osft: task {name} finds no free direction in {count} of {len(self._matrix_shapes)} matrices; "
                "run again with method.constraint.on_full=release_base, or start anew with a lower "
                "method.constraint.protected_ratio or method.constraint.energy_threshold"
            )

    @staticmethod
    def _is_full(subspace: ProtectedSubspace) -> bool:
        """Whether the matrix has no free direction in which it can change."""
        full = [basis.shape[1] == len(basis) for basis in (subspace.right, subspace.left)]
        return all(full) if subspace.projection == "paper" else any(full)

    def _sample_general_texts(self, context: TaskContext) -> list[TextBlock]:
        """Texts sampled from the base model, whose activations show what it needs in general. Empty if no source uses
        them."""
        if self.settings.protect_base == ("weights",) and self.settings.rank_allocation != "importance":
            return []
        training = context.model.training
        context.model.eval()
        with torch.no_grad():
            texts = sample_texts(
                context.model,
                NUM_TEXTS,
                TEXT_LENGTH,
                self.run_info.seed,
                context.device,
                functools.partial(context.report_progress, "making up texts"),
            )
        context.model.train(training)
        return texts

    def _ratios_by_importance(
        self, context: TaskContext, passes: Callable[[], Iterable[ProbePass]]
    ) -> dict[str, float]:
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
            for name in self._matrix_shapes
        }

    def _split_by_memory(self) -> list[list[str]]:
        """Split the matrices into groups whose second moments fit into memory together. A decoder layer's matrices stay
        in one group."""
        name_groups: list[list[str]] = [[]]
        room, layer = MAX_MOMENT_BYTES, None
        for name, (_, columns) in self._matrix_shapes.items():
            room -= 8 * columns**2
            if room < 0 and layer != layer_index(name):
                name_groups.append([])
                room = MAX_MOMENT_BYTES - 8 * columns**2
            layer = layer_index(name)
            name_groups[-1].append(name)
        return name_groups

    def _apply_on_owners_checked(self, context: TaskContext, names: Sequence[str], matrix_fn: MatrixFn) -> None:
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

    def _describe_protection(self, context: TaskContext) -> str:
        """A message with the protected part of all directions, over all ranks."""
        counts = [self._count_free_directions(subspace) for subspace in self._subspaces.values()]
        free, total = context.all_reduce_sum(
            torch.tensor([(0, 0), *counts], dtype=torch.int64, device=context.device).sum(0)
        ).tolist()
        return f"{1 - free / total:.1%} of the directions are protected from now on"

    @staticmethod
    def _count_free_directions(subspace: ProtectedSubspace) -> tuple[int, int]:
        """(number of free directions, number of all directions) of a matrix."""
        right, left = (len(basis) - basis.shape[1] for basis in (subspace.right, subspace.left))
        if subspace.projection == "input":
            return right, len(subspace.right)
        return right + left, len(subspace.right) + len(subspace.left)

    # ---- checkpoints

    def matrix_state_dict(self) -> dict[str, torch.Tensor]:
        state = {
            f"{name}|{kind}": tensor
            for name, subspace in self._subspaces.items()
            for kind, tensor in subspace.state_dict().items()
        }
        state |= {f"{name}|base": counts for name, counts in self._base_counts.items()}
        return state | {f"{name}|start": weight for name, weight in self._task_start_weights.items()}

    def load_matrix_state(self, read_matrix_state: Callable[[str], dict[str, torch.Tensor]]) -> None:
        for name in self._owned_names:
            tensors = read_matrix_state(name)
            if "start" in tensors:
                self._task_start_weights[name] = tensors.pop("start")
            if "base" in tensors:
                self._base_counts[name] = tensors.pop("base")
            if tensors:
                moved = {kind: tensor.to(self._device) for kind, tensor in tensors.items()}
                self._subspaces[name] = ProtectedSubspace.from_state_dict(str(self.settings.projection), moved)


def _scale_by_unprotected_energy(moment: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
    """Scale a second moment so that its energy outside the protected directions is 1."""
    basis, total_energy = protected.to(moment), moment.trace()
    rest = total_energy - (basis * (moment @ basis)).sum()
    floor = 1e-10 * float(total_energy) + torch.finfo(moment.dtype).tiny  # a rest below it is only rounding
    return moment / rest.clamp_min(floor)


def _text_passes(texts: Iterable[TextBlock]) -> Iterator[ProbePass]:
    """Passes over sampled texts, a few rows at a time."""
    for ids, num_counted in texts:
        for at in range(0, len(ids), ROWS_PER_PASS):
            rows = ids[at : at + ROWS_PER_PASS]
            counts = (torch.arange(at, at + len(rows), device=ids.device) < num_counted)[:, None].expand(rows.shape)
            yield ProbePass(
                counts.double(), functools.partial(_text_loss, rows, rows.masked_fill(~counts, -100)[:, 1:])
            )


def _text_loss(ids: torch.Tensor, targets: torch.Tensor, model: Any) -> torch.Tensor:
    """The sum of next-token losses of texts; `targets` is -100 where a token does not count."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _task_passes(batches: Iterable[Batch]) -> Iterator[ProbePass]:
    """Passes over the task's own samples. In each batch, all prompt tokens together and all answer tokens together have
    the same weight."""
    for batch in batches:
        prompts, answers = (torch.zeros(batch.input_ids.shape, dtype=torch.float64) for _ in range(2))
        for row, start, stop in batch.prompt_spans:
            prompts[row, start:stop] = 1
        answers.view(-1)[batch.loss_positions.cpu()] = (batch.labels.cpu() != -100).double()
        token_weights = (prompts / prompts.sum().clamp_min(1) + answers / answers.sum().clamp_min(1)) * len(
            batch.sample_ids
        )
        yield ProbePass(token_weights.to(batch.input_ids.device), functools.partial(answer_loss, batch=batch))
