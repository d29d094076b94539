"""The summary of the ranks' timings, against values by hand for invented ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dscl.data.batches import StepPlan
from dscl.distributed import comm
from dscl.monitoring.throughput import CONSECUTIVE_REPORTS, MEMORY, Throughput, is_measured_metric
from dscl.utils import timers


def make_throughput(
    messages: list[str], world: int, module: nn.Module | None = None, peak: float | None = None
) -> Throughput:
    engine: Any = SimpleNamespace(
        module=nn.Linear(1, 1) if module is None else module, device=torch.device("cpu"), dtype=torch.float32
    )
    throughput = Throughput(engine, "x", peak, messages.append)
    throughput._hosts = [f"host{rank}" for rank in range(world)]
    return throughput


def rank_numbers(ranks: list[dict[str, float]]) -> torch.Tensor:
    """The matrix of all ranks' numbers [ranks, numbers], from their seconds by part and their tokens (`computed`)."""
    width = len(timers.PARTS) + 2 * len(timers.COLLECTIVES) + len(MEMORY)
    matrix = torch.zeros(len(ranks), width + 1, dtype=torch.float64)
    for row, numbers in zip(matrix, ranks, strict=True):
        for name, value in numbers.items():
            row[-1 if name == "computed" else timers.PARTS.index(name)] = value
    return matrix


def summarize_repeatedly(
    monkeypatch: pytest.MonkeyPatch, ranks: list[dict[str, float]], elapsed: float
) -> tuple[list[str], Any]:
    """The messages and the metrics after as many equal reports as a message needs."""
    messages: list[str] = []
    throughput = make_throughput(messages, len(ranks))
    plan = StepPlan((0,), 1, 10, 10, 0.0)
    metrics = {}
    with monkeypatch.context() as patch:
        patch.setattr(comm, "world_size", lambda: len(ranks))
        for _ in range(CONSECUTIVE_REPORTS):
            assert not messages, "one report alone gives no message"
            metrics = throughput.summarize(rank_numbers(ranks), elapsed, [plan], [])
    return messages, metrics


def forward_seconds(*seconds: float) -> list[dict[str, float]]:
    return [{"forward": each, "computed": 16.0} for each in seconds]


@pytest.mark.parametrize("seconds", [(0.2, 0.6), (0.2, 0.2, 0.6), (0.2, 0.18, 0.22, 0.6)])
def test_a_slow_rank_is_held_against_the_others(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...]) -> None:
    messages, metrics = summarize_repeatedly(monkeypatch, forward_seconds(*seconds), 1.0)
    (line,) = messages
    assert f"rank {len(seconds) - 1} on host{len(seconds) - 1} is slow" in line
    assert "take 3.0 times as long as the others'" in line
    assert metrics["step_spread"] == pytest.approx(max(seconds) - min(seconds))
    assert is_measured_metric("step_spread")


def test_one_of_two_ranks_is_told_from_a_quarter_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "1.3 times" in summarize_repeatedly(monkeypatch, forward_seconds(0.2, 0.26), 1.0)[0][0]
    assert summarize_repeatedly(monkeypatch, forward_seconds(0.2, 0.24), 1.0)[0] == []
    assert summarize_repeatedly(monkeypatch, forward_seconds(0.02, 0.06), 1.0)[0] == [], "it is little of the step"
    many = [{"forward": 0.2, "computed": 16.0}, {"forward": 0.6, "computed": 48.0}]
    assert summarize_repeatedly(monkeypatch, many, 1.0)[0] == [], "it had more to do"


def test_alone_there_is_nobody_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    messages, metrics = summarize_repeatedly(monkeypatch, forward_seconds(0.6), 1.0)
    assert messages == []
    assert "step_spread" not in metrics


def test_batches_that_the_device_waits_for_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [{"data": 0.1, "forward": 0.2, "computed": 16.0}, {"data": 0.25, "forward": 0.1, "computed": 16.0}]
    (line,) = summarize_repeatedly(monkeypatch, slow, 1.0)[0]
    assert "task x: making batches takes 25% of the time" in line
    assert summarize_repeatedly(monkeypatch, slow, 3.0)[0] == []


def test_padding_and_operations_are_those_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    width, inner, layers, words = 16, 24, 2, 50
    shape = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2, vocab_size=words
    )
    throughput = make_throughput([], 2, LlamaForCausalLM(shape), peak=1e9)
    monkeypatch.setattr(comm, "world_size", lambda: 2)
    plans = [StepPlan((0, 1), 3, 30, 120, 0.5), StepPlan((2, 3), 4, 40, 200, 1.0)]
    reference_plans = [StepPlan((0,), 2, 10, 55, 0.5)]
    ranks = rank_numbers([{"computed": 60.0}, {"computed": 40.0}])
    metrics = throughput.summarize(ranks, 0.5, plans, reference_plans)
    assert metrics["padding"] == pytest.approx(1 - 80 / 100)
    assert metrics["tokens_per_s"] == pytest.approx(70 / 0.5)
    # Everything trains: twice as much backward as forward, where each weight takes 2 a token.
    token = 6 * layers * (4 * width * width + 3 * width * inner)
    pair = 3 * layers * (2 * width + 2 * width)
    target = 6 * width * words
    operations = 80 * token + (120 + 200 + 55) * pair + (3 + 4 + 2) * target
    assert metrics["tflops_per_device"] == pytest.approx(operations / (0.5 * 2) / 1e12)
    assert metrics["mfu"] == pytest.approx(operations / (0.5 * 2) / 1e9)
    assert "tflops_with_recomputation" not in metrics
