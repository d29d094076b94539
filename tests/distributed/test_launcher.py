"""Ranks that are started together and end together: with small programs in the place of dscl."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dscl.distributed import launcher as spawning
from dscl.distributed.launcher import CHANNEL, PARENT, how_many, spawn, spawned, tell
from dscl.utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
HEADER = """
import os, signal, sys, time
from pathlib import Path
from dscl.distributed.launcher import die_with_parent, tell
die_with_parent()
rank, here = int(os.environ["RANK"]), Path(__file__).parent
def mark(name): (here / f"{name}.{rank}").write_text(str(os.getpid()))
def await_mark(name):
    while not (here / name).exists(): time.sleep(0.01)
"""

Run = Callable[..., int]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """program(source): what the ranks run instead of dscl."""

    def put(source: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(HEADER + source)
        monkeypatch.setattr(spawning, "PROGRAM", (str(path),))
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        return path

    return put


def children() -> set[str]:
    """Processes that this one has started and not yet waited for."""
    tasks = Path("/proc/self/task").iterdir()
    return {child for task in tasks for child in (task / "children").read_text().split()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def pids(folder: Path, name: str, count: int) -> list[int]:
    files = [folder / f"{name}.{rank}" for rank in range(count)]
    assert until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def test_every_rank_knows_its_place(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    program(f"(here / f'out.{{rank}}').write_text(' '.join([*(os.environ[n] for n in {names}), *sys.argv[1:]]))")
    before = children()
    assert spawn(2, ["a=b", "c d"]) == 0
    first, second = ((tmp_path / f"out.{rank}").read_text().split(" ") for rank in range(2))
    assert (first[:5], second[:5]) == (["0", "0", "2", "2", "127.0.0.1"], ["1", "1", "2", "2", "127.0.0.1"])
    assert first[5:] == second[5:]
    assert first[6] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert first[7:] == ["a=b", "c", "d"]
    assert children() <= before


@pytest.mark.parametrize("culprit", [0, 1])
def test_first_failure_in_time_is_the_status_and_is_told_once(
    program: Callable[[str], Path], capfd: pytest.CaptureFixture[str], culprit: int
) -> None:
    program(
        f"""
if rank == {culprit}:
    tell(2, "dscl: the mistake")
    mark("told")
    time.sleep(0.5)  # it leaves slowly, after the one that fails because of it
    sys.exit(2)
await_mark("told.{culprit}")
tell(1, "Traceback: connection closed by peer")
sys.exit(1)
"""
    )
    assert spawn(2, []) == 2
    assert capfd.readouterr().err == "dscl: the mistake\n"


def test_same_mistake_on_all_ranks_is_told_once(
    program: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    program("tell(2, 'dscl: wrong'); sys.exit(2)")
    assert spawn(4, []) == 2
    assert capfd.readouterr().err == "dscl: wrong\n"


def test_long_tracebacks_arrive(program: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    program("tell(1, 'é' * 10**6 + ' the end'); sys.exit(1)")
    assert spawn(2, []) == 1
    assert capfd.readouterr().err.endswith("éé the end\n")


@pytest.mark.parametrize("status", [1, 2, 75])
def test_silent_status_of_one_rank_is_the_status_of_all(program: Callable[[str], Path], status: int) -> None:
    program(f"sys.exit({status} if rank == 1 else 0)")
    assert spawn(2, []) == status


def test_ranks_that_hang_are_ended_after_the_grace(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spawning, "GRACE", 0.5)
    program("mark('up')\nif rank == 0: time.sleep(60)\nawait_mark('up.0')\ntell(2, 'dscl: wrong'); sys.exit(2)")
    start, before = time.monotonic(), children()
    assert spawn(2, []) == 2
    assert 0.5 < time.monotonic() - start < 8
    assert not any(map(alive, pids(tmp_path, "up", 2)))
    assert children() <= before
    assert capfd.readouterr().err == "dscl: wrong\n"


def test_ranks_may_end_by_themselves_within_the_grace(program: Callable[[str], Path], tmp_path: Path) -> None:
    program("if rank == 1: sys.exit(75)\ntime.sleep(0.5); mark('saved')")
    assert spawn(2, []) == 75
    assert (tmp_path / "saved.0").exists()


def test_rank_ended_by_a_signal_is_named(program: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    program(
        """
