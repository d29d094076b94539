"""The counted FLOPs of a training step against those that torch's own counter sees in a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dscl.config.parsing import parse_config
from dscl.methods.base import RunInfo
from dscl.methods.registry import find_method
from dscl.model.backbone import enable_activation_checkpointing
from dscl.model.flops import count_flops

SHAPE = {
    "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
ROWS, WIDTH, NUM_TARGETS = 3, 24, 5
RUN_INFO = RunInfo(0, ("a", "b", "c"), "", "", "", 40, "fp32")
LORA = {"rank": 4, "targets": ["q_proj", "down_proj"]}
ROUTER = {"layer": 2, "num_features": 128}
METHODS: list[dict[str, Any]] = [
    {"name": "sequential"},
    {"name": "sequential", "tune": {"name": "lora", **LORA}},
    {"name": "osft"},
    {"name": "asr", "tune": LORA, "router": ROUTER},
    {"name": "lora_per_task", "tune": {"rank": 4}},
    {"name": "olora", "tune": LORA},
    {"name": "moses", "tune": {"num_experts": 4, "top_k": 2, "rank": 2}},
    {"name": "moses", "tune": {"num_experts": 4, "gate": "uniform", "rank": 2, "masks": "element"}},
]
# Further methods with adapters in the MLP.
MLP_METHODS: list[dict[str, Any]] = [
    {"name": "moses", "tune": {"num_experts": 4, "top_k": 2, "rank": 2, "targets": ["q_proj", "down_proj"]}},
    {"name": "asr", "tune": {"rank": 4, "targets": ["gate_proj"]}, "router": ROUTER},
]


def describe_method(method: dict[str, Any]) -> str:
    """The id of a test case: all values of a method's keys."""
    values = [part.values() if isinstance(part, dict) else [part] for part in method.values()]
    return "-".join(str(value) for part in values for value in part)[:60]


def prepare_model(method: dict[str, Any], tied: bool = True, recompute: bool = False) -> nn.Module:
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied, attn_implementation="eager")
    method_class = find_method(method["name"])
    instance = method_class(parse_config(method_class.Config, method, "method"), RUN_INFO)
    plain = LlamaForCausalLM(config)
    if recompute:
        enable_activation_checkpointing(plain)
    model: nn.Module = instance.prepare(plain)
    return model.train()


def in_place(_added: Any, a: Any, b: Any, **_: Any) -> int:
    """The FLOPs of the one product that torch's counter lacks."""
    return int(2 * a[0] * a[1] * b[1])


def count_by_torch(model: nn.Module) -> int:
    """All FLOPs of one step by torch's counter."""
    ids = torch.randint(0, 300, (ROWS, WIDTH))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=torch.arange(NUM_TARGETS)).logits
        functional.cross_entropy(logits.flatten(0, 1), torch.zeros(ROWS * NUM_TARGETS, dtype=torch.int64)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS, ids=describe_method)
def test_count_equals_torchs_flop_counter(method: dict[str, Any]) -> None:
    model = prepare_model(method)
    cost = count_flops(model)
    # Eager attention computes all pairs of a row, those that are masked too.
    expected = cost.total_flops(ROWS * WIDTH, ROWS * WIDTH * WIDTH, ROWS * NUM_TARGETS)
    if method["name"] == "olora":  # of weights with weights, whatever the tokens
        penalty = sum(2 * m.in_features * m.rank * len(m.bank_a) for m in model.modules() if hasattr(m, "bank_a"))
        assert count_without_overlap(model) == pytest.approx(expected, rel=1e-12)
        assert penalty > 0
    else:
        assert count_by_torch(model) == pytest.approx(expected, rel=1e-12)


def count_without_overlap(model: nn.Module, times: int = 1) -> int:
    nothing = torch.zeros(())
    for module in model.modules():
        if hasattr(module, "on_overlap"):
            module.on_overlap = lambda value: nothing
    overlap = sum(2 * m.in_features * m.rank * len(m.bank_a) for m in model.modules() if hasattr(m, "on_overlap"))
    return count_by_torch(model) - times * overlap


@pytest.mark.parametrize("method", [*METHODS, *MLP_METHODS], ids=describe_method)
def test_recomputation_is_counted_separately(method: dict[str, Any]) -> None:
    """Whole layers are recomputed, from the first layer that needs a gradient on."""
    plain_model, recomputing_model = prepare_model(method), prepare_model(method, recompute=True)
    cost, plain_cost = count_flops(recomputing_model), count_flops(plain_model)
    assert (plain_cost.recompute_per_token, plain_cost.recompute_per_pair) == (0.0, 0.0)
    tokens, pairs = ROWS * WIDTH, ROWS * WIDTH * WIDTH
    once = cost.total_flops(tokens, pairs, ROWS * NUM_TARGETS)
    assert once == plain_cost.total_flops(tokens, pairs, ROWS * NUM_TARGETS)
    assert count_without_overlap(plain_model) == pytest.approx(once, rel=1e-12)
    assert count_without_overlap(recomputing_model, 2) == pytest.approx(
        once + cost.recompute_flops(tokens, pairs), rel=1e-12
    )


def test_frozen_layers_below_cost_a_third() -> None:
    full, above = count_flops(prepare_model({"name": "sequential"})), count_flops(prepare_model(METHODS[3]))
    assert above.per_token < 0.6 * full.per_token
    assert above.per_pair < 0.65 * full.per_pair


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_other_model_structures_are_not_counted(kind: str) -> None:
    small = {
        "opt": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16},
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    }[kind]
    config = AutoConfig.for_model(kind, vocab_size=30, **small)
    assert count_flops(AutoModelForCausalLM.from_config(config)) is None
