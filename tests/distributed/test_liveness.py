"""A rank that dies, fails or falls silent: the other ranks name it and its host and exit in time; none hangs.

The heartbeats are tested with a simulated clock. That processes exit, and what they print, is tested with real ranks.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dscl.distributed.launcher import STATUS_FILE_VARIABLE
from dscl.distributed.liveness import (
    ALIVE,
    DEAD,
    FAILED,
    INVALID_INPUT,
    LEFT,
    MESSAGES_PER_TIMEOUT,
    SILENT,
    STOPPED,
    TIMEOUT_VARIABLE,
    Heartbeat,
    Liveness,
    PeerConnection,
    PeerConnections,
)
from dscl.utils.errors import UserError
from tests.support.hosts import REPOSITORY
from tests.support.programs import Program, redirect_streams, reset_process_state

SECONDS = 60.0  # of silence after which a rank counts as dead
STEP = 0.25  # seconds of the simulated clock between two polls


class NonBlockingConnections(PeerConnections):
    """Connections that are polled without waiting."""

    def wait_until_readable(self, seconds: float) -> list[PeerConnection]:
        return super().wait_until_readable(0.0)


class SimulatedRanks:
    """The heartbeats of three ranks; their time passes only in `advance_clock`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.peers = [NonBlockingConnections() for _ in range(3)]
        for rank in (1, 2):
            for (mine, other), end in zip(((0, rank), (rank, 0)), socket.socketpair(), strict=True):
                self.peers[mine].add(PeerConnection(end, other))
        self.beats = [Heartbeat(peers, SECONDS, self.clock(rank)) for rank, peers in enumerate(self.peers)]
        self.lost: dict[
            int, tuple[bytes, int]
        ] = {}  # by rank: the loss that it noticed, as the message and the lost rank
        self.gone: set[int] = set()

    def clock(self, rank: int) -> Callable[[], float]:
        """The clock of a rank; clocks of different hosts have different offsets."""
        return lambda: self.now + 1000.0 * rank

    def advance_clock(self, seconds: float, still: Sequence[int] = ()) -> None:
        """Let so much time pass. The ranks in `still` are suspended; ranks that noticed a loss have exited."""
        for _ in range(round(seconds / STEP)):
            self.now += STEP
            for rank, heart in enumerate(self.beats):
                if rank not in {*still, *self.gone, *self.lost} and (lost := heart.poll()):
                    self.lost[rank] = lost

    def close(self, rank: int) -> None:
        """End the process of a rank."""
        self.gone.add(rank)
        self.peers[rank].close()


@pytest.fixture
def ranks_with_clock() -> Iterator[SimulatedRanks]:
    ranks = SimulatedRanks()
    yield ranks
    for rank in {0, 1, 2} - ranks.gone:
        ranks.close(rank)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_counts_as_dead_after_the_timeout(ranks_with_clock: SimulatedRanks, silent: int) -> None:
    ranks_with_clock.advance_clock(10 * SECONDS)
    assert not ranks_with_clock.lost
    others = [rank for rank in range(3) if rank != silent]
    ranks_with_clock.advance_clock(
        SECONDS - SECONDS / MESSAGES_PER_TIMEOUT - 2 * STEP, still=[silent]
    )  # its last heartbeat may be up to an interval old
    assert not ranks_with_clock.lost
    ranks_with_clock.advance_clock(SECONDS / MESSAGES_PER_TIMEOUT + 4 * STEP, still=[silent])
    assert ranks_with_clock.lost == dict.fromkeys(others, (SILENT, silent))


@pytest.mark.parametrize("still", [[0, 1, 2], [0, 1], [0]])
@pytest.mark.parametrize("seconds", [SECONDS / MESSAGES_PER_TIMEOUT + 1, 0.7 * SECONDS, 1000 * SECONDS])
def test_only_suspended_ranks_count_as_dead_after_a_suspension(
    ranks_with_clock: SimulatedRanks, still: list[int], seconds: float
) -> None:
    """After a machine was suspended, all ranks seem silent at first."""
    ranks_with_clock.advance_clock(SECONDS)
    ranks_with_clock.now += seconds if len(still) == 3 else 0.0
    ranks_with_clock.advance_clock(0.0 if len(still) == 3 else min(seconds, 3 * SECONDS), still)
    ranks_with_clock.advance_clock(3 * SECONDS)
    dead = len(still) < 3 and seconds > SECONDS
    assert sorted(ranks_with_clock.lost) == ([0, 1, 2] if dead else [])
    assert all(how == SILENT and rank in still for how, rank in ranks_with_clock.lost.values())


