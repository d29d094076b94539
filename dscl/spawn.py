"""Start N ranks of this program on this machine, and end them together: the `--nproc` of the command line."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from dscl.errors import UserError

GRACE = 20.0  # seconds that the other ranks get to end by themselves once one has failed
PARENT = "DSCL_SPAWNED_BY"


def how_many(asked: str) -> int:
    """The number of ranks for `--nproc N|auto`; auto is one for each GPU, or one."""
    if asked == "auto":
        return max(1, torch.cuda.device_count())
    if not asked.isdigit() or int(asked) < 1:
        raise UserError(f"--nproc: given {asked!r}; allowed: a whole number of at least 1, or auto")
    gpus = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else 0
    if gpus and int(asked) > gpus:
        raise UserError(f"--nproc: given {asked}; this machine has {gpus} GPUs, so at most {gpus} (or DS_ACCELERATOR=cpu)")
    return int(asked)


def spawn(count: int, arguments: Sequence[str]) -> int:
    """Run `dscl ARGUMENTS` in `count` processes that find each other; returns the exit status of the whole."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for rank in range(count):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": threads,
                PARENT: str(os.getpid()),
            }
            ranks.append(subprocess.Popen([sys.executable, "-m", "dscl", *arguments], env=environment))
        return _wait(ranks)
    except KeyboardInterrupt:
        return _wait(ranks, ending=True) or 1  # the terminal has sent the signal to the ranks as well
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """In a spawned rank: be killed when the spawner is, instead of training on unseen (Linux)."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before we asked
        os._exit(1)


def _wait(ranks: list[subprocess.Popen[bytes]], ending: bool = False) -> int:
    """Wait for all; when one fails, give the others a moment to end by themselves, then end them."""
    deadline = time.monotonic() + GRACE if ending else None
    failed = 0
    while any(rank.poll() is None for rank in ranks):
        if not failed:
            failed = _status(ranks)
            if failed and deadline is None:
                deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(0.05)
    return failed or _status(ranks)


def _status(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The first failure among the ranks that have ended; one ended by a signal counts as an internal failure."""
    for number, rank in enumerate(ranks):
        if rank.returncode:
            if rank.returncode < 0:
                name = signal.Signals(-rank.returncode).name
                print(f"dscl: rank {number} was ended by {name}; run the same command again to resume", file=sys.stderr)
                return 1
            return rank.returncode
    return 0
