"""A rank that dies, fails or falls silent: the others name it and its host, and leave in time; nobody hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dscl.errors import UserError
from dscl.pulse import DEAD_AFTER, Line, Pulse
from dscl.spawn import STATUS_TO
from tests.support.runs import recipe_of, write_tasks
from tests.test_spawn import REPOSITORY

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
import torch
from dscl import dist
from dscl.cli import guarded
from dscl.errors import Failure, Stopped, UserError
from dscl.pulse import Pulse
from dscl.spawn import leave
here = Path({here!r})
def mark(name): (here / f"{{name}}.{{dist.rank()}}").write_text(str(os.getpid()))
def work():
{work}
    return 0
with dist.session(), Pulse() as pulse:
    mark("joined")
    status = pulse.end(guarded(lambda: pulse.beside(work)))
mark("left")
sys.exit(leave(status))
"""

Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Ranks as another launcher than ours starts them, each doing `work`; they have joined."""

    def put(world: int, work: str, **environment: str) -> list[subprocess.Popen[str]]:
        body = "\n".join(f"    {line}" for line in work.splitlines())
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.format(repository=str(REPOSITORY), here=str(tmp_path), work=body))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
        processes = [
            subprocess.Popen(
                [sys.executable, str(path)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("joined.*"))) < world:
            assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return processes

    return put


def ended(processes: list[subprocess.Popen[str]], within: float) -> list[tuple[int, str]]:
    """The exit status of each, and what it said."""
    start = time.monotonic()
    results = [process.communicate(timeout=max(1.0, within + start - time.monotonic()))[1] for process in processes]
    return [(process.returncode, said) for process, said in zip(processes, results, strict=True)]


@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("busy", ["dist.barrier()", "time.sleep(600)", "dist.meet()"])
def test_a_killed_rank_is_named_and_the_others_leave(start: Start, dead: int, busy: str) -> None:
    """Whether the others wait for it in a collective (which fails, or not) or are busy with something else."""
    processes = start(3, f"if dist.rank() == {dead}: time.sleep(600)\n{busy}")
    os.kill(processes[dead].pid, signal.SIGKILL)
    results = ended(processes, 20)
    assert [status for status, _ in results] == [-9 if rank == dead else 1 for rank in range(3)]
    said = [text for rank, (_, text) in enumerate(results) if rank != dead and "dscl: " in text]
    assert said  # by one at least; a rank that is not the first on its host may leave the word to that
    for text in said:
        line = text.strip().splitlines()[-1]
        assert f"rank {dead} on {socket.gethostname()} is dead (its process ended without a word)" in line
        assert "Traceback" not in text


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_counts_as_dead_after_the_time_given(start: Start, silent: int) -> None:
    processes = start(3, "time.sleep(600)", DSCL_DEAD_AFTER="4")
    os.kill(processes[silent].pid, signal.SIGSTOP)
    began = time.monotonic()
    others = [process for rank, process in enumerate(processes) if rank != silent]
    results = ended(others, 30)
    assert 2.5 < time.monotonic() - began < 15
    assert [status for status, _ in results] == [1, 1]
    assert f"rank {silent} on {socket.gethostname()} is silent for more than 4 s (see DSCL_DEAD_AFTER)" in results[0][1]
    os.kill(processes[silent].pid, signal.SIGCONT)
    ended(processes[silent : silent + 1], 20)


def test_a_short_standstill_of_all_ranks_is_nobodys_death(start: Start) -> None:
    """A machine that was suspended: when it wakes, everybody was silent."""
    work = "while not (here / 'go').exists(): time.sleep(0.05)"
    processes = start(3, work, DSCL_DEAD_AFTER="2")
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(5)
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    time.sleep(3)
    assert all(process.poll() is None for process in processes)
    Path(processes[0].args[1]).with_name("go").touch()  # type: ignore[index,arg-type]
    assert [status for status, _ in ended(processes, 20)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        ("Failure('the disk is full')", 1, "dscl: the disk is full"),
        ("UserError('no such file')", 2, "dscl: no such file"),
        ("ZeroDivisionError('a mistake')", 1, "ZeroDivisionError: a mistake"),
        ("Stopped('told to', together=False)", 75, "dscl: told to"),
    ],
)
def test_a_failing_rank_tells_why_and_the_others_do_not_wait(start: Start, error: str, status: int, told: str) -> None:
    processes = start(2, f"if dist.rank() == 0: raise {error}\ntime.sleep(600)")
    results = ended(processes, 40)
    assert [found for found, _ in results] == [status, status]  # what is wrong for one is wrong for all
    assert told in results[0][1]
    assert "rank 0 on " in results[1][1] or not results[1][1]


@pytest.mark.parametrize(
    ("error", "status"), [("UserError('no such file')", 2), ("Stopped('told to', together=False)", 75)]
)
@pytest.mark.parametrize("later", [0.0, 0.5])
def test_what_no_restart_mends_is_left_for_the_launch_script(
    start: Start, tmp_path: Path, error: str, status: int, later: float
) -> None:
    """The ranks end with 0, or a launcher would start them again; one of them tells."""
    (tmp_path / "status").touch()
    processes = start(3, f"time.sleep({later} * dist.rank()); raise {error}", DSCL_STATUS_TO=str(tmp_path / "status"))
    results = ended(processes, 40)
    assert [found for found, _ in results] == [0, 0, 0]
    assert (tmp_path / "status").read_text() == str(status)
    assert [bool(said) for _, said in results] == [True, False, False]


def test_before_the_ranks_have_joined_a_wrong_input_ends_them_all(tmp_path: Path) -> None:
    """Status 0 would let the others wait for this one."""
    words = [sys.executable, "-m", "dscl", "train", "no-such-recipe.yaml", "--nproc"]
    done = subprocess.run(
        words,
        env={**os.environ, "RANK": "0", DEAD_AFTER: "60", STATUS_TO: str(tmp_path / "status")},
        capture_output=True,
    )
    assert done.returncode == 2
    assert (tmp_path / "status").read_text() == "2"


def test_a_rank_that_wakes_after_it_was_given_up_leaves_too(start: Start) -> None:
    """Alone on its host, as it believes: it hears that it is silent itself."""
    work = "pulse._hosts = [f'host{r}' for r in range(3)]\ntime.sleep(600)"
    processes = start(3, work, DSCL_DEAD_AFTER="2")
    time.sleep(1)
    os.kill(processes[1].pid, signal.SIGSTOP)
    assert [status for status, _ in ended([processes[0], processes[2]], 30)] == [1, 1]
    os.kill(processes[1].pid, signal.SIGCONT)
    assert [status for status, _ in ended([processes[1]], 20)] == [1]


def test_who_is_done_waits_for_nobody_and_is_no_death(start: Start) -> None:
    work = "if dist.rank() != 1: return 0\nfor _ in range(60): time.sleep(0.05)"
    processes = start(3, work)
    assert [status for status, _ in ended(processes, 20)] == [0, 0, 0]


def test_stopping_together_is_no_failure(start: Start) -> None:
    processes = start(3, "time.sleep(dist.rank()); raise Stopped('all saved')")
    assert [status for status, _ in ended(processes, 30)] == [75, 75, 75]


IMPATIENT = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, {repository!r})
import torch.distributed as td
from dscl import dist, doctor, job, train
from dscl.recipe import read_recipe
td.init_process_group("gloo", timeout=timedelta(seconds=5))
dist._patient()

class Met(BaseException):
    pass

class Met(BaseException):
    pass

def slowly(*a, encode=job.encode, **k):
    if waiting and dist.rank() == 0:
        time.sleep(waiting.pop())
    return encode(*a, **k)

def met(*a):
    dist.barrier()
    raise Met

run = Path({run!r})
job.encode, job.Job.engine = slowly, met
{change}
for work in (
    lambda: train.train(read_recipe(run / "recipe.yaml", [])),
    lambda: train.rehearse(read_recipe(run / "recipe.yaml", [])),
    lambda: train.evaluate(str(run), []),
    lambda: train.diagnose(read_recipe(run / "recipe.yaml", [])),
):
    waiting = [7.0]
    try:
        work()
    except Met:
        print("met", file=sys.stderr)
os._exit(75)
"""


