"""The sub-expert layer (MoSEs): a frozen projection plus low-rank experts, masked per task and gated per token.

    y = x Wᵀ + ((x Aᵀ) ∘ gate) Bᵀ     A [columns, in], B [out, columns]: all experts' matrices side by side
    gate = scale · num_experts · softmax(x Rᵀ), kept for the `top_k` largest, repeated over each expert's `rank` columns

The layer computes two dense products and one pointwise product (`dscl.maths.gates`), whichever experts a token uses.
So shapes are static, the host never waits for the device, and under ZeRO-3 every rank touches every tensor. Where a
token uses few of very many columns, training sorts tokens by expert instead (`dscl.maths.grouped`), which keeps these
properties.

A task's mask selects parameters of A and B. A rank-1 mask has one bit for each rank-1 pair, which is a column of B and
its row of A; it is multiplied into the gate or into B. An element mask has one bit for each element.

When a task ends, the parameters in its mask are frozen: their values move into buffers, and the forward pass reads them
from there. Masks of later tasks may include frozen parameters, but no optimizer step, weight decay or rounding changes
them, at any ZeRO stage. All tasks train the same tensors; the forward pass ignores the trained values of frozen
parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dscl.maths import grouped
from dscl.maths.gates import apply_gates, compute_gates, select_experts
from dscl.maths.masks import mask_size, pack_bits, top_k_mask, trainable_top_k_mask, unpack_bits
from dscl.model.adapters.routing import AdaptedLinear, Routing, SlotAssignment
from dscl.model.flops import MatMul, low_rank_matmuls
from dscl.utils.errors import ExternalFailure

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SubExpertShape:
    """Sizes of the sub-experts beside each projection. The field names are keys of the task-mask files."""

    num_experts: int  # number of experts for the first task
    max_experts: int  # number of experts that later tasks can grow to
    rank: int  # of each expert
    top_k: int  # experts per token; 0: every token uses all experts equally, and there is no token router
    mask_density: float  # size of a task's mask, as a fraction of the parameters of the first `num_experts` experts
    scale: float  # factor on the experts' output (alpha / rank)
    rank1: bool  # rank-1 masks instead of element masks
    dropout: float = 0.0

    @property
    def columns(self) -> int:
        """Rows of A and columns of B: those of all experts that there may be."""
        return self.max_experts * self.rank

    def mask_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """The shape of each mask, by its name, beside a projection [out_features, in_features]."""
        if self.rank1:
            return {"rank1": (self.columns,)}
        return {"a": (self.columns, in_features), "b": (out_features, self.columns)}


class SubExpertLinear(AdaptedLinear):
    """A projection with sub-experts.

    In training mode, all tokens use the current task's masks. In evaluation mode, each row uses the masks, experts and
    token router of the task in its slot.
    """

    frozen_a: torch.Tensor  # [columns, in]: values of frozen parameters; zero elsewhere
    frozen_b: torch.Tensor  # [out, columns]
    expert_mask: torch.Tensor  # [tasks, experts], bool: the experts that each task may use
    routers: torch.Tensor  # [tasks, experts, in]: the token router of each task

    def __init__(self, base_layer: nn.Linear, shape: SubExpertShape, routing: Routing, template: torch.Tensor) -> None:
        super().__init__(base_layer)
        self.shape, self.routing = shape, routing
        tasks, size, device = routing.num_slots, shape.columns, template.device
        self._add_buffer("frozen_a", template.new_zeros(size, self.in_features))
        self._add_buffer("frozen_b", template.new_zeros(self.out_features, size))
        self.num_used_experts = shape.num_experts  # the current task trains the first `num_used_experts` experts
        self._add_buffer("expert_mask", torch.ones(tasks, shape.max_experts, dtype=torch.bool, device=device))
        self._add_buffer(
            "routers", template.new_zeros(tasks, shape.max_experts if shape.top_k else 0, self.in_features)
        )
        self.mask_shapes = shape.mask_shapes(self.out_features, self.in_features)
        initial_columns = shape.num_experts * shape.rank
        # The number of parameters of the first `num_experts` experts, and how many of them a task's mask selects.
        self.initial_sizes = {name: math.prod(s) // size * initial_columns for name, s in self.mask_shapes.items()}
        self.mask_counts = {name: mask_size(shape.mask_density, total) for name, total in self.initial_sizes.items()}
        for name, mask_shape in self.mask_shapes.items():
            # The mask of each task; the frozen parameters; the parameters that the current task's mask may select.
            self._add_buffer(
                f"task_mask_{name}", torch.zeros(tasks, *mask_shape, dtype=torch.bool, device=template.device)
            )
            self._add_buffer(f"frozen_mask_{name}", torch.zeros(mask_shape, dtype=torch.bool, device=device))
            self._add_buffer(f"allowed_{name}", torch.zeros(mask_shape, dtype=torch.bool, device=device))

    def _add_buffer(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _tensors_by_mask(self, kind: str) -> Tensors:
        """The tensors `opens_*`, `taken_*`, `allowed_*` or `score_*` (the `kind`), by the mask's name."""
        return {name: getattr(self, f"{kind}_{name}") for name in self.mask_shapes}

    def _side_masks(self, masks: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks for A and for B, with shapes that broadcast to A and B."""
        return (masks["rank1"][:, None], masks["rank1"]) if self.shape.rank1 else (masks["a"], masks["b"])

    def make_trainable(self) -> None:
        """Add the trainable tensors; `initial_expert_values` gives their values at the start of a task."""
        self.sub_a, self.sub_b = (nn.Parameter(torch.zeros_like(side)) for side in (self.frozen_a, self.frozen_b))
        for name, mask_shape in self.mask_shapes.items():
            self.register_parameter(f"score_{name}", nn.Parameter(self.frozen_a.new_zeros(mask_shape)))
        if self.shape.top_k:
            self.token_router = nn.Parameter(self.frozen_a.new_zeros(self.shape.max_experts, self.in_features))

    @property
    def trainable_names(self) -> list[str]:
        """The names of the trainable tensors."""
        scores = [f"score_{name}" for name in self.mask_shapes]
        return ["sub_a", "sub_b", *scores, *(["token_router"] if self.shape.top_k else [])]

    def adapter_matmuls(self) -> list[list[MatMul]]:
        """The matrix products of a training pass beside the projection: the token router, and A and B."""
        shape = self.shape
        is_grouped = self._uses_grouped_mm(self.frozen_a.device, self.frozen_a.dtype)
        num_experts = shape.top_k if is_grouped else self.num_used_experts
        router = [[MatMul(self.in_features, self.num_used_experts, True)]] if shape.top_k else []
        return [*router, low_rank_matmuls(self.in_features, num_experts * shape.rank, self.out_features, True)]

    def _uses_grouped_mm(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether tokens are sorted by expert, so that each token is multiplied only with its own experts."""
        shape, widths = self.shape, (self.in_features, self.out_features)
        return grouped.grouped_is_faster(device, dtype, self.num_used_experts, shape.rank, shape.top_k, *widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self._training_forward(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        y, assignment = super().forward(x), self.routing.assignment
        if assignment is None:
            return y
        return y + self._inference_output(
            x.reshape(len(assignment.slots), -1, self.in_features), assignment, y.dtype
        ).reshape(y.shape)

    def _training_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output [tokens, out] for x [tokens, in], with the masks of the current task."""
        shape, (a, b) = self.shape, self._training_matrices()
        device_type = x.device.type
        autocast = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
        grouped_path = self._uses_grouped_mm(x.device, torch.get_autocast_dtype(device_type) if autocast else x.dtype)
        joint_a = a[:0] if shape.dropout or grouped_path else a  # shares one product with the router
        router = self.token_router[: self.num_used_experts] if shape.top_k else a[:0]
        # The second output: [tokens, columns of joint_a, then one router logit for each expert in use].
        y, joint = _SharedInputLinear.apply(x, self.weight, self.bias, torch.cat([joint_a, router]))
        dropped_x = functional.dropout(x, shape.dropout) if shape.dropout else x
        if grouped_path:
            return y.add_(self._grouped_output(dropped_x.to(y.dtype), a.to(y.dtype), b.to(y.dtype), joint))
        if shape.dropout:
            low = functional.linear(dropped_x, a)
            joint = torch.cat([low, joint], 1) if shape.top_k else low
        low = (
            apply_gates(joint, self.num_used_experts, shape.top_k, self._gate_scale)
            if shape.top_k
            else joint * shape.scale
        )
        return y.addmm_(low.to(y.dtype), b.to(y.dtype))

    def _grouped_output(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The experts' output [tokens, out], computed with tokens sorted by expert."""
        a, b = (side.unflatten(0, (self.num_used_experts, self.shape.rank)) for side in (a, b))
        probs, expert_ids = select_experts(logits, self.shape.top_k)
        return grouped.grouped_mixture(
            x, a, b, expert_ids, (probs.gather(-1, expert_ids) * self._gate_scale).to(x.dtype)
        )

    @property
    def _gate_scale(self) -> float:
        """The factor on a softmax probability; with equal probabilities, each gate equals `scale`."""
        return self.shape.num_experts * self.shape.scale

    def _training_matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked A and Bᵀ of the experts in use for the current task. A rank-1 mask is applied to B only."""
        scores, allowed, frozen_mask = (
            {name: self._used_part(name, tensor) for name, tensor in self._tensors_by_mask(kind).items()}
            for kind in ("score", "allowed", "frozen_mask")
        )
        masks = {
            name: trainable_top_k_mask(scores[name], allowed[name], count) for name, count in self.mask_counts.items()
        }
        frozen_mask_a, frozen_mask_b = self._side_masks(frozen_mask)
        a = merge_frozen_params(frozen_mask_a, self._used_part("a", self.frozen_a), self._used_part("a", self.sub_a))
        b = merge_frozen_params(frozen_mask_b, self._used_part("b", self.frozen_b), self._used_part("b", self.sub_b))
        a, b = (a, b * masks["rank1"]) if self.shape.rank1 else (a * masks["a"], b * masks["b"])
        return a, b.T.contiguous()  # the backward product is faster for Bᵀ than for B

    def _used_part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The part that belongs to the experts in use, of a tensor shaped like A, B or a mask (`name`)."""
        size = self.num_used_experts * self.shape.rank
        return tensor[:, :size] if name == "b" else tensor[:size]

    def _inference_output(self, x: torch.Tensor, assignment: SlotAssignment, dtype: torch.dtype) -> torch.Tensor:
        """The experts' output [rows, tokens, out] for x [rows, tokens, in], each row with its own task."""
        expert_mask = self.expert_mask[assignment.slot_indices][:, None]
        if self.shape.top_k:
            gate = compute_gates(
                x @ self.routers[assignment.slot_indices].transpose(1, 2),
                self.shape.top_k,
                self._gate_scale,
                expert_mask,
            )
        else:
            gate = expert_mask.to(self.frozen_a.dtype) * self.shape.scale
        gate = gate[..., None].expand(*gate.shape, self.shape.rank).flatten(-2)
        if self.shape.rank1:
            rank1_mask = (
                self._tensors_by_mask("task_mask")["rank1"][assignment.slot_indices].to(gate)
                * assignment.has_slot[:, None]
            )
            return _gated_low_rank(x, self.frozen_a, self.frozen_b, gate * rank1_mask[:, None])
        expert_y = x.new_zeros(*x.shape[:2], self.out_features, dtype=dtype)
        gate = gate.expand(*x.shape[:2], -1)
        for slot, row_ids in assignment.rows_by_slot.items():
            task_masks = {name: masks[slot] for name, masks in self._tensors_by_mask("task_mask").items()}
            a, b = self.frozen_a * task_masks["a"], self.frozen_b * task_masks["b"]
            expert_y.index_copy_(0, row_ids, _gated_low_rank(x[row_ids], a, b, gate[row_ids]).to(dtype))
        return expert_y

    # ---- masks and frozen parameters

    def set_allowed_masks(self, num_experts: int, reuse: bool) -> None:
        """Let the next task's mask select parameters of the first `num_experts` experts; without `reuse`, only those
        that are not frozen."""
        self.num_used_experts = num_experts
        is_used_column = torch.arange(self.shape.columns, device=self.frozen_a.device) < num_experts * self.shape.rank
        for name, frozen_mask in self._tensors_by_mask("frozen_mask").items():
            is_used = is_used_column[:, None] if name == "a" else is_used_column
            getattr(self, f"allowed_{name}").copy_(is_used & (~frozen_mask | reuse))

    def count_missing_params(self, num_experts: int) -> int:
        """How many free parameters the first `num_experts` experts lack for a mask without frozen ones; 0: none."""
        missing = 0
        for name, frozen_mask in self._tensors_by_mask("frozen_mask").items():
            total_params = self.initial_sizes[name] // self.shape.num_experts * num_experts
            missing = max(missing, self.mask_counts[name] - (total_params - int(frozen_mask.sum())))
        return missing

    @torch.no_grad()
    def freeze_task_params(self, slot: int, trained_tensors: Tensors) -> Tensors:
        """Freeze the parameters in the mask of an ended task; returns the tensors for `load_task_params`."""
        dtype, allowed = self.frozen_a.dtype, self._tensors_by_mask("allowed")
        masks = {name: torch.zeros_like(mask) for name, mask in allowed.items()}
        if not all(bool(tensor.to(dtype).isfinite().all()) for tensor in trained_tensors.values()):
            raise ExternalFailure(
                "a sub-expert's values are not finite, so the task cannot be saved; lower train.lr and run again"
            )
        for name, count in self.mask_counts.items():
            # The slice is the same as in training, so that equal scores are selected alike.
            scores = self._used_part(name, trained_tensors[f"score_{name}"].to(dtype))
            self._used_part(name, masks[name]).copy_(top_k_mask(scores, self._used_part(name, allowed[name]), count))
        new_masks = self._store_masks(slot, masks)
        task_tensors = {f"mask_{name}": pack_bits(mask) for name, mask in masks.items()}
        task_tensors |= {
            side: trained_tensors[f"sub_{side}"].to(dtype)[new_mask]
            for side, new_mask in zip("ab", new_masks, strict=True)
        }
        task_tensors["expert_mask"] = (
            torch.arange(self.shape.max_experts, device=self.frozen_a.device) < self.num_used_experts
        )
        if self.shape.top_k:
            task_tensors["router"] = trained_tensors["token_router"].to(dtype)[: self.num_used_experts]
        self._store_values(slot, new_masks, task_tensors)
        return task_tensors

    @torch.no_grad()
    def load_task_params(self, slot: int, task_tensors: Tensors) -> None:
        """Restore what `freeze_task_params` returned. Tasks must be restored in the order in which they ended."""
        shapes, device = self.mask_shapes, self.frozen_a.device
        masks = {name: unpack_bits(task_tensors[f"mask_{name}"], shape).to(device) for name, shape in shapes.items()}
        self._store_values(slot, self._store_masks(slot, masks), task_tensors)

    def count_new_params(self, masks: Tensors) -> tuple[int, int]:
        """How many parameters of A and of B are in these masks and not frozen yet."""
        a, b = self._side_masks({name: mask & ~getattr(self, f"frozen_mask_{name}") for name, mask in masks.items()})
        return int(a.expand_as(self.frozen_a).sum()), int(b.expand_as(self.frozen_b).sum())

    def _store_masks(self, slot: int, masks: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Set the masks of the task in this slot; returns masks of A and of B of the parameters newly frozen by it."""
        previously_frozen = {
            name: frozen_mask.clone() for name, frozen_mask in self._tensors_by_mask("frozen_mask").items()
        }
        for name, mask in masks.items():
            getattr(self, f"task_mask_{name}")[slot] = mask
            getattr(self, f"frozen_mask_{name}").logical_or_(mask)
        new_masks = self._side_masks({name: mask & ~previously_frozen[name] for name, mask in masks.items()})
        return new_masks[0].expand_as(self.frozen_a), new_masks[1].expand_as(self.frozen_b)

    def _store_values(self, slot: int, new_masks: tuple[torch.Tensor, torch.Tensor], task_tensors: Tensors) -> None:
        """Copy a task's parameters, expert mask and token router into the buffers."""
        for frozen_values, new_mask, side in zip((self.frozen_a, self.frozen_b), new_masks, "ab", strict=True):
            frozen_values[new_mask] = task_tensors[side].to(frozen_values)
        self.expert_mask[slot] = task_tensors["expert_mask"].to(self.expert_mask)
        if self.shape.top_k:
            self.routers[slot, : len(task_tensors["router"])] = task_tensors["router"].to(self.routers)

    @property
    def num_frozen_params(self) -> int:
        """How many parameters of A and B are frozen."""
        a, b = self._side_masks(self._tensors_by_mask("frozen_mask"))
        return int(a.expand_as(self.frozen_a).sum()) + int(b.expand_as(self.frozen_b).sum())

    def mask_overlap(self) -> torch.Tensor:
        """[tasks, tasks]: how many parameters are in the masks of both tasks."""
        flat_masks = [masks.flatten(1).float() for masks in self._tensors_by_mask("task_mask").values()]
        return torch.stack([flat @ flat.T for flat in flat_masks]).double().sum(0)


def merge_frozen_params(
    frozen_mask: torch.Tensor, frozen_values: torch.Tensor, trained_values: torch.Tensor
) -> torch.Tensor:
    """The frozen values where the mask is set, without a gradient; the trained values elsewhere."""
    return torch.where(frozen_mask, frozen_values, trained_values)


class _SharedInputLinear(torch.autograd.Function):
    """A projection and a second product of the same input. The two gradients of the input are added in place."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight, other)
        return functional.linear(x, weight, bias), functional.linear(x, other)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_y, grad_other = gradients
        x, weight, other = (saved.to(grad_y.dtype) for saved in ctx.saved_tensors)  # autocast may have cast the outputs
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            (grad_y @ weight).addmm_(grad_other, other) if needs_x else None,
            grad_y.T @ x if needs_weight else None,
            grad_y.sum(0) if needs_bias else None,
            grad_other.T @ x,
        )


def _gated_low_rank(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """((x Aᵀ) ∘ gate) Bᵀ"""
    return functional.linear(functional.linear(x, a) * gate, b)
