"""A rank that dies, fails or falls silent: the others name it and its host, and leave in time; nobody hangs.

What a heartbeat makes of silence and of words is tested on a clock that the tests set; that processes leave, and what
they say, with real ranks.
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

from dscl.distributed.launcher import STATUS_TO
from dscl.distributed.liveness import (
    ALIVE,
    BEATS,
    DEAD,
    DEAD_AFTER,
    FAILED,
    LEFT,
    SILENT,
    TOLD,
    WRONG,
    Heartbeat,
    Line,
    Lines,
    Pulse,
)
from dscl.utils.errors import UserError
from tests.support.hosts import REPOSITORY
from tests.support.programs import Program, attach, refresh

SECONDS = 60.0  # of silence that make a rank a dead one
STEP = 0.25  # seconds of the clock between two turns


class Ready(Lines):
    """Lines on which nobody waits."""

    def ready(self, seconds: float) -> list[Line]:
        return super().ready(0.0)


class Hearts:
    """The heartbeats of three ranks, whose time passes when `passes` says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines = [Ready() for _ in range(3)]
        for rank in (1, 2):
            for (mine, other), end in zip(((0, rank), (rank, 0)), socket.socketpair(), strict=True):
                self.lines[mine].add(Line(end, other))
        self.beats = [Heartbeat(lines, SECONDS, self.clock(rank)) for rank, lines in enumerate(self.lines)]
        self.lost: dict[int, tuple[bytes, int]] = {}  # what each rank believes in the end: how, and of whom
        self.gone: set[int] = set()

    def clock(self, rank: int) -> Callable[[], float]:
        """Each host counts from a moment of its own."""
        return lambda: self.now + 1000.0 * rank

    def passes(self, seconds: float, still: Sequence[int] = ()) -> None:
        """So much time; some ranks stand still in it, and those that have lost one have left."""
        for _ in range(round(seconds / STEP)):
            self.now += STEP
            for rank, heart in enumerate(self.beats):
                if rank not in {*still, *self.gone, *self.lost} and (lost := heart.turn()):
                    self.lost[rank] = lost

    def close(self, rank: int) -> None:
        """Its process has ended."""
        self.gone.add(rank)
        self.lines[rank].close()


@pytest.fixture
def hearts() -> Iterator[Hearts]:
    made = Hearts()
    yield made
    for rank in {0, 1, 2} - made.gone:
        made.close(rank)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_counts_as_dead_after_the_time_given(hearts: Hearts, silent: int) -> None:
    hearts.passes(10 * SECONDS)
    assert not hearts.lost
    others = [rank for rank in range(3) if rank != silent]
    hearts.passes(SECONDS - SECONDS / BEATS - 2 * STEP, still=[silent])  # it may last have been heard a beat ago
    assert not hearts.lost
    hearts.passes(SECONDS / BEATS + 4 * STEP, still=[silent])
    assert hearts.lost == dict.fromkeys(others, (SILENT, silent))


@pytest.mark.parametrize("still", [[0, 1, 2], [0, 1], [0]])
@pytest.mark.parametrize("seconds", [SECONDS / BEATS + 1, 0.7 * SECONDS, 1000 * SECONDS])
def test_a_standstill_is_nobodys_death_but_of_those_who_stood_still(
    hearts: Hearts, still: list[int], seconds: float
) -> None:
    """A machine that was suspended: when it wakes, everybody was silent."""
    hearts.passes(SECONDS)
    hearts.now += seconds if len(still) == 3 else 0.0
    hearts.passes(0.0 if len(still) == 3 else min(seconds, 3 * SECONDS), still)
    hearts.passes(3 * SECONDS)
    dead = len(still) < 3 and seconds > SECONDS
    assert sorted(hearts.lost) == ([0, 1, 2] if dead else [])
    assert all(how == SILENT and rank in still for how, rank in hearts.lost.values())


def test_a_rank_that_wakes_after_it_was_given_up_hears_so(hearts: Hearts) -> None:
    hearts.passes(2 * SECONDS, still=[1])
    assert hearts.lost == {0: (SILENT, 1), 2: (SILENT, 1)}
    hearts.passes(STEP)
    assert hearts.lost[1] == (SILENT, 1)


@pytest.mark.parametrize("dead", [0, 2])
def test_a_broken_line_is_a_death(hearts: Hearts, dead: int) -> None:
    hearts.passes(SECONDS)
    hearts.close(dead)
    hearts.passes(2 * STEP)
    assert hearts.lost == {rank: (DEAD, dead) for rank in range(3) if rank != dead}