def test_a_rank_that_resumes_after_its_timeout_learns_of_it(ranks_with_clock: SimulatedRanks) -> None:
    ranks_with_clock.advance_clock(2 * SECONDS, still=[1])
    assert ranks_with_clock.lost == {0: (SILENT, 1), 2: (SILENT, 1)}
    ranks_with_clock.advance_clock(STEP)
    assert ranks_with_clock.lost[1] == (SILENT, 1)


@pytest.mark.parametrize("dead", [0, 2])
def test_a_closed_connection_counts_as_a_death(ranks_with_clock: SimulatedRanks, dead: int) -> None:
    ranks_with_clock.advance_clock(SECONDS)
    ranks_with_clock.close(dead)
    ranks_with_clock.advance_clock(2 * STEP)
    assert ranks_with_clock.lost == {rank: (DEAD, dead) for rank in range(3) if rank != dead}


@pytest.mark.parametrize("what", [FAILED, INVALID_INPUT, STOPPED])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_exit_message_of_a_rank_reaches_all_others(
    ranks_with_clock: SimulatedRanks, what: bytes, rank: int
) -> None:
    ranks_with_clock.advance_clock(SECONDS)
    ranks_with_clock.peers[rank].send_to_all(what, rank)
    ranks_with_clock.close(rank)
    ranks_with_clock.advance_clock(2 * STEP)
    assert ranks_with_clock.lost == {other: (what, rank) for other in range(3) if other != rank}


@pytest.mark.parametrize("done", [0, 2])
def test_a_finished_rank_does_not_count_as_dead(ranks_with_clock: SimulatedRanks, done: int) -> None:
    """The remaining ranks are still watched."""
    ranks_with_clock.advance_clock(SECONDS)
    ranks_with_clock.peers[done].send_to_all(LEFT, done)
    ranks_with_clock.close(done)
    ranks_with_clock.advance_clock(10 * SECONDS)
    assert not ranks_with_clock.lost
    ranks_with_clock.advance_clock(2 * SECONDS, still=[1])
    assert ranks_with_clock.lost == ({0: (SILENT, 1)} if done == 2 else {})  # only the main one hears all


def test_heartbeats_are_sent_at_the_interval() -> None:
    now = 0.0
    peers = NonBlockingConnections()
    ours, theirs = socket.socketpair()
    peers.add(PeerConnection(ours, 1))
    heart = Heartbeat(peers, SECONDS, lambda: now)
    while now < 10 * SECONDS:
        now += STEP
        PeerConnection(theirs, 0).send(ALIVE)
        assert heart.poll() is None
    signs = PeerConnection(theirs, 0).receive_messages()
    assert set(signs) == {(ALIVE, 0)}
    assert 9 * MESSAGES_PER_TIMEOUT <= len(signs) <= 10 * MESSAGES_PER_TIMEOUT + 1
    peers.close()
    theirs.close()


PROGRAM = """
import os, sys, time
from pathlib import Path
from dscl.distributed import comm, launcher, liveness
from dscl.cli.app import run_with_error_report
from dscl.utils.errors import ExternalFailure, RunStopped, UserError
from dscl.distributed.liveness import Liveness
from dscl.distributed.launcher import resolve_exit_status
here = Path({here!r})
{changes}
def mark(name): (here / f"{{name}}.{{comm.rank()}}").write_text(str(os.getpid()))
def await_mark(name):
    while not (here / name).exists(): time.sleep(0.01)
def work():
{work}
    return 0
with comm.process_group(), Liveness() as watch:
    mark("joined")
    status = watch.set_exit_status(run_with_error_report(lambda: watch.run_watched(work)))
mark("left")
sys.exit(resolve_exit_status(status))
"""
# Shorter waits for the other ranks: to exit after a failure or a death, and to report first.
HURRY = "liveness.EXIT_GRACE_SECONDS = 0.5; liveness.DEATH_GRACE_SECONDS = 1.0; launcher.REPORT_DELAY_SECONDS = 0.5"


