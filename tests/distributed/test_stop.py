"""Stopping on a signal, with real ranks: status 75, nothing lost, and the resumed run is the same bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.config.parsing import parse_config
from dscl.distributed import comm
from dscl.methods.osft import Osft
from dscl.recipe.recipe import resolve_recipe
from dscl.training import run as training_run
from dscl.utils.errors import RunStopped
from tests.support.programs import Program
from tests.support.runs import StopAtPoll, recipe_of, reference_recipe, run, run_outcome, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    write_tasks(folder)
    return folder


def run_stopping(document: dict[str, Any], places: list[int]) -> list[tuple[str, str]]:
    """Run and stop at every one of these polls, resuming in between; then run to the end.

    Returns for each stop its message and the newest checkpoint.
    """
    messages = []
    for place in places:
        try:
            training_run.train(resolve_recipe(document), StopAtPoll(place))
            raise AssertionError(f"place {place} was never come by")
        except RunStopped as stopped:
            folder = Path(document["run_dir"]) / "checkpoints"
            messages.append((str(stopped), max((path.name for path in folder.glob("step-*")), default="")))
        comm.barrier()
    run(document)
    return messages


@pytest.mark.parametrize(
    ("stage", "world"),
    [
        (0, 1),
        pytest.param(1, 2, marks=pytest.mark.exhaustive),
        pytest.param(2, 2, marks=pytest.mark.exhaustive),
        (3, 2),
    ],
)
def test_a_stopped_run_resumes_at_the_same_step(
    ranks: Any, undisturbed_run: Any, tasks: Path, world: int, stage: int
) -> None:
    changes: dict[str, Any] = {"checkpoint__every": 100, "evaluate__batch": 4}
    expected = undisturbed_run(*reference_recipe(tasks, stage, world, **changes))
    places = [8, 3, 12, 9] if world == 1 else [8, 3, 9, 5]  # in steps, and in the last evaluation
    results = ranks(world)(run_stopping, recipe_of(tasks, f"stopped{stage}{world}", stage, **changes), places)
    assert results == [results[0]] * world  # at the same place on all
    evaluation_messages = [messages for messages, _ in results[0] if "in an evaluation" in messages]
    step_stops = [(messages, name) for messages, name in results[0] if "after step" in messages]
    assert evaluation_messages
    assert step_stops
    for messages, name in step_stops:
        assert name == f"step-{int(messages.split()[3].rstrip(',')):08d}"
    assert run_outcome(tasks / f"stopped{stage}{world}") == run_outcome(expected)


def test_a_run_stops_after_a_projected_step_only(ranks: Any, undisturbed_run: Any, tasks: Path) -> None:
    """A stop adds no projection, because an additional one would change the following steps."""
    method = {"name": "osft", "constraint": {"project_every": 4, "protected_ratio": 0.3}}
    assert parse_config(Osft.Config, method).constraint.project_every == 4
    changes: dict[str, Any] = {"method": method, "evaluate__zero_shot": False, "checkpoint__every": 100}
    expected = undisturbed_run(*reference_recipe(tasks, 2, **changes))
    document = recipe_of(tasks, "stopped and held", 2, **changes)
    (messages, checkpoint), *_ = ranks(2)(run_stopping, document, [2])[0]
    assert "after step 4," in messages
    assert checkpoint == "step-00000004"
    assert run_outcome(tasks / "stopped and held") == run_outcome(expected)


def write_recipe_and_arguments(folder: Path, name: str, **changes: Any) -> tuple[list[str], Path]:
    """Write a recipe; the arguments of dscl for a run on two ranks, and the run directory."""
    document = recipe_of(folder, name, 2, **changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return ["train", str(path), "--nproc", "2"], Path(document["run_dir"])


def start_program(folder: Path, name: str, **changes: Any) -> tuple[Program, Path]:
    arguments, run_dir = write_recipe_and_arguments(folder, name, **changes)
    return Program(arguments), run_dir


def read_metric_lines(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def count_checkpoints(run_dir: Path) -> int:
    return len(list(run_dir.glob("checkpoints/step-*/complete.json")))


def is_signal_pending(pid: int, number: int) -> bool:
    """Whether a suspended process has a pending signal of this number."""
    match = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return bool(int(match[1], 16) >> (number - 1) & 1)


def suspend_process(process: Program, pid: int) -> None:
    """Suspend a process and wait until it stands still.

    Linux handles the pending signal with the lower number first, so a signal sent before then could overtake SIGSTOP.
    """
    os.kill(pid, signal.SIGSTOP)
    process.until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")


def read_cpu_ticks(pid: int) -> list[str]:
    """The CPU time that a process has used."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]