@pytest.mark.parametrize("what", [FAILED, WRONG, TOLD])
@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_rank_ends_with_is_told_to_all_others(hearts: Hearts, what: bytes, rank: int) -> None:
    hearts.passes(SECONDS)
    hearts.lines[rank].say(what, rank)
    hearts.close(rank)
    hearts.passes(2 * STEP)
    assert hearts.lost == {other: (what, rank) for other in range(3) if other != rank}


@pytest.mark.parametrize("done", [0, 2])
def test_a_rank_that_is_done_is_not_missed(hearts: Hearts, done: int) -> None:
    """And those that go on are watched as before."""
    hearts.passes(SECONDS)
    hearts.lines[done].say(LEFT, done)
    hearts.close(done)
    hearts.passes(10 * SECONDS)
    assert not hearts.lost
    hearts.passes(2 * SECONDS, still=[1])
    assert hearts.lost == ({0: (SILENT, 1)} if done == 2 else {})  # only the main one hears all


def test_signs_of_life_come_some_times_within_the_time_and_not_all_the_time() -> None:
    now = 0.0
    lines = Ready()
    ours, theirs = socket.socketpair()
    lines.add(Line(ours, 1))
    heart = Heartbeat(lines, SECONDS, lambda: now)
    while now < 10 * SECONDS:
        now += STEP
        Line(theirs, 0).say(ALIVE)
        assert heart.turn() is None
    signs = Line(theirs, 0).listen()
    assert set(signs) == {(ALIVE, 0)}
    assert 9 * BEATS <= len(signs) <= 10 * BEATS + 1
    lines.close()
    theirs.close()


PROGRAM = """
import os, sys, time
from pathlib import Path
from dscl import dist, pulse as pulses, spawn
from dscl.cli.app import guarded
from dscl.utils.errors import Failure, Stopped, UserError
from dscl.distributed.liveness import Pulse
from dscl.distributed.launcher import leave
here = Path({here!r})
{changes}
def mark(name): (here / f"{{name}}.{{dist.rank()}}").write_text(str(os.getpid()))
def await_mark(name):
    while not (here / name).exists(): time.sleep(0.01)
def work():
{work}
    return 0
with dist.session(), Pulse() as pulse:
    mark("joined")
    status = pulse.end(guarded(lambda: pulse.beside(work)))
mark("left")
sys.exit(leave(status))
"""
# A rank gives others less time: to end after a failure and after a death, and to speak first.
HURRY = "pulses.GRACE = 0.5; pulses.SOON = 1.0; spawn.PATIENCE = 0.5"


class Rank(Program):
    """A process that runs this source, forked."""

    def __init__(self, source: str, **environment: str) -> None:
        super().__init__([source], **environment)

    def _target(self) -> Callable[..., None]:
        return _rank


def _rank(arguments: list[str], cwd: str, session: bool, environment: dict[str, str], files: list[str]) -> None:
    attach(cwd, files)
    refresh(["rank"], environment, session)
    exec(compile(arguments[0], "rank", "exec"), {"__name__": "__main__"})


