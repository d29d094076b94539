"""Stopping on purpose, on real ranks: status 75, nothing lost, and what follows is bitwise what would have followed."""

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

from dscl.distributed import comm
from dscl.methods.osft import Osft
from dscl.recipe.recipe import resolve
from dscl.training import trainer
from dscl.utils.errors import Stopped
from tests.support.programs import Program
from tests.support.runs import Told, outcome, recipe_of, run, whole, write_tasks


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
            trainer.train(resolve(document), Told(place))
            raise AssertionError(f"place {place} was never come by")
        except Stopped as stopped:
            folder = Path(document["run_dir"]) / "checkpoints"
            said.append((str(stopped), max((path.name for path in folder.glob("step-*")), default="")))
        comm.barrier()
    run(document)
    return said


@pytest.mark.parametrize(
    ("stage", "world"),
    [
        (0, 1),
        pytest.param(1, 2, marks=pytest.mark.exhaustive),
        pytest.param(2, 2, marks=pytest.mark.exhaustive),
        (3, 2),
    ],
)
def test_a_stopped_run_goes_on_from_that_very_step(
    ranks: Any, undisturbed: Any, tasks: Path, world: int, stage: int
) -> None:
    changes: dict[str, Any] = {"checkpoint__every": 100, "evaluate__batch": 4}
    expected = undisturbed(*whole(tasks, stage, world, **changes))
    places = [8, 3, 12, 9] if world == 1 else [8, 3, 9, 5]  # in steps, and in the last evaluation
    results = ranks(world)(run_stopping, recipe_of(tasks, f"stopped{stage}{world}", stage, **changes), places)
    assert results == [results[0]] * world  # at the same place on all
    evaluated = [said for said, _ in results[0] if "in an evaluation" in said]
    stepped = [(said, name) for said, name in results[0] if "after step" in said]
    assert evaluated
    assert stepped
    for said, name in stepped:
        assert name == f"step-{int(said.split()[3].rstrip(',')):08d}"
    assert outcome(tasks / f"stopped{stage}{world}") == outcome(expected)


def test_where_steps_go_unheld_it_stops_at_one_that_is_held(ranks: Any, undisturbed: Any, tasks: Path) -> None:
    """A projection more would change what follows."""
    method = {"name": "osft", "project_every": 4, "share": 0.3}
    assert Osft.Config(project_every=4).project_every == 4
    changes: dict[str, Any] = {"method": method, "evaluate__before": False, "checkpoint__every": 100}
    held = undisturbed(*whole(tasks, 2, **changes))
    document = recipe_of(tasks, "stopped and held", 2, **changes)
    (said, checkpoint), *_ = ranks(2)(run_stopping, document, [2])[0]
    assert "after step 4," in said
    assert checkpoint == "step-00000004"
    assert outcome(tasks / "stopped and held") == outcome(held)


