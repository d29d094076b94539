"""What a training step of a model costs in floating-point operations, by what is really computed.

A product of [tokens, in] with [in, out] takes 2 · in · out a token forward, as much again backward for its input where
a gradient flows on to something that trains below, and as much again for the weight where that trains itself. So frozen
layers cost a third or two of trained ones, and what stands below everything that trains costs nothing backward. The
usual six operations a parameter and token are right for none of these methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Product(NamedTuple):
    """With a matrix of this size, which trains or not."""

    into: int
    out: int
    trains: bool


@dataclass(frozen=True)
class Cost:
    """Operations, forward and backward."""

    token: float  # of each token, in all layers
    pair: float  # of each token and one that it attends to, in all layers
    target: float  # of each position whose logits are made
    again_token: float  # of the first two, what activation checkpointing computes once more
    again_pair: float

    def of(self, tokens: int, pairs: int, targets: int) -> float:
        """Of samples with so many tokens, pairs of a token with itself or one before it, and targets."""
        return self.token * tokens + self.pair * pairs + self.target * targets

    def again(self, tokens: int, pairs: int) -> float:
        return self.again_token * tokens + self.again_pair * pairs


def cost_of(model: nn.Module) -> Cost | None:
    """Of a LLaMA-like causal language model as it stands: what trains, and what was put beside its projections.

    None where it is not built like that: there are many kinds, and nothing but a figure depends on it.
    """
    try:
        return _cost_of(model)
    except AttributeError:
        return None


def _cost_of(model: nn.Module) -> Cost:
    core: Any = model.get_submodule("model")
    head: Any = model.get_submodule("lm_head")
    token = pair = again = again_pair = 0.0
    flows = _trains(core.embed_tokens)
    for layer in core.layers:
        attention, mlp = layer.self_attn, layer.mlp
        flows |= _trains(layer.input_layernorm)
        q, k, v = read = [_applied(module, flows) for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
        # Between them every token meets those before it: products of q with k, and of what comes out with v.
        width, met = 2.0 * attention.q_proj.out_features, q.flows or k.flows
        pair += width * (1 + q.flows + k.flows) + width * (1 + met + v.flows)
        o = _applied(attention.o_proj, met or v.flows)
        flows |= o.flows or _trains(layer.post_attention_layernorm)
        raised = [_applied(module, flows) for module in (mlp.gate_proj, mlp.up_proj)]
        down = _applied(mlp.down_proj, any(each.flows for each in raised))
        flows |= down.flows
        token += sum(each.whole for each in (*read, o, *raised, down))
        if flows:  # the whole layer, frozen or not, up to its last product: nothing is made of what comes out of that
            last = products(mlp.down_proj)[-1][-1]
            again += sum(each.forward for each in (*read, o, *raised, down)) - 2.0 * last.into * last.out
            again_pair += 2 * width
    kept = not getattr(core, "gradient_checkpointing", False)
    target = _applied(head, flows or _trains(core.norm)).whole
    return Cost(token, pair, target, 0.0 if kept else again, 0.0 if kept else again_pair)


def low_rank(into: int, rank: int, out: int, trains: bool) -> list[Product]:
    return [Product(into, rank, trains), Product(rank, out, trains)]


def products(module: Any) -> list[list[Product]]:
    """The chains of products that a projection makes of its input, to be added up, as they come one after the other."""
    if hasattr(module, "base_layer"):  # PEFT's
        chains = products(module.base_layer)
        for name in module.active_adapters:
            low, high = module.lora_A[name], module.lora_B[name]
            chains.append([_product(low), _product(high)])
        return chains
    own = [[_product(module)]]
    return own + module.beside() if hasattr(module, "beside") else own


def _product(linear: Any) -> Product:
    return Product(linear.in_features, linear.out_features, linear.weight.requires_grad)


class Applied(NamedTuple):
    """A projection of one token."""

    forward: float
    whole: float
    flows: bool  # whether a gradient comes to its output


def _applied(module: Any, flows: bool) -> Applied:
    forward = whole = 0.0
    on = flows
    for chain in products(module):
        reached = flows
        for into, out, trains in chain:
            once = 2.0 * into * out
            forward += once
            whole += once * (1 + reached + trains)
            reached |= trains
        on |= reached
    return Applied(forward, whole, on)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
