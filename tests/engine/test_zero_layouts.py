"""Layouts without a DeepSpeed engine, computed from shapes and positions alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dscl.engine.full_shape import full_shape
from dscl.engine.optimizer import ParamShard
from dscl.engine.zero_layouts import (
    FlatPartitionLayout,
    ParamPartitionLayout,
    ReplicatedFp32Layout,
    ReplicatedLayout,
    ZeroLayout,
    choose_layout,
)


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    return monkeypatch


def layout_of(layout_class: type[ZeroLayout], module: nn.Module, **optimizer: Any) -> ZeroLayout:
    adamw = torch.optim.AdamW(module.parameters())
    return layout_class(SimpleNamespace(module=module, optimizer=SimpleNamespace(**optimizer)), adamw)


@pytest.mark.parametrize(
    ("stage", "precision", "layout"),
    [
        (0, "fp32", ReplicatedFp32Layout), (0, "bf16", ReplicatedLayout), (0, "fp16", ReplicatedLayout),
        (1, "fp32", FlatPartitionLayout), (2, "bf16", FlatPartitionLayout), (3, "fp32", ParamPartitionLayout),
    ],
)  # fmt: skip
def test_a_stage_has_its_layout(stage: int, precision: str, layout: type[ZeroLayout]) -> None:
    assert choose_layout(stage, precision) is layout


def test_the_shape_of_a_sharded_parameter_is_that_of_the_whole() -> None:
    parameter: Any = nn.Parameter(torch.empty(0))
    assert full_shape(parameter) == (0,)
    parameter.ds_shape = torch.Size([3, 4])
    assert full_shape(parameter) == (3, 4)


def test_disjoint_shards_of_replicas_cover_every_element_once(three_ranks: pytest.MonkeyPatch) -> None:
    layout = layout_of(ReplicatedFp32Layout, nn.Linear(5, 2))
    numbers = torch.arange(10.0)
    whole = ParamShard("weight", torch.Size([2, 5]), 0, numbers, {"exp_avg": -numbers}, numbers, {"extra": 2 * numbers})
    covered = []
    for rank in range(3):
        three_ranks.setenv("RANK", str(rank))
        for shard in layout.disjoint_shards([whole]):
            covered += shard.master.tolist()
            assert shard.master.tolist() == numbers[shard.start : shard.stop].tolist()
            assert shard.moments["exp_avg"].tolist() == (-shard.master).tolist()
            assert shard.extra_state["extra"].tolist() == (2 * shard.master).tolist()
    assert covered == numbers.tolist()


def test_peers_hold_what_lies_in_their_slice_of_the_flat_tensor(three_ranks: pytest.MonkeyPatch) -> None:
    """10 elements of a weight at 0, 2 of a bias at 11 (one of padding between them): slices of 5 for each rank."""
    module = nn.Linear(5, 2)
    layout = layout_of(
        FlatPartitionLayout, module, round_robin_bit16_groups=[[module.weight, module.bias]],
        round_robin_bit16_offsets=[[0, 11]], bit16_groups_flat=[torch.empty(15)],
    )  # fmt: skip
    slices = layout.peer_slices({"weight", "bias"})
    assert slices is not None
    ends = [{name: (part.start, part.stop) for name, part in rank.items()} for rank in slices]
    assert ends == [{"weight": (0, 5)}, {"weight": (5, 10)}, {"bias": (0, 2)}]
    assert layout.peer_slices({"bias"}) == [{}, {}, {"bias": slices[2]["bias"]}]


def test_clipping_is_on_again_afterwards() -> None:
    layout: Any = layout_of(FlatPartitionLayout, nn.Linear(2, 2), clip_grad=0.5)
    clip_grads = []

    def fail() -> None:
        with layout.without_clipping():
            clip_grads.append(layout._zero_optimizer.clip_grad)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert clip_grads == [0.0]
    assert layout._zero_optimizer.clip_grad == 0.5


def test_fp32_replicas_are_clipped_here_and_the_norm_is_known() -> None:
    module = nn.Linear(2, 2, bias=False)
    layout = layout_of(ReplicatedFp32Layout, module)
    module.weight.grad = torch.full((2, 2), 3.0)
    for max_norm, expected_norm in ((0.0, 6.0), (1.5, 1.5)):
        norm = layout.clip_gradients(max_norm)
        assert norm is not None
        assert float(norm) == pytest.approx(6.0)
        assert float(module.weight.grad.norm()) == pytest.approx(expected_norm)
    assert layout_of(ReplicatedLayout, module).clip_gradients(1.0) is None
