"""Start N ranks of this program on this machine and end them together: the `--nproc` of the command line.

A rank that fails says so to the spawner before it leaves the others (`tell`), so that what is shown and what becomes
the exit status is the first failure in time, once, and not what follows from it on the other ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dscl.utils.errors import AGAIN, Stopped, UserError

PROGRAM = ("-m", "dscl")
GRACE = 20.0  # seconds that the other ranks get to end by themselves once one has failed
PATIENCE = 3.0  # seconds after which a rank doubts that another launcher's first rank has told the same mistake
POLL = 0.05
LONGEST = 16_000  # characters of one report; it travels as one datagram
PARENT, CHANNEL = "DSCL_SPAWNED_BY", "DSCL_REPORT_TO"
STATUS_TO = "DSCL_STATUS_TO"  # a file for what no restart mends, under a launcher that restarts whatever fails
ENDS_WITH = "DSCL_ENDS_WITH"  # a program that starts others, which are not its ranks
_JOINED = threading.Event()
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def how_many(asked: str) -> int:
    """The number of ranks for `--nproc N|auto`; auto is one for each GPU, or one."""
    if asked == "auto":
        return max(1, gpus())
    if not re.fullmatch("[0-9]{1,6}", asked) or int(asked) < 1:
        raise UserError(f"--nproc: given {asked!r}; allowed: a whole number of at least 1, or auto")
    count = int(asked)
    there = gpus() if count > 1 else 0
    if there and count > there:
        raise UserError(
            f"--nproc: given {count}; this machine has {there} GPUs, so at most {there} (or DS_ACCELERATOR=cpu)"
        )
    most = max(16, 2 * cores())
    if count > most and not there:
        raise UserError(f"--nproc: given {count}; this machine has {cores()} cores, so at most {most}")
    return count


def spawn(count: int, arguments: Sequence[str]) -> int:
    """Run `dscl ARGUMENTS` in `count` processes that find each other; returns the exit status of the whole."""
    ranks: list[subprocess.Popen[bytes]] = []
    heard = 0

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        for rank in ranks:
            if rank.poll() is None:  # a second one does not ask any more
                rank.send_signal(number if heard < 2 else signal.SIGKILL)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        shared = {
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // count)),
            PARENT: str(os.getpid()),
            CHANNEL: str(theirs.fileno()),
        }
        for rank in range(count):
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *PROGRAM, *arguments],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # so that a Ctrl-C reaches each rank once, from `forward`
                )
            )
        return _wait(ranks, ours)
    finally:
        _kill(ranks)
        ours.close()
        theirs.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def spawned() -> bool:
    """Whether this process is a rank that `spawn` started."""
    return PARENT in os.environ


def outside() -> dict[str, str]:
    """The environment for a program that this one starts, is no rank, and ends with it."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", PARENT, CHANNEL, STATUS_TO)
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("SLURM_")}
    return {**kept, ENDS_WITH: str(os.getpid())}


def die_with_parent() -> None:
    """Be killed when the program that started this one is, instead of training on unseen (Linux)."""
    parent = os.environ.get(PARENT if spawned() else ENDS_WITH)
    if parent is None or not sys.platform.startswith("linux"):
        return
    os.environ.pop(ENDS_WITH, None)  # it is not for those that this one starts
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before we asked
        os._exit(1)


def begin() -> None:
    """What a rank does first: hear signals, and clear away the status that an earlier start has left."""
    if not {"RANK", "SLURM_PROCID"} & set(os.environ):
        return
    for number in FORWARDED:
        signal.signal(number, stop_early)
    if STATUS_TO in os.environ:
        Path(os.environ[STATUS_TO]).write_text("")


def stop_early(number: int, _frame: FrameType | None) -> None:
    """A signal's handler, as long as there is nothing to save."""
    raise Stopped(f"{signal.Signals(number).name}: nothing was trained yet; {AGAIN}", together=False)


def joined() -> None:
    """All ranks have found each other, so that one which ends leaves nobody waiting for it."""
    _JOINED.set()


def leave(status: int) -> int:
    """The status to exit with: 0 where a rank would be started again in vain, and a launch script is told the other.

    Before all ranks have found each other it stays what it is, or a launcher would let the others wait for this one.
    """
    if status in (2, 75) and "RANK" in os.environ and STATUS_TO in os.environ:
        Path(os.environ[STATUS_TO]).write_text(str(status))
        return 0 if _JOINED.is_set() else status
    return status


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def tell(status: int, text: str, patience: float | None = None) -> None:
    """Say on stderr why this process ends with `status`; of many ranks with the same mistake, one says it.

    Under `spawn` the first to come is heard. Under another launcher the machine's first rank speaks at once, and the
    others only when, after a while, nobody has ended them: then the mistake is theirs alone.
    """
    local = local_rank()
    if CHANNEL in os.environ:
        report = {"rank": local, "status": status, "text": text[-LONGEST:]}
        with socket.socket(fileno=os.dup(int(os.environ[CHANNEL]))) as channel:
            try:
                channel.send(json.dumps(report).encode())
                return
            except OSError:  # a system with smaller datagrams; rather twice than never
                pass
    elif local:
        if _told_meanwhile(PATIENCE if patience is None else patience):
            return
        text = f"rank {os.environ.get('RANK', local)}: {text}"
    print(text, file=sys.stderr, flush=True)


def _told_meanwhile(seconds: float) -> bool:
    """Wait, and see whether another rank of this machine has told a launch script what it ends with."""
    if STATUS_TO not in os.environ:
        time.sleep(seconds)
        return False
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if Path(os.environ[STATUS_TO]).read_text():
            return True
        time.sleep(POLL)
    return False


def _wait(ranks: list[subprocess.Popen[bytes]], channel: socket.socket) -> int:
    """Wait for all; when one fails, give the others a moment to end by themselves, then end them."""
    status, deadline = 0, float("inf")
    told: set[int] = set()
    signalled = False
    while True:
        running = [rank for rank in ranks if rank.poll() is None]  # asked first: an ended one has said what it had to
        seconds = POLL if running else 0.0
        while select.select([channel], [], [], seconds)[0]:
            report, seconds = json.loads(channel.recv(1 << 20)), 0.0
            if not told and not signalled:  # what comes later follows from it
                print(report["text"], file=sys.stderr, flush=True)
            told.add(report["rank"])
            status = status or report["status"]
        for number, rank in enumerate(ranks):
            code = rank.returncode or 0
            if code < 0 and number not in told and not signalled:  # it could not say a word
                print(
                    f"dscl: rank {number} was ended by signal {-code} ({signal.strsignal(-code)}); "
                    "run the same command again to resume",
                    file=sys.stderr,
                )
                signalled = True
            status = status or (1 if code < 0 else code)
        if not running:
            return status
        if status:
            deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            _kill(ranks)
            return status


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()  # does nothing to one that has ended
    for rank in ranks:
        rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """The GPUs that the ranks would use."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return 0
    import torch  # takes seconds, which `dscl --help` has no use for

    return torch.cuda.device_count()
