"""A small run of the benchmark: every section has its rows, and the rows of other scripts join its table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tools import SUBPROCESS, Tool
from tools import bench

REPOSITORY = Path(__file__).resolve().parents[2]
METHOD_BENCHMARKS = {
    "bench_osft.py": "--section step setup --rounds 1 --hidden 64 --layers 1 --intermediate 96 --vocab 64 --micro 2 "
    "--rows 1 --length 16",
    "bench_experts.py": "--section step --device cpu --width 32 --tokens 16 --experts 4 --rounds 1",
    "bench_asr.py": "--section step mixed --hidden 64 --layers 2 --rounds 1",
    "bench_router.py": "--width 64 --rows 64 --dim 16",
}
SMALL = ["--rounds", "1", "--hidden", "64", "--layers", "1", "--json"]
SCRIPT = str(REPOSITORY / "tools" / "bench.py")
SMALLER = {
    "BLOCK": 4, "TARGETS": 1024, "HEAD_SIZES": {"cpu": (64, 8000, torch.float32)}, "MAX_LOGITS": 128 * 8000,
}  # fmt: skip
ANEW = pytest.param(True, id="anew", marks=pytest.mark.exhaustive)


def run_anew(*words: str) -> list[dict[str, str]]:
    process = subprocess.run(
        [sys.executable, *words, *SMALL], cwd=REPOSITORY, capture_output=True, text=True,
        env={**bench.subprocess_environment(), "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    return parse_rows(process.stdout)


def start_forked(*words: str, **environment: str) -> Tool:
    return Tool([SCRIPT, *words, *SMALL], SMALLER, environment)


def read_rows(tool: Tool) -> list[dict[str, str]]:
    out, err = tool.communicate(timeout=100)
    assert tool.returncode == 0, err[-2000:]
    return parse_rows(out)


def parse_rows(output: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("anew", [False, ANEW])
def test_the_quick_sections_find_figures(monkeypatch: pytest.MonkeyPatch, anew: bool) -> None:
    words = ["--section", "overhead", "trainer", "head", "evaluation"]
    if anew:
        rows = run_anew(SCRIPT, *words, "start")
    else:
        monkeypatch.setattr(bench, "subprocess", SUBPROCESS)
        options = argparse.Namespace(rounds=1, hidden=64, layers=1, deepspeed=str(REPOSITORY / "ds_configs/zero2.json"))
        rows = [*read_rows(start_forked(*words)), *map(dataclasses.asdict, bench.start(options))]
    sections = [row["name"].split(":")[0] for row in rows]
    packed = "LoRA, short samples of different lengths, which dscl packs"
    peers = ["full fine-tuning", "LoRA", packed, "head", "the same"]
    assert sections[:8] == ["trainer", "monitoring", *peers, "evaluation"]
    # A share of the memory. The forked run computes the logits in eight chunks.
    assert float(rows[6]["value"]) < (0.5 if anew else 0.2)
    assert all(float(row["value"].split(" ")[0]) > 0 for row in rows)
    shares = {row["name"].split(": ")[1]: row["value"] for row in rows if " tasks: " in row["name"]}
    # Of 64 evaluations: the seen tasks, and all tasks after the last; the new task, and all after the last; all twice.
    assert [float(share) for share in shares.values()] == [0.562, 0.234, 0.25, 0.141]
    first_start, second_start = rows[-2:]
    assert "empty cache" in first_start["name"]
    parts = dict(part.rsplit(" ", 1) for part in second_start["note"].split(", ") if "tokenizer" not in part)
    assert {"imports", "model and DeepSpeed", "evaluation before training", "first step"} <= set(parts)


@pytest.mark.parametrize("anew", [False, ANEW])
def test_two_ranks_measure_together(anew: bool) -> None:
    words = ["--section", "overhead", "evaluation"]
    if anew:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        rows = run_anew(*launcher, SCRIPT, *words)
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
        first, second = (start_forked(*words, **place, RANK=rank, LOCAL_RANK=rank) for rank in "01")
        rows = read_rows(first)
        assert read_rows(second) == []
    assert [row["name"].rpartition(", ")[2] for row in rows] == ["on 2 ranks"] * 3


def test_parts_of_the_start_are_the_whole() -> None:
    record = {"began": 102.0, "ended": 110.0, "parts": {"imports": 3.0, "first step": 4.0}}
    note = "Python 2.0, imports 3.0, first step 4.0, the rest 1.0"
    assert bench.summarize_start(record, began=100.0) == ("10.0 s", "", note)


def test_rows_of_another_script_join_the_table_and_its_failure_is_told(tmp_path: Path, capfd: Any) -> None:
    script = tmp_path / "other.py"
    row = {"name": "a", "value": "1", "target": "", "note": ""}
    script.write_text(f"print('words')\nprint({json.dumps(row)!r}, flush=True)\nimport os; os.kill(os.getpid(), 9)\n")
    rows = list(bench.run_script(str(script), "--rounds", "1"))
    assert rows == [bench.Measurement("a", "1"), bench.Measurement("other.py", "", "", "failed: status -9")]
    assert capfd.readouterr() == ("", "words\n")


@pytest.mark.parametrize("anew", [False, ANEW])
def test_bars_of_the_methods_are_rows(monkeypatch: pytest.MonkeyPatch, anew: bool) -> None:
    """Rows of OSFT's step and set-up, sub-experts, mixed batches and the router, with their targets."""
    if not anew:
        monkeypatch.setattr(bench, "subprocess", SUBPROCESS)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(bench, "METHOD_BENCHMARKS", {name: words.split() for name, words in METHOD_BENCHMARKS.items()})
    rows = list(bench.methods(bench.argparse.Namespace()))
    assert not [row for row in rows if not row.value], rows
    for name, target in {
        "OSFT, two_sided: step of": "", "OSFT, two_sided: set-up": "≥ 10", "over a LoRA": "≤ 1.3",
        "mixed batches": "> 1", "collects features": "≤ 1.03", "router: ": "> 1",
    }.items():  # fmt: skip
        assert target in [row.target for row in rows if name in row.name], name
