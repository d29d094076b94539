"""The program `dscl` for tests that signal or kill it, forked from a process that has imported everything.

A fresh `dscl ...` spends seconds on imports. Here its process, the ranks that `--nproc` starts and the runs that
`dscl compare` starts are forks. They have the arguments, the environment and the signals of a program that a shell
started.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

from tests.support.pool import fork_context

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Program:
    """A running `dscl ARGUMENTS`, with the methods of subprocess.Popen that tests use."""

    def __init__(
        self, arguments: Sequence[str], cwd: Path | None = None, session: bool = False, **environment: str
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("out", "err")]
        variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ, **environment}
        work = (list(arguments), str(cwd or Path.cwd()), session, variables, [str(path) for path in self._files])
        self._process: Any = fork_context().Process(target=self._target(), args=work)  # type: ignore[attr-defined]
        self._process.start()
        self.pid: int = self._process.pid
        _STARTED.add(self)

    def _target(self) -> Callable[..., None]:
        return _run_forked_program

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("dscl", timeout or 0.0)
        return self.returncode

    def output(self) -> tuple[str, str]:
        """The stdout and stderr that the program has written so far."""
        out, err = (path.read_text() if path.exists() else "" for path in self._files)
        return out, err

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.output()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait until the condition holds, while the program runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def rank(self, number: int) -> int:
        """The process id of a rank that `--nproc` started."""
        return self._child(f"rank-{number}")

    def run(self) -> int:
        """The process id of the run that `dscl compare` has started."""
        return self._child("run")

    def _child(self, name: str) -> int:
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        children = [child for thread in threads for child in (thread / "children").read_text().split()]
        for child in children:
            if Path(f"/proc/{child}/comm").read_text().strip() == name:
                return int(child)
        raise AssertionError(f"no {name} among {children}")


_STARTED: weakref.WeakSet[Program] = weakref.WeakSet()


@atexit.register
def _kill_started_programs() -> None:
    """Kill programs that a failed test has left running, because this process would wait for them."""
    for program in _STARTED:
        program.kill()


def forked_run(
    words: Sequence[str], cwd: str | Path | None = None, capture_output: bool = True, text: bool = True
) -> subprocess.CompletedProcess[str]:
    """Replaces the subprocess.run with which a tool starts `python -m dscl`."""
    assert list(words[:3]) == [sys.executable, "-m", "dscl"], words
    assert capture_output
    assert text
    program = Program(words[3:], Path(cwd) if cwd is not None else None)
    out, err = program.communicate(timeout=100)
    return subprocess.CompletedProcess(words, program.wait(), out, err)


class ForkedRank:
    """Replaces the subprocess.Popen with which `--nproc` starts a rank, and `dscl compare` a run."""

    def __init__(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
        start_new_session: bool = False,
        stdout: IO[bytes] | None = None,
        stderr: int | None = None,
    ) -> None:
        assert list(words[:3]) == [sys.executable, "-m", "dscl"], words
        assert (stdout is None) == (stderr is None)
        self.returncode: int | None = None
        # Signals are blocked until the child has handlers of its own; `reset_process_state` unblocks them.
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.pid = os.fork()
        if self.pid == 0:
            Path("/proc/self/comm").write_text(f"rank-{env['RANK']}" if "RANK" in env else "run")
            for number in (1, 2) if stdout is not None else ():
                os.dup2(stdout.fileno(), number)
            _run_dscl(words[3:], env, start_new_session)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _run_forked_program(
    arguments: list[str], cwd: str, session: bool, environment: dict[str, str], files: list[str]
) -> None:
    """In the forked process: set up what the shell and the start of the interpreter would have set up, then run
    dscl."""
    redirect_streams(cwd, files)
    _run_dscl(arguments, environment, session)


def redirect_streams(cwd: str, files: list[str]) -> None:
    """Write standard output and standard error to these files, read nothing, work in this folder."""
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)


def _run_dscl(arguments: Sequence[str], environment: Mapping[str, str], session: bool) -> NoReturn:
    reset_process_state(["dscl", *arguments], environment, session)

    from dscl.cli import app
    from dscl.distributed import launcher
    from dscl.reporting import run_pool

    launcher.subprocess = SimpleNamespace(Popen=ForkedRank)  # type: ignore[assignment]
    run_pool.subprocess = SimpleNamespace(Popen=ForkedRank, STDOUT=subprocess.STDOUT)  # type: ignore[assignment]
    app.run_and_exit()


def reset_process_state(words: Sequence[str], environment: Mapping[str, str], session: bool) -> None:
    """Set arguments, environment, signals, streams and threads as a new interpreter would have them."""
    if session:
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(words)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(fd, mode, buffering, closefd=False)
        for fd, (mode, buffering) in enumerate((("r", -1), ("w", -1), ("w", 1)))
    )

    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
