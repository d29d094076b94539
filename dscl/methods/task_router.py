"""Task inference for methods: a router that collects its features during training.

A training pass computes the feature layer's input anyway. In the first epoch, the features of each prompt are
collected there. When the task ends, they become the task's statistics in the router. At inference the router chooses
each prompt's task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dscl.data.batches import Batch, PromptBatch
from dscl.maths.rls import triangle_size
from dscl.methods.base import RunInfo, TaskContext
from dscl.methods.rls_router import Router, RouterSpec, load_task_statistics, save_task_statistics
from dscl.model.adapters.peft_files import task_file_name
from dscl.model.adapters.routing import Routing
from dscl.model.lm_head import answer_loss
from dscl.utils import timers
from dscl.utils.errors import UserError

# fp64 matrices of [features, features] that exist at the same time while the router is fitted; measured by
# tools/bench_router.py
SOLVE_PEAK_MATRICES = 7


class TaskRouter:
    """A method's router, and the features collected so far for the current task."""

    def __init__(self, router: Router, routing: Routing) -> None:
        self.router, self.routing = router, routing
        self._sample_ids: list[int] = []
        self._features: list[torch.Tensor] = []
        self._finite_masks: list[torch.Tensor] = []

    def loss_with_features(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of a batch. In the first epoch, the router's features of the batch's prompts are collected too."""
        if not batch.first_epoch or not batch.sample_ids:
            return answer_loss(model, batch)
        with self.routing.capture_features(batch.prompt_spans) as get_pooled:
            loss = answer_loss(model, batch)
        # Attention is causal, so a prompt's features do not depend on the answer behind it: they are the same as at
        # inference.
        self._sample_ids += batch.sample_ids
        with timers.timed_part("router"):
            states = get_pooled()  # [prompts, hidden]
            self._finite_masks.append(states.isfinite().all(1))  # read later, so that the GPU is not synchronized here
            self._features.append(self.router.feature_map.quantize(states.nan_to_num()))
        return loss

    def add_task(self, name: str, context: TaskContext) -> str:
        """Add the current task, which has ended, to the router. Returns a message for the user."""
        sample_ids, features = self._collected_features()
        assert len(set(sample_ids)) == len(sample_ids), "a sample was counted twice"
        statistics = self.router.compute_statistics(features)
        for tensor in statistics.tensors():
            context.all_reduce_sum(tensor)
        self.router.add(name, statistics)
        self._sample_ids, self._features, self._finite_masks = [], [], []
        return f"{int(statistics.count)} prompts join {self.router.describe()}"

    def statistics_bytes(self) -> float:
        """The bytes of all tasks' statistics."""
        statistics = (self.router.get_statistics(name).tensors() for name in self.router.names)
        return float(sum(tensor.numel() * tensor.element_size() for tensors in statistics for tensor in tensors))

    def estimate_memory(self) -> dict[str, float]:
        """The bytes that a task adds when it ends, by a description; see `Method.estimate_memory`."""
        num_features = self.router.spec.num_features
        if self.router.spec.kind == "key":
            return {"keys, a task": 8.0 * num_features}
        return {
            "router's sums, a task (host)": 4.0 * triangle_size(num_features) + 8.0 * num_features,
            "router, while it is solved": self.solve_bytes(),
        }

    def solve_bytes(self) -> float:
        """The peak bytes of device memory while the router is fitted."""
        return 0.0 if self.router.spec.kind == "key" else SOLVE_PEAK_MATRICES * 8.0 * self.router.spec.num_features**2

    def save_task_artifacts(self, folder: Path, name: str) -> Path:
        """Write a task's statistics into the run's folder."""
        path = _artifact_path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_task_statistics(path, self.router.spec, name, self.router.get_statistics(name))
        return path

    def load_task_artifacts(self, folder: Path, name: str) -> None:
        """Add a task from the statistics in the run's folder."""
        self.router.add(name, load_task_statistics(_artifact_path(folder, name), self.router.spec))

    @contextmanager
    def inference_context(
        self, batch: PromptBatch, get_slot: Callable[[str | None], int | None]
    ) -> Iterator[list[str | None]]:
        """A context for all forward passes that answer these prompts. The list holds each prompt's task after the first
        pass. `get_slot`: the adapter slot of a task."""
        task_names: list[str | None] = []

        def choose_slots(pooled: torch.Tensor) -> Sequence[int | None]:
            if self.router.names:
                task_names.extend(self.router.route(self.router.quantize(pooled)).task)
            else:
                task_names.extend([None] * len(pooled))
            return [get_slot(name) for name in task_names]

        with self.routing.route_prompts(batch.prompt_spans, choose_slots):
            yield task_names

    def row_state_dict(self) -> dict[str, torch.Tensor]:
        """The features collected on this rank; see `Method.row_state_dict`."""
        sample_ids, features = self._collected_features()
        return {"samples": torch.tensor(sample_ids, dtype=torch.int64), "features": features.cpu()}

    def load_row_state(self, rows: dict[str, torch.Tensor]) -> None:
        """Load this rank's part of the collected features."""
        self._sample_ids, self._features = rows["samples"].tolist(), [rows["features"]]
        self._finite_masks = [torch.ones(len(self._sample_ids), dtype=torch.bool)]

    def _collected_features(self) -> tuple[list[int], torch.Tensor]:
        """The sample ids and features of the current task so far, without prompts whose features are not finite."""
        device = self.router.device  # all ranks must have their features on the same kind of device
        if not self._features:
            return [], self.router.quantize(torch.zeros(0, self.router.spec.dim, device=device))
        finite = torch.cat([mask.to(device) for mask in self._finite_masks])
        features = torch.cat([part.to(device) for part in self._features])
        return [sample for sample, ok in zip(self._sample_ids, finite.tolist(), strict=True) if ok], features[finite]


def make_router_spec(kind: str, layer: int, num_features: int, dim: int, run_info: RunInfo) -> RouterSpec:
    """The spec of a run's router, whose kind is exact, paper or key."""
    return RouterSpec(
        kind=kind,
        layer=layer,
        dim=dim,
        num_features=dim if kind == "key" else num_features,
        seed=run_info.seed,
        model=run_info.model,
        tokenizer=run_info.tokenizer,
        prompt_limit=run_info.prompt_limit,
        precision=run_info.precision,
    )


def resolve_feature_layer(configured: int | None, layers: int) -> int:
    """The configured feature layer after a check, or the default: an eighth of the layers, but at least 2."""
    layer = min(max(2, layers // 8), layers - 1) if configured is None else configured
    if not 1 <= layer < layers:
        raise UserError(
            f"the router's layer: given {layer}; the model has {layers} layers, of which at least the first stays "
            f"frozen and the last is adapted, so 1 to {layers - 1} is allowed"
        )
    return layer


def resolve_num_features(configured: int | None, hidden: int) -> int:
    """The configured number of router features, or the default: twice the hidden size, but at least 2048."""
    return configured or max(2048, 2 * hidden)


def _artifact_path(folder: Path, name: str) -> Path:
    """The file of a task's router statistics in the run's folder."""
    return folder / "router" / f"{task_file_name(name)}.safetensors"