def words(folder: Path, name: str, **changes: Any) -> tuple[list[str], Path]:
    """What a user gives dscl for a run on two ranks; and its folder."""
    document = recipe_of(folder, name, 2, **changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return ["train", str(path), "--nproc", "2"], Path(document["run_dir"])


def started(folder: Path, name: str, **changes: Any) -> tuple[Program, Path]:
    arguments, run_dir = words(folder, name, **changes)
    return Program(arguments), run_dir


def lines(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def saved(run_dir: Path) -> int:
    return len(list(run_dir.glob("checkpoints/step-*/complete.json")))


def pending(pid: int, number: int) -> bool:
    """Whether a signal has been sent to a process that stands still."""
    found = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return bool(int(found[1], 16) >> (number - 1) & 1)


def halted(process: Program, pid: int) -> None:
    """Make a process stand still. Before it does, a signal that is sent later may be handled first: of two that wait,
    Linux takes the one with the lower number."""
    os.kill(pid, signal.SIGSTOP)
    process.until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")


def ticks(pid: int) -> list[str]:
    """The processor time that a process has had."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]


def waits(process: Program, pid: int) -> None:
    """Return when a process does nothing any more."""
    seen: list[list[str]] = []

    def still() -> bool:
        seen.append(ticks(pid))
        return len(seen) > 30 and seen[-1] == seen[-30]

    process.until(still)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive), signal.SIGUSR1]
)
def test_a_signal_to_one_rank_stops_all(undisturbed: Any, tasks: Path, number: signal.Signals) -> None:
    """Status 75, one line; the next start ends as a run that was never stopped."""
    changes: dict[str, Any] = {"train__epochs": 4, "checkpoint__every": 1000}
    expected = undisturbed(*whole(tasks, 2, **changes))
    name = f"told {number.name}"
    process, run_dir = started(tasks, name, **changes)
    steps = random.Random(number).randint(3, 20)
    process.until(lambda: len(lines(run_dir)) >= steps)
    os.kill(process.rank(1), number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert [line for line in err.splitlines() if line.startswith("dscl: stopped")] == err.splitlines()[-1:]
    assert "with everything saved; run the same command again to go on" in err or "before which everything" in err
    again, _ = started(tasks, name, **changes)
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert outcome(run_dir) == outcome(expected)


def test_a_signal_before_training_ends_the_run_there_and_then(tasks: Path) -> None:
    """When the data are prepared, and there is no engine yet."""
    process, run_dir = started(tasks, "early")
    process.until((run_dir / ".lock").exists)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err == "dscl: SIGTERM: nothing was trained yet; run the same command again to go on\n"
    assert not list(run_dir.glob("checkpoints/step-*"))


@pytest.mark.exhaustive
def test_a_signal_while_ranks_import_ends_the_run_there_and_then(tasks: Path) -> None:
    """Ranks that are started, not forked: before they listen, the signal itself ends them."""
    arguments, run_dir = words(tasks, "very early")
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


def test_a_second_signal_leaves_at_once_and_the_checkpoint_before_is_whole(tasks: Path) -> None:
    """Rank 1 stands still, so that nobody can come to a step's end."""
    changes: dict[str, Any] = {"train__epochs": 40, "checkpoint__every": 4}
    process, run_dir = started(tasks, "twice", **changes)
    process.until(lambda: saved(run_dir) >= 2)
    still = process.rank(1)
    halted(process, still)
    process.send_signal(signal.SIGTERM)
    process.until(lambda: pending(still, signal.SIGTERM))  # it has been passed on
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode not in (0, 75)
    count = len(lines(run_dir))
    again, _ = started(tasks, "twice", **changes)
    again.until(lambda: len(lines(run_dir)) > count + 4)
    again.send_signal(signal.SIGTERM)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 75, err
    assert "resumed from step-" in err


def test_what_is_not_saved_in_time_is_said(tasks: Path) -> None:
    changes: dict[str, Any] = {"train__epochs": 40, "checkpoint__every": 4, "checkpoint__grace": 0.5}
    process, run_dir = started(tasks, "late", **changes)
    process.until(lambda: saved(run_dir) >= 2)
    told, still = process.rank(0), process.rank(1)
    halted(process, still)
    waits(process, told)  # in a collective
    os.kill(told, signal.SIGTERM)
    process.until(lambda: "not saved within" in process.output()[1])
    os.kill(still, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGTERM: not saved within checkpoint.grace=0.5 s; run the same command again" in err


def test_a_second_job_is_refused_and_a_dead_one_holds_nothing(tasks: Path) -> None:
    process, run_dir = started(tasks, "held once", train__epochs=40)
    process.until(lambda: bool(lines(run_dir)))
    holder = process.rank(0)
    second, _ = started(tasks, "held once", train__epochs=40)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"is in use by process {holder} on {socket.gethostname()}, since 20" in err
    assert len(err.splitlines()) == 1
    process.kill()
    process.wait()
    third, _ = started(tasks, "held once", train__epochs=40)
    count = len(lines(run_dir))
    third.until(lambda: len(lines(run_dir)) > count + 4)
    third.kill()
    third.wait()
