"""Synchronizations of a training step with the GPU, by package. Skipped without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from dscl.data.batches import Batch, BatchSampler, collate
from dscl.distributed import comm
from dscl.engine.engine import Engine
from dscl.model.backbone import Backbone, ModelConfig
from dscl.model.lm_head import answer_loss
from dscl.model.weights import RandomWeights
from dscl.monitoring.loss_monitor import LossMonitor

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here (torch.cuda.is_available() is false)"
)

WORDS, SAMPLES, WARM, STEPS, PASSES = 160, 64, 3, 5, 2
OWNERS = ("dscl", "deepspeed", "transformers")
ENCODED = [([number % WORDS] * (5 + number % 3), [1 + number % 7] * 2) for number in range(SAMPLES)]


def owner() -> str:
    """The package whose function synchronizes: the innermost one of OWNERS on the stack."""
    for frame in reversed(traceback.extract_stack()):
        for name in set(Path(frame.filename).parts) & set(OWNERS):
            return name
    return "others"


def batches(packing: bool) -> list[Batch]:
    rows = [[[0, 1], [2, 3]], [[4], [5, 6]]] if packing else [[[0], [1]], [[2], [4]]]
    return [collate(each, ENCODED, 0, packing) for each in rows]


def count_waits_in_steps(stage: int, packing: bool) -> dict[str, int]:
    """The number of synchronizations in STEPS steps, by package."""
    shape = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=WORDS
    )
    backbone = Backbone(ModelConfig(shape={}), shape, None, RandomWeights(0, 0.05), torch.bfloat16)  # type: ignore[arg-type]
    engine = Engine(
        {"zero_optimization": {"stage": stage}},
        build=backbone.build,
        read=backbone.weights.read,
        prepare=lambda model: model,
        precision="bf16",
    )
    lengths = torch.tensor([[len(side) for side in pair] for pair in ENCODED]).numpy()
    plan = BatchSampler(
        lengths[:, 0], lengths[:, 1],
        seed=0, epochs=1, global_batch=4, micro_batch=2, world_size=1, max_length=32, packing=packing,
    ).step_plan(0)  # fmt: skip
    monitor = LossMonitor(engine, "x", 100, False, lambda number: [], lambda record: None, print)
    monitor.start_task()
    counts: Counter[str] = Counter()

    def count_waits(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            counts[owner()] += 1

    def step(number: int) -> None:
        micro_batches = batches(packing)
        loss = engine.step(answer_loss, micro_batches, targets=plan.num_targets, lr=1e-3)
        computed = sum(batch.input_ids.numel() for batch in micro_batches)
        monitor.record_step(number, number + 1, plan, 1e-3, loss, False, computed)

    for number in range(WARM):
        step(number)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count_waits
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for number in range(WARM, WARM + STEPS):
                step(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monitor.flush()
    engine.close()
    return dict(counts)


def tell(stage: int, packing: bool) -> None:
    """Print the counts; runs in a process of its own with one engine."""
    with comm.process_group():
        print(json.dumps(count_waits_in_steps(stage, packing)))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_of_ours_waits_within_a_step(stage: int, packing: bool) -> None:
    """DeepSpeed may synchronize (it reads the gradient norm, for example). transformers does once or twice a pass, when
    it checks whether rows are padded or packed."""
    program = f"from tests.gpu.test_step import tell; tell({stage}, {packing})"
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    print(f"waits in {STEPS} steps at stage {stage}: {counts}")
    assert counts.pop("transformers", 0) <= 2 * STEPS * PASSES
    counts.pop("deepspeed", 0)
    assert not counts
