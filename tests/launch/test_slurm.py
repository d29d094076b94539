"""launch/slurm.sh on a real Slurm: trains, is preempted, goes back into the queue, and ends as if nothing had been."""

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
from tests.support.runs import run_outcome, recipe_of, reference_recipe, write_tasks
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


def submitted(
    slurm: Slurm, document: dict[str, Any], folder: Path, *options: str, **environment: str
) -> tuple[str, Path]:
    """The job's number, and where its output goes."""
    name = Path(document["run_dir"]).name
    path, log = folder / f"{name}.yaml", folder / f"{name}.log"
    path.write_text(yaml.safe_dump(document))
    done = subprocess.run(
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
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1], log


def until(there: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no output"
        time.sleep(0.1)


def steps(folder: Path, name: str) -> int:
    lines = folder / name / "metrics.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0


def shown(slurm: Slurm, job: str) -> str:
    return slurm.ask("scontrol", "show", "job", job)


@pytest.mark.parametrize("count", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_a_wrong_recipe_is_not_tried_again(slurm: Slurm, tasks: Path, count: str) -> None:
    """Of several ranks, those that do not speak wait for the one that does."""
    document = recipe_of(tasks, f"wrong{count}", 2, train__lr=-1.0)
    job, log = submitted(slurm, document, tasks, NPROC_PER_NODE=count)
    until(lambda: slurm.state(job) == "FAILED", log)
    assert "train.lr" in log.read_text()
    assert "starting again" not in log.read_text()
    assert "ExitCode=2:0" in shown(slurm, job)


CHANGES: dict[str, Any] = {"train__epochs": 2, "checkpoint__every": 1000}


def test_a_preempted_job_goes_on_as_if_nothing_had_been(slurm: Slurm, undisturbed: Any, tasks: Path) -> None:
    calm = undisturbed(*reference_recipe(tasks, 2, **CHANGES))
    told = recipe_of(tasks, "told", 2, **CHANGES)
    job, log = submitted(slurm, told, tasks, "--no-doctor")
    until(lambda: steps(tasks, "told") > 6, log)
    slurm.ask("scancel", "--signal=USR1", job)  # to the ranks, as a preemption does
    until(lambda: "with everything saved" in log.read_text() or "everything was saved" in log.read_text(), log)
    until(lambda: "Restarts=1" in shown(slurm, job), log)
    until(lambda: slurm.state(job) == "COMPLETED", log)
    assert "resumed from step-" in log.read_text()
    assert run_outcome(tasks / "told") == run_outcome(calm)


@pytest.mark.exhaustive
def test_a_job_that_does_not_save_in_time_goes_back_into_the_queue(slurm: Slurm, tasks: Path) -> None:
    """Its end was announced, so that another start within the job would be cut off, with nothing to requeue it."""
    late = recipe_of(tasks, "late", 2, train__epochs=60, checkpoint__every=3, checkpoint__grace=1e-9)
    job, log = submitted(slurm, late, tasks)
    until(lambda: steps(tasks, "late") > 6, log)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 does
    until(lambda: "not saved within checkpoint.grace" in log.read_text(), log)
    until(lambda: "Restarts=1" in shown(slurm, job), log, 60)
    assert "starting again" not in log.read_text()
    slurm.ask("scancel", job)


@pytest.mark.exhaustive
def test_a_job_whose_time_ends_is_told_and_goes_back_into_the_queue(slurm: Slurm, tasks: Path) -> None:
    """By what the script itself asks for; of six minutes, 300 s before the end is about the first Slurm can do."""
    long = recipe_of(tasks, "long", 2, train__epochs=600, checkpoint__every=100000)
    job, log = submitted(slurm, long, tasks, SBATCH=f"--time=6 --output={tasks / 'long.log'}")
    until(lambda: "Restarts=1" in shown(slurm, job), log)
    assert re.search("with everything saved|SIGUSR1: nothing was trained yet", log.read_text())
    slurm.ask("scancel", job)


@pytest.mark.exhaustive
def test_a_cancelled_job_has_saved_and_can_be_submitted_again(slurm: Slurm, undisturbed: Any, tasks: Path) -> None:
    """Slurm says SIGTERM to all of it, and some time (KillWait) later SIGKILL."""
    calm = undisturbed(*reference_recipe(tasks, 2, **CHANGES))
    gone = recipe_of(tasks, "gone", 2, **CHANGES)
    job, log = submitted(slurm, gone, tasks)
    until(lambda: steps(tasks, "gone") > 6, log)
    slurm.ask("scancel", job)
    until(lambda: slurm.state(job) == "CANCELLED", log)
    assert "with everything saved" in log.read_text() or "everything was saved" in log.read_text()
    assert "starting again" not in log.read_text()
    job, log = submitted(slurm, gone, tasks)
    until(lambda: slurm.state(job) == "COMPLETED", log)
    assert "resumed from step-" in log.read_text()
    assert run_outcome(tasks / "gone") == run_outcome(calm)


@pytest.mark.exhaustive
def test_a_dead_rank_brings_a_restart_within_the_job(slurm: Slurm, undisturbed: Any, tasks: Path) -> None:
    changes: dict[str, Any] = {"train__epochs": 8, "checkpoint__every": 4}
    alive = undisturbed(*reference_recipe(tasks, 3, **changes))
    dead = recipe_of(tasks, "dead", 3, **changes)
    job, log = submitted(slurm, dead, tasks)
    until(lambda: steps(tasks, "dead") > 8, log)
    slurm.ask("scancel", "--signal=KILL", f"{job}.0")  # kills the ranks, not the job
    until(lambda: slurm.state(job) == "COMPLETED", log)
    assert re.search(r"slurm.sh: ended with status \d+; starting again", log.read_text())
    assert run_outcome(tasks / "dead") == run_outcome(alive)
