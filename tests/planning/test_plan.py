"""`dscl plan`: its arithmetic, its words, and a whole one (what it counts: tests/distributed/test_plan.py)."""

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


def rehearsed(peak: float, optimizer: int = 0, weights: int = 0, passing: int = 0, ending: int = 0) -> MemoryEstimate:
    return MemoryEstimate(weights, optimizer, 0, 0, passing, int(peak), 0, 0, {}, {}, ending, None, 1, 1, None)


def fits(stage: StageEstimate, found: dict[int, MemoryEstimate], memory: float, most: int) -> int | None:
    cluster = Cluster(1, 1, memory + UNTRACKED_GPU_BYTES, None, None, 0.4)
    return plan._with_max_rows(stage, found, cluster, most).max_rows


def test_rows_that_fit_follow_from_two_rehearsals() -> None:
    """10 GiB and 2 for each row."""
    found = {4: rehearsed(18 * GIB), 2: rehearsed(14 * GIB)}
    stage = StageEstimate("a", {}, found[4], None)
    assert fits(stage, found, 30 * GIB, 64) == 10
    assert fits(stage, found, 29.9 * GIB, 64) == 9
    assert fits(stage, found, 30 * GIB, 8) == 8
    assert fits(stage, found, 11 * GIB, 8) == 0
    only = {1: rehearsed(18 * GIB)}
    assert [fits(stage, only, memory * GIB, 1) for memory in (17.9, 18)] == [0, 1]


def test_what_is_offloaded_is_not_on_the_device() -> None:
    found = {1: rehearsed(18 * GIB, optimizer=8 * GIB, weights=4 * GIB)}
    zero = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    assert StageEstimate("a", {"zero_optimization": zero}, found[1], None).device_bytes == 10 * GIB
    assert fits(StageEstimate("a", {"zero_optimization": zero}, found[1], None), found, 10 * GIB, 1) == 1


def test_what_a_task_needs_when_it_ends_has_to_fit_too() -> None:
    """10 GiB are kept and 8 pass in a step; when a task ends, 12 are needed instead of these."""
    found = {4: rehearsed(18 * GIB, passing=8 * GIB, ending=12 * GIB), 2: rehearsed(14 * GIB, passing=4 * GIB)}
    stage = StageEstimate("a", {}, found[4], None)
    assert (stage.step_bytes, stage.task_end_bytes, stage.device_bytes) == (18 * GIB, 22 * GIB, 22 * GIB)
    assert [fits(stage, found, memory * GIB, 64) for memory in (21.9, 22)] == [0, 6]
    assert StageEstimate("a", {}, rehearsed(18 * GIB, passing=8 * GIB, ending=GIB), None).device_bytes == 18 * GIB
    alone = {1: rehearsed(18 * GIB, passing=8 * GIB, ending=12 * GIB)}
    assert [fits(StageEstimate("a", {}, alone[1], None), alone, memory * GIB, 1) for memory in (21.9, 22)] == [0, 1]


def test_micro_batches_are_those_of_the_first_step_of_the_first_task() -> None:
    first: Any = SimpleNamespace(sampler=SimpleNamespace(micro_batches=lambda step, rank: [(step, rank)] * 3))
    assert plan._micro_batches_per_step(SimpleNamespace(training_data={0: first}.__getitem__)) == 3  # type: ignore[arg-type]


def test_time_of_a_step_is_that_of_the_stated_device_and_network() -> None:
    """Steps of 4 samples of 10 tokens, of which 4 are answered: 40 tokens, 4 · 55 pairs, 16 targets, on 2 ranks."""
    lengths = np.full(8, 6, np.int32), np.full(8, 4, np.int32)
    sampler = BatchSampler(
        *lengths, seed=0, epochs=3, global_batch=4, micro_batch=2, world_size=2, max_length=10, packing=False
    )
    setup: Any = SimpleNamespace(
        training_data=lambda _: SimpleNamespace(sampler=sampler), planned_steps=lambda: [("a", 6)]
    )
    cost: Any = SimpleNamespace(
        total_flops=lambda tokens, pairs, targets: 1e12 * tokens + 1e11 * pairs + 1e12 * targets,
        recompute_flops=lambda *_: 22e12,
    )
    found: Any = SimpleNamespace(flop_count=cost, bytes_sent={"all_reduce": 8e9, "all_gather": 2e9})
    cluster = Cluster(1, 2, None, 1e9, 100e12, 0.5)
    step = plan.estimate_step(setup, cluster, found)
    # 40e12 + 22e12 + 16e12 of use and 22e12 once more, halved; a ring sends 2 · 8e9 / 2 and 2e9.
    assert (step.tokens, step.flops, step.bytes_sent) == pytest.approx((40, 50e12, 10e9))
    assert (step.compute_seconds, step.communication_seconds) == pytest.approx((1.0, 10.0))
    assert step.seconds == pytest.approx((10.0, 11.0))
    assert step.tokens_per_second == pytest.approx((40 / 11, 4.0))
    said = "\n".join(plan._describe_times(setup, cluster, found))
    assert "so 10 to 11 s a step, 4 to 4 tokens/s" in said
    assert "6 steps, 1m00s to 1m06s" in said
    assert plan.estimate_step(setup, Cluster(1, 2, None, None, 100e12, 0.5), found).seconds is None
    assert plan.estimate_step(setup, Cluster(1, 1, None, None, 100e12, 0.5), found).seconds == pytest.approx((2.0, 2.0))
    assert plan.estimate_step(setup, Cluster(1, 2, None, 1e9, None, 0.5), found).tokens_per_second is None


