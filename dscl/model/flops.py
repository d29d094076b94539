"""Floating-point operations of a training step, counted from the matrix products that are really computed.

A product of [tokens, in] with [in, out] takes 2 · in · out operations per token in the forward pass. The backward pass
takes as many for the gradient of the input, if a layer below is trainable, and as many for the gradient of the weight,
if the weight is trainable. So a frozen layer costs one or two thirds of a trainable one. The usual estimate of six
operations per parameter and token is therefore wrong for the methods here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class MatMul(NamedTuple):
    """A matrix product x Wᵀ with a weight of this size."""

    in_features: int
    out_features: int
    trainable: bool


@dataclass(frozen=True)
class FlopCount:
    """Operations of a forward and backward pass."""

    per_token: float  # for each token, in all layers
    per_pair: float  # for each pair of a token and a token it attends to, in all layers
    per_target: float  # for each position whose logits are computed
    recompute_per_token: float  # additional operations of activation checkpointing
    recompute_per_pair: float

    def total_flops(self, tokens: int, pairs: int, targets: int) -> float:
        """Operations for samples with this many tokens, pairs and targets; a token also attends to itself."""
        return self.per_token * tokens + self.per_pair * pairs + self.per_target * targets

    def recompute_flops(self, tokens: int, pairs: int) -> float:
        """Operations that activation checkpointing adds."""
        return self.recompute_per_token * tokens + self.recompute_per_pair * pairs


def count_flops(model: nn.Module) -> FlopCount | None:
    """Operations of a LLaMA-like causal language model, with its adapters and its trainable parameters as they are.

    None for a model of another structure; only displayed figures depend on the count.
    """
    try:
        return _count_flops(model)
    except AttributeError:
        return None


def _count_flops(model: nn.Module) -> FlopCount:
    decoder: Any = model.get_submodule("model")
    head: Any = model.get_submodule("lm_head")
    per_token = per_pair = recompute = recompute_per_pair = 0.0
    has_gradient = _has_trainable(decoder.embed_tokens)
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        has_gradient |= _has_trainable(layer.input_layernorm)
        q, k, v = qkv = [
            _projection_flops(module, has_gradient) for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        # Attention: each token's q with the k of each token before it, and the attention weights with v.
        width, scores_gradient = 2.0 * attention.q_proj.out_features, q.has_gradient or k.has_gradient
        per_pair += width * (1 + q.has_gradient + k.has_gradient) + width * (1 + scores_gradient + v.has_gradient)
        o = _projection_flops(attention.o_proj, scores_gradient or v.has_gradient)
        has_gradient |= o.has_gradient or _has_trainable(layer.post_attention_layernorm)
        gate_up = [_projection_flops(module, has_gradient) for module in (mlp.gate_proj, mlp.up_proj)]
        down = _projection_flops(mlp.down_proj, any(each.has_gradient for each in gate_up))
        has_gradient |= down.has_gradient
        per_token += sum(each.total for each in (*qkv, o, *gate_up, down))
        if has_gradient:  # the whole layer is recomputed, except its last product, whose output is not needed
            last = matmul_chains(mlp.down_proj)[-1][-1]
            recompute += (
                sum(each.forward for each in (*qkv, o, *gate_up, down)) - 2.0 * last.in_features * last.out_features
            )
            recompute_per_pair += 2 * width
    keeps_activations = not getattr(decoder, "gradient_checkpointing", False)
    per_target = _projection_flops(head, has_gradient or _has_trainable(decoder.norm)).total
    return FlopCount(
        per_token,
        per_pair,
        per_target,
        0.0 if keeps_activations else recompute,
        0.0 if keeps_activations else recompute_per_pair,
    )


def low_rank_matmuls(in_features: int, rank: int, out_features: int, trainable: bool) -> list[MatMul]:
    """The two products of a low-rank adapter."""
    return [MatMul(in_features, rank, trainable), MatMul(rank, out_features, trainable)]


def matmul_chains(module: Any) -> list[list[MatMul]]:
    """The matrix products of a projection. The outputs of the chains are summed; a chain's products are consecutive."""
    if hasattr(module, "base_layer"):  # a layer of PEFT
        chains = matmul_chains(module.base_layer)
        for name in module.active_adapters:
            lora_a, lora_b = module.lora_A[name], module.lora_B[name]
            chains.append([_linear_matmul(lora_a), _linear_matmul(lora_b)])
        return chains
    base_chain = [[_linear_matmul(module)]]
    return base_chain + module.adapter_matmuls() if hasattr(module, "adapter_matmuls") else base_chain


def _linear_matmul(linear: Any) -> MatMul:
    return MatMul(linear.in_features, linear.out_features, linear.weight.requires_grad)


class ProjectionFlops(NamedTuple):
    """Operations of a projection for one token."""

    forward: float
    total: float  # forward and backward
    has_gradient: bool  # whether its output requires a gradient


def _projection_flops(module: Any, has_gradient: bool) -> ProjectionFlops:
    """`has_gradient`: whether the projection's input requires a gradient."""
    forward = total = 0.0
    has_output_gradient = has_gradient
    for chain in matmul_chains(module):
        has_input_gradient = has_gradient
        for in_features, out_features, trainable in chain:
            forward_flops = 2.0 * in_features * out_features
            forward += forward_flops
            total += forward_flops * (1 + has_input_gradient + trainable)
            has_input_gradient |= trainable
        has_output_gradient |= has_input_gradient
    return ProjectionFlops(forward, total, has_output_gradient)


def _has_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
