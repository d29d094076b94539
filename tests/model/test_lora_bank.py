"""The routed layer against a loop over its rows; what a row gets depends on nothing but its own adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dscl.model.adapters.injection import LLAMA_PROJECTIONS, LoraConfig
from dscl.model.adapters.lora_bank import Bank, RoutedLinear, add_routed, first_values
from dscl.model.adapters.peft_files import Adapter, Pair
from dscl.model.adapters.routing import Routing, layer_of, pool, pool_at, targets_above
from dscl.utils.errors import UserError
from tests.support.small_models import PIECES, SHAPE

IDS = torch.randint(0, PIECES, (4, 9), generator=torch.Generator().manual_seed(0))
SPANS = [(row, 1 + row, 9 - row) for row in range(4)]
SLOTS = 3


def layer(capacity: int = SLOTS, rank: int = 4, dtype: torch.dtype = torch.float64) -> RoutedLinear:
    torch.manual_seed(0)
    return RoutedLinear(nn.Linear(16, 12, bias=True, dtype=dtype), Routing(capacity, rank), torch.empty(0, dtype=dtype))


def pair(seed: int, rank: int, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (16, 12)) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((rank, size[0]), (size[1], rank)))
    return Pair(a, b, 0.5 + seed)


@pytest.mark.parametrize("rank", [1, 4, 64])
@pytest.mark.parametrize("slots", [[0, 1, 2, 0], [None, 2, None, 1], [None] * 4])
def test_rows_equal_a_loop_over_adapters(rank: int, slots: list[int | None]) -> None:
    routed, x = layer(rank=rank).eval(), torch.randn(4, 5, 16, dtype=torch.float64)
    pairs = {0: pair(0, rank), 1: pair(1, max(1, rank // 2)), 2: pair(2, rank)}  # one of a smaller rank
    for slot, held in pairs.items():
        routed.fill(slot, held)
    routed.routing.choose(slots, x)
    expected = nn.functional.linear(x, routed.weight, routed.bias)
    for row, slot in enumerate(slots):
        if slot is not None:
            expected[row] += pairs[slot].scale * (x[row] @ pairs[slot].a.T @ pairs[slot].b.T)
    torch.testing.assert_close(routed(x), expected, rtol=1e-12, atol=1e-12)
    repeated = x.repeat_interleave(3, 0)  # the labels of each prompt, side by side
    torch.testing.assert_close(routed(repeated), expected.repeat_interleave(3, 0), rtol=1e-12, atol=1e-12)
    flat = routed(x.flatten(0, 1))  # as the experts of a mixture model see it
    torch.testing.assert_close(flat, expected.flatten(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_fuller_bank_changes_no_bit(dtype: torch.dtype, tokens: int) -> None:
    routed, x = layer(5, 8, dtype).eval(), torch.randn(4, tokens, 16).to(dtype)
    routed.fill(1, pair(1, 8, dtype))
    routed.routing.choose([1, 1, None, 1], x)
    before = routed(x)
    for slot in (0, 2, 3, 4):
        routed.fill(slot, pair(slot, 8, dtype))
    assert torch.equal(routed(x), before)
    routed.fill(1, None)
    assert not torch.equal(routed(x), before)


def test_training_uses_the_lora_alone_and_its_gradients_are_right() -> None:
    routed = layer()
    routed.make_trainable(LoraConfig(rank=4, alpha=6.0))
    routed.fill(0, pair(0, 4))
    with torch.no_grad():
        routed.lora_a.normal_()
        routed.lora_b.normal_()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    a, b = (p.detach().clone().requires_grad_() for p in (routed.lora_a, routed.lora_b))
    expected = nn.functional.linear(x, routed.weight, routed.bias) + 1.5 * (x @ a.T @ b.T)
    expected.square().sum().backward()
    routed.routing.choose([0, 0], x)  # of no concern to training
    got = routed.train()(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routed.lora_a.grad, a.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(routed.lora_b.grad, b.grad, rtol=1e-11, atol=1e-11)


def test_dropout_only_in_training() -> None:
    routed = layer()
    routed.make_trainable(LoraConfig(rank=4, dropout=0.5))
    with torch.no_grad():
        routed.lora_a.normal_()
        routed.lora_b.normal_()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert not torch.equal(routed.train()(x), routed(x))
    assert torch.equal(routed.eval()(x), routed(x))


def tiny(layers: int = 2, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}, **more)).eval()


def routed_model(slots: int = SLOTS, layers: int = 4, feature_layer: int = 2) -> tuple[Any, Bank]:
    model = tiny(layers)
    targets = targets_above(model, feature_layer, ("q_proj", "down_proj"))
    bank = add_routed(model, Routing(slots, 4), targets)
    pool_at(model, bank.routing, feature_layer)
    return model, bank


def adapter(name: str, bank: Bank, seed: int) -> Adapter:
    layers = {}
    for path, routed in bank.layers.items():
        sizes = (routed.in_features, routed.out_features)
        layers[path] = pair(seed + layer_of(path), 4, torch.float32, sizes)
    return Adapter(name, "", layers)


def test_it_starts_as_the_bare_model_and_nothing_below_is_touched() -> None:
    expected = tiny(4)(input_ids=IDS).logits
    model, bank = routed_model()
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert {layer_of(path) for path in bank.layers} == {2, 3}
    assert len(bank.layers) == 4
    assert not any(p.requires_grad for p in model.parameters())


def test_the_first_pass_decides_from_the_feature_layer_on() -> None:
    model, bank = routed_model()
    for number in range(SLOTS):
        bank.add(adapter(f"task {number}", bank, number))
    plain = tiny(4)
    states = plain(input_ids=IDS, output_hidden_states=True).hidden_states[2]
    expected = torch.stack([states[row, start:stop].mean(0) for row, start, stop in SPANS])
    seen: list[torch.Tensor] = []

    def decide(pooled: torch.Tensor) -> list[int | None]:
        seen.append(pooled)
        return [2, None, 0, 1]

    with bank.routing.answering(SPANS, decide), torch.no_grad():
        first = model(input_ids=IDS, use_cache=True)
        second = model(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(first.past_key_values)).logits
    assert len(seen) == 1  # later passes keep to the decision
    torch.testing.assert_close(seen[0], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)  # and afterwards it is gone
    for row, slot in enumerate([2, None, 0, 1]):
        with torch.no_grad(), bank.routing.answering([(0, *SPANS[row][1:])], lambda _, s=slot: [s]):
            alone = model(input_ids=IDS[row : row + 1], use_cache=True)
            torch.testing.assert_close(first.logits[row], alone.logits[0], rtol=1e-5, atol=1e-5)
            following = model(input_ids=IDS[row : row + 1, :1], past_key_values=alone.past_key_values).logits
            torch.testing.assert_close(second[row], following[0], rtol=1e-5, atol=1e-5)


def test_recomputed_activations_pool_nothing_a_second_time() -> None:
    model, bank = routed_model()
    for routed in bank.layers.values():
        routed.make_trainable(LoraConfig(rank=4))
    model.train().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    passes: list[int] = []
    model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(lambda *_: passes.append(1))
    with bank.routing.pooling(SPANS) as pooled:
        loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
    first = pooled()
    loss.backward()
    assert len(passes) == 2  # it was recomputed, and in some releases of transformers the hook comes with it
    bank.routing.at_feature_layer(torch.zeros(4, 9, 64))
    assert first.shape == (4, SHAPE["hidden_size"])
    with pytest.raises(AssertionError, match="no pass"):
        pooled()


def test_padding_and_neighbours_do_not_enter_the_pooled_sum() -> None:
    hidden = torch.randn(3, 20, 16)
    alone = pool(hidden[1:2, 5:17].contiguous(), [(0, 0, 12)])
    spoilt = hidden.clone()
    spoilt[1, :5] = float("nan")
    spoilt[1, 17:] = float("nan")
    spoilt[0] = float("nan")
    assert torch.equal(pool(spoilt, [(2, 0, 3), (1, 5, 17)])[1], alone[0])
    assert pool(hidden, []).shape == (0, 16)


def test_a_full_bank_refuses_and_a_removed_one_makes_room() -> None:
    _model, bank = routed_model(slots=1)
    bank.add(adapter("a", bank, 0))
    before = bank.layers["model.layers.2.self_attn.q_proj"].bank_a.clone()
    with pytest.raises(UserError, match="the bank is full: it has 1 slots \\(a\\) and 'b' needs one more"):
        bank.add(adapter("b", bank, 1))
    assert torch.equal(bank.layers["model.layers.2.self_attn.q_proj"].bank_a, before)
    bank.remove("a")
    for layer in bank.layers.values():
        assert not layer.bank_a.any()
        assert not layer.bank_b.any()
    bank.add(adapter("b", bank, 1))
    assert bank.names == ["b"]


def test_first_values_are_those_of_the_name() -> None:
    shape = torch.Size((4, 64))
    whole = first_values(0, "t:x.lora_a", shape, 0, 256)
    assert torch.equal(first_values(0, "t:x.lora_a", shape, 100, 200), whole[100:200])
    assert not torch.equal(first_values(0, "u:x.lora_a", shape, 0, 256), whole)
    assert whole.std() == pytest.approx((1 / (3 * 64)) ** 0.5, rel=0.15)
    assert first_values(0, "t:x.lora_b", shape, 0, 256).abs().max() == 0


def test_frozen_layers_below_keep_nothing_for_the_backward_pass() -> None:
    """The graph of the loss reaches the feature layer and not a tensor of what stands below."""
    model, bank = routed_model()
    for routed in bank.layers.values():
        routed.make_trainable(LoraConfig(rank=4))
    states: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _m, _a, out, n=number: states.__setitem__(n, out))
    model.train()(input_ids=IDS, use_cache=False)
    assert [states[n].requires_grad for n in range(4)] == [False, False, True, True]


def test_all_projections_can_be_routed() -> None:
    model = tiny()
    assert len(targets_above(model, 1, LLAMA_PROJECTIONS)) == 7
    with pytest.raises(UserError, match="'q_proj', which stands in no layer from feature_layer=2 on"):
        targets_above(model, 2, ("q_proj",))