def test_what_was_not_tried_is_not_compared() -> None:
    cluster = Cluster(1, 1, GIB, None, None, 0.4)
    tried = [StageEstimate(name, {}, rehearsed(0), most) for name, most in (("zero1.json", 2), ("zero2.json", 4))]
    (both,), (one,) = plan._describe_fit(tried, cluster), plan._describe_fit(tried[:1], cluster)
    assert both.startswith("fits: zero1.json is the lowest stage that does, with train.micro_batch up to 2; zero2.json")
    assert one == "fits: zero1.json does, with train.micro_batch up to 2"


def test_a_ring_sends_each_byte_past_all_others() -> None:
    """Of 8 ranks: a sum passes everybody twice, a share that is gathered goes to seven."""
    assert ring_bytes({"all_reduce": 80.0}, 8) == 140.0
    assert ring_bytes({"all_gather": 10.0}, 8) == ring_bytes({"reduce_scatter": 80.0}, 8) == 70.0
    assert ring_bytes({"all_to_all": 80.0, "broadcast": 1.0}, 8) == 71.0


def test_sizes_and_devices_are_read_or_refused() -> None:
    assert parse_size("--gpu-memory", "80GiB") == 80 * GIB
    assert parse_size("--bandwidth", "1.5 GB/s") == 1.5e9
    for given in ("80", "GiB", "0GiB", "80 parsecs"):
        with pytest.raises(UserError, match="a size like 80GiB"):
            parse_size("--gpu-memory", given)
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
    """What `dscl plan` prints."""
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
    ):  # what is held and what passes is the peak
        assert sum(map(float, parts)) == pytest.approx(float(peak), abs=0.35)
        peaks[name] = float(peak)
    assert sorted(peaks) == ["zero0", "zero1", "zero2", "zero3"]
    for said in ("all_to_all", "owners: the busiest", "s a step", "lowest stage", "how sure", "when all are protected"):
        assert said in out, said
    assert not (recipe.parent / "run").exists()


def test_a_plan_for_programs_is_one_object(recipe: Path) -> None:
    words = ["--recipe-only", "--json", "--gpus-per-node", "2", "train.precision=fp16"]
    done = subprocess.run(
        [sys.executable, "-m", "dscl", "plan", str(recipe), *words],
        cwd=recipe.parent, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    stage = found["stages"][found["recipe"]]
    assert (found["ranks"], found["recipe"], len(found["stages"])) == (2, "zero1.json", 1)
    assert found["disk"] == 3 * stage["checkpoint"]
    assert stage["device"] == stage["peak"]
    assert found["step"]["bytes_sent"] == ring_bytes(stage["bytes_sent"], 2)
    assert found["step"]["seconds"] is found["step"]["tokens_per_second"] is None


def test_a_plan_for_programs_has_times_and_the_balance_of_owners(recipe: Path) -> None:
    """Two matrices of one size have two owners; of four ranks these have twice the mean each."""
    cluster = ["--gpus-per-node", "4", "--tflops", "1", "--bandwidth", "1GB", "--efficiency", "0.5"]
    found = json.loads(run_plan(recipe, "--recipe-only", "--json", *cluster, "method.constraint.targets=[q_proj]"))
    step = found["step"]
    computing, sending = step["flops"] / 0.5e12, step["bytes_sent"] / 1e9
    assert step["seconds"] == pytest.approx([max(computing, sending), computing + sending])
    assert step["tokens_per_second"] == pytest.approx([step["tokens"] / seconds for seconds in step["seconds"][::-1]])
    assert found["load_imbalance"] == pytest.approx(2.0)


def test_a_router_that_is_solved_counts(recipe: Path) -> None:
    """Wide features take more than a step of a small model does: seven matrices of them in fp64."""
    found = json.loads(
        run_plan(recipe, "--recipe-only", "--json", "method.name=asr", "method.router.num_features=4096")
    )
    stage = found["stages"][found["recipe"]]
    assert stage["task_end"] == 7 * 8 * 4096**2
    assert stage["device"] == stage["peak"] - stage["activations"] + stage["task_end"] > stage["peak"]
