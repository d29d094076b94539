"""Runs whose processes get a real SIGKILL."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.hosts import REPOSITORY
from tests.support.programs import Program
from tests.support.runs import recipe_of, reference_recipe, run_outcome, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_tasks(folder)
    (folder / "warm.txt").write_text("The red bird sings today.\nThe fast cat sleeps here.\n")
    return folder


def train_arguments(document: dict[str, Any], folder: Path) -> list[str]:
    """Write the recipe; the arguments of dscl for its run on two ranks."""
    path = folder / f"{Path(document['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return ["train", str(path), "--nproc", "2"]


def test_a_folder_removed_under_a_launch_script_is_not_trained_in_again(tasks: Path) -> None:
    """The script restarts a failed run; here that would train from the beginning."""
    document = recipe_of(tasks, "vanished", train__epochs=200)
    folder = Path(document["run_dir"])
    script = f'source {REPOSITORY / "launch" / "supervise.sh"}; launch 3 "$@"'
    command = [sys.executable, "-m", "dscl", *train_arguments(document, tasks)]
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script, "script", *command],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    try:
        while not (folder / "checkpoints" / "step-00000006").is_dir():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        folder.rename(tasks / "gone")
        _, stderr = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert process.returncode == 2, stderr
    assert f"{folder / 'checkpoints'}: removed by somebody while the run went on" in stderr
    assert "starting again" not in stderr
    assert not folder.exists()


def changes_with_much_state(folder: Path) -> dict[str, Any]:
    """Settings with much state besides the weights: replayed samples, packed rows, held-out texts, the best checkpoint
    and asynchronous saving."""
    return {
        "method": {"name": "replay", "replay": {"size": 9}, "tune": {"name": "lora", "dropout": 0.2}},
        "train__packing": True,
        "evaluate": {"heldout": str(folder / "warm.txt"), "zero_shot": False},
        "checkpoint": {"every": 3, "best": "heldout", "async": True},
    }


def kill_with_ranks(process: Program) -> None:
    """Send SIGKILL to the program and its ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ranks = children.read_text().split() if children.exists() else []
    for pid in (process.pid, *map(int, ranks)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def count_steps(run_dir: Path) -> int:
    """The number of steps in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("stage", "much"),
    [
        (0, False),
        (3, True),
        pytest.param(0, True, marks=pytest.mark.exhaustive),
        pytest.param(3, False, marks=pytest.mark.exhaustive),
    ],
)
def test_killed_for_real_at_random_moments(undisturbed_run: Any, tasks: Path, stage: int, much: bool) -> None:
    """SIGKILL to all processes at random moments. DSCL_KILL_SEED repeats a failure.

    A moment is a number of steps plus up to 0.1 s, about the time of a step or of writing a checkpoint.
    """
    changes = changes_with_much_state(tasks) if much else {}
    expected = run_outcome(undisturbed_run(*reference_recipe(tasks, stage, **changes)))
    steps = expected[0][-1]["step"]
    document = recipe_of(tasks, f"killed {stage} {much}", stage, **changes)
    folder = Path(document["run_dir"])
    seed = int(os.environ.get("DSCL_KILL_SEED", random.randrange(10**6)))
    moments = random.Random(seed)
    for _ in range(2):
        process = Program(train_arguments(document, tasks))
        count, then = moments.randint(0, steps - 2), moments.uniform(0.0, 0.1)
        deadline = time.monotonic() + 60
        while count_steps(folder) < count and process.poll() is None:
            assert time.monotonic() < deadline, process.output()
            time.sleep(0.005)
        time.sleep(then)
        kill_with_ranks(process)
    process = Program(train_arguments(document, tasks))
    assert process.wait(120) == 0, process.output()
    assert run_outcome(folder) == expected, f"DSCL_KILL_SEED={seed}"