@pytest.mark.parametrize(
    ("change", "met", "status"),
    [
        ("doctor.examine = met", 4, 75),
        ("train.dist.meet = lambda: None", 0, 1),  # there is a time limit
    ],
)
def test_who_prepares_its_data_for_long_runs_into_no_time_limit(
    tmp_path: Path, change: str, met: int, status: int
) -> None:
    """Training, rehearsing, evaluating, and the doctor."""
    write_tasks(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(tmp_path, "run")))
    program = IMPATIENT.format(repository=str(REPOSITORY), run=str(tmp_path / "run"), change=change)
    (tmp_path / "program.py").write_text(program)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {
            **os.environ,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
        }
    words = [sys.executable, str(tmp_path / "program.py")]
    processes = [
        subprocess.Popen(
            words, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    found, said = ended(processes, 200)[1]  # the one that is kept waiting
    assert (found, said.splitlines().count("met")) == (status, met), said


def test_a_stranger_who_knocks_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not know the job's key gets no line; the rank that does, after it, gets one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    pulse = Pulse()
    published: list[tuple[int, bytes]] = []
    ends: list[socket.socket] = []

    def publish(value: tuple[int, bytes]) -> tuple[int, bytes]:
        published.append(value)
        for said in (b"GET / HTTP/1.1\r\n\r\n....", b"x" * 16 + b"\0\0\0\1", value[1] + b"\0\0\0\1"):
            ends.append(socket.create_connection(("127.0.0.1", value[0])))
            ends[-1].sendall(said)
        return value

    monkeypatch.setattr("dscl.dist.from_main", publish)
    pulse._connect()
    assert list(pulse._lines) == [1]
    assert pulse._lines[1].end.getpeername()[1] == ends[2].getsockname()[1]
    for end in (*ends, pulse._lines[1].end):
        end.close()


def test_words_that_come_in_pieces_are_put_together() -> None:
    ours, theirs = socket.socketpair()
    line = Line(ours, 7)
    theirs.sendall(b"a\0\0\0")
    assert line.listen() == []
    theirs.sendall(b"\0d\0\0\1\2")
    assert line.listen() == [(b"a", 0), (b"d", 258)]
    theirs.close()
    assert line.listen() == [(b"d", 7)]
    ours.close()


@pytest.mark.parametrize("given", ["soon", "0", "-3", "inf", "nan"])
def test_a_wrong_time_is_told(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEAD_AFTER, given)
    with pytest.raises(UserError, match=f"DSCL_DEAD_AFTER: given '{given}' in the environment; allowed: seconds"):
        Pulse()
