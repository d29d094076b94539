"""Local launcher: start N ranks of this program on this machine and end them together (`--nproc`).

A rank that fails reports its exit status and message to the spawner (`report_exit`) before it leaves the process group.
The spawner prints the first report and exits with its status. Later failures usually follow from the first one.
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

from dscl.utils.errors import RERUN_HINT, RunStopped, UserError

PROGRAM = ("-m", "dscl")
EXIT_GRACE_SECONDS = 20.0  # after the first failure, the other ranks get this long to exit by themselves
REPORT_DELAY_SECONDS = 10.0  # without `spawn_ranks`, local ranks above 0 wait this long before they report an error
POLL_SECONDS = 0.05
MAX_REPORT_LENGTH = 16_000  # characters of one report, which is sent as one datagram
PARENT_PID_VARIABLE = "DSCL_SPAWNED_BY"  # the process id of the spawner
REPORT_SOCKET_VARIABLE = "DSCL_REPORT_TO"  # the file descriptor of the socket on which ranks report to the spawner
# A launcher may restart every process that fails. Exit statuses that no restart can mend go into this file instead.
STATUS_FILE_VARIABLE = "DSCL_STATUS_TO"
EXIT_WITH_PID_VARIABLE = "DSCL_ENDS_WITH"  # the process id of the program that started this one, which is not a rank
_RANKS_CONNECTED = threading.Event()
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def parse_nproc(value: str) -> int:
    """The number of ranks for `--nproc N|auto`; auto is one rank for each GPU, or one rank without GPUs."""
    if value == "auto":
        return max(1, count_gpus())
    if not re.fullmatch("[0-9]{1,6}", value) or int(value) < 1:
        raise UserError(f"--nproc: given {value!r}; allowed: a whole number of at least 1, or auto")
    count = int(value)
    num_gpus = count_gpus() if count > 1 else 0
    if num_gpus and count > num_gpus:
        raise UserError(
            f"--nproc: given {count}; this machine has {num_gpus} GPUs, so at most {num_gpus} (or DS_ACCELERATOR=cpu)"
        )
    max_ranks = max(16, 2 * count_cores())
    if count > max_ranks and not num_gpus:
        raise UserError(f"--nproc: given {count}; this machine has {count_cores()} cores, so at most {max_ranks}")
    return count


def spawn_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run `dscl ARGUMENTS` in `count` processes as ranks 0 to count - 1; returns the exit status of the whole run."""
    processes: list[subprocess.Popen[bytes]] = []
    num_signals = 0

    def forward_signal(signum: int, _frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum if num_signals < 2 else signal.SIGKILL)  # the second signal kills

    previous_handlers = {signum: signal.signal(signum, forward_signal) for signum in FORWARDED_SIGNALS}
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        environment = {
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_find_free_port()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, count_cores() // count)),
            PARENT_PID_VARIABLE: str(os.getpid()),
            REPORT_SOCKET_VARIABLE: str(sender.fileno()),
        }
        for rank in range(count):
            processes.append(
                subprocess.Popen(
                    [sys.executable, *PROGRAM, *arguments],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    pass_fds=[sender.fileno()],
                    start_new_session=True,  # so that Ctrl-C reaches each rank only once, through `forward_signal`
                )
            )
        return _wait_for_ranks(processes, receiver)
    finally:
        _kill_ranks(processes)
        receiver.close()
        sender.close()
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)


def is_spawned_rank() -> bool:
    """Whether this process is a rank that `spawn_ranks` started."""
    return PARENT_PID_VARIABLE in os.environ


def subprocess_environment() -> dict[str, str]:
    """The environment for a program that this process starts.

    The program is not a rank of this run. `die_with_parent` ends it together with this process.
    """
    rank_variables = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        PARENT_PID_VARIABLE,
        REPORT_SOCKET_VARIABLE,
        STATUS_FILE_VARIABLE,
    )
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in rank_variables and not name.startswith("SLURM_")
    }
    return {**inherited, EXIT_WITH_PID_VARIABLE: str(os.getpid())}


def die_with_parent() -> None:
    """On Linux, have this process killed when its parent ends, so that it does not go on training unseen."""
    parent = os.environ.get(PARENT_PID_VARIABLE if is_spawned_rank() else EXIT_WITH_PID_VARIABLE)
    if parent is None or not sys.platform.startswith("linux"):
        return
    os.environ.pop(EXIT_WITH_PID_VARIABLE, None)  # the children of this process have another parent
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # the parent ended before the call of prctl
        os._exit(1)


def prepare_rank_process() -> None:
    """On a rank, install the first signal handlers and clear the status file of an earlier start; else do nothing."""
    if not {"RANK", "SLURM_PROCID"} & set(os.environ):
        return
    for signum in FORWARDED_SIGNALS:
        signal.signal(signum, handle_signal_before_training)
    if STATUS_FILE_VARIABLE in os.environ:
        Path(os.environ[STATUS_FILE_VARIABLE]).write_text("")


