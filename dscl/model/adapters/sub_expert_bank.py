"""The sub-experts of a whole model: one `SubExpertLinear` beside each target projection, with a slot for every task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from dscl.model.adapters.injection import sample_lora_a
from dscl.model.adapters.routing import Routing, make_template_tensor, replace_module
from dscl.model.adapters.sub_experts import SubExpertLinear, SubExpertShape, Tensors
from dscl.model.weights import draw_normal

SCORE_STD = 0.5  # standard deviation of the initial mask scores; large, so that training changes few mask entries


class SubExpertBank:
    """The sub-experts of one model, with a slot for each task that has ended."""

    def __init__(self, model: nn.Module, shape: SubExpertShape, routing: Routing) -> None:
        self.shape, self.routing = shape, routing
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, SubExpertLinear)}
        self.num_used_experts = shape.num_experts  # experts that the current task trains
        self.names: list[str] = []  # tasks that have ended; the index is the slot

    def count_missing_params(self) -> int:
        """How many free parameters a layer lacks for a mask without frozen ones; the largest of all layers."""
        return max(layer.count_missing_params(self.num_used_experts) for layer in self.layers.values())

    def set_allowed_masks(self, reuse: bool) -> None:
        """Let the next task's masks select parameters of the first `num_used_experts` experts; without `reuse`, only
        those that are not frozen."""
        for layer in self.layers.values():
            layer.set_allowed_masks(self.num_used_experts, reuse)

    def trainable_names(self) -> list[str]:
        """The names of the tensors that train."""
        return [f"{path}.{own}" for path, layer in self.layers.items() for own in layer.trainable_names]

    def freeze_task_params(self, name: str, trained_tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
        """Freeze the parameters in the masks of a task that has ended; returns the tensors to save, by layer.

        `trained_tensors`: by the parameters' full names.
        """
        slot = self._add_slot(name)
        return {
            path: layer.freeze_task_params(
                slot, {own: trained_tensors[f"{path}.{own}"] for own in layer.trainable_names}
            )
            for path, layer in self.layers.items()
        }

    def load_task_params(self, name: str, task_tensors: Mapping[str, Tensors]) -> None:
        """Restore what `freeze_task_params` returned for this task."""
        slot = self._add_slot(name)
        for path, layer in self.layers.items():
            layer.load_task_params(slot, task_tensors[path])
            self.num_used_experts = int(layer.expert_mask[slot].sum())

    def _add_slot(self, name: str) -> int:
        assert name not in self.names, f"{name} has ended already"
        self.names.append(name)
        return len(self.names) - 1

    def get_slot(self, name: str | None) -> int | None:
        return None if name is None else self.names.index(name)

    def mask_overlap(self) -> torch.Tensor:
        """[tasks, tasks]: the fraction of the row task's masks that is also in the column task's, over all layers."""
        num_tasks = len(self.names)
        counts = torch.stack([layer.mask_overlap().cpu() for layer in self.layers.values()]).sum(0)[
            :num_tasks, :num_tasks
        ]
        return counts / counts.diagonal()[:, None].clamp_min(1)

    def frozen_share(self) -> float:
        """Frozen parameters as a fraction of the parameters of the initial experts; above 1 if experts were added."""
        total_params = sum(
            self.shape.num_experts * self.shape.rank * (m.in_features + m.out_features) for m in self.layers.values()
        )
        return sum(layer.num_frozen_params for layer in self.layers.values()) / total_params


def inject_sub_experts(
    model: nn.Module, shape: SubExpertShape, routing: Routing, targets: Iterable[str]
) -> SubExpertBank:
    """Put sub-experts beside the named projections of a frozen model."""
    template = make_template_tensor(model)
    for name in targets:
        base_layer = model.get_submodule(name)
        assert isinstance(base_layer, nn.Linear)
        replace_module(model, name, SubExpertLinear(base_layer, shape, routing, template))
    return SubExpertBank(model, shape, routing)


def initial_expert_values(seed: int, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a trainable tensor at the start of a task: B is zero, A and the scores are random."""
    kind = name.rpartition(".")[2]
    if kind == "sub_b":
        return torch.zeros(stop - start)
    if kind.startswith("score_"):
        return draw_normal(seed, name, start, stop, SCORE_STD)
    return sample_lora_a(seed, name, shape, start, stop)
