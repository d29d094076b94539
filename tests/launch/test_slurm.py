"""launch/slurm.sh on a real Slurm: a job that is preempted and requeued ends like an undisturbed run."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.hosts import REPOSITORY, Unavailable
from tests.support.runs import recipe_of, reference_recipe, run_outcome, write_tasks
from tests.support.slurm import Slurm


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    try:
        cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    except Unavailable as why:
        pytest.skip(str(why))
    yield cluster
    cluster.close()


def submit_job(
    slurm: Slurm, document: dict[str, Any], folder: Path, *options: str, **environment: str
) -> tuple[str, Path]:
    """Submit a job; its id, and the path of its output."""
    name = Path(document["run_dir"]).name
    path, log = folder / f"{name}.yaml", folder / f"{name}.log"
    path.write_text(yaml.safe_dump(document))
    result = subprocess.run(
        [str(REPOSITORY / "launch" / "slurm.sh"), str(path), *options],
        cwd=folder,
        env={
            **slurm.environment,
            "PYTHON": sys.executable,
            "NPROC_PER_NODE": "2",
            "GPU_OPTION": "",
            "SBATCH": f"--output={log}",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[-1], log


def wait_until(condition: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no output"
        time.sleep(0.1)


def count_steps(folder: Path, name: str) -> int:
    lines = folder / name / "metrics.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0


def show_job(slurm: Slurm, job: str) -> str:
    return slurm.run_command("scontrol", "show", "job", job)


@pytest.mark.parametrize("count", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_a_wrong_recipe_is_not_tried_again(slurm: Slurm, tasks: Path, count: str) -> None:
    """Ranks that do not print the error wait for the rank that does."""
    document = recipe_of(tasks, f"wrong{count}", 2, train__lr=-1.0)
    job, log = submit_job(slurm, document, tasks, NPROC_PER_NODE=count)
    wait_until(lambda: slurm.job_state(job) == "FAILED", log)
    assert "train.lr" in log.read_text()
    assert "starting again" not in log.read_text()
    assert "ExitCode=2:0" in show_job(slurm, job)


CHANGES: dict[str, Any] = {"train__epochs": 2, "checkpoint__every": 1000}


def test_a_preempted_job_goes_on_as_if_nothing_had_been(slurm: Slurm, undisturbed_run: Any, tasks: Path) -> None:
    expected = undisturbed_run(*reference_recipe(tasks, 2, **CHANGES))
    document = recipe_of(tasks, "told", 2, **CHANGES)
    job, log = submit_job(slurm, document, tasks, "--no-doctor")
    wait_until(lambda: count_steps(tasks, "told") > 6, log)
    slurm.run_command("scancel", "--signal=USR1", job)  # to the ranks, as a preemption does
    wait_until(lambda: "with everything saved" in log.read_text() or "everything was saved" in log.read_text(), log)
    wait_until(lambda: "Restarts=1" in show_job(slurm, job), log)
    wait_until(lambda: slurm.job_state(job) == "COMPLETED", log)
    assert "resumed from step-" in log.read_text()
    assert run_outcome(tasks / "told") == run_outcome(expected)


@pytest.mark.exhaustive
def test_a_job_that_does_not_save_in_time_goes_back_into_the_queue(slurm: Slurm, tasks: Path) -> None:
    """The end of the job was announced, so a restart within the job would be killed, and no process could requeue
    it."""
    document = recipe_of(tasks, "late", 2, train__epochs=60, checkpoint__every=3, checkpoint__grace=1e-9)
    job, log = submit_job(slurm, document, tasks)
    wait_until(lambda: count_steps(tasks, "late") > 6, log)
    slurm.run_command("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 does
    wait_until(lambda: "not saved within checkpoint.grace" in log.read_text(), log)
    wait_until(lambda: "Restarts=1" in show_job(slurm, job), log, 60)
    assert "starting again" not in log.read_text()
    slurm.run_command("scancel", job)


@pytest.mark.exhaustive
def test_a_job_whose_time_ends_is_told_and_goes_back_into_the_queue(slurm: Slurm, tasks: Path) -> None:
    """By the --signal option of the script. A limit of six minutes is about the shortest of which 300 s remain."""
    document = recipe_of(tasks, "long", 2, train__epochs=600, checkpoint__every=100000)
    job, log = submit_job(slurm, document, tasks, SBATCH=f"--time=6 --output={tasks / 'long.log'}")
    wait_until(lambda: "Restarts=1" in show_job(slurm, job), log)
    assert re.search("with everything saved|SIGUSR1: nothing was trained yet", log.read_text())
    slurm.run_command("scancel", job)


@pytest.mark.exhaustive
def test_a_cancelled_job_has_saved_and_can_be_submitted_again(slurm: Slurm, undisturbed_run: Any, tasks: Path) -> None:
    """Slurm sends SIGTERM to all processes, and SIGKILL after KillWait."""
    expected = undisturbed_run(*reference_recipe(tasks, 2, **CHANGES))
    document = recipe_of(tasks, "gone", 2, **CHANGES)
    job, log = submit_job(slurm, document, tasks)
    wait_until(lambda: count_steps(tasks, "gone") > 6, log)
    slurm.run_command("scancel", job)
    wait_until(lambda: slurm.job_state(job) == "CANCELLED", log)
    assert "with everything saved" in log.read_text() or "everything was saved" in log.read_text()
    assert "starting again" not in log.read_text()
    job, log = submit_job(slurm, document, tasks)
    wait_until(lambda: slurm.job_state(job) == "COMPLETED", log)
    assert "resumed from step-" in log.read_text()
    assert run_outcome(tasks / "gone") == run_outcome(expected)


@pytest.mark.exhaustive
def test_a_dead_rank_brings_a_restart_within_the_job(slurm: Slurm, undisturbed_run: Any, tasks: Path) -> None:
    changes: dict[str, Any] = {"train__epochs": 8, "checkpoint__every": 4}
    expected = undisturbed_run(*reference_recipe(tasks, 3, **changes))
    document = recipe_of(tasks, "dead", 3, **changes)
    job, log = submit_job(slurm, document, tasks)
    wait_until(lambda: count_steps(tasks, "dead") > 8, log)
    slurm.run_command("scancel", "--signal=KILL", f"{job}.0")  # kills the ranks, not the job
    wait_until(lambda: slurm.job_state(job) == "COMPLETED", log)
    assert re.search(r"slurm.sh: ended with status \d+; starting again", log.read_text())
    assert run_outcome(tasks / "dead") == run_outcome(expected)
