"""`dscl plan`: its arithmetic, its messages, and whole plans. tests/distributed/test_plan.py checks what it counts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dscl.data.batches import BatchSampler
from dscl.maths.subspace import PROJECTIONS, ProtectedSubspace, placeholder_state
from dscl.planning import plan
from dscl.planning.plan import GIB, UNTRACKED_GPU_BYTES, Cluster, StageEstimate, ring_bytes
from dscl.planning.simulate import MemoryEstimate
from dscl.utils.errors import UserError
from dscl.utils.hardware import parse_gpu_peak, parse_size
from tests.support.programs import Program

REPOSITORY = Path(__file__).resolve().parents[2]


def make_estimate(
    peak: float, optimizer: int = 0, weights: int = 0, passing: int = 0, ending: int = 0
) -> MemoryEstimate:
    return MemoryEstimate(weights, optimizer, 0, 0, passing, int(peak), 0, 0, {}, {}, ending, None, 1, 1, None)


def max_rows_within(
    stage: StageEstimate, estimates: dict[int, MemoryEstimate], memory: float, limit: int
) -> int | None:
    cluster = Cluster(1, 1, memory + UNTRACKED_GPU_BYTES, None, None, 0.4)
    return plan._with_max_rows(stage, estimates, cluster, limit).max_rows


def test_rows_that_fit_follow_from_two_rehearsals() -> None:
    """The estimates need 10 GiB and 2 GiB more for each row."""
    estimates = {4: make_estimate(18 * GIB), 2: make_estimate(14 * GIB)}
    stage = StageEstimate("a", {}, estimates[4], None)
    assert max_rows_within(stage, estimates, 30 * GIB, 64) == 10
    assert max_rows_within(stage, estimates, 29.9 * GIB, 64) == 9
    assert max_rows_within(stage, estimates, 30 * GIB, 8) == 8
    assert max_rows_within(stage, estimates, 11 * GIB, 8) == 0
    one_row = {1: make_estimate(18 * GIB)}
    assert [max_rows_within(stage, one_row, memory * GIB, 1) for memory in (17.9, 18)] == [0, 1]


def test_what_is_offloaded_is_not_on_the_device() -> None:
    estimates = {1: make_estimate(18 * GIB, optimizer=8 * GIB, weights=4 * GIB)}
    zero = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    assert StageEstimate("a", {"zero_optimization": zero}, estimates[1], None).device_bytes == 10 * GIB
    assert (
        max_rows_within(StageEstimate("a", {"zero_optimization": zero}, estimates[1], None), estimates, 10 * GIB, 1)
        == 1
    )


def test_what_a_task_needs_when_it_ends_has_to_fit_too() -> None:
    """10 GiB stay allocated. A step needs 8 GiB more, and the end of a task 12 GiB more."""
    estimates = {
        4: make_estimate(18 * GIB, passing=8 * GIB, ending=12 * GIB),
        2: make_estimate(14 * GIB, passing=4 * GIB),
    }
    stage = StageEstimate("a", {}, estimates[4], None)
    assert (stage.step_bytes, stage.task_end_bytes, stage.device_bytes) == (18 * GIB, 22 * GIB, 22 * GIB)
    assert [max_rows_within(stage, estimates, memory * GIB, 64) for memory in (21.9, 22)] == [0, 6]
    assert StageEstimate("a", {}, make_estimate(18 * GIB, passing=8 * GIB, ending=GIB), None).device_bytes == 18 * GIB
    one_row = {1: make_estimate(18 * GIB, passing=8 * GIB, ending=12 * GIB)}
    assert [
        max_rows_within(StageEstimate("a", {}, one_row[1], None), one_row, memory * GIB, 1) for memory in (21.9, 22)
    ] == [0, 1]


def test_micro_batches_are_those_of_the_first_step_of_the_first_task() -> None:
    first: Any = SimpleNamespace(sampler=SimpleNamespace(micro_batches=lambda step, rank: [(step, rank)] * 3))
    assert plan._micro_batches_per_step(SimpleNamespace(training_data={0: first}.__getitem__)) == 3  # type: ignore[arg-type]


def test_time_of_a_step_is_that_of_the_stated_device_and_network() -> None:
    """Steps of 4 samples of 10 tokens, of which 4 are targets: 40 tokens, 4 · 55 pairs, 16 targets, on 2 ranks."""
    lengths = np.full(8, 6, np.int32), np.full(8, 4, np.int32)
    sampler = BatchSampler(
        *lengths, seed=0, epochs=3, global_batch=4, micro_batch=2, world_size=2, max_length=10, packing=False
    )
    setup: Any = SimpleNamespace(
        training_data=lambda _: SimpleNamespace(sampler=sampler), planned_steps=lambda: [("a", 6)]
    )
    flop_count: Any = SimpleNamespace(
        total_flops=lambda tokens, pairs, targets: 1e12 * tokens + 1e11 * pairs + 1e12 * targets,
        recompute_flops=lambda *_: 22e12,
    )
    estimate: Any = SimpleNamespace(flop_count=flop_count, bytes_sent={"all_reduce": 8e9, "all_gather": 2e9})
    cluster = Cluster(1, 2, None, 1e9, 100e12, 0.5)
    step = plan.estimate_step(setup, cluster, estimate)
    # Half of 40e12 + 22e12 + 16e12 useful FLOPs and 22e12 of recomputation; a ring sends 2 · 8e9 / 2 and 2e9.
    assert (step.tokens, step.flops, step.bytes_sent) == pytest.approx((40, 50e12, 10e9))
    assert (step.compute_seconds, step.communication_seconds) == pytest.approx((1.0, 10.0))
    assert step.seconds == pytest.approx((10.0, 11.0))
    assert step.tokens_per_second == pytest.approx((40 / 11, 4.0))
    description = "\n".join(plan._describe_times(setup, cluster, estimate))
    assert "so 10 to 11 s a step, 4 to 4 tokens/s" in description
    assert "6 steps, 1m00s to 1m06s" in description
    assert plan.estimate_step(setup, Cluster(1, 2, None, None, 100e12, 0.5), estimate).seconds is None
    assert plan.estimate_step(setup, Cluster(1, 1, None, None, 100e12, 0.5), estimate).seconds == pytest.approx(
        (2.0, 2.0)
    )
    assert plan.estimate_step(setup, Cluster(1, 2, None, 1e9, None, 0.5), estimate).tokens_per_second is None


def test_what_was_not_tried_is_not_compared() -> None:
    cluster = Cluster(1, 1, GIB, None, None, 0.4)
    stages = [StageEstimate(name, {}, make_estimate(0), most) for name, most in (("zero1.json", 2), ("zero2.json", 4))]
    (for_two,), (for_one,) = plan._describe_fit(stages, cluster), plan._describe_fit(stages[:1], cluster)
    assert for_two.startswith(
        "fits: zero1.json is the lowest stage that does, with train.micro_batch up to 2; zero2.json"
    )
    assert for_one == "fits: zero1.json does, with train.micro_batch up to 2"


def test_a_ring_sends_each_byte_past_all_others() -> None:
    """On 8 ranks: each byte of a sum passes every rank twice, and a gathered share goes to seven ranks."""
    assert ring_bytes({"all_reduce": 80.0}, 8) == 140.0
    assert ring_bytes({"all_gather": 10.0}, 8) == ring_bytes({"reduce_scatter": 80.0}, 8) == 70.0
    assert ring_bytes({"all_to_all": 80.0, "broadcast": 1.0}, 8) == 71.0


def test_sizes_and_devices_are_read_or_refused() -> None:
    assert parse_size("--gpu-memory", "80GiB") == 80 * GIB
    assert parse_size("--bandwidth", "1.5 GB/s") == 1.5e9
    for text in ("80", "GiB", "0GiB", "80 parsecs"):
        with pytest.raises(UserError, match="a size like 80GiB"):
            parse_size("--gpu-memory", text)
    assert parse_gpu_peak("H100") == 989e12
    with pytest.raises(UserError, match=r"--gpu: given 'abacus'.*--tflops"):
        parse_gpu_peak("abacus")


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_room_is_that_of_directions_that_were_protected(projection: str) -> None:
    import torch

    weight, count = torch.randn(7, 5), 3
    space = ProtectedSubspace.empty(projection, weight)
    left, _, right = torch.linalg.svd(weight)
    space.add_directions(weight, right[:count].T.contiguous(), left[:, :count].contiguous())
    room = placeholder_state(projection, 7, 5, count, torch.device("cpu"))
    assert {name: t.shape for name, t in room.items()} == {name: t.shape for name, t in space.state_dict().items()}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "labels.json").write_text('["good", "bad"]')
        for split in ("train", "test"):
            rows = [
                {"label": ("good", "bad")[i % 2], "sentence": f"word {i} of many words, or {i * i}"} for i in range(20)
            ]
            (tmp_path / name / f"{split}.json").write_text(json.dumps(rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "run_dir: run\n"
        "model: {shape: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 300}}\n"
        "method: {name: osft}\nstream: [{name: a, path: a}, {name: b, path: b}]\n"
        "train: {precision: fp32, micro_batch: 2, global_batch: 16}\ndata: {cache_dir: cache}\n"
    )
    return path


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run_plan(recipe: Path, *words: str) -> str:
    """The output of `dscl plan`."""
    program = Program(["plan", str(recipe), *words], cwd=recipe.parent)
    out, err = program.communicate(timeout=100)
    assert program.returncode == 0, err
    return out


def test_a_plan_names_stages_what_fits_and_how_sure_it_is(recipe: Path) -> None:
    words = ["--nodes", "2", "--gpus-per-node", "2", "--gpu-memory", "80GiB", "--tflops", "1", "--bandwidth", "1GB"]
    out = run_plan(recipe, *words)
    assert "4 ranks (2 x 2); a step of 16 samples is 2 micro-batches of up to 2 rows on each" in out
    peaks = {}
    for name, *parts, peak in re.findall(
        r"(zero\d)\.json.*?" + r"\s+([\d.]+)" * 6 + r"  up to 4", out
    ):  # the parts add up to the peak
        assert sum(map(float, parts)) == pytest.approx(float(peak), abs=0.35)
        peaks[name] = float(peak)
    assert sorted(peaks) == ["zero0", "zero1", "zero2", "zero3"]
    for phrase in (
        "all_to_all",
        "owners: the busiest",
        "s a step",
        "lowest stage",
        "how sure",
        "when all are protected",
    ):
        assert phrase in out, phrase
    assert not (recipe.parent / "run").exists()


def test_a_plan_for_programs_is_one_object(recipe: Path) -> None:
    words = ["--recipe-only", "--json", "--gpus-per-node", "2", "train.precision=fp16"]
    process = subprocess.run(
        [sys.executable, "-m", "dscl", "plan", str(recipe), *words],
        cwd=recipe.parent, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    stage = document["stages"][document["recipe"]]
    assert (document["ranks"], document["recipe"], len(document["stages"])) == (2, "zero1.json", 1)
    assert document["disk"] == 3 * stage["checkpoint"]
    assert stage["device"] == stage["peak"]
    assert document["step"]["bytes_sent"] == ring_bytes(stage["bytes_sent"], 2)
    assert document["step"]["seconds"] is document["step"]["tokens_per_second"] is None


def test_a_plan_for_programs_has_times_and_the_balance_of_owners(recipe: Path) -> None:
    """Two matrices of one size have two owners. On four ranks, each owner has twice the mean load."""
    cluster = ["--gpus-per-node", "4", "--tflops", "1", "--bandwidth", "1GB", "--efficiency", "0.5"]
    document = json.loads(run_plan(recipe, "--recipe-only", "--json", *cluster, "method.constraint.targets=[q_proj]"))
    step = document["step"]
    computing, sending = step["flops"] / 0.5e12, step["bytes_sent"] / 1e9
    assert step["seconds"] == pytest.approx([max(computing, sending), computing + sending])
    assert step["tokens_per_second"] == pytest.approx([step["tokens"] / seconds for seconds in step["seconds"][::-1]])
    assert document["load_imbalance"] == pytest.approx(2.0)


def test_a_router_that_is_solved_counts(recipe: Path) -> None:
    """Solving for many features takes more memory than a step of a small model: seven matrices in fp64."""
    document = json.loads(
        run_plan(recipe, "--recipe-only", "--json", "method.name=asr", "method.router.num_features=4096")
    )
    stage = document["stages"][document["recipe"]]
    assert stage["task_end"] == 7 * 8 * 4096**2
    assert stage["device"] == stage["peak"] - stage["activations"] + stage["task_end"] > stage["peak"]
