"""Second moments and importance against what plain hooks, hidden states and autograd give, in fp64."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from dscl.distributed import comm
from dscl.model.activation_stats import ActivationStats, LayerImportance
from dscl.model.adapters.injection import LLAMA_PROJECTIONS, match_target_layers
from tests.support.moments import gradient_weighted_moments, record_layer_calls, second_moment
from tests.support.toy_model import VOCABULARY, sample_rows, summed_loss, toy_model

ROWS, LENGTH = 3, 10
SITES = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "gate_proj", "up_proj": "gate_proj"}


def block(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens, and how much each counts: some more, some less, some not at all."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=draw)
    return ids, torch.randint(0, 4, ids.shape, generator=draw).double() / 2


def gathered(numbers: Iterable[int]) -> ActivationStats:
    module, moments = toy_model(), ActivationStats(gradient_weighted=False)
    layers = match_target_layers(module, LLAMA_PROJECTIONS)
    with torch.no_grad(), moments.collect_stats(module, layers):
        for number in numbers:
            ids, moments.token_mask = block(number)
            module(input_ids=ids, use_cache=False)
    return moments


def close(got: torch.Tensor, expected: torch.Tensor, within: float) -> bool:
    return float((got - expected).norm()) <= within * float(expected.norm())


def test_sums_equal_those_of_plain_hooks() -> None:
    moments, module = gathered(range(4)), toy_model()
    with torch.no_grad():
        inputs = []
        for number in range(4):
            with record_layer_calls(module) as seen:
                module(input_ids=block(number)[0], use_cache=False)
            inputs.append({layer: given for layer, (given, _) in seen.items()})
    assert len(inputs[0]) == 14
    for layer in inputs[0]:
        expected = torch.stack([second_moment(inputs[n][layer], block(n)[1]) for n in range(4)]).sum(0)
        got = moments.second_moment(layer)
        assert got is not None
        assert got.dtype == torch.float64
        assert close(got, expected, 1e-6)


def test_sums_equal_those_of_hidden_states() -> None:
    """What q, k and v are given is the normed hidden state before their layer."""
    moments, module = gathered(range(1)), toy_model()
    ids, counted = block(0)
    with torch.no_grad():
        states = module(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    for index, layer in enumerate(module.model.layers):
        state = states[index].double()
        scale = (state.square().mean(-1, keepdim=True) + layer.input_layernorm.variance_epsilon).rsqrt()
        expected = second_moment(state * scale * layer.input_layernorm.weight.double(), counted)
        assert close(moments.second_moment(f"model.layers.{index}.self_attn.v_proj"), expected, 1e-6)  # type: ignore[arg-type]


def test_layers_with_the_same_input_share_a_sum() -> None:
    moments = gathered(range(2))
    assert len(moments.source_layer) == 14
    assert len(moments.sums) == 8
    for layer, source_layer in moments.source_layer.items():
        place, _, name = layer.rpartition(".")
        assert source_layer == f"{place}.{SITES.get(name, name)}"
    assert moments.second_moment("lm_head") is None


def test_masked_tokens_do_not_count() -> None:
    module = toy_model()
    ids = block(0)[0]
    counted = torch.ones(ids.shape, dtype=torch.float64)
    counted[:, -3:] = 0
    sums = []
    for last in (ids[:, -3:], (ids[:, -3:] + 1) % VOCABULARY, torch.empty(ROWS, 0, dtype=torch.long)):
        moments = ActivationStats(gradient_weighted=False)
        given = torch.cat([ids[:, :-3], last], 1)
        moments.token_mask = counted[:, : given.shape[1]]
        with torch.no_grad(), moments.collect_stats(module, match_target_layers(module, LLAMA_PROJECTIONS)):
            module(input_ids=given, use_cache=False)
        sums.append(moments.sums)
    for other in sums[1:]:
        assert all(close(other[layer], expected, 1e-6) for layer, expected in sums[0].items())


def of_my_blocks(count: int) -> dict[str, torch.Tensor]:
    moments = gathered(range(comm.rank(), count, comm.world_size()))
    return {layer: comm.all_reduce_sum(moments.sums[layer]) for layer in sorted(moments.sums)}


def test_sums_do_not_depend_on_the_number_of_ranks(ranks: Any) -> None:
    expected = ranks(1)(of_my_blocks, 4)[0]
    for found in ranks(2)(of_my_blocks, 4):
        assert sorted(found) == sorted(expected)
        assert all(close(found[layer], expected[layer], 1e-12) for layer in expected)


def test_gradient_weighted_sums_equal_autograd() -> None:
    module, moments = toy_model(), ActivationStats(gradient_weighted=True)
    with moments.collect_stats(module, match_target_layers(module, LLAMA_PROJECTIONS)):
        for toy in sample_rows(0):
            summed_loss(module, toy).backward()
    expected = gradient_weighted_moments(sample_rows(0))
    assert sorted(moments.sums) == sorted(expected)
    for layer, of_layer in expected.items():
        assert close(moments.sums[layer], of_layer, 1e-6)
        assert moments.second_moment(layer) is moments.sums[layer]


def test_layer_importance_is_the_mean_cosine() -> None:
    module = toy_model()
    ids, counted = block(7)
    changes, states = LayerImportance(2, torch.device("cpu")), []
    changes.token_mask = counted
    with ExitStack() as stack, torch.no_grad():
        for layer in module.model.layers:
            hook = layer.register_forward_hook(lambda _m, given, output: states.append((given[0], output)))
            stack.callback(hook.remove)
        with changes.collect_stats(module.model.layers):
            for _ in range(2):
                module(input_ids=ids, use_cache=False)
    for index, mean in enumerate(changes.mean_similarity().tolist()):
        before, after = (state.double()[counted > 0] for state in states[index])
        expected = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        assert mean == pytest.approx(float(expected), rel=1e-12)
        assert abs(mean) < 0.9999