class Rank(Program):
    """A forked process that runs this source."""

    def __init__(self, source: str, **environment: str) -> None:
        super().__init__([source], **environment)

    def _target(self) -> Callable[..., None]:
        return _rank


def _rank(arguments: list[str], cwd: str, session: bool, environment: dict[str, str], files: list[str]) -> None:
    redirect_streams(cwd, files)
    reset_process_state(["rank"], environment, session)
    exec(compile(arguments[0], "rank", "exec"), {"__name__": "__main__"})


Start = Callable[..., list[Rank]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(count, work): start ranks, as another launcher would, that run `work`; return when they are connected."""
    started: list[Rank] = []

    def start_ranks(world: int, work: str, changes: str = "", **environment: str) -> list[Rank]:
        body = "\n".join(f"    {line}" for line in work.splitlines())
        source = PROGRAM.format(here=str(tmp_path), work=body, changes=changes)
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **environment}
        ranks = [Rank(source, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]
        started.extend(ranks)
        for number, rank in enumerate(ranks):
            rank.until((tmp_path / f"joined.{number}").exists)
        return ranks

    yield start_ranks
    for rank in started:
        rank.kill()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait_for_exits(ranks: Sequence[Rank], within: float) -> list[tuple[int, str]]:
    """Wait for the ranks; the exit status and the stderr output of each."""
    deadline = time.monotonic() + within
    return [(rank.wait(max(0.1, deadline - time.monotonic())), rank.output()[1]) for rank in ranks]


def kill_case(dead: int, busy: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(dead, busy, marks=marks, id=f"{busy}-{dead}")


@pytest.mark.parametrize(
    ("dead", "busy"),
    [
        kill_case(0, "comm.barrier()"),
        kill_case(2, "time.sleep(600)"),
        kill_case(2, "comm.wait_for_all_ranks()"),
        kill_case(2, "comm.barrier()", pytest.mark.exhaustive),
        kill_case(0, "time.sleep(600)", pytest.mark.exhaustive),
        kill_case(0, "comm.wait_for_all_ranks()", pytest.mark.exhaustive),
    ],
)
def test_a_killed_rank_is_named_and_the_others_exit(start: Start, dead: int, busy: str) -> None:
    """The others wait in a collective (which may fail or hang) or are busy with something else."""
    ranks = start(3, f"if comm.rank() == {dead}: time.sleep(600)\n{busy}", "liveness.DEATH_GRACE_SECONDS = 1.5")
    ranks[dead].kill()
    results = wait_for_exits(ranks, 20)
    assert [status for status, _ in results] == [-9 if rank == dead else 1 for rank in range(3)]
    messages = [text for rank, (_, text) in enumerate(results) if rank != dead and "dscl: " in text]
    assert messages  # by one at least; a rank that is not the first on its host may leave the word to that
    for text in messages:
        line = text.strip().splitlines()[-1]
        assert f"rank {dead} on {socket.gethostname()} is dead (its process ended without a word)" in line
        assert "Traceback" not in text


@pytest.mark.exhaustive
@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_process_counts_as_dead_after_the_timeout(start: Start, silent: int) -> None:
    ranks = start(3, "time.sleep(600)", DSCL_DEAD_AFTER="4")
    ranks[silent].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    others = [process for rank, process in enumerate(ranks) if rank != silent]
    results = wait_for_exits(others, 30)
    assert 2.5 < time.monotonic() - began < 15
    assert [status for status, _ in results] == [1, 1]
    assert f"rank {silent} on {socket.gethostname()} is silent for more than 4 s (see DSCL_DEAD_AFTER)" in results[0][1]
    ranks[silent].send_signal(signal.SIGCONT)
    wait_for_exits(ranks[silent : silent + 1], 20)


@pytest.mark.exhaustive
def test_a_short_suspension_of_all_processes_kills_none(start: Start, tmp_path: Path) -> None:
    ranks = start(3, "await_mark('go')", DSCL_DEAD_AFTER="2")
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    time.sleep(5)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    time.sleep(3)
    assert all(rank.poll() is None for rank in ranks)
    (tmp_path / "go").touch()
    assert [status for status, _ in wait_for_exits(ranks, 20)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("error", "status", "expected_message"),
    [
        ("ExternalFailure('the disk is full')", 1, "dscl: the disk is full"),
        ("UserError('no such file')", 2, "dscl: no such file"),
        ("ZeroDivisionError('a mistake')", 1, "ZeroDivisionError: a mistake"),
        ("RunStopped('told to', all_ranks_agreed=False)", 75, "dscl: told to"),
    ],
)
def test_a_failing_rank_reports_why_and_the_others_exit(
    start: Start, error: str, status: int, expected_message: str
) -> None:
    ranks = start(2, f"if comm.rank() == 0: raise {error}\ntime.sleep(600)", HURRY)
    results = wait_for_exits(ranks, 40)
    assert [exit_status for exit_status, _ in results] == [status, status]  # what is wrong for one is wrong for all
    assert expected_message in results[0][1]
    assert "rank 0 on " in results[1][1] or not results[1][1]


@pytest.mark.parametrize(
    ("error", "status"), [("UserError('no such file')", 2), ("RunStopped('told to', all_ranks_agreed=False)", 75)]
)
@pytest.mark.parametrize("later", [0.0, 0.2])
def test_permanent_failures_go_into_the_status_file(
    start: Start, tmp_path: Path, error: str, status: int, later: float
) -> None:
    """The ranks end with 0, or a launcher would start them again; one of them tells."""
    (tmp_path / "status").touch()
    ranks = start(3, f"time.sleep({later} * comm.rank()); raise {error}", DSCL_STATUS_TO=str(tmp_path / "status"))
    results = wait_for_exits(ranks, 40)
    assert [exit_status for exit_status, _ in results] == [0, 0, 0]
    assert (tmp_path / "status").read_text() == str(status)
    assert [bool(messages) for _, messages in results] == [True, False, False]


def test_wrong_input_before_the_ranks_connect_ends_all_ranks(tmp_path: Path) -> None:
    """Status 0 would let the others wait for this one."""
    words = [sys.executable, "-m", "dscl", "train", "no-such-recipe.yaml", "--nproc"]
    done = subprocess.run(
        words,
        env={**os.environ, "RANK": "0", TIMEOUT_VARIABLE: "60", STATUS_FILE_VARIABLE: str(tmp_path / "status")},
        capture_output=True,
    )
    assert done.returncode == 2
    assert (tmp_path / "status").read_text() == "2"


@pytest.mark.exhaustive
def test_a_process_that_resumes_after_its_timeout_exits(start: Start) -> None:
    """Alone on its host, as it believes: it hears that it is silent itself."""
    ranks = start(3, "watch._hosts = [f'host{r}' for r in range(3)]\ntime.sleep(600)", DSCL_DEAD_AFTER="2")
    time.sleep(1)
    ranks[1].send_signal(signal.SIGSTOP)
    assert [status for status, _ in wait_for_exits([ranks[0], ranks[2]], 30)] == [1, 1]
    ranks[1].send_signal(signal.SIGCONT)
    assert [status for status, _ in wait_for_exits([ranks[1]], 20)] == [1]


def test_a_finished_process_does_not_wait_and_is_not_dead(start: Start, tmp_path: Path) -> None:
    ranks = start(3, "if comm.rank() == 1: await_mark('go')")
    assert [status for status, _ in wait_for_exits([ranks[0], ranks[2]], 20)] == [0, 0]
    assert ranks[1].poll() is None
    (tmp_path / "go").touch()
    assert [status for status, _ in wait_for_exits([ranks[1]], 20)] == [0]


def test_a_stop_on_all_ranks_is_no_failure(start: Start, tmp_path: Path) -> None:
    """One after another: those who stop later are not told that the first have failed, and leave as usual."""
    work = "if comm.rank(): await_mark(f'left.{comm.rank() - 1}')\nraise RunStopped('all saved')"
    ranks = start(3, work, HURRY)
    assert [status for status, _ in wait_for_exits(ranks, 30)] == [75, 75, 75]
    assert (tmp_path / "left.2").exists()


class RanksMet(BaseException):
    """Ends a test when all ranks have reached the same point."""


COLLECTIVES = (
    "wait_for_all_ranks",
    "any_rank_true",
    "all_reduce_sum",
    "broadcast_from_main",
    "all_gather_objects",
    "all_to_all",
)
LIMITED, DEADLINE = 0.4, 30.0  # seconds in one and the same collective after which a rank is taken to wait there


def find_blocking_collectives(
    folder: Path, verb: str, patience: float, changes: Sequence[str] = ()
) -> tuple[list[str], float]:
    """Start `verb`; the main rank prepares its data until it knows in which collective the other rank waits.

    Returns the names of those collectives and the time limit of such a wait in days.
    """
    import torch

    from dscl.distributed import comm
    from dscl.recipe.recipe import read_recipe
    from dscl.training import preflight, setup
    from dscl.training import run as training_run
    from dscl.training.checkpoint import Checkpoints
    from dscl.training.dry_run import dry_run

    note, collectives = folder / f"{verb} waits", []

    def encode(*words: Any, original: Any = setup.encode_dataset, **named: Any) -> Any:
        if comm.is_main() and not collectives:
            collectives.append(wait_until_blocked(note, patience))
        return original(*words, **named)

    def record_calls(name: str, original: Any) -> Any:
        def collective(*words: Any) -> Any:
            note.write_text(name)
            result = original(*words)
            note.write_text("")
            return result

        return collective

    def meet(*_: Any) -> None:
        comm.barrier()
        raise RanksMet

    recipe = folder / "recipe.yaml"
    works: dict[str, Callable[[], object]] = {
        "train": lambda: training_run.train(read_recipe(str(recipe), [])),
        "rehearse": lambda: dry_run(read_recipe(str(recipe), [])),
        "evaluate": lambda: training_run.evaluate_run(str(folder), []),
        "diagnose": lambda: training_run.diagnose_cluster(read_recipe(str(recipe), [])),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "encode_dataset", encode)
        patch.setattr(setup.RunSetup, "build_engine", meet)
        patch.setattr(preflight, "run_checks", meet)
        patch.setattr(Checkpoints, "find_checkpoint", meet)  # before an evaluation builds its engine
        if not comm.is_main():
            for name in COLLECTIVES:
                patch.setattr(comm, name, record_calls(name, getattr(comm, name)))
        for change in changes:
            patch.setattr(change, lambda: None)
        with pytest.raises(RanksMet):
            works[verb]()
    limit = comm._group_without_timeout()._get_backend(torch.device("cpu")).options._timeout
    return collectives, limit.total_seconds() / 86400


def wait_until_blocked(note: Path, patience: float) -> str:
    """The collective in which the other rank waits: the barrier without a time limit, or one that does not return."""
    name, since, deadline = "", time.monotonic(), time.monotonic() + DEADLINE
    while name != "wait_for_all_ranks" and time.monotonic() < deadline:
        now = note.read_text() if note.exists() else ""
        if now != name:
            name, since = now, time.monotonic()
        elif name and time.monotonic() - since > patience:
            break
        time.sleep(0.01)
    return name


@pytest.mark.parametrize("verb", ["train", "rehearse", "evaluate", "diagnose"])
def test_ranks_wait_without_a_time_limit_for_data_preparation(ranks: Any, tmp_path: Path, verb: str) -> None:
    write_run_folder(tmp_path)
    (collectives, days), _ = ranks(2)(find_blocking_collectives, tmp_path, verb, 10.0)
    assert collectives == ["wait_for_all_ranks"]
    assert days >= 7


def test_the_previous_test_notices_a_time_limit(ranks: Any, tmp_path: Path) -> None:
    write_run_folder(tmp_path)
    (collectives, _), _ = ranks(2)(
        find_blocking_collectives, tmp_path, "train", LIMITED, ["dscl.training.run.comm.wait_for_all_ranks"]
    )
    assert collectives
    assert collectives[0] in COLLECTIVES[1:]


def write_run_folder(folder: Path) -> None:
    """Write the recipe and the tasks of a run into this folder."""
    from tests.support.runs import recipe_of, write_tasks

    write_tasks(folder)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            recipe_of(folder.parent, folder.name)
            | {"stream": [{"name": name, "path": str(folder / name)} for name in ("colour", "animal")]}
        )
    )


IMPATIENT = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, {repository!r})
import torch.distributed as td
from dscl.distributed import comm
from dscl.training import preflight, setup
from dscl.training import run as training_run
from dscl.training.checkpoint import Checkpoints
from dscl.training.dry_run import dry_run
from dscl.recipe.recipe import read_recipe
td.init_process_group("gloo", timeout=timedelta(seconds=5))
comm._group_without_timeout()

class Met(BaseException):
    pass

def slowly(*a, encode=setup.encode_dataset, **k):
    if waiting and comm.rank() == 0:
        time.sleep(waiting.pop())
    return encode(*a, **k)

def met(*a):
    comm.barrier()
    raise Met

run = Path({run!r})
setup.encode_dataset, setup.RunSetup.build_engine, Checkpoints.find_checkpoint = slowly, met, met
{change}
for work in (
    lambda: training_run.train(read_recipe(run / "recipe.yaml", [])),
    lambda: dry_run(read_recipe(run / "recipe.yaml", [])),
    lambda: training_run.evaluate_run(str(run), []),
    lambda: training_run.diagnose_cluster(read_recipe(run / "recipe.yaml", [])),
):
    waiting = [7.0]
    try:
        work()
    except Met:
        print("met", file=sys.stderr)
os._exit(75)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("change", "met", "status"),
    [
        ("preflight.run_checks = met", 4, 75),
        ("training_run.comm.wait_for_all_ranks = lambda: None", 0, 1),  # there is a time limit
    ],
)
def test_long_data_preparation_meets_no_time_limit(tmp_path: Path, change: str, met: int, status: int) -> None:
    """For training, the dry run, evaluation and the doctor."""
    from tests.support.runs import recipe_of, write_tasks

    write_tasks(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(tmp_path, "run")))
    program = IMPATIENT.format(repository=str(REPOSITORY), run=str(tmp_path / "run"), change=change)
    (tmp_path / "program.py").write_text(program)
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    words = [sys.executable, str(tmp_path / "program.py")]
    processes = [
        subprocess.Popen(
            words, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    messages = [process.communicate(timeout=200)[1] for process in processes][1]  # of the one that is kept waiting
    assert (processes[1].returncode, messages.splitlines().count("met")) == (status, met), messages


def test_a_connection_without_the_key_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without the key is closed; a rank that connects later with the key is accepted."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    liveness = Liveness()
    published: list[tuple[int, bytes]] = []
    ends: list[socket.socket] = []

    def publish(value: tuple[int, bytes]) -> tuple[int, bytes]:
        published.append(value)
        for messages in (b"GET / HTTP/1.1\r\n\r\n....", b"x" * 16 + b"\0\0\0\1", value[1] + b"\0\0\0\1"):
            ends.append(socket.create_connection(("127.0.0.1", value[0])))
            ends[-1].sendall(messages)
        return value

    monkeypatch.setattr("dscl.distributed.comm.broadcast_from_main", publish)
    liveness._connect_peers()
    (line,) = liveness._peers
    assert line.rank == 1
    assert line.sock.getpeername()[1] == ends[2].getsockname()[1]
    liveness._peers.close()
    for end in ends:
        end.close()


def test_partial_messages_are_joined() -> None:
    ours, theirs = socket.socketpair()
    line = PeerConnection(ours, 7)
    theirs.sendall(b"a\0\0\0")
    assert line.receive_messages() == []
    theirs.sendall(b"\0d\0\0\1\2")
    assert line.receive_messages() == [(b"a", 0), (b"d", 258)]
    theirs.close()
    assert line.receive_messages() == [(b"d", 7)]
    ours.close()


@pytest.mark.parametrize("value", ["soon", "0", "-3", "inf", "nan"])
def test_an_invalid_timeout_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, value)
    with pytest.raises(UserError, match=f"DSCL_DEAD_AFTER: given '{value}' in the environment; allowed: seconds"):
        Liveness()