if rank == 1:
    mark("up")
    os.kill(os.getpid(), signal.SIGKILL)
await_mark("up.1")
while not (pid := (here / "up.1").read_text()) or Path(f"/proc/{pid}").exists(): time.sleep(0.01)
time.sleep(0.4)
tell(1, "it follows")
sys.exit(3)
"""
    )
    assert spawn(2, []) == 1
    assert (
        capfd.readouterr().err == "dscl: rank 1 was ended by signal 9 (Killed); run the same command again to resume\n"
    )


@pytest.fixture
def spawner(program: Callable[[str], Path]) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """spawner(source): a process of its own that spawns two ranks of the program."""
    code = (
        "import sys; from dscl import spawn as s; s.PROGRAM = (sys.argv[1],); s.GRACE = 5.0; sys.exit(s.spawn(2, []))"
    )
    started: list[subprocess.Popen[str]] = []

    def start(source: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(program(source))],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


Spawner = Callable[[str], subprocess.Popen[str]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent died")
def test_ranks_die_with_the_spawner(spawner: Spawner, tmp_path: Path) -> None:
    process = spawner("mark('up'); time.sleep(60)")
    ranks = pids(tmp_path, "up", 2)
    assert all(map(alive, ranks))
    process.kill()
    process.communicate()
    assert until(lambda: not any(map(alive, ranks)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_forwarded_once(spawner: Spawner, tmp_path: Path, number: signal.Signals) -> None:
    process = spawner(
        f"""
got = []
signal.signal({int(number)}, lambda *_: got.append(1))
mark("up")
while not got: time.sleep(0.01)
time.sleep(0.3)
sys.exit(75 if len(got) == 1 else 9)
"""
    )
    pids(tmp_path, "up", 2)
    os.killpg(process.pid, number)  # as a terminal sends it: to all that are in the spawner's process group
    assert process.wait(10) == 75
    process.communicate()


def test_second_interrupt_ends_ranks_that_do_not_listen(spawner: Spawner, tmp_path: Path) -> None:
    process = spawner("signal.signal(signal.SIGINT, lambda *_: mark('heard')); mark('up')\nwhile True: time.sleep(60)")
    ranks = pids(tmp_path, "up", 2)
    process.send_signal(signal.SIGINT)
    pids(tmp_path, "heard", 2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 1
    process.communicate()
    assert not any(map(alive, ranks))


def test_handlers_are_given_back(program: Callable[[str], Path]) -> None:
    before = [signal.getsignal(number) for number in spawning.FORWARDED]
    program("")
    assert spawn(2, []) == 0
    assert [signal.getsignal(number) for number in spawning.FORWARDED] == before


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5", "", "²", "9" * 5000, "auto2"])
def test_counts_that_are_refused(asked: str) -> None:
    with pytest.raises(UserError, match=r"^--nproc: given '.*'; allowed: a whole number of at least 1, or auto$"):
        how_many(asked)


def test_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = 0
    monkeypatch.setattr(spawning, "gpus", lambda: gpus)
    assert (how_many("1"), how_many("007"), how_many("auto")) == (1, 7, 1)
    with pytest.raises(UserError, match=r"^--nproc: given 9999; this machine has \d+ cores, so at most \d+$"):
        how_many("9999")
    gpus = 4
    assert (how_many("auto"), how_many("4")) == (4, 4)
    with pytest.raises(UserError, match="given 5; this machine has 4 GPUs, so at most 4 \\(or DS_ACCELERATOR=cpu\\)"):
        how_many("5")


def test_no_gpus_where_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert how_many("auto") == 1


def test_another_launchers_ranks_speak_in_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(CHANNEL, raising=False)
    monkeypatch.delenv(PARENT, raising=False)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    tell(2, "dscl: wrong")
    assert (waited, capsys.readouterr().err) == ([], "dscl: wrong\n")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    tell(2, "dscl: wrong")
    assert (waited, capsys.readouterr().err) == ([spawning.PATIENCE], "rank 9: dscl: wrong\n")
    assert not spawned()