def wait_until_idle(process: Program, pid: int) -> None:
    """Wait until a process uses no CPU time."""
    ticks: list[list[str]] = []

    def is_idle() -> bool:
        ticks.append(read_cpu_ticks(pid))
        return len(ticks) > 30 and ticks[-1] == ticks[-30]

    process.until(is_idle)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive), signal.SIGUSR1]
)
def test_a_signal_to_one_rank_stops_all(undisturbed_run: Any, tasks: Path, number: signal.Signals) -> None:
    """Status 75 and one line; the resumed run ends like a run that was never stopped."""
    changes: dict[str, Any] = {"train__epochs": 4, "checkpoint__every": 1000}
    expected = undisturbed_run(*reference_recipe(tasks, 2, **changes))
    name = f"told {number.name}"
    process, run_dir = start_program(tasks, name, **changes)
    steps = random.Random(number).randint(3, 20)
    process.until(lambda: len(read_metric_lines(run_dir)) >= steps)
    os.kill(process.rank(1), number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert [line for line in err.splitlines() if line.startswith("dscl: stopped")] == err.splitlines()[-1:]
    assert "with everything saved; run the same command again to go on" in err or "before which everything" in err
    again, _ = start_program(tasks, name, **changes)
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert run_outcome(run_dir) == run_outcome(expected)


def test_a_signal_before_training_ends_the_run_at_once(tasks: Path) -> None:
    """While the data are prepared and there is no engine yet."""
    process, run_dir = start_program(tasks, "early")
    process.until((run_dir / ".lock").exists)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err == "dscl: SIGTERM: nothing was trained yet; run the same command again to go on\n"
    assert not list(run_dir.glob("checkpoints/step-*"))


@pytest.mark.exhaustive
def test_a_signal_during_imports_ends_the_run_at_once(tasks: Path) -> None:
    """Started ranks, not forked ones: before they handle signals, the signal itself ends them."""
    arguments, run_dir = write_recipe_and_arguments(tasks, "very early")
    process = subprocess.Popen([sys.executable, "-m", "dscl", *arguments], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while len(children.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (75, 1), err
    assert "again" in err
    assert not list(run_dir.glob("checkpoints/step-*"))


def test_a_second_signal_exits_at_once_and_the_checkpoint_is_complete(tasks: Path) -> None:
    """Rank 1 is suspended, so that no rank can finish a step."""
    changes: dict[str, Any] = {"train__epochs": 40, "checkpoint__every": 4}
    process, run_dir = start_program(tasks, "twice", **changes)
    process.until(lambda: count_checkpoints(run_dir) >= 2)
    suspended_pid = process.rank(1)
    suspend_process(process, suspended_pid)
    process.send_signal(signal.SIGTERM)
    process.until(lambda: is_signal_pending(suspended_pid, signal.SIGTERM))  # it has been passed on
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode not in (0, 75)
    count = len(read_metric_lines(run_dir))
    again, _ = start_program(tasks, "twice", **changes)
    again.until(lambda: len(read_metric_lines(run_dir)) > count + 4)
    again.send_signal(signal.SIGTERM)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 75, err
    assert "resumed from step-" in err


def test_a_save_that_exceeds_the_grace_period_is_reported(tasks: Path) -> None:
    changes: dict[str, Any] = {"train__epochs": 40, "checkpoint__every": 4, "checkpoint__grace": 0.5}
    process, run_dir = start_program(tasks, "late", **changes)
    process.until(lambda: count_checkpoints(run_dir) >= 2)
    signalled_pid, suspended_pid = process.rank(0), process.rank(1)
    suspend_process(process, suspended_pid)
    wait_until_idle(process, signalled_pid)  # in a collective
    os.kill(signalled_pid, signal.SIGTERM)
    process.until(lambda: "not saved within" in process.output()[1])
    os.kill(suspended_pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGTERM: not saved within checkpoint.grace=0.5 s; run the same command again" in err


def test_a_run_directory_in_use_is_refused_until_its_process_ends(tasks: Path) -> None:
    process, run_dir = start_program(tasks, "held once", train__epochs=40)
    process.until(lambda: bool(read_metric_lines(run_dir)))
    holder = process.rank(0)
    second, _ = start_program(tasks, "held once", train__epochs=40)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"is in use by process {holder} on {socket.gethostname()}, since 20" in err
    assert len(err.splitlines()) == 1
    process.kill()
    process.wait()
    third, _ = start_program(tasks, "held once", train__epochs=40)
    count = len(read_metric_lines(run_dir))
    third.until(lambda: len(read_metric_lines(run_dir)) > count + 4)
    third.kill()
    third.wait()
