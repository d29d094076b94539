"""One plain LoRA: it starts at zero, it alone trains, and it is the same on every rank."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dscl.model.adapters.injection import LLAMA_PROJECTIONS, LoraConfig, inject_lora
from dscl.utils.errors import UserError
from tests.support.small_models import PIECES, SHAPE

IDS = torch.randint(0, PIECES, (2, 9), generator=torch.Generator().manual_seed(0))


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=dtype)
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_starts_at_zero_and_alone_is_trainable(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = copy.deepcopy(model)(input_ids=IDS).logits
    model = inject_lora(model, LoraConfig(rank=4), seed=0)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    trained = trainable_parameters(model)
    assert len(trained) == 2 * len(LLAMA_PROJECTIONS) * SHAPE["num_hidden_layers"]
    assert all("lora_" in name and p.dtype == dtype for name, p in trained.items())
    optimizer = torch.optim.SGD(list(model.parameters()), lr=1.0)
    model(input_ids=IDS).logits.float().square().sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    assert all(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)


def test_output_is_base_plus_scaled_product() -> None:
    model = inject_lora(make_model(), LoraConfig(rank=4, alpha=6.0, targets=("gate_proj",)), seed=0)
    layer = model.model.layers[1].mlp.gate_proj  # type: ignore[union-attr,index]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 64)
    assert b.shape == (96, 4)
    nn.init.normal_(b)
    x = torch.randn(3, 64)
    expected = x @ layer.base_layer.weight.T + 6.0 / 4 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected)


def test_lora_a_depends_on_seed_and_name_with_pefts_std() -> None:
    first, again, other = (
        trainable_parameters(inject_lora(make_model(), LoraConfig(rank=16), seed)) for seed in (1, 1, 2)
    )
    torch.manual_seed(99)  # other random draws make no difference
    downs = {name for name in first if "lora_A" in name}
    assert len(downs) == len(first) / 2
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == ("lora_B" in name)
    assert len({first[name].flatten()[0].item() for name in downs}) == len(downs)
    spread = torch.cat([first[name].detach().flatten() * math.sqrt(first[name].shape[1]) for name in downs])
    assert spread.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.02)  # kaiming_uniform(a=√5)


@pytest.mark.parametrize(("targets", "count"), [(("q_proj", "v_proj"), 4), (("model.layers.1.mlp.up_proj",), 1)])
def test_targets_by_ending_or_full_name(targets: tuple[str, ...], count: int) -> None:
    trained = trainable_parameters(inject_lora(make_model(), LoraConfig(targets=targets), seed=0))
    assert len(trained) == 2 * count
    assert all(any(f"{target}.lora_" in name for target in targets) for name in trained)


@pytest.mark.parametrize("target", ["qproj", "proj", "norm", ""])
def test_unknown_targets_are_refused(target: str) -> None:
    with pytest.raises(
        UserError, match=r"^method.tune.targets: given .*; layers here: down.*lm_head.*q_proj"
    ) as caught:
        inject_lora(make_model(), LoraConfig(targets=("q_proj", target)), seed=0)
    assert repr(target) in str(caught.value)
