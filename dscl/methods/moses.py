"""MoSEs, mixtures of sub-experts (after arXiv 2511.06237): tasks share sparse parameters of one set of sub-experts.

What trains: low-rank sub-experts beside frozen projections, a mask per task that selects some of their parameters, and
a gate that sends every token to a few sub-experts. What may not change: parameters that earlier tasks' masks select.
Later masks may select them too, but cannot change them. At inference the prompt's task comes from the caller, from
per-task keys, or from the analytic router. Optionally the dense weights train as well, constrained by OSFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dscl.config.methods import MosesPreset, OsftPreset
from dscl.config.parts import KeyRouterConfig, OracleRouterConfig, RlsRouterConfig
from dscl.data.batches import Batch, PromptBatch
from dscl.engine.matrix_owners import Constraint
from dscl.maths.masks import mask_size
from dscl.methods.base import Method, RunInfo, TaskContext, TaskMatrix, TaskSummary, TensorReader
from dscl.methods.osft import Osft
from dscl.methods.rls_router import Router
from dscl.methods.task_router import TaskRouter, make_router_spec, resolve_feature_layer, resolve_num_features
from dscl.model.adapters.peft_files import task_file_name
from dscl.model.adapters.routing import Routing, hook_feature_layer, make_template_tensor, match_targets_from_layer
from dscl.model.adapters.sub_expert_bank import initial_expert_values, inject_sub_experts
from dscl.model.adapters.sub_experts import SubExpertShape
from dscl.model.adapters.task_masks import TaskMasks, read_matching_masks, write_task_masks
from dscl.model.lm_head import answer_loss
from dscl.utils.errors import UserError


class Moses(Method):
    """MoSEs. `experts` holds the sub-experts and the masks of ended tasks."""

    Config = MosesPreset
    config: MosesPreset
    uses_task_id = True

    def __init__(self, config: MosesPreset, run_info: RunInfo) -> None:
        super().__init__(config, run_info)
        self.infers_task_id = self.infers_task_id_with(config)
        self.routing = Routing(num_slots=len(run_info.task_names), rank=0)
        self.dense_osft = None
        if config.constraint is not None:
            self.dense_osft = Osft(OsftPreset(constraint=config.constraint), run_info)
        self.task_router: TaskRouter | None = None
        self._task_masks: list[TaskMasks] = []  # one for each ended task

    @classmethod
    def infers_task_id_with(cls, config: MosesPreset) -> bool:
        return not isinstance(config.router, OracleRouterConfig)

    def prepare(self, model: nn.Module) -> nn.Module:
        if not isinstance(getattr(getattr(model, "model", None), "layers", None), nn.ModuleList):
            raise UserError(
                "method.name: moses needs a model whose layers stand in model.layers (llama, mistral, qwen2, ...); "
                f"this is a {type(model).__name__}"
            )
        layer = self._prepare_task_router(model) if self.infers_task_id else 0
        model.requires_grad_(False)
        if self.dense_osft is not None:
            self.dense_osft.from_layer = layer
            self.dense_osft.prepare(model)
        self.template = make_template_tensor(model)
        config = self.config.tune
        columns = config.num_experts * config.rank
        is_rank1 = config.masks == "rank1"
        density = config.mask_density
        experts_per_task = mask_size(density, columns) / config.rank if is_rank1 else density * config.num_experts
        max_needed = math.ceil(len(self.run_info.task_names) * experts_per_task - 1e-9)  # if tasks share no parameters
        shape = SubExpertShape(
            num_experts=config.num_experts,
            max_experts=config.max_experts or max(config.num_experts, max_needed),
            rank=config.rank,
            top_k=0 if config.gate == "uniform" else config.top_k or min(2, config.num_experts),
            mask_density=density,
            scale=config.alpha / config.rank,
            rank1=is_rank1,
            dropout=config.dropout,
        )
        self.experts = inject_sub_experts(
            model, shape, self.routing, match_targets_from_layer(model, layer, config.targets, "method.tune.targets")
        )
        for sub_expert_linear in self.experts.layers.values():
            sub_expert_linear.make_trainable()
        return model

    def _prepare_task_router(self, model: Any) -> int:
        """Create the task router and hook it into the model. Returns the feature layer."""
        config, shape = self.config.router, model.config
        assert isinstance(config, KeyRouterConfig)
        layer = resolve_feature_layer(config.layer, shape.num_hidden_layers)
        analytic = config if isinstance(config, RlsRouterConfig) else RlsRouterConfig()
        num_features = resolve_num_features(analytic.num_features, shape.hidden_size)
        spec = make_router_spec(
            "exact" if config is analytic else "key", layer, num_features, shape.hidden_size, self.run_info
        )
        device = next(model.parameters()).device
        router = Router(spec, analytic.ridge, analytic.ood_fallback is not False, device)
        self.task_router = TaskRouter(router, self.routing)
        hook_feature_layer(model, self.routing, layer)
        return layer

    def estimate_memory(self) -> dict[str, float]:
        self.experts.num_used_experts = self.experts.shape.max_experts  # the most that training can come to
        self.experts.set_allowed_masks(self.config.tune.reuse)
        dense = self.dense_osft.estimate_memory() if self.dense_osft is not None else {}
        return {**dense, **(self.task_router.estimate_memory() if self.task_router is not None else {})}

    def task_end_bytes(self) -> float:
        return self.task_router.solve_bytes() if self.task_router is not None else 0.0

    def begin_task(self, index: int, name: str, context: TaskContext) -> TensorReader:
        experts, policy = self.experts, self.config.tune.on_full
        while (
            (num_missing := experts.count_missing_params())
            and policy == "grow"
            and experts.num_used_experts < experts.shape.max_experts
        ):
            experts.num_used_experts += 1
        if num_missing and policy != "reuse":
            remedies = [f"run again with method.tune.on_full={other}" for other in self._alternative_policies(policy)]
            remedies.append("start anew with a lower method.tune.mask_density, or a larger method.tune.max_experts")
            unit = "rank-1 pairs" if experts.shape.rank1 else "entries"
            raise UserError(
                f"method moses: task {name} needs {num_missing} more {unit} of a layer than are free there; "
                + ", or ".join(remedies)
            )
        experts.set_allowed_masks(self.config.tune.reuse)
        if self.dense_osft is not None:
            self.dense_osft.begin_task(index, name, context)

        def read_initial_values(tensor: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor | None:
            if tensor.rpartition(".")[0] in experts.layers and not tensor.endswith((".weight", ".bias")):
                return initial_expert_values(self.run_info.seed, f"{name}:{tensor}", shape, start, stop)
            return None  # a dense weight continues from its current value

        return read_initial_values

    def _alternative_policies(self, policy: str) -> list[str]:
        """The other values of `on_full` that would let a task begin that finds too few free parameters."""
        grow = policy == "stop" and self.experts.num_used_experts < self.experts.shape.max_experts
        return ["grow"] * grow + ["reuse"] * self.config.tune.reuse

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if self.task_router is not None:
            return self.task_router.loss_with_features(model, batch)
        return answer_loss(model, batch)

    def end_task(self, index: int, name: str, context: TaskContext) -> TaskSummary:
        messages = [self.task_router.add_task(name, context)] if self.task_router is not None else []
        experts = self.experts
        previous_tasks, growth = tuple(experts.names), self._describe_growth()
        frozen_tensors = experts.freeze_task_params(name, context.gather_full_weights(experts.trainable_names()))
        training = {name: getattr(self.run_info, name) for name in ("model", "tokenizer", "prompt_limit", "precision")}
        self._task_masks.append(TaskMasks(name, previous_tasks, experts.shape, frozen_tensors, training))
        messages.append(f"{experts.frozen_share():.1%} of the initial sub-experts' parameters are frozen{growth}")
        metrics = self._capacity_metrics()
        if self.dense_osft is not None:
            with self.routing.use_slots([experts.get_slot(name)], self.template):
                dense_summary = self.dense_osft.end_task(index, name, context)
            messages.append(dense_summary.message)
            metrics["directions_bytes"] = dense_summary.metrics["capacity_bytes"]
        return TaskSummary("; ".join(filter(None, messages)), metrics, self._mask_overlap_matrix())

    def _describe_growth(self) -> str:
        """How the ended task got its parameters if too few were free, for a message; empty if enough were."""
        experts, num_missing = self.experts, self.experts.count_missing_params()
        num_before = experts.shape.num_experts
        if self._task_masks:
            num_before = int(next(iter(self._task_masks[-1].layers.values()))["expert_mask"].sum())
        if experts.num_used_experts > num_before:
            growth = f"from {num_before} to {experts.num_used_experts} of at most {experts.shape.max_experts}"
            return f"; too few parameters were free, so the sub-experts grew {growth}"
        if not num_missing:
            return ""
        unit = "rank-1 pairs" if experts.shape.rank1 else "entries"
        return f"; too few were free, so at least {num_missing} {unit} of a layer are shared with earlier tasks"

    def _capacity_metrics(self) -> dict[str, float]:
        """The bytes that all tasks so far take; and for comparison those of one LoRA per task with as many columns as a
        mask selects."""
        task_bytes = [task_masks.byte_sizes() for task_masks in self._task_masks]
        component_bytes = {f"{kind}_bytes": float(sum(sizes[kind] for sizes in task_bytes)) for kind in task_bytes[0]}
        shape, element_size = self.experts.shape, self.template.element_size()
        columns = mask_size(shape.mask_density, shape.num_experts * shape.rank)
        lora_bytes = sum(
            columns * element_size * (m.in_features + m.out_features) for m in self.experts.layers.values()
        )
        if self.task_router is not None:
            component_bytes["router_bytes"] = self.task_router.statistics_bytes()
        # Keys count as capacity. The analytic router's statistics do not, as in asr.
        key_bytes = component_bytes["router_bytes"] if self.config.router.name == "key" else 0.0
        return {
            "capacity_bytes": sum(component_bytes[f"{kind}_bytes"] for kind in task_bytes[0]) + key_bytes,
            "capacity_share": self.experts.frozen_share(),
            "num_experts": float(self.experts.num_used_experts),
            "lora_per_task_bytes": float(lora_bytes * len(task_bytes)),
            **component_bytes,
        }

    def _mask_overlap_matrix(self) -> TaskMatrix:
        """For each pair of tasks, the part of one task's mask that the other's mask selects too."""
        names = tuple(self.experts.names)
        return TaskMatrix(
            "mask overlap: fraction of the row's mask that is also in the column's",
            names,
            self.experts.mask_overlap().tolist(),
        )

    def save_task_artifacts(self, folder: Path, name: str) -> list[Path]:
        path = folder / "experts" / f"{task_file_name(name)}.safetensors"
        write_task_masks(path, next(task_masks for task_masks in self._task_masks if task_masks.task == name))
        return [path] if self.task_router is None else [path, self.task_router.save_task_artifacts(folder, name)]

    def load_task_artifacts(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            path = folder / "experts" / f"{task_file_name(name)}.safetensors"
            task_masks = read_matching_masks(path, name, tuple(self.experts.names), self.experts)
            self.experts.load_task_params(name, task_masks.layers)
            self._task_masks.append(task_masks)
            if self.task_router is not None:
                self.task_router.load_task_artifacts(folder, name)
        self.experts.num_used_experts = self._saved_num_used_experts
        self.experts.set_allowed_masks(self.config.tune.reuse)

    def inference_context(
        self, batch: PromptBatch, task: str | None = None
    ) -> AbstractContextManager[Sequence[str | None] | None]:
        if task is not None:
            return self.routing.use_slots([self._slot_of_task(task)], self.template)
        return (
            self.task_router.inference_context(batch, self._slot_of_task)
            if self.task_router is not None
            else nullcontext()
        )

    def _slot_of_task(self, name: str | None) -> int | None:
        """The task's slot. None without a task, or for a task that was not trained yet: the base model answers."""
        return self.experts.get_slot(name) if name in self.experts.names else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"num_used_experts": torch.tensor(self.experts.num_used_experts)}

    def row_state_dict(self) -> dict[str, torch.Tensor]:
        return self.task_router.row_state_dict() if self.task_router is not None else {}

    def load_state_dict(self, state: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> None:
        self._saved_num_used_experts = int(state["num_used_experts"])
        if self.task_router is not None:
            self.task_router.load_row_state(rows)

    # ---- the dense weights, constrained by OSFT

    def constraint(self) -> Constraint | None:
        return self.dense_osft.constraint() if self.dense_osft is not None else None

    def matrix_state_dict(self) -> dict[str, torch.Tensor]:
        return self.dense_osft.matrix_state_dict() if self.dense_osft is not None else {}

    def load_matrix_state(self, read_matrix_state: Callable[[str], dict[str, torch.Tensor]]) -> None:
        if self.dense_osft is not None:
            self.dense_osft.load_matrix_state(read_matrix_state)
