"""The LoRA bank against a loop over rows; a row's output depends only on its own adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dscl.model.adapters.injection import LLAMA_PROJECTIONS, LoraConfig
from dscl.model.adapters.lora_bank import LoraBank, RoutedLoraLinear, initial_lora_values, inject_lora_bank
from dscl.model.adapters.peft_files import LoraAdapter, LoraWeights
from dscl.model.adapters.routing import (
    Routing,
    hook_feature_layer,
    layer_index,
    match_targets_from_layer,
    mean_pool_spans,
)
from dscl.utils.errors import UserError
from tests.support.small_models import PIECES, SHAPE

IDS = torch.randint(0, PIECES, (4, 9), generator=torch.Generator().manual_seed(0))
SPANS = [(row, 1 + row, 9 - row) for row in range(4)]
SLOTS = 3


def make_layer(num_slots: int = SLOTS, rank: int = 4, dtype: torch.dtype = torch.float64) -> RoutedLoraLinear:
    torch.manual_seed(0)
    return RoutedLoraLinear(
        nn.Linear(16, 12, bias=True, dtype=dtype), Routing(num_slots, rank), torch.empty(0, dtype=dtype)
    )


def make_lora(
    seed: int, rank: int, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (16, 12)
) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((rank, size[0]), (size[1], rank)))
    return LoraWeights(a, b, 0.5 + seed)


@pytest.mark.parametrize("rank", [1, 4, 64])
@pytest.mark.parametrize("slots", [[0, 1, 2, 0], [None, 2, None, 1], [None] * 4])
def test_rows_equal_a_loop_over_adapters(rank: int, slots: list[int | None]) -> None:
    routed, x = make_layer(rank=rank).eval(), torch.randn(4, 5, 16, dtype=torch.float64)
    loras = {0: make_lora(0, rank), 1: make_lora(1, max(1, rank // 2)), 2: make_lora(2, rank)}  # one of a smaller rank
    for slot, lora in loras.items():
        routed.set_adapter(slot, lora)
    routed.routing.assign_slots(slots, x)
    expected = nn.functional.linear(x, routed.weight, routed.bias)
    for row, slot in enumerate(slots):
        if slot is not None:
            expected[row] += loras[slot].scale * (x[row] @ loras[slot].a.T @ loras[slot].b.T)
    torch.testing.assert_close(routed(x), expected, rtol=1e-12, atol=1e-12)
    repeated = x.repeat_interleave(3, 0)  # the labels of each prompt, side by side
    torch.testing.assert_close(routed(repeated), expected.repeat_interleave(3, 0), rtol=1e-12, atol=1e-12)
    flat = routed(x.flatten(0, 1))  # as the experts of a mixture model see it
    torch.testing.assert_close(flat, expected.flatten(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_adding_adapters_leaves_outputs_bitwise_equal(dtype: torch.dtype, tokens: int) -> None:
    routed, x = make_layer(5, 8, dtype).eval(), torch.randn(4, tokens, 16).to(dtype)
    routed.set_adapter(1, make_lora(1, 8, dtype))
    routed.routing.assign_slots([1, 1, None, 1], x)
    before = routed(x)
    for slot in (0, 2, 3, 4):
        routed.set_adapter(slot, make_lora(slot, 8, dtype))
    assert torch.equal(routed(x), before)
    routed.set_adapter(1, None)
    assert not torch.equal(routed(x), before)


def test_training_uses_only_the_trainable_lora() -> None:
    routed = make_layer()
    routed.make_trainable(LoraConfig(rank=4, alpha=6.0))
    routed.set_adapter(0, make_lora(0, 4))
    with torch.no_grad():
        routed.lora_a.normal_()
        routed.lora_b.normal_()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    a, b = (p.detach().clone().requires_grad_() for p in (routed.lora_a, routed.lora_b))
    expected = nn.functional.linear(x, routed.weight, routed.bias) + 1.5 * (x @ a.T @ b.T)
    expected.square().sum().backward()
    routed.routing.assign_slots([0, 0], x)  # training ignores the slots
    output = routed.train()(x)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routed.lora_a.grad, a.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(routed.lora_b.grad, b.grad, rtol=1e-11, atol=1e-11)


def test_dropout_only_in_training() -> None:
    routed = make_layer()
    routed.make_trainable(LoraConfig(rank=4, dropout=0.5))
    with torch.no_grad():
        routed.lora_a.normal_()
        routed.lora_b.normal_()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert not torch.equal(routed.train()(x), routed(x))
    assert torch.equal(routed.eval()(x), routed(x))


def make_model(layers: int = 2, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}, **more)).eval()


def make_routed_model(slots: int = SLOTS, layers: int = 4, feature_layer: int = 2) -> tuple[Any, LoraBank]:
    model = make_model(layers)
    targets = match_targets_from_layer(model, feature_layer, ("q_proj", "down_proj"))
    bank = inject_lora_bank(model, Routing(slots, 4), targets)
    hook_feature_layer(model, bank.routing, feature_layer)
    return model, bank


def make_adapter(name: str, bank: LoraBank, seed: int) -> LoraAdapter:
    layers = {}
    for path, routed in bank.layers.items():
        sizes = (routed.in_features, routed.out_features)
        layers[path] = make_lora(seed + layer_index(path), 4, torch.float32, sizes)
    return LoraAdapter(name, "", layers)


def test_empty_bank_equals_the_base_model() -> None:
    expected = make_model(4)(input_ids=IDS).logits
    model, bank = make_routed_model()
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert {layer_index(path) for path in bank.layers} == {2, 3}
    assert len(bank.layers) == 4
    assert not any(p.requires_grad for p in model.parameters())


def test_first_pass_chooses_slots_at_the_feature_layer() -> None:
    model, bank = make_routed_model()
    for number in range(SLOTS):
        bank.add(make_adapter(f"task {number}", bank, number))
    plain = make_model(4)
    states = plain(input_ids=IDS, output_hidden_states=True).hidden_states[2]
    expected = torch.stack([states[row, start:stop].mean(0) for row, start, stop in SPANS])
    all_features: list[torch.Tensor] = []

    def choose_slots(features: torch.Tensor) -> list[int | None]:
        all_features.append(features)
        return [2, None, 0, 1]

    with bank.routing.route_prompts(SPANS, choose_slots), torch.no_grad():
        first = model(input_ids=IDS, use_cache=True)
        second = model(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(first.past_key_values)).logits
    assert len(all_features) == 1  # later passes keep the slots
    torch.testing.assert_close(all_features[0], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)  # afterwards no adapter is used
    for row, slot in enumerate([2, None, 0, 1]):
        with torch.no_grad(), bank.routing.route_prompts([(0, *SPANS[row][1:])], lambda _, s=slot: [s]):
            alone = model(input_ids=IDS[row : row + 1], use_cache=True)
            torch.testing.assert_close(first.logits[row], alone.logits[0], rtol=1e-5, atol=1e-5)
            following = model(input_ids=IDS[row : row + 1, :1], past_key_values=alone.past_key_values).logits
            torch.testing.assert_close(second[row], following[0], rtol=1e-5, atol=1e-5)


def test_recomputation_does_not_pool_again() -> None:
    model, bank = make_routed_model()
    for routed in bank.layers.values():
        routed.make_trainable(LoraConfig(rank=4))
    model.train().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    passes: list[int] = []
    model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(lambda *_: passes.append(1))
    with bank.routing.capture_features(SPANS) as get_features:
        loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
    first = get_features()
    loss.backward()
    assert len(passes) == 2  # it was recomputed, and in some releases of transformers the hook comes with it
    bank.routing.on_feature_layer(torch.zeros(4, 9, 64))
    assert first.shape == (4, SHAPE["hidden_size"])
    with pytest.raises(AssertionError, match="no forward pass"):
        get_features()


def test_pooling_ignores_padding_and_other_rows() -> None:
    hidden = torch.randn(3, 20, 16)
    alone = mean_pool_spans(hidden[1:2, 5:17].contiguous(), [(0, 0, 12)])
    spoilt = hidden.clone()
    spoilt[1, :5] = float("nan")
    spoilt[1, 17:] = float("nan")
    spoilt[0] = float("nan")
    assert torch.equal(mean_pool_spans(spoilt, [(2, 0, 3), (1, 5, 17)])[1], alone[0])
    assert mean_pool_spans(hidden, []).shape == (0, 16)


def test_full_bank_refuses_until_an_adapter_is_removed() -> None:
    _model, bank = make_routed_model(slots=1)
    bank.add(make_adapter("a", bank, 0))
    before = bank.layers["model.layers.2.self_attn.q_proj"].bank_a.clone()
    with pytest.raises(UserError, match="the bank is full: it has 1 slots \\(a\\) and 'b' needs one more"):
        bank.add(make_adapter("b", bank, 1))
    assert torch.equal(bank.layers["model.layers.2.self_attn.q_proj"].bank_a, before)
    bank.remove("a")
    for layer in bank.layers.values():
        assert not layer.bank_a.any()
        assert not layer.bank_b.any()
    bank.add(make_adapter("b", bank, 1))
    assert bank.names == ["b"]


def test_initial_lora_values_depend_on_seed_and_name() -> None:
    shape = torch.Size((4, 64))
    whole = initial_lora_values(0, "t:x.lora_a", shape, 0, 256)
    assert torch.equal(initial_lora_values(0, "t:x.lora_a", shape, 100, 200), whole[100:200])
    assert not torch.equal(initial_lora_values(0, "u:x.lora_a", shape, 0, 256), whole)
    assert whole.std() == pytest.approx((1 / (3 * 64)) ** 0.5, rel=0.15)
    assert initial_lora_values(0, "t:x.lora_b", shape, 0, 256).abs().max() == 0


def test_layers_below_the_feature_layer_need_no_gradient() -> None:
    """The autograd graph of the loss reaches the feature layer, and no layer below it."""
    model, bank = make_routed_model()
    for routed in bank.layers.values():
        routed.make_trainable(LoraConfig(rank=4))
    states: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _m, _a, out, n=number: states.__setitem__(n, out))
    model.train()(input_ids=IDS, use_cache=False)
    assert [states[n].requires_grad for n in range(4)] == [False, False, True, True]


def test_all_projections_can_be_routed() -> None:
    model = make_model()
    assert len(match_targets_from_layer(model, 1, LLAMA_PROJECTIONS)) == 7
    with pytest.raises(UserError, match=r"'q_proj', which stands in no layer from the router's layer \(2\) on"):
        match_targets_from_layer(model, 2, ("q_proj",))
