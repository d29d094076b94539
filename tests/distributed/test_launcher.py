"""The local launcher: ranks start together and end together. Small programs stand in for dscl."""

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
from dscl.distributed.launcher import (
    PARENT_PID_VARIABLE,
    REPORT_SOCKET_VARIABLE,
    is_spawned_rank,
    parse_nproc,
    report_exit,
    spawn_ranks,
)
from dscl.utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
HEADER = """
import os, signal, sys, time
from pathlib import Path
from dscl.distributed.launcher import die_with_parent, report_exit
die_with_parent()
rank, here = int(os.environ["RANK"]), Path(__file__).parent
def mark(name): (here / f"{name}.{rank}").write_text(str(os.getpid()))
def await_mark(name):
    while not (here / name).exists(): time.sleep(0.01)
"""

Run = Callable[..., int]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """program(source): write the program that the ranks run instead of dscl."""

    def write_program(source: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(HEADER + source)
        monkeypatch.setattr(spawning, "PROGRAM", (str(path),))
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        return path

    return write_program


def list_child_pids() -> set[str]:
    """The process ids of the children of this process that are not reaped yet."""
    tasks = Path("/proc/self/task").iterdir()
    return {child for task in tasks for child in (task / "children").read_text().split()}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def read_pids(folder: Path, name: str, count: int) -> list[int]:
    files = [folder / f"{name}.{rank}" for rank in range(count)]
    assert wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def test_every_rank_gets_its_environment(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    program(f"(here / f'out.{{rank}}').write_text(' '.join([*(os.environ[n] for n in {names}), *sys.argv[1:]]))")
    before = list_child_pids()
    assert spawn_ranks(2, ["a=b", "c d"]) == 0
    first, second = ((tmp_path / f"out.{rank}").read_text().split(" ") for rank in range(2))
    assert (first[:5], second[:5]) == (["0", "0", "2", "2", "127.0.0.1"], ["1", "1", "2", "2", "127.0.0.1"])
    assert first[5:] == second[5:]
    assert first[6] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert first[7:] == ["a=b", "c", "d"]
    assert list_child_pids() <= before


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_first_failure_is_the_status_and_is_printed_once(
    program: Callable[[str], Path], capfd: pytest.CaptureFixture[str], culprit: int
) -> None:
    program(
        f"""
if rank == {culprit}:
    report_exit(2, "dscl: the mistake")
    mark("told")
    time.sleep(0.5)  # exits after the rank that fails because of it
    sys.exit(2)
await_mark("told.{culprit}")
report_exit(1, "Traceback: connection closed by peer")
sys.exit(1)
"""
    )
    assert spawn_ranks(2, []) == 2
    assert capfd.readouterr().err == "dscl: the mistake\n"


def test_the_same_error_on_all_ranks_is_printed_once(
    program: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    program("report_exit(2, 'dscl: wrong'); sys.exit(2)")
    assert spawn_ranks(4, []) == 2
    assert capfd.readouterr().err == "dscl: wrong\n"


def test_the_end_of_a_long_traceback_is_printed(
    program: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    program("report_exit(1, 'é' * 10**6 + ' the end'); sys.exit(1)")
    assert spawn_ranks(2, []) == 1
    assert capfd.readouterr().err.endswith("éé the end\n")


@pytest.mark.parametrize("status", [1, 2, 75])
def test_a_status_without_a_report_is_the_status_of_the_run(program: Callable[[str], Path], status: int) -> None:
    program(f"sys.exit({status} if rank == 1 else 0)")
    assert spawn_ranks(2, []) == status


def test_ranks_that_hang_are_killed_after_the_grace_period(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spawning, "EXIT_GRACE_SECONDS", 0.5)
    program("mark('up')\nif rank == 0: time.sleep(60)\nawait_mark('up.0')\nreport_exit(2, 'dscl: wrong'); sys.exit(2)")
    start_spawner, before = time.monotonic(), list_child_pids()
    assert spawn_ranks(2, []) == 2
    assert 0.5 < time.monotonic() - start_spawner < 8
    assert not any(map(is_alive, read_pids(tmp_path, "up", 2)))
    assert list_child_pids() <= before
    assert capfd.readouterr().err == "dscl: wrong\n"


def test_ranks_may_exit_by_themselves_within_the_grace_period(program: Callable[[str], Path], tmp_path: Path) -> None:
    program("if rank == 1: sys.exit(75)\ntime.sleep(0.5); mark('saved')")
    assert spawn_ranks(2, []) == 75
    assert (tmp_path / "saved.0").exists()


def test_a_rank_killed_by_a_signal_is_named(program: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    program(
        """
if rank == 1:
    mark("up")
    os.kill(os.getpid(), signal.SIGKILL)
await_mark("up.1")
while not (pid := (here / "up.1").read_text()) or Path(f"/proc/{pid}").exists(): time.sleep(0.01)
time.sleep(0.4)
report_exit(1, "it follows")
sys.exit(3)
"""
    )
    assert spawn_ranks(2, []) == 1
    assert (
        capfd.readouterr().err == "dscl: rank 1 was ended by signal 9 (Killed); run the same command again to resume\n"
    )


@pytest.fixture
def spawner(program: Callable[[str], Path]) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """spawner(source): start a process that spawns two ranks of the program."""
    code = (
        "import sys; from dscl.distributed import launcher; launcher.PROGRAM = (sys.argv[1],); "
        "launcher.EXIT_GRACE_SECONDS = 5.0; sys.exit(launcher.spawn_ranks(2, []))"
    )
    started: list[subprocess.Popen[str]] = []

    def start_spawner(source: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(program(source))],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_spawner
    for process in started:
        process.kill()
        process.wait()


Spawner = Callable[[str], subprocess.Popen[str]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent died")
def test_ranks_die_with_the_spawner(spawner: Spawner, tmp_path: Path) -> None:
    process = spawner("mark('up'); time.sleep(60)")
    ranks = read_pids(tmp_path, "up", 2)
    assert all(map(is_alive, ranks))
    process.kill()
    process.communicate()
    assert wait_until(lambda: not any(map(is_alive, ranks)))


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
    read_pids(tmp_path, "up", 2)
    os.killpg(process.pid, number)  # a terminal sends a signal to the whole process group of the spawner
    assert process.wait(10) == 75
    process.communicate()


def test_a_second_interrupt_kills_ranks_that_ignore_the_first(spawner: Spawner, tmp_path: Path) -> None:
    process = spawner("signal.signal(signal.SIGINT, lambda *_: mark('heard')); mark('up')\nwhile True: time.sleep(60)")
    ranks = read_pids(tmp_path, "up", 2)
    process.send_signal(signal.SIGINT)
    read_pids(tmp_path, "heard", 2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 1
    process.communicate()
    assert not any(map(is_alive, ranks))


def test_signal_handlers_are_restored(program: Callable[[str], Path]) -> None:
    before = [signal.getsignal(number) for number in spawning.FORWARDED_SIGNALS]
    program("")
    assert spawn_ranks(2, []) == 0
    assert [signal.getsignal(number) for number in spawning.FORWARDED_SIGNALS] == before


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "", "²", "9" * 5000, "auto2"])
def test_invalid_nproc_values_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"^--nproc: given '.*'; allowed: a whole number of at least 1, or auto$"):
        parse_nproc(value)


def test_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = 0
    monkeypatch.setattr(spawning, "count_gpus", lambda: gpus)
    assert (parse_nproc("1"), parse_nproc("007"), parse_nproc("auto")) == (1, 7, 1)
    with pytest.raises(UserError, match=r"^--nproc: given 9999; this machine has \d+ cores, so at most \d+$"):
        parse_nproc("9999")
    gpus = 4
    assert (parse_nproc("auto"), parse_nproc("4")) == (4, 4)
    with pytest.raises(UserError, match="given 5; this machine has 4 GPUs, so at most 4 \\(or DS_ACCELERATOR=cpu\\)"):
        parse_nproc("5")


def test_no_gpus_are_counted_with_the_cpu_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert parse_nproc("auto") == 1


def test_local_rank_0_reports_first_under_another_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(REPORT_SOCKET_VARIABLE, raising=False)
    monkeypatch.delenv(PARENT_PID_VARIABLE, raising=False)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    report_exit(2, "dscl: wrong")
    assert (waited, capsys.readouterr().err) == ([], "dscl: wrong\n")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    report_exit(2, "dscl: wrong")
    assert (waited, capsys.readouterr().err) == ([spawning.REPORT_DELAY_SECONDS], "rank 9: dscl: wrong\n")
    assert not is_spawned_rank()
