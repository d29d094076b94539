"""The benchmark for one large GPU, with a tiny shape on the CPU: every method trains, and failures are reported."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaConfig

from tools import bench_gpu as bench
from tools.bench_gpu import METHODS, Case

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 96,
}  # fmt: skip
FIGURES = {"seconds": 2.0, "tokens": 2048.0, "tflops": 1.0, "mfu": 0.5, "floor": 1.0, "peak_gib": 9.0, "host_gib": 1.0}


def attempt_tiny_case(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of a rank, and how much of the methods' own work was done."""
    config = LlamaConfig(**TINY, max_position_embeddings=case.length, tie_word_embeddings=False)
    work: dict[str, Any] = {}
    large = bench.large

    def record_work(case: Case, config: LlamaConfig, engine: Any, method: Any) -> dict[str, Any]:
        figures = large(case, config, engine, method)
        task_router = getattr(method, "task_router", None)
        work["gathered"] = len(task_router.row_state_dict()["samples"]) if task_router is not None else None
        experts = getattr(method, "experts", None)
        work["open"] = [int(layer.allowed_rank1.sum()) for layer in experts.layers.values()] if experts else []
        work["protected"] = len(method.directions.subspaces) if hasattr(method, "directions") else 0
        work["again"] = bool(engine.module.model.gradient_checkpointing)
        return figures

    bench.large = record_work
    try:
        return bench.attempt(case, config), work
    finally:
        bench.large = large


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_takes_steps_with_its_own_work_in_them(ranks: Callable[[int], Any], method: str) -> None:
    offload, recompute = method == "osft", method == "full"
    case = Case("7B", method, offload=offload, recompute=recompute, length=64, rounds=1, samples=2)
    ((figures, work),) = ranks(1)(attempt_tiny_case, case)
    assert figures["seconds"] > 0
    assert figures["tokens"] == pytest.approx(2 * 64 / figures["seconds"])
    assert figures["mfu"] is figures["floor"] is None  # no CPU has a stated peak
    assert work["again"] is recompute
    assert work["gathered"] == (2 * (bench.WARM + case.rounds) if method in ("asr", "moses") else None)
    assert bool(work["open"]) is (method == "moses")
    assert all(work["open"])
    assert work["protected"] == (7 * TINY["num_hidden_layers"] if method == "osft" else 0)


def test_activations_are_recomputed_only_where_memory_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def child(case: Case, limit: float) -> dict[str, Any]:
        attempts.append((case.offload, case.recompute))
        if not case.offload:
            return {"full": "before the first step"}
        return {**FIGURES, "recompute": True} if case.recompute else {"full": "in a step"}

    monkeypatch.setattr(bench, "child", child)
    monkeypatch.setattr(bench.comm, "device", lambda: argparse.Namespace(type="cuda"))
    monkeypatch.setattr(bench, "is_flash_attn_2_available", lambda: False)
    options = argparse.Namespace(
        shape=["7B"], method=["full"], attention=None, rounds=1, samples=1, limit=9.0, offload=True
    )
    absent, whole, offloaded = bench.rows(options)
    assert "flash-attn is not here" in absent["what"]
    assert attempts == [(False, False), (True, False), (True, True)]
    assert whole["told"] == "not enough memory of the device before the first step"
    assert "activations recomputed" in offloaded["told"]
    assert "floor 1 s" in offloaded["told"]
    assert "none to compare" in offloaded["told"]
    options.offload = False
    assert len(list(bench.rows(options))) == 2
    beside = bench.row(Case("7B", "full", offload=True), {**FIGURES, "recompute": False}, {**FIGURES, "seconds": 0.5})
    assert "4.0 times the step that is not offloaded" in beside["told"]


@pytest.mark.parametrize(("status", "stderr", "expected"), [
    (-9, "", "failed: killed by signal 9 (9 is mostly the host's memory)"),
    (1, "Traceback\nKeyError: 'q'\n", "failed: status 1: KeyError: 'q'"),
])  # fmt: skip
def test_a_child_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, status: int, stderr: str, expected: str) -> None:
    process = subprocess.CompletedProcess([], status, "", stderr)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: process)
    assert bench.row(Case("7B", "full"), bench.tried(Case("7B", "full"), 9.0))["told"] == expected


def test_a_child_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(words: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(bench.subprocess, "run", time_out)
    message = bench.row(Case("7B", "full"), bench.tried(Case("7B", "full"), 9.0))["told"]
    assert message == "took longer than 9 s (--limit)"
