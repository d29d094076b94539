"""The benchmark for one large GPU, with a tiny shape on the CPU: every method trains, and failures give a row."""

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
RESULT = {"seconds": 2.0, "tokens": 2048.0, "tflops": 1.0, "mfu": 0.5, "floor": 1.0, "peak_gib": 9.0, "host_gib": 1.0}


def try_small_case(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """A rank's measurements, and counts of the methods' own work."""
    config = LlamaConfig(**TINY, max_position_embeddings=case.length, tie_word_embeddings=False)
    counts: dict[str, Any] = {}
    time_steps = bench.time_steps

    def counting_time_steps(case: Case, config: LlamaConfig, engine: Any, method: Any) -> dict[str, Any]:
        result = time_steps(case, config, engine, method)
        task_router = getattr(method, "task_router", None)
        counts["collected"] = len(task_router.row_state_dict()["samples"]) if task_router is not None else None
        experts = getattr(method, "experts", None)
        counts["allowed"] = [int(layer.allowed_rank1.sum()) for layer in experts.layers.values()] if experts else []
        counts["protected"] = len(method.directions.subspaces) if hasattr(method, "directions") else 0
        counts["recompute"] = bool(engine.module.model.gradient_checkpointing)
        return result

    bench.time_steps = counting_time_steps
    try:
        return bench.try_steps(case, config), counts
    finally:
        bench.time_steps = time_steps


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_takes_steps_with_its_own_work_in_them(ranks: Callable[[int], Any], method: str) -> None:
    offload, recompute = method == "osft", method == "full"
    case = Case("7B", method, offload=offload, recompute=recompute, length=64, rounds=1, samples=2)
    ((result, counts),) = ranks(1)(try_small_case, case)
    assert result["seconds"] > 0
    assert result["tokens"] == pytest.approx(2 * 64 / result["seconds"])
    assert result["mfu"] is result["floor"] is None  # no CPU has a stated peak
    assert counts["recompute"] is recompute
    assert counts["collected"] == (2 * (bench.WARMUP_STEPS + case.rounds) if method in ("asr", "moses") else None)
    assert bool(counts["allowed"]) is (method == "moses")
    assert all(counts["allowed"])
    assert counts["protected"] == (7 * TINY["num_hidden_layers"] if method == "osft" else 0)


def test_activations_are_recomputed_only_where_memory_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def run_child(case: Case, limit: float) -> dict[str, Any]:
        attempts.append((case.offload, case.recompute))
        if not case.offload:
            return {"out_of_memory": "before the first step"}
        return {**RESULT, "recompute": True} if case.recompute else {"out_of_memory": "in a step"}

    monkeypatch.setattr(bench, "run_child", run_child)
    monkeypatch.setattr(bench.comm, "device", lambda: argparse.Namespace(type="cuda"))
    monkeypatch.setattr(bench, "is_flash_attn_2_available", lambda: False)
    options = argparse.Namespace(
        shape=["7B"], method=["full"], attention=None, rounds=1, samples=1, limit=9.0, offload=True
    )
    absent, whole, offloaded = bench.rows(options)
    assert "flash-attn is not installed" in absent["name"]
    assert attempts == [(False, False), (True, False), (True, True)]
    assert whole["note"] == "out of GPU memory before the first step"
    assert "activations recomputed" in offloaded["note"]
    assert "floor 1 s" in offloaded["note"]
    assert "no step without offload" in offloaded["note"]
    options.offload = False
    assert len(list(bench.rows(options))) == 2
    offloaded = bench.row(Case("7B", "full", offload=True), {**RESULT, "recompute": False}, {**RESULT, "seconds": 0.5})
    assert "4.0 times the step without offload" in offloaded["note"]


@pytest.mark.parametrize(("status", "stderr", "note"), [
    (-9, "", "failed: killed by signal 9 (mostly because the host is out of memory)"),
    (1, "Traceback\nKeyError: 'q'\n", "failed: status 1: KeyError: 'q'"),
])  # fmt: skip
def test_a_child_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, status: int, stderr: str, note: str) -> None:
    process = subprocess.CompletedProcess([], status, "", stderr)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: process)
    assert bench.row(Case("7B", "full"), bench.measure_case(Case("7B", "full"), 9.0))["note"] == note


def test_a_child_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(words: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(bench.subprocess, "run", late)
    note = bench.row(Case("7B", "full"), bench.measure_case(Case("7B", "full"), 9.0))["note"]
    assert note == "took longer than 9 s (--limit)"
