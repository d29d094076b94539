"""The operations of a training step, counted: what torch's own counter sees in a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dscl.methods.base import Facts
from dscl.methods.registry import find_method
from dscl.model.backbone import checkpoint_activations
from dscl.model.flops import cost_of

SHAPE = {
    "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
ROWS, WIDTH, KEPT = 3, 24, 5
FACTS = Facts(0, ("a", "b", "c"), "", "", "", 40, "fp32")
LORA = {"rank": 4, "targets": ["q_proj", "down_proj"]}
METHODS: list[dict[str, Any]] = [
    {"name": "sequential"},
    {"name": "sequential", "tune": "lora", "lora": LORA},
    {"name": "osft"},
    {"name": "asr", "width": 128, "feature_layer": 2, "lora": LORA},
    {"name": "lora_per_task", "lora": {"rank": 4}},
    {"name": "olora", "lora": LORA},
    {"name": "moses", "experts": 4, "top_k": 2, "rank": 2},
    {"name": "moses", "experts": 4, "gate": "uniform", "rank": 2, "masks": "element"},
]
# Where something stands beside the layer's last product as well.
AT_LAST: list[dict[str, Any]] = [
    {"name": "moses", "experts": 4, "top_k": 2, "rank": 2, "targets": ["q_proj", "down_proj"]},
    {"name": "asr", "width": 128, "feature_layer": 2, "lora": {"rank": 4, "targets": ["gate_proj"]}},
]


def prepared(method: dict[str, Any], tied: bool = True, again: bool = False) -> nn.Module:
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied, attn_implementation="eager")
    kind = find_method(method["name"])
    made = kind(kind.Config(**{**method, **({"lora": lora(method["lora"])} if "lora" in method else {})}), FACTS)
    plain = LlamaForCausalLM(config)
    if again:
        checkpoint_activations(plain)
    model: nn.Module = made.prepare(plain)
    return model.train()


def lora(keys: dict[str, Any]) -> Any:
    from dscl.model.adapters.injection import LoraConfig

    return LoraConfig(**{**keys, **({"targets": tuple(keys["targets"])} if "targets" in keys else {})})


def in_place(_added: Any, a: Any, b: Any, **_: Any) -> int:
    """The one product that torch's counter does not know."""
    return int(2 * a[0] * a[1] * b[1])


def counted(model: nn.Module) -> int:
    """All operations of one step, as torch sees them pass."""
    ids = torch.randint(0, 300, (ROWS, WIDTH))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=torch.arange(KEPT)).logits
        functional.cross_entropy(logits.flatten(0, 1), torch.zeros(ROWS * KEPT, dtype=torch.int64)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values()))[:40])
def test_the_count_is_what_is_computed(method: dict[str, Any]) -> None:
    model = prepared(method)
    cost = cost_of(model)
    # Eager attention computes all pairs of a row, those that are masked too.
    expected = cost.of(ROWS * WIDTH, ROWS * WIDTH * WIDTH, ROWS * KEPT)
    if method["name"] == "olora":  # of weights with weights, whatever the tokens
        penalty = sum(2 * m.in_features * m.rank * len(m.bank_a) for m in model.modules() if hasattr(m, "bank_a"))
        assert counted_without_overlap(model) == pytest.approx(expected, rel=1e-12)
        assert penalty > 0
    else:
        assert counted(model) == pytest.approx(expected, rel=1e-12)


def counted_without_overlap(model: nn.Module, times: int = 1) -> int:
    nothing = torch.zeros(())
    for module in model.modules():
        if hasattr(module, "overlap"):
            module.overlap = lambda value: nothing
    overlap = sum(2 * m.in_features * m.rank * len(m.bank_a) for m in model.modules() if hasattr(m, "overlap"))
    return counted(model) - times * overlap


@pytest.mark.parametrize("method", [*METHODS, *AT_LAST], ids=lambda method: "-".join(map(str, method.values()))[:60])
def test_recomputation_is_told_apart(method: dict[str, Any]) -> None:
    """Of whole layers from the first that something trains in or below, and of none under it."""
    plain, again = prepared(method), prepared(method, again=True)
    cost, without = cost_of(again), cost_of(plain)
    assert (without.again_token, without.again_pair) == (0.0, 0.0)
    tokens, pairs = ROWS * WIDTH, ROWS * WIDTH * WIDTH
    once = cost.of(tokens, pairs, ROWS * KEPT)
    assert once == without.of(tokens, pairs, ROWS * KEPT)
    assert counted_without_overlap(plain) == pytest.approx(once, rel=1e-12)
    assert counted_without_overlap(again, 2) == pytest.approx(once + cost.again(tokens, pairs), rel=1e-12)


def test_what_is_frozen_below_costs_a_third() -> None:
    full, above = cost_of(prepared({"name": "sequential"})), cost_of(prepared(METHODS[3]))
    assert above.token < 0.6 * full.token
    assert above.pair < 0.65 * full.pair


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_of_a_model_that_is_built_otherwise_nothing_is_said(kind: str) -> None:
    small = {
        "opt": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16},
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    }[kind]
    config = AutoConfig.for_model(kind, vocab_size=30, **small)
    assert cost_of(AutoModelForCausalLM.from_config(config)) is None
