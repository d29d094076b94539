"""Stopping on purpose, on real ranks: status 75, nothing lost, and what follows is bitwise what would have followed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl import dist, train
from dscl.errors import Stopped
from dscl.methods.osft import Osft
from dscl.recipe import resolve
from tests.support.runs import Told, metrics, outcome, recipe_of, run, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    write_tasks(folder)
    return folder


def run_stopping(document: dict[str, Any], places: list[int]) -> list[tuple[str, str]]:
    """Run; stop at that place, start again, stop at the next; then run to the end. What was said, and the newest
    checkpoint then."""
    said = []
    for place in places:
        try:
            train.train(resolve(document), Told(place))
            raise AssertionError(f"place {place} was never come by")
        except Stopped as stopped:
            folder = Path(document["run_dir"]) / "checkpoints"
            said.append((str(stopped), max((path.name for path in folder.glob("step-*")), default="")))
        dist.barrier()
    run(document)
    return said


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_a_stopped_run_goes_on_from_that_very_step(ranks: Any, tasks: Path, world: int, stage: int) -> None:
    changes: dict[str, Any] = {"checkpoint__every": 100, "evaluate__batch": 4}
    ranks(world)(run, recipe_of(tasks, f"whole{stage}{world}", stage, **changes))
    places = [8, 3, 12, 9] if world == 1 else [8, 3, 9, 5]  # in steps, and in the last evaluation
    results = ranks(world)(run_stopping, recipe_of(tasks, f"stopped{stage}{world}", stage, **changes), places)
    assert results == [results[0]] * world  # at the same place on all
    evaluated = [said for said, _ in results[0] if "in an evaluation" in said]
    stepped = [(said, name) for said, name in results[0] if "after step" in said]
    assert evaluated
    assert stepped
    for said, name in stepped:
        assert name == f"step-{int(said.split()[3].rstrip(',')):08d}"
    assert outcome(tasks / f"stopped{stage}{world}") == outcome(tasks / f"whole{stage}{world}")


def test_where_steps_go_unheld_it_stops_at_one_that_is_held(ranks: Any, tasks: Path) -> None:
    """A projection more would change what follows."""
    method = {"name": "osft", "project_every": 4, "share": 0.3}
    assert Osft.Config(project_every=4).project_every == 4
    for name in ("held", "stopped and held"):
        document = recipe_of(tasks, name, 2, method=method, evaluate__before=False, checkpoint__every=100)
        if name == "held":
            ranks(2)(run, document)
        else:
            (said, checkpoint), *_ = ranks(2)(run_stopping, document, [2])[0]
            assert "after step 4," in said
            assert checkpoint == "step-00000004"
    assert outcome(tasks / "stopped and held") == outcome(tasks / "held")


def started(folder: Path, name: str, world: int, **changes: Any) -> tuple[subprocess.Popen[str], Path]:
    document = recipe_of(folder, name, 2, **changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    words = [sys.executable, "-m", "dscl", "train", str(path), "--nproc", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, Path(document["run_dir"])


def until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rank_of(process: subprocess.Popen[str], number: int) -> int:
    """The process of a rank that `--nproc` started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if f"\0RANK={number}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank {number} among {children}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all(tasks: Path, number: signal.Signals) -> None:
    """Status 75, one line; the next start ends as a run that was never stopped."""
    changes: dict[str, Any] = {"train__epochs": 6, "checkpoint__every": 1000}
    whole, folder = started(tasks, "unstopped", 2, **changes)
    assert whole.wait() == 0 or (folder / "scores.json").exists()
    name = f"told {number.name}"
    process, run_dir = started(tasks, name, 2, **changes)
    generator = random.Random(number)
    steps = generator.randint(3, 20)
    until(lambda: (run_dir / "metrics.jsonl").exists() and len(lines(run_dir)) >= steps, process)
    os.kill(rank_of(process, 1), number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert [line for line in err.splitlines() if line.startswith("dscl: stopped")] == err.splitlines()[-1:]
    assert "with everything saved; run the same command again to go on" in err or "before which everything" in err
    again, _ = started(tasks, name, 2, **changes)
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert outcome(run_dir) == outcome(folder)


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_a_signal_before_training_ends_the_run_there_and_then(tasks: Path) -> None:
    process, run_dir = started(tasks, "early", 2)
    until(lambda: len(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()) == 2, process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (75, 1), err  # before the ranks listen, the signal itself ends them
    assert "again" in err
    assert not (run_dir / "checkpoints").exists()


def test_a_second_signal_leaves_at_once_and_the_checkpoint_before_is_whole(tasks: Path) -> None:
    """Rank 1 stands still, so that nobody can come to a step's end."""
    process, run_dir = started(tasks, "twice", 2, train__epochs=40, checkpoint__every=4)
    until(lambda: len(list(run_dir.glob("checkpoints/step-*/complete.json"))) >= 2, process)
    still = rank_of(process, 1)
    os.kill(still, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode not in (0, 75)
    again, _ = started(tasks, "twice", 2, train__epochs=40, checkpoint__every=4)
    until(lambda: max((record["step"] for record in metrics(run_dir)), default=0) > 30, again)
    again.send_signal(signal.SIGTERM)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 75, err
    assert "resumed from step-" in err


def test_what_is_not_saved_in_time_is_said(tasks: Path) -> None:
    process, run_dir = started(tasks, "late", 2, train__epochs=40, checkpoint__every=4, checkpoint__grace=1.0)
    until(lambda: len(list(run_dir.glob("checkpoints/step-*/complete.json"))) >= 2, process)
    told, still = rank_of(process, 0), rank_of(process, 1)
    os.kill(still, signal.SIGSTOP)
    time.sleep(0.5)  # the other one waits in a collective by now
    os.kill(told, signal.SIGTERM)
    time.sleep(2.5)
    os.kill(still, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGTERM: not saved within checkpoint.grace=1 s; run the same command again" in err


def test_a_second_job_is_refused_and_a_dead_one_holds_nothing(tasks: Path) -> None:
    process, run_dir = started(tasks, "held once", 2, train__epochs=40)
    until(lambda: (run_dir / "metrics.jsonl").exists(), process)
    holder = rank_of(process, 0)
    second, _ = started(tasks, "held once", 2, train__epochs=40)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"is in use by process {holder} on {socket.gethostname()}, since 20" in err
    assert len(err.splitlines()) == 1
    process.kill()
    process.wait()
    third, _ = started(tasks, "held once", 2, train__epochs=40)
    count = len(lines(run_dir))
    until(lambda: len(lines(run_dir)) > count + 4, third)
    third.kill()
    third.wait()
