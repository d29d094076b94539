"""`dscl plan`: its arithmetic, its words, and a whole one (what it counts: tests/distributed/test_plan.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dscl import plan
from dscl.errors import UserError
from dscl.maths.subspace import READINGS, Subspace, room_of
from dscl.plan import AROUND, GIB, Cluster, Stage, peak_named, size_of, wire
from dscl.rehearsal import Rehearsed

REPOSITORY = Path(__file__).resolve().parents[1]


def rehearsed(peak: float, optimizer: int = 0, weights: int = 0) -> Rehearsed:
    return Rehearsed(weights, optimizer, 0, 0, 0, int(peak), 0, 0, {}, {}, None, 1, 1, None)


def fits(stage: Stage, found: dict[int, Rehearsed], memory: float, most: int) -> int | None:
    cluster = Cluster(1, 1, memory + AROUND, None, None, 0.4)
    return plan._judged(stage, found, cluster, most).fits


def test_rows_that_fit_follow_from_two_rehearsals() -> None:
    """10 GiB and 2 for each row."""
    found = {4: rehearsed(18 * GIB), 2: rehearsed(14 * GIB)}
    stage = Stage("a", {}, found[4], None)
    assert fits(stage, found, 30 * GIB, 64) == 10
    assert fits(stage, found, 29.9 * GIB, 64) == 9
    assert fits(stage, found, 30 * GIB, 8) == 8
    assert fits(stage, found, 11 * GIB, 8) == 0
    only = {1: rehearsed(18 * GIB)}
    assert [fits(stage, only, memory * GIB, 1) for memory in (17.9, 18)] == [0, 1]


def test_what_is_offloaded_is_not_on_the_device() -> None:
    found = {1: rehearsed(18 * GIB, optimizer=8 * GIB, weights=4 * GIB)}
    zero = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    assert Stage("a", {"zero_optimization": zero}, found[1], None).device == 10 * GIB
    assert fits(Stage("a", {"zero_optimization": zero}, found[1], None), found, 10 * GIB, 1) == 1


def test_a_ring_sends_each_byte_past_all_others() -> None:
    """Of 8 ranks: a sum passes everybody twice, a share that is gathered goes to seven."""
    assert wire({"all_reduce": 80.0}, 8) == 140.0
    assert wire({"all_gather": 10.0}, 8) == wire({"reduce_scatter": 80.0}, 8) == 70.0
    assert wire({"all_to_all": 80.0, "broadcast": 1.0}, 8) == 71.0


def test_sizes_and_devices_are_read_or_refused() -> None:
    assert size_of("--gpu-memory", "80GiB") == 80 * GIB
    assert size_of("--bandwidth", "1.5 GB/s") == 1.5e9
    for given in ("80", "GiB", "0GiB", "80 parsecs"):
        with pytest.raises(UserError, match="a size like 80GiB"):
            size_of("--gpu-memory", given)
    assert peak_named("H100") == 989e12
    with pytest.raises(UserError, match=r"--gpu: given 'abacus'.*--tflops"):
        peak_named("abacus")


@pytest.mark.parametrize("reading", READINGS)
def test_room_is_that_of_directions_that_were_protected(reading: str) -> None:
    import torch

    weight, count = torch.randn(7, 5), 3
    space = Subspace.empty(reading, weight)
    left, _, right = torch.linalg.svd(weight)
    space.grow(weight, right[:count].T.contiguous(), left[:, :count].contiguous())
    room = room_of(reading, 7, 5, count, torch.device("cpu"))
    assert {name: t.shape for name, t in room.items()} == {name: t.shape for name, t in space.tensors().items()}


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


def dscl(recipe: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return subprocess.run(
        [sys.executable, "-m", "dscl", "plan", str(recipe), *words],
        cwd=recipe.parent, env={**environment, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip


def test_a_plan_names_stages_what_fits_and_how_sure_it_is(recipe: Path) -> None:
    words = ["--nodes", "2", "--gpus-per-node", "2", "--gpu-memory", "80GiB", "--tflops", "1", "--bandwidth", "1GB"]
    done = dscl(recipe, *words)
    assert done.returncode == 0, done.stderr
    assert "4 ranks (2 x 2); a step of 16 samples is 2 micro-batches of up to 2 rows on each" in done.stdout
    peaks = {}
    for name, *parts, peak in re.findall(
        r"(zero\d)\.json.*?" + r"\s+([\d.]+)" * 6 + r"  up to 4", done.stdout
    ):  # what is held and what passes is the peak
        assert sum(map(float, parts)) == pytest.approx(float(peak), abs=0.35)
        peaks[name] = float(peak)
    assert sorted(peaks) == ["zero0", "zero1", "zero2", "zero3"]
    for said in ("all_to_all", "owners: the busiest", "s a step", "lowest stage", "how sure", "when all are protected"):
        assert said in done.stdout, said
    assert not (recipe.parent / "run").exists()


def test_a_plan_for_programs_is_one_object(recipe: Path) -> None:
    done = dscl(recipe, "--alone", "--json", "--gpus-per-node", "2", "train.precision=fp16")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    stage = found["stages"][found["recipe"]]
    assert (found["ranks"], found["recipe"], len(found["stages"])) == (2, "zero1.json", 1)
    assert found["disk"] == 3 * stage["saved"]
    assert stage["device"] == stage["peak"]