def handle_signal_before_training(signum: int, _frame: FrameType | None) -> None:
    """The signal handler for the time in which there is nothing to save."""
    raise RunStopped(f"{signal.Signals(signum).name}: nothing was trained yet; {RERUN_HINT}", all_ranks_agreed=False)


def mark_ranks_connected() -> None:
    """Record that all ranks are connected: from now on no rank waits in vain for one that exits."""
    _RANKS_CONNECTED.set()


def resolve_exit_status(status: int) -> int:
    """The exit status for a rank whose work ended with `status`.

    Where a restart would not help (2: wrong input, 75: stopped on purpose), a rank writes `status` to the launch
    script's status file and exits with 0, so that the launcher does not restart it. Before all ranks are connected the
    status stays as it is: after an exit with 0 the launcher would let the other ranks wait for this one.
    """
    if status in (2, 75) and "RANK" in os.environ and STATUS_FILE_VARIABLE in os.environ:
        Path(os.environ[STATUS_FILE_VARIABLE]).write_text(str(status))
        return 0 if _RANKS_CONNECTED.is_set() else status
    return status


def launcher_local_rank() -> int:
    """This rank's number on its machine, as torchrun, DeepSpeed or Slurm states it; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def report_exit(status: int, message: str, delay: float | None = None) -> None:
    """Print on stderr why this process ends with `status`; of several ranks with the same error, one prints it.

    Under `spawn_ranks`, the spawner prints the first report. Under another launcher, local rank 0 prints at once. The
    other local ranks wait for `delay` seconds (default: REPORT_DELAY_SECONDS). A rank that has not been ended by then
    has an error of its own, and prints it.
    """
    local_rank = launcher_local_rank()
    if REPORT_SOCKET_VARIABLE in os.environ:
        report = {"rank": local_rank, "status": status, "text": message[-MAX_REPORT_LENGTH:]}
        with socket.socket(fileno=os.dup(int(os.environ[REPORT_SOCKET_VARIABLE]))) as sender:
            try:
                sender.send(json.dumps(report).encode())
                return
            except OSError:  # the system allows only smaller datagrams; a message printed twice is better than none
                pass
    elif local_rank:
        if _other_rank_reported(REPORT_DELAY_SECONDS if delay is None else delay):
            return
        message = f"rank {os.environ.get('RANK', local_rank)}: {message}"
    print(message, file=sys.stderr, flush=True)


def _other_rank_reported(seconds: float) -> bool:
    """Wait for so many seconds; whether another rank of this machine has meanwhile written the status file."""
    if STATUS_FILE_VARIABLE not in os.environ:
        time.sleep(seconds)
        return False
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if Path(os.environ[STATUS_FILE_VARIABLE]).read_text():
            return True
        time.sleep(POLL_SECONDS)
    return False


def _wait_for_ranks(processes: list[subprocess.Popen[bytes]], receiver: socket.socket) -> int:
    """Wait for all ranks and return the status of the first failure.

    After a failure the other ranks get EXIT_GRACE_SECONDS to exit by themselves, and are killed then.
    """
    status, deadline = 0, float("inf")
    reported_ranks: set[int] = set()
    killed_rank_named = False
    while True:
        # Polled before the reports are read: a process that has ended by now has already sent its report.
        running = [process for process in processes if process.poll() is None]
        timeout = POLL_SECONDS if running else 0.0
        while select.select([receiver], [], [], timeout)[0]:
            report, timeout = json.loads(receiver.recv(1 << 20)), 0.0
            if not reported_ranks and not killed_rank_named:  # later failures follow from the first one
                print(report["text"], file=sys.stderr, flush=True)
            reported_ranks.add(report["rank"])
            status = status or report["status"]
        for rank, process in enumerate(processes):
            code = process.returncode or 0
            if (
                code < 0 and rank not in reported_ranks and not killed_rank_named
            ):  # a signal killed it, without a report
                print(
                    f"dscl: rank {rank} was ended by signal {-code} ({signal.strsignal(-code)}); "
                    "run the same command again to resume",
                    file=sys.stderr,
                )
                killed_rank_named = True
            status = status or (1 if code < 0 else code)
        if not running:
            return status
        if status:
            deadline = min(deadline, time.monotonic() + EXIT_GRACE_SECONDS)
        if time.monotonic() > deadline:
            _kill_ranks(processes)
            return status


def _kill_ranks(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()  # has no effect on a process that has ended
    for process in processes:
        process.wait()


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus() -> int:
    """How many GPUs the ranks would use; 0 with DS_ACCELERATOR=cpu."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return 0
    import torch  # not at the top of the file: the import takes seconds, and `dscl --help` does not need it

    return torch.cuda.device_count()
