"""A small run of the sub-expert benchmark; its operation counts against torch, and its rivals against the layer."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tools import bench_experts as bench

SIZES = (4, 8, 2)  # experts, rank, top
OPTIONS = argparse.Namespace(dtype=torch.float32, device="cpu")


def test_all_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--width 32 --tokens 16 --experts 4 --rank 4 --columns 32 64 --ranks 8 --rounds 1"
    bench.main([*sizes.split(), "--device", "cpu", "--threads", str(torch.get_num_threads())])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| ---")]) == 4
    for name in (bench.BARE, bench.LORA, bench.LAYER, bench.ELEMENTS, bench.LOOP, bench.GROUPED):
        assert len([line for line in lines if f"| {name} |" in line and line.startswith("| 32 |")]) >= 2
    assert len([line for line in lines if line.startswith(("| 32 | rank-1", "| 32 | elements"))]) == 4


@pytest.mark.parametrize("name", [bench.BARE, bench.LORA, bench.LAYER, bench.ELEMENTS])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    sides = bench.build_sides(OPTIONS, 40, 24, *SIZES, masks=True)

    def added_in_place(_: Any, one: torch.Size, other: torch.Size, **_more: Any) -> int:
        return 2 * one[0] * one[1] * other[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place}) as counter:
        sides[name]()
    assert counter.get_total_flops() == bench.count_operations(40, 24, *SIZES)[name]


@pytest.mark.parametrize("rival", [bench.LOOP, bench.GROUPED])
def test_a_rival_that_computes_something_else_is_not_timed(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.build_sides(OPTIONS, 40, 24, *SIZES)
    right = bench.RIVALS[rival]

    def forgets_the_last_token(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([right(layer, x)[:-1], torch.nn.functional.linear(x[-1:], layer.weight)])

    monkeypatch.setitem(bench.RIVALS, rival, forgets_the_last_token)
    with pytest.raises(AssertionError, match=f"{rival} and the layer differ in output"):
        bench.build_sides(OPTIONS, 40, 24, *SIZES)