Start = Callable[..., list[Rank]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Ranks as another launcher than ours starts them, each doing `work`; they have joined."""
    started: list[Rank] = []

    def put(world: int, work: str, changes: str = "", **environment: str) -> list[Rank]:
        body = "\n".join(f"    {line}" for line in work.splitlines())
        source = PROGRAM.format(here=str(tmp_path), work=body, changes=changes)
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **environment}
        ranks = [Rank(source, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]
        started.extend(ranks)
        for number, rank in enumerate(ranks):
            rank.until((tmp_path / f"joined.{number}").exists)
        return ranks

    yield put
    for rank in started:
        rank.kill()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ended(ranks: Sequence[Rank], within: float) -> list[tuple[int, str]]:
    """The exit status of each, and what it said."""
    deadline = time.monotonic() + within
    return [(rank.wait(max(0.1, deadline - time.monotonic())), rank.output()[1]) for rank in ranks]


def killed(dead: int, busy: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(dead, busy, marks=marks, id=f"{busy}-{dead}")


@pytest.mark.parametrize(
    ("dead", "busy"),
    [
        killed(0, "dist.barrier()"),
        killed(2, "time.sleep(600)"),
        killed(2, "dist.meet()"),
        killed(2, "dist.barrier()", pytest.mark.exhaustive),
        killed(0, "time.sleep(600)", pytest.mark.exhaustive),
        killed(0, "dist.meet()", pytest.mark.exhaustive),
    ],
)
def test_a_killed_rank_is_named_and_the_others_leave(start: Start, dead: int, busy: str) -> None:
    """Whether the others wait for it in a collective (which fails, or not) or are busy with something else."""
    ranks = start(3, f"if comm.rank() == {dead}: time.sleep(600)\n{busy}", "pulses.SOON = 1.5")
    ranks[dead].kill()
    results = ended(ranks, 20)
    assert [status for status, _ in results] == [-9 if rank == dead else 1 for rank in range(3)]
    said = [text for rank, (_, text) in enumerate(results) if rank != dead and "dscl: " in text]
    assert said  # by one at least; a rank that is not the first on its host may leave the word to that
    for text in said:
        line = text.strip().splitlines()[-1]
        assert f"rank {dead} on {socket.gethostname()} is dead (its process ended without a word)" in line
        assert "Traceback" not in text


@pytest.mark.exhaustive
@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_process_counts_as_dead_after_the_time_given(start: Start, silent: int) -> None:
    ranks = start(3, "time.sleep(600)", DSCL_DEAD_AFTER="4")
    ranks[silent].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    others = [process for rank, process in enumerate(ranks) if rank != silent]
    results = ended(others, 30)
    assert 2.5 < time.monotonic() - began < 15
    assert [status for status, _ in results] == [1, 1]
    assert f"rank {silent} on {socket.gethostname()} is silent for more than 4 s (see DSCL_DEAD_AFTER)" in results[0][1]
    ranks[silent].send_signal(signal.SIGCONT)
    ended(ranks[silent : silent + 1], 20)


@pytest.mark.exhaustive
def test_a_short_standstill_of_all_processes_is_nobodys_death(start: Start, tmp_path: Path) -> None:
    ranks = start(3, "await_mark('go')", DSCL_DEAD_AFTER="2")
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    time.sleep(5)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    time.sleep(3)
    assert all(rank.poll() is None for rank in ranks)
    (tmp_path / "go").touch()
    assert [status for status, _ in ended(ranks, 20)] == [0, 0, 0]


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
    ranks = start(2, f"if comm.rank() == 0: raise {error}\ntime.sleep(600)", HURRY)
    results = ended(ranks, 40)
    assert [found for found, _ in results] == [status, status]  # what is wrong for one is wrong for all
    assert told in results[0][1]
    assert "rank 0 on " in results[1][1] or not results[1][1]


@pytest.mark.parametrize(
    ("error", "status"), [("UserError('no such file')", 2), ("Stopped('told to', together=False)", 75)]
)
@pytest.mark.parametrize("later", [0.0, 0.2])
def test_what_no_restart_mends_is_left_for_the_launch_script(
    start: Start, tmp_path: Path, error: str, status: int, later: float
) -> None:
    """The ranks end with 0, or a launcher would start them again; one of them tells."""
    (tmp_path / "status").touch()
    ranks = start(3, f"time.sleep({later} * comm.rank()); raise {error}", DSCL_STATUS_TO=str(tmp_path / "status"))
    results = ended(ranks, 40)
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


@pytest.mark.exhaustive
def test_a_process_that_wakes_after_it_was_given_up_leaves_too(start: Start) -> None:
    """Alone on its host, as it believes: it hears that it is silent itself."""
    ranks = start(3, "pulse._hosts = [f'host{r}' for r in range(3)]\ntime.sleep(600)", DSCL_DEAD_AFTER="2")
    time.sleep(1)
    ranks[1].send_signal(signal.SIGSTOP)
    assert [status for status, _ in ended([ranks[0], ranks[2]], 30)] == [1, 1]
    ranks[1].send_signal(signal.SIGCONT)
    assert [status for status, _ in ended([ranks[1]], 20)] == [1]


def test_who_is_done_waits_for_nobody_and_is_no_death(start: Start, tmp_path: Path) -> None:
    ranks = start(3, "if dist.rank() == 1: await_mark('go')")
    assert [status for status, _ in ended([ranks[0], ranks[2]], 20)] == [0, 0]
    assert ranks[1].poll() is None
    (tmp_path / "go").touch()
    assert [status for status, _ in ended([ranks[1]], 20)] == [0]


def test_stopping_together_is_no_failure(start: Start, tmp_path: Path) -> None:
    """One after another: those who stop later are not told that the first have failed, and leave as usual."""
    work = "if dist.rank(): await_mark(f'left.{dist.rank() - 1}')\nraise Stopped('all saved')"
    ranks = start(3, work, HURRY)
    assert [status for status, _ in ended(ranks, 30)] == [75, 75, 75]
    assert (tmp_path / "left.2").exists()


class Met(BaseException):
    """All ranks have met, and that is enough."""


COLLECTIVES = ("meet", "any_rank", "sum_", "from_main", "gather", "exchange")
LIMITED, DEADLINE = 0.4, 30.0  # seconds in one and the same collective after which a rank is taken to wait there


def waiting(folder: Path, verb: str, patience: float, changes: Sequence[str] = ()) -> tuple[list[str], float]:
    """Begin what `verb` does. The main rank prepares its data until it knows for what the other one waits: those names,
    and the days that such a wait may last."""
    import torch

    from dscl.distributed import comm
    from dscl.recipe.recipe import read_recipe
    from dscl.training import preflight, setup, trainer

    note, seen = folder / f"{verb} waits", []

    def encode(*words: Any, original: Any = setup.encode, **named: Any) -> Any:
        if comm.is_main() and not seen:
            seen.append(settled(note, patience))
        return original(*words, **named)

    def noted(name: str, original: Any) -> Any:
        def collective(*words: Any) -> Any:
            note.write_text(name)
            result = original(*words)
            note.write_text("")
            return result

        return collective

    def met(*_: Any) -> None:
        comm.barrier()
        raise Met

    recipe = folder / "recipe.yaml"
    works: dict[str, Callable[[], object]] = {
        "train": lambda: trainer.train(read_recipe(str(recipe), [])),
        "rehearse": lambda: trainer.rehearse(read_recipe(str(recipe), [])),
        "evaluate": lambda: trainer.evaluate(str(folder), []),
        "diagnose": lambda: trainer.diagnose(read_recipe(str(recipe), [])),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "encode", encode)
        patch.setattr(setup.Job, "engine", met)
        patch.setattr(preflight, "examine", met)
        if not comm.is_main():
            for name in COLLECTIVES:
                patch.setattr(comm, name, noted(name, getattr(comm, name)))
        for change in changes:
            patch.setattr(change, lambda: None)
        with pytest.raises(Met):
            works[verb]()
    limit = comm._patient()._get_backend(torch.device("cpu")).options._timeout
    return seen, limit.total_seconds() / 86400


def settled(note: Path, patience: float) -> str:
    """What the other rank waits for: the meeting without a limit, or else what it does not come back from."""
    name, since, deadline = "", time.monotonic(), time.monotonic() + DEADLINE
    while name != "meet" and time.monotonic() < deadline:
        now = note.read_text() if note.exists() else ""
        if now != name:
            name, since = now, time.monotonic()
        elif name and time.monotonic() - since > patience:
            break
        time.sleep(0.01)
    return name


@pytest.mark.parametrize("verb", ["train", "rehearse", "evaluate", "diagnose"])
def test_who_prepares_its_data_for_long_is_waited_for_without_a_limit(ranks: Any, tmp_path: Path, verb: str) -> None:
    prepared(tmp_path)
    (seen, days), _ = ranks(2)(waiting, tmp_path, verb, 10.0)
    assert seen == ["meet"]
    assert days >= 7


def test_a_wait_with_a_limit_would_be_noticed(ranks: Any, tmp_path: Path) -> None:
    prepared(tmp_path)
    (seen, _), _ = ranks(2)(waiting, tmp_path, "train", LIMITED, ["dscl.training.trainer.dist.meet"])
    assert seen
    assert seen[0] in COLLECTIVES[1:]


def prepared(folder: Path) -> None:
    """A run that has been started, in this folder."""
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
from dscl import dist, doctor, job, train
from dscl.recipe.recipe import read_recipe
td.init_process_group("gloo", timeout=timedelta(seconds=5))
dist._patient()

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


@pytest.mark.exhaustive
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
    said = [process.communicate(timeout=200)[1] for process in processes][1]  # of the one that is kept waiting
    assert (processes[1].returncode, said.splitlines().count("met")) == (status, met), said


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

    monkeypatch.setattr("dscl.distributed.comm.from_main", publish)
    pulse._connect()
    (line,) = pulse._lines
    assert line.rank == 1
    assert line.end.getpeername()[1] == ends[2].getsockname()[1]
    pulse._lines.close()
    for end in ends:
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
