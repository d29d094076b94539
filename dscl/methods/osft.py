"""OSFT: full fine-tuning in the orthogonal complement of protected subspaces (after arXiv 2504.07097).

What trains: the dense weights. What may not change: in each target matrix, a protected subspace. It starts with
directions that matter for the base model, and grows with every task. After the optimizer's step, the rank that owns a
matrix projects its fp32 master, so that the weights cannot change in protected directions. Inference needs no task id;
there is one model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from dscl.config.methods import OsftPreset
from dscl.engine.full_shape import full_shape
from dscl.maths.subspace import ProtectedSubspace, placeholder_state, projection_flops, rank_from_ratio
from dscl.methods.base import Method, RunInfo, TaskContext, TaskSummary
from dscl.methods.osft_directions import ProtectedDirections
from dscl.model.activation_stats import ProbePass, task_passes, text_passes
from dscl.model.adapters.routing import match_targets_from_layer
from dscl.model.generation import TextBlock, sample_texts

NUM_TEXTS, TEXT_LENGTH = 128, 128  # texts sampled from the base model, and tokens of each
NUM_SAMPLES = 512  # training samples of an ended task that are used to find its directions


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
        self.directions = ProtectedDirections(self.settings)
        self._owned_names: list[str] = []

    def prepare(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(self.settings.other_params == "free")
        modules, matrix_shapes = dict(model.named_modules()), self.directions.matrix_shapes
        targets, key = self.settings.targets, "method.constraint.targets"
        for layer in match_targets_from_layer(model, self.from_layer, targets, key):
            linear = modules[layer]
            assert isinstance(linear, nn.Linear)
            matrix_shapes[f"{layer}.weight"] = linear.out_features, linear.in_features
            self.directions.module_names[f"{layer}.weight"] = layer
            linear.weight.requires_grad_(True)
        if self.settings.other_params == "protected":
            for name, parameter in model.named_parameters():
                shape = full_shape(parameter)
                if len(shape) == 2 and name not in matrix_shapes:
                    matrix_shapes[name] = int(shape[0]), int(shape[1])
                    parameter.requires_grad_(True)
        return model

    # ---- the constraint

    def constraint(self) -> Osft:
        return self

    def matrix_costs(self) -> dict[str, float]:
        return {
            name: float(self._projection_flops(rows, columns))
            for name, (rows, columns) in self.directions.matrix_shapes.items()
        }

    def _projection_flops(self, rows: int, columns: int) -> int:
        """The cost of projecting a matrix, if half of its directions are protected; the true count is not known yet."""
        half = rank_from_ratio(0.5, rows, columns)
        return projection_flops(str(self.settings.projection), rows, columns, half, half)

    def set_owned(self, names: Sequence[str], device: torch.device) -> None:
        self._owned_names, self._device = list(names), device

    def project_weight(self, name: str, weight: torch.Tensor) -> None:
        self.directions.subspaces[name].project_weight_(weight)

    def project_gradient(self, name: str, gradient: torch.Tensor) -> None:
        self.directions.subspaces[name].project_gradient_(gradient)

    def estimate_memory(self) -> dict[str, float]:
        assert self.settings.protected_ratio is not None
        projection, full_bytes = str(self.settings.projection), 0
        for name in self._owned_names:
            rows, columns = self.directions.matrix_shapes[name]
            count = rank_from_ratio(self.settings.protected_ratio, rows, columns)
            self.directions.subspaces[name] = ProtectedSubspace.from_state_dict(
                projection, placeholder_state(projection, rows, columns, count, self._device)
            )
            full_state = placeholder_state(projection, rows, columns, min(rows, columns), torch.device("meta"))
            full_bytes += sum(tensor.numel() * tensor.element_size() for tensor in full_state.values())
            if "updates" in (self.settings.protect_task or ()) and len(self.run_info.task_names) > 1:
                self.directions.task_start_weights[name] = torch.zeros(rows, columns)
        return {"directions of this rank, when all are protected": float(full_bytes)}

    # ---- what is protected

    def begin_task(self, index: int, name: str, context: TaskContext) -> None:
        if index == 0:
            texts = self._sample_general_texts(context)
            self.directions.protect_base(context, lambda: text_passes(texts))
            self.directions.record_base_counts()
        elif self.settings.on_full == "release_base":
            self.directions.release_base_directions(len(self.run_info.task_names))
        self.directions.check_free_directions(name, context)
        if "updates" in (self.settings.protect_task or ()) and name != self.run_info.task_names[-1]:
            self.directions.save_task_start_weights(context)

    def end_task(self, index: int, name: str, context: TaskContext) -> TaskSummary:
        num_later_tasks, message = len(self.run_info.task_names) - index - 1, ""
        if num_later_tasks:

            def passes() -> Iterator[ProbePass]:
                return task_passes(context.iter_batches(NUM_SAMPLES))

            self.directions.protect_task(context, passes, num_later_tasks)
            if self.settings.rank_allocation != "fixed":
                self.directions.protect_base(context, passes)
            message = self.directions.describe_protection(context)
        return TaskSummary(message, {"capacity_bytes": float(self.directions.protected_bytes(context))})

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
                functools.partial(context.report_progress, "sampling texts"),
            )
        context.model.train(training)
        return texts

    # ---- checkpoints

    def matrix_state_dict(self) -> dict[str, torch.Tensor]:
        return self.directions.state_dict()

    def load_matrix_state(self, read_matrix_state: Callable[[str], dict[str, torch.Tensor]]) -> None:
        for name in self._owned_names:
            self.directions.load_matrix_state(name, read_matrix_state(name), self._device)
